"""The experiments that need no download, whole, on tiny sizes: counts are exact, and a second run trains nothing."""

import importlib
import json
import math
import sys

import pytest
import torch

import residual_steer
from experiments.results import Result

pytest.importorskip("transformers")
pytest.importorskip("timm")
pytest.importorskip("peft")

QUICK = ["--quick", "--seeds", "1", "--rates", "1"]


@pytest.fixture
def experiment():
    """Import an experiment; the backbone that it registers, it registers for every test."""

    def script(name):
        known = f"experiments.{name}" in sys.modules
        module = importlib.import_module(f"experiments.{name}")
        return importlib.reload(module) if known and name == "latent_ablation" else module

    return script


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("claims")


def rerun(script, arguments, monkeypatch, pretrained=True):
    """Run a script again; nothing may be trained, but for a backbone that is kept in no cache."""
    from experiments.sweep import sweep

    def refuse(*_, **__):
        raise AssertionError("a finished run was done again")

    monkeypatch.setattr(sys.modules[sweep.__module__], "fit", refuse)
    if pretrained:
        monkeypatch.setattr(residual_steer, "fit", refuse)
    return script.main(arguments)


def rows_of(result, title=None):
    table = next(t for t in result.tables if title is None or title in t.title)
    return {row[table.columns[0].key]: row for row in table.rows}


def test_the_latent_ablation_has_the_papers_parameter_counts(experiment, out, monkeypatch):
    script = experiment("latent_ablation")
    arguments = [*QUICK, "--out", str(out)]
    assert script.main(arguments) == 0
    rows = rows_of(Result.load(out / "latent-ablation.json"))
    counts = {name: row["trainable"] for name, row in rows.items()}
    assert counts["prompt of 1"] == 194
    assert counts["prompt of 10"] == 64 * 10 + 130
    assert counts["H-Res, rank 8"] == 1226
    assert counts["H-Res, rank 32"] == 4322
    assert counts["new head alone"] == 130
    assert rerun(script, arguments, monkeypatch, pretrained=False) == 0


def test_a_count_that_is_not_the_papers_is_an_error(experiment, out, monkeypatch, capsys):
    script = experiment("latent_ablation")
    monkeypatch.setitem(script.COUNTS, "H-Res, rank 8", 1225)
    assert script.main([*QUICK, "--out", str(out)]) == 1
    assert "trains 1226 parameters; table 2 has 1225" in capsys.readouterr().err


def test_retrieval_compares_methods_of_one_size(experiment, out, backbones, monkeypatch):
    script = experiment("retrieval")
    arguments = [*QUICK, "--out", str(out), "--cache", backbones]
    assert script.main(arguments) == 0
    result = Result.load(out / "retrieval.json")
    assert [table.title for table in result.tables] == ["GPT-2", "Mamba"]
    for name in ("GPT-2", "Mamba"):
        rows = rows_of(result, name)
        budget = rows["H-Res"]["trainable"]
        assert budget == 2 * (2 * 64 * script.RANK + script.RANK + 64)
        for method in ("LoRA", "prompt"):
            assert rows[method]["trainable"] == pytest.approx(budget, rel=0.25)
        assert rows["LoRA, merged"]["recall"].mean == pytest.approx(rows["LoRA"]["recall"].mean, abs=0.5)
    assert "prefix" in rows_of(result, "GPT-2")
    assert result.verdicts == ()  # a test is no result
    assert rerun(script, arguments, monkeypatch) == 0


def test_the_lessons_of_the_recalling_backbones_say_nothing_of_the_new_associations(experiment):
    script = experiment("retrieval")
    new = {*script.TARGET["keys"], *script.TARGET["values"]}
    unseen = script.lessons(64, 0.0)[:]["input_ids"]
    assert not new & set(unseen.unique().tolist())
    met = script.lessons(64, 0.5)[:]["input_ids"]
    assert torch.equal(met[:16], unseen[:16])  # what is recalled: tokens of its own alone
    assert len(new & set(met[16:].unique().tolist())) > 50
    assert int(met.max()) <= max(new)


def test_every_method_on_a_transformer_a_mamba_and_a_vit(experiment, out, backbones, monkeypatch):
    script = experiment("compare_methods")
    arguments = [*QUICK, "--out", str(out), "--cache", backbones]
    assert script.main(arguments) == 0
    result = Result.load(out / "compare-transformer-mamba.json")
    methods = {name: set(rows_of(result, name)) for name in ("GPT-2", "Mamba", "ViT")}
    common = {"H-Res", "LoRA", "LoRA, merged", "parallel adapter", "head alone", "full fine-tuning"}
    assert methods["GPT-2"] == common | {"frozen", "prompt", "prefix"}
    assert methods["Mamba"] == methods["GPT-2"]
    assert methods["ViT"] == common | {"VPT-deep"}
    mamba = next(table for table in result.tables if table.title.startswith("Mamba"))
    assert rows_of(result, "Mamba")["prefix"].get("metric") is None
    assert any("no keys and values to extend" in note for note in mamba.notes)
    assert rerun(script, arguments, monkeypatch) == 0


