"""Every example runs from end to end, on few steps: what it prints hangs together, and none is longer than a page."""

import argparse

import pytest
import torch

import residual_steer as rs
from beside import EXAMPLES, scripts

for package in ("transformers", "timm", "sklearn", "matplotlib", "tabulate"):
    pytest.importorskip(package)

NAMES = sorted(path.stem for path in EXAMPLES.glob("*.py"))


@pytest.fixture(scope="module")
def script():
    """Import an example as if it had been run."""
    with scripts(EXAMPLES) as importing:
        yield importing


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_there_are_eight_which_are_read_in_two_minutes():
    assert NAMES == [
        "compare_transformer_mamba",
        "continual_nullspace",
        "inspect_a_model",
        "many_tasks",
        "quickstart_text",
        "quickstart_vision",
        "register_backbone",  # see test_register_backbone.py
        "torch_loop",
    ]
    for name in NAMES:
        assert 25 <= len((EXAMPLES / f"{name}.py").read_text().splitlines()) <= 120, name


def cells_of(text):
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {row[0]: dict(zip(rows[0], row, strict=True)) for row in rows[2:]}


def test_the_demo_prints_one_table_and_draws_the_curves(script, cache, tmp_path, capsys):
    demo = script("compare_transformer_mamba")
    demo.main(["--quick", "--cache", str(cache), "--out", str(tmp_path)])
    table, out = (tmp_path / "table.md").read_text(), capsys.readouterr().out
    assert table in out
    assert out.count("pre-training") == 3
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    rows = cells_of(table)
    assert list(rows) == ["GPT-2", "Mamba", "ViT"]
    assert [row["trainable"] for row in rows.values()] == ["12,720", "16,960", "8,837"]
    assert [row["share"] for row in rows.values()] == ["2.0%", "6.4%", "4.2%"]
    before, steered, full = (float(rows["GPT-2"][key]) for key in ("before", "H-Res", "full"))
    assert 5 < full < steered < before < 9  # bits per byte, after four steps
    assert float(rows["GPT-2"]["gap closed"].strip("%")) == pytest.approx(
        100 * (steered - before) / (full - before), abs=1
    )
    again = demo.adapt("ViT", "H-Res", argparse.Namespace(cache=cache, quick=True, seed=0))
    assert f"{again['curve'][-1][1]:.1f}" == rows["ViT"]["H-Res"]
    assert "pre-training" not in capsys.readouterr().out  # it is in the cache


def test_rows_of_a_mixed_batch_are_served_as_alone(script, cache, tmp_path, capsys):
    service = script("many_tasks")
    service.main(["--quick", "--cache", str(cache), "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert [out.count(f"{what}: rows differ by") for what in ("scoring", "cached generation")] == [3, 2]
    for backbone, tasks in (("gpt-2", "prose capitals backwards"), ("vit", "odd above-four has-a-loop")):
        assert {path.name for path in (tmp_path / backbone).iterdir()} == set(tasks.split())
        assert all((tmp_path / backbone / task / "steering.json").exists() for task in tasks.split())

    model = script("compare_transformer_mamba").pretrained("GPT-2", cache, quick=True)
    for task in ("prose", "capitals"):
        rs.load(model, tmp_path / "gpt-2" / task)
    fields, ids = ["prose", "capitals", None, "prose"], torch.arange(32).view(4, 8)
    worst, ratio = service.check_rows(model.eval(), fields, ids, service.logits)
    assert worst <= service.TOLERANCE
    assert ratio > 0
    with pytest.raises(rs.SteerError, match="differ from separate runs"):  # rows that got another row's field
        service.check_rows(model, fields, ids, lambda model, rows: service.logits(model, rows).flip(0))


def test_the_quickstart_for_text(script, tmp_path, capsys):
    script("quickstart_text").main(["--steps", "5", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    frozen, steered = (part.split()[0] for part in out.split("held-out loss: ")[1].split(", "))
    assert float(steered) < float(frozen)
    assert f"on a fresh model: {steered}" in out
    assert f"switched off: {frozen}" in out


def test_the_quickstart_for_text_takes_a_model_in_a_folder(script, tmp_path, capsys):
    import transformers
    from tokenizers import ByteLevelBPETokenizer

    (tmp_path / "text.txt").write_text("".join(f"Line {i} tells of the fox and the hen.\n" for i in range(400)))
    words = ByteLevelBPETokenizer()
    words.train([str(tmp_path / "text.txt")], vocab_size=300, show_progress=False)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words._tokenizer).save_pretrained(tmp_path / "model")
    tokens = {"vocab_size": 300, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = transformers.MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, **tokens)
    transformers.MambaForCausalLM(config).save_pretrained(tmp_path / "model")
    places = ["--model", str(tmp_path / "model"), "--text", str(tmp_path / "text.txt"), "--out", str(tmp_path / "out")]
    script("quickstart_text").main(["--steps", "2", *places])
    assert "backbone   mamba" in capsys.readouterr().out


def test_the_quickstart_for_vision(script, tmp_path, capsys):
    script("quickstart_vision").main(["--steps", "5", "--out", str(tmp_path)])
    lines = dict(line.split(": ") for line in capsys.readouterr().out.splitlines() if "%" in line and ": " in line)
    assert lines["digits 5–9"] == lines["on a fresh backbone"]


@pytest.mark.filterwarnings("ignore:no room is left")
def test_what_is_forgotten(script, capsys):
    script("continual_nullspace").main(["--steps", "10"])
    out = capsys.readouterr().out
    first = out.split("right after it was learned: ")[1].split()[0]
    assert f"first task now {first}" in out.split("a field of its own")[1]  # which forgets nothing
    assert "blocks.0.down" in out


def test_a_model_is_looked_into(script, tmp_path, capsys):
    script("inspect_a_model").main(["--steps", "5", "--out", str(tmp_path)])
    assert "NC1" in capsys.readouterr().out
    pictures = {path.stem: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(pictures) == {"effort", "entropy", "drift", "collapse"}
    assert all(content.startswith(b"\x89PNG") for content in pictures.values())


def test_a_loop_of_ones_own(script, tmp_path, capsys):
    script("torch_loop").main(["--steps", "101", "--out", str(tmp_path)])
    first, last = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines() if line.startswith("step"))
    assert last < first
    assert (tmp_path / "steering.safetensors").exists()
