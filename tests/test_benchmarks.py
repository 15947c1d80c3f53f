"""The benchmarks' arithmetic, with a clock of our own, and that they time what they say. Nothing here asks how fast."""

import json

import pytest
import torch

import residual_steer as rs
from beside import BENCHMARKS, scripts

pytest.importorskip("transformers")
pytest.importorskip("timm")

SMALL = ["--tiny", "--rank", "2", "--rows", "4", "--length", "5", "--counts", "1", "2", "4", "--weighted", "3"]


@pytest.fixture(scope="module")
def bench():
    """The script as a module; its siblings are imported as if it had been run."""
    with scripts(BENCHMARKS) as script:
        yield script("many_fields")


@pytest.fixture(scope="module")
def output(bench):
    import output

    return output


def test_tables_line_up(output):
    lines = output.markdown(["what", "ms"], [["a", "1.00"], ["longer", "10.00"]]).splitlines()
    assert lines == ["| what   |    ms |", "|:-------|------:|", "| a      |  1.00 |", "| longer | 10.00 |"]


def test_a_record_names_the_machine_and_replaces_what_was_there_whole(output, tmp_path):
    path = tmp_path / "new" / "record.json"
    output.save_json({"results": {"a": 1}}, path)
    with pytest.raises(TypeError):
        output.save_json({"results": object()}, path)
    record = json.loads(path.read_text())
    assert record["results"] == {"a": 1}
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert record["machine"]["cpu"]
    assert record["versions"]["torch"] == torch.__version__
    assert {"python", "transformers"} <= set(record["versions"])
    assert record["date"].endswith("+00:00")
    assert [file.name for file in path.parent.iterdir()] == ["record.json"]


@pytest.mark.parametrize("backbone", ["gpt2", "mamba", "vit"])
def test_many_fields_from_end_to_end(bench, tmp_path, capsys, backbone):
    assert bench.main([*SMALL, "--backbone", backbone, "--rounds", "2", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / f"many_fields-{backbone}-cpu.json").read_text())
    own = {"frozen", "one field", "1 by row", "2 by row", "4 by row", "3 with weights"}
    assert set(record["results"]) == ({"prefill"} if backbone == "vit" else {"prefill", "decode"})
    for phase, variants in record["results"].items():
        assert own <= set(variants)
        for name, variant in variants.items():
            assert variant["reference"] == ("PEFT: one adapter" if name.startswith("PEFT") else "one field")
            assert len(variant["rounds"]) == (2 if phase == "prefill" else 6)
            assert min(variant["rounds"]) > 0
        assert variants["one field"]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert set(record["use"]) == own
    assert record["held"]["fields"] == 4
    assert min(record["held"]["add_first"], record["held"]["add_last"]) > 0
    table = (tmp_path / f"many_fields-{backbone}-cpu.md").read_text()
    assert table in capsys.readouterr().out
    shown = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert own <= set(shown)
    if backbone == "gpt2" and bench.has_peft():
        assert {"one adapter", "1 by row"} <= set(shown)


def built(bench, backbone="gpt2", more=()):
    return bench.build(bench.parse([*SMALL, "--backbone", backbone, *more]))


@torch.no_grad()
@pytest.mark.parametrize("backbone", ["gpt2", "mamba"])
def test_every_measurement_of_decoding_starts_from_the_same_cache(bench, backbone):
    setting = built(bench, backbone)
    one = setting.contenders[1]
    first = setting.run("decode", one, setting.before("decode", one))
    assert torch.equal(setting.run("decode", one, setting.before("decode", one)), first)
    cache = setting.before("decode", one)
    assert torch.equal(setting.run("decode", one, cache), first)
    assert not torch.equal(setting.run("decode", one, cache), first)  # a cache that was used has grown


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "wrong", "said"),
    [
        ("2 by row", ["f0", "f0", "f0", "f1"], "rows of f1 differ"),
        ("2 by row", None, "rows of f0 differ"),
        ("4 by row", ["f1", "f0", "f2", "f3"], "rows of f0 differ"),
        ("3 with weights", {"f0": 1.0, "f1": -0.5}, "the weighted sum"),
    ],
)
def test_a_computation_that_is_not_what_it_is_called_is_not_timed(bench, name, wrong, said):
    setting = built(bench)
    bench.check(setting, bench.PHASES)
    (found,) = [each for each in setting.contenders if each.name == name]
    object.__setattr__(found, "select", lambda: rs.use(setting.model, wrong))
    with pytest.raises(rs.SteerError, match=said):
        bench.check(setting, bench.PHASES)


@torch.no_grad()
def test_fields_that_do_nothing_are_not_timed(bench):
    setting = built(bench, "vit")
    for name, parameter in setting.model.named_parameters():
        if "steering_" in name:
            parameter.zero_()
    with pytest.raises(rs.SteerError, match="moves the output by 0 of"):
        bench.check(setting, ["prefill"])


@torch.no_grad()
def test_adapters_of_the_peer_are_checked_too(bench):
    pytest.importorskip("peft")
    setting = built(bench, more=["--rows", "8", "--counts", "8"])
    (found,) = [each for each in setting.contenders if each.name == "PEFT: 8 by row"]
    found.more["adapter_names"] = found.more["adapter_names"][::-1]
    with pytest.raises(rs.SteerError, match="PEFT: 8 by row, prefill: rows of f0 differ"):
        bench.check(setting, ["prefill"])


@pytest.mark.parametrize(
    "arguments",
    [["--rank", "0"], ["--rounds", "0"], ["--counts", "5"], ["--length", "1"], ["--rank", "33"], ["--output", "FILE"]],
)
def test_errors_are_one_line(bench, tmp_path, capsys, arguments):
    (tmp_path / "file").write_text("")
    arguments = [str(tmp_path / "file") if argument == "FILE" else argument for argument in arguments]
    output = [] if "--output" in arguments else ["--output", str(tmp_path)]
    assert bench.main([*SMALL, "--backbone", "vit", "--rounds", "1", *arguments, *output]) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ")
    assert error.count("\n") == 0