@pytest.mark.filterwarnings("ignore:no room is left")
def test_one_task_after_another_is_forgotten_unless_it_is_protected(experiment, out, backbones, monkeypatch):
    script = experiment("continual")
    arguments = [*QUICK, "--out", str(out), "--cache", backbones]
    assert script.main(arguments) == 0
    result = Result.load(out / "continual.json")
    assert [table.title.split(",")[0] for table in result.tables] == ["ViT", "GPT-2", "Mamba"]
    for table, tasks in zip(result.tables, (5, 2, 2), strict=True):
        rows = {row["way"]: row for row in table.rows}
        assert list(rows) == [way.name for way in script.WAYS]
        assert rows["a field per task"]["kept"].mean == pytest.approx(tasks * rows["no protection"]["kept"].mean)
        assert rows["no protection"]["held"].mean == 0 < rows["null space, energy 0.99"]["held"].mean
        room = [rows[f"null space, energy {energy:g}"]["room"].mean for energy in script.ENERGIES]
        assert 100 > room[0] > room[1] >= 0
    for name in ("ViT", "GPT-2", "Mamba"):
        (walked,) = result.records[name]["a field per task"]
        assert all(row[: len(before)] == before for before, row in zip(walked["matrix"], walked["matrix"][1:]))  # noqa: B905
    assert rerun(script, arguments, monkeypatch) == 0


def test_forgetting_is_what_was_lost_since_it_was_learned(experiment):
    script = experiment("continual")
    up, down = (script.Course("", None, (), (), "", better, 0.0, 1, 1) for better in ("up", "down"))
    matrix = [[90.0], [80.0, 70.0], [60.0, 75.0, 99.0]]
    assert script.forgotten(up, matrix) == pytest.approx((30 - 5) / 2)
    assert script.forgotten(down, matrix) == pytest.approx(-(30 - 5) / 2)
    assert script.learned(matrix) == pytest.approx((70 + 99) / 2)


def test_the_verdict_on_null_spaces_wants_a_tenth(experiment):
    script = experiment("continual")
    course = script.Course("ViT", None, (), (), "", "up", 0.0, 1, 1)

    def runs(kept, bare=(20.0, 22.0, 21.0)):
        lost = {"no protection": bare, "null space, energy 0.999": kept}
        return {name: [{"matrix": [[90.0], [90.0 - x, 90.0]]} for x in values] for name, values in lost.items()}

    forgotten = ([1.0, 1.5, 1.0], [9.0, 9.0, 9.0], [30.0, 30.0, 31.0])
    words = [script.verdict([(course, runs(kept))]).verdict for kept in forgotten]
    assert words == ["holds", "partly holds", "does not hold"]
    for kept, bare in (([1.0], [20.0]), ([-2.0, -2.1, -2.2], [-1.0, -1.1, -1.0]), ([1.0, math.nan, 1.0], [20.0] * 3)):
        assert script.verdict([(course, runs(kept, bare))]).verdict == "can't be tested here"


def test_the_verdicts_on_what_is_inside_follow_the_numbers(experiment):
    from experiments.problem import Arm
    from experiments.sweep import Entry, Run

    script = experiment("inspect_steering")

    def entry(name, **scores):
        values = {"entropy": 0.0, "untouched": 1.0, "bound": 0.4, "order": 0.3, "contraction": 0.8}
        values |= {
            "nc1": 1.0,
            "nc2 norms": 0.1,
            "nc2 angles": 0.1,
            "nc3": 0.1,
            "nc4": 1.0,
            "entropy 0": 0.0,
            "entropy 1": 0.0,
        }
        values |= scores
        runs = tuple(
            Run(0.1, seed, None, {key: value + 0.01 * seed * (value != 1.0) for key, value in values.items()},
                None, 1, 1, None, 0.0)
            for seed in range(3)
        )  # fmt: skip
        return Entry(Arm(name, "full", (0.1,)), 0.1, runs[:1], runs)

    def results(untouched=1.0, prompts=0.4, lora=None, **steered):
        vit = [entry("H-Res", untouched=untouched, **steered), entry("LoRA", **(lora or {})), entry("full fine-tuning")]
        vit += [entry(name, entropy=prompts) for name in ("VPT-shallow", "VPT-deep")]
        vit.append(entry("head alone", nc1=10.0, nc3=1.3, nc4=30.0, **{"nc2 norms": 0.4, "nc2 angles": 0.5}))
        return {"ViT": vit, "GPT-2": [entry("H-Res", untouched=untouched), entry("prompt", entropy=prompts)]}

    assert script.on_entropy(results()).verdict == "partly holds"  # lemma 1 alone
    assert script.on_entropy(results(prompts=-0.4)).verdict == "does not hold"
    assert script.on_entropy(results(untouched=2.0)).verdict == "holds"
    assert script.on_collapse(results()).verdict == "holds"
    assert "LoRA and VPT-shallow" in script.on_collapse(results()).ours
    assert script.on_collapse(results(nc1=20.0)).verdict == "partly holds"
    assert script.on_collapse(results(nc1=math.nan)).verdict == "can't be tested here"
    assert script.on_fields(results(lora={"order": -0.01})).verdict == "partly holds"
    assert script.on_fields(results(lora={"order": -0.01, "contraction": 1.5})).verdict == "holds"
    assert script.on_fields(results(contraction=1.5)).verdict == "does not hold"


def test_what_is_inside_adapted_models(experiment, out, backbones, monkeypatch):
    script = experiment("inspect_steering")
    arguments = [*QUICK, "--out", str(out), "--cache", backbones]
    assert script.main(arguments) == 0
    result = Result.load(out / "inspect-steering.json")
    entropy = rows_of(result, "ViT: change of attention entropy")
    assert entropy["H-Res"]["entropy 0"].mean == 0  # lemma 2, up to the first steered layer
    assert entropy["H-Res"]["untouched"].mean == 1
    assert entropy["VPT-shallow"]["bound"].mean > 0
    still = rows_of(result, "ViT: movement of the stream")["head alone"]
    assert still["drift"].mean == still["drift elsewhere"].mean == 0
    assert {type(plot).__name__ for plot in result.plots} >= {"Surface", "Arrows", "Plot"}
    assert rerun(script, arguments, monkeypatch) == 0


def test_speed_and_counts(experiment, out):
    script = experiment("wikitext_speed")
    arguments = ["--random-weights", *QUICK, "--rounds", "1", "--rows", "2", "--length", "8", "--out", str(out)]
    assert script.main(arguments) == 0
    result = Result.load(out / "wikitext-speed.json")
    assert [table.title for table in result.tables][:2] == ["GPT-2-small", "Mamba-130m"]
    table = next(table for table in result.tables if table.title.startswith("FLOPs"))
    frozen, steered, longer = (
        {row["length"]: row[name] * 1e9 for row in table.rows} for name in ("frozen", "H-Res", "prompt of 100")
    )
    width, blocks = 768, 1  # with --quick

    def closed_form(tokens):
        """Products of GPT-2's blocks: 12·d² weights for every token, and queries, keys and values for every pair."""
        return blocks * (24 * width**2 * tokens + 4 * width * tokens**2)

    for length in frozen:
        assert frozen[length] == pytest.approx(closed_form(length), rel=1e-12)
        assert steered[length] - frozen[length] == pytest.approx(4 * script.RANK * width * blocks * length, rel=1e-6)
        assert longer[length] == pytest.approx(closed_form(length + 100), rel=1e-12)


def test_a_model_is_adapted_and_then_timed(experiment, tmp_path):
    pytest.importorskip("datasets")
    from tokenizers import ByteLevelBPETokenizer
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    text = [f"Line {i} tells of the {'fox' if i % 3 else 'hen'} and the number {i * i}." for i in range(300)]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(text, vocab_size=300)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=0)
    )
    model.save_pretrained(tmp_path / "model")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer).save_pretrained(tmp_path / "model")
    (tmp_path / "text").mkdir()
    for split, part in (("train", text[:200]), ("validation", text[200:250]), ("test", text[250:])):
        lines = "\n".join(json.dumps({"text": line}) for line in part)
        (tmp_path / "text" / f"{split}.jsonl").write_text(lines + "\n")
    script = experiment("wikitext_speed")
    given = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "text"), "--length", "16", "--rounds", "1"]
    assert script.main([*QUICK, *given, "--out", str(tmp_path / "out")]) == 0
    result = Result.load(tmp_path / "out" / "wikitext-speed.json")
    rows = rows_of(result)
    assert {"H-Res", "LoRA", "LoRA, merged", "prompt of 10", "prompt of 100"} == set(rows)
    assert all(row["perplexity"].mean > 1 for row in rows.values())
    assert [plot.kind for plot in result.plots] == ["scatter"]
    assert str(tmp_path) not in (tmp_path / "out" / "wikitext-speed.json").read_text()


def test_a_model_that_cannot_be_had_is_one_line(experiment, tmp_path, capsys):
    script = experiment("wikitext_speed")
    assert script.main(["--model", "nobody/nothing", "--out", str(tmp_path)]) == 1
    assert "cannot be had" in capsys.readouterr().err
