"""Every benchmark runs from end to end on tiny shapes, and the page is made of what they leave. No time is judged."""

import datetime
import importlib
import json
import math

import pytest
import torch
from hypothesis import given, settings, strategies

import residual_steer as rs
from benchmarks.rounds import Spread
from beside import BENCHMARKS, scripts
from experiments.problem import Arm
from experiments.sweep import Entry, Run

pytest.importorskip("transformers")
pytest.importorskip("timm")
pytest.importorskip("peft")


@pytest.fixture(scope="module")
def script():
    """Import a script; its siblings are imported as if it had been run."""
    with scripts(BENCHMARKS) as importing:
        yield importing


@pytest.fixture(scope="module")
def folder(script, backbones, tmp_path_factory):
    """What the benchmarks leave that run here."""
    folder = tmp_path_factory.mktemp("results")
    common = ["--quick", "--output", str(folder)]
    assert script("cost").main([*common, "--backbone", "gpt2", "--rank", "4"]) == 0
    assert script("closer").main([*common, "--backbone", "gpt2", "--rank", "4", "--rounds", "6"]) == 0
    assert script("growth").main([*common, "--curve", "rank", "blocks", "fields", "length"]) == 0
    assert script("ssm").main(common) == 0
    assert script("startup").main(common) == 0
    pytest.importorskip("sklearn")
    assert script("experiments.last_blocks").main([*common, "--cache", backbones]) == 0
    return folder


def read(folder, stem):
    return json.loads((folder / f"{stem}.json").read_text())


def test_counts_grow_with_rank_blocks_and_fields(folder):
    for name in ("rank", "blocks", "fields"):
        record = read(folder, f"growth-{name}-cpu")
        assert record["failed"] == {}
        first, second = record["points"].values()
        for key in ("saved", "flops"):
            assert first[key]["H-Res, block"] < second[key]["H-Res, block"]
        assert first["step"]["floor"]["ratio"]["median"] == first["prefill"]["frozen"]["ratio"]["median"] == 1
    lengths = read(folder, "growth-length-cpu")["points"]
    assert list(lengths) == ["4", "8"]
    assert lengths["4"]["saved"]["H-Res, block"] == pytest.approx(lengths["8"]["saved"]["H-Res, block"], rel=0.05)


def test_steering_the_last_block_alone_computes_and_keeps_less_than_the_floor_of_all(folder):
    for name in ("growth-blocks-cpu", "last_blocks-digits-cpu", "last_blocks-retrieval-cpu"):
        record = read(folder, name)
        if name.startswith("growth"):
            least, most = (point["saved"]["H-Res, block"] for point in record["points"].values())
        else:
            cost = record["cost"]
            least, most = cost["saved"]["H-Res, last 1"], cost["saved"]["H-Res, last 2"]
            assert cost["flops"]["H-Res, last 1"] < 1
        assert least < 1 < most


def test_a_point_that_fails_leaves_the_others(script, monkeypatch, tmp_path):
    growth = script("growth")
    whole = growth.point

    def point(name, *arguments):
        if name == "rank 2":
            raise MemoryError("none left")
        return whole(name, *arguments)

    monkeypatch.setattr(growth, "point", point)
    assert growth.main(["--quick", "--curve", "rank", "--output", str(tmp_path)]) == 0
    record = read(tmp_path, "growth-rank-cpu")
    assert list(record["points"]) == ["4"]
    assert record["failed"] == {"2": "MemoryError: none left"}
    assert "- 2: MemoryError: none left" in growth.table(record)


def test_plots_show_every_method(script, folder):
    growth = script("growth")
    plot = growth.plot(read(folder, "growth-rank-cpu"))
    assert [series.x for series in plot.series] == [(2.0, 4.0)] * 4
    plot = script("page").plot_of_last_blocks(read(folder, "last_blocks-digits-cpu"))
    assert [(series.name, series.labels) for series in plot.series] == [
        ("H-Res", ("last 1", "last 2")),
        ("LoRA", ("last 1", "last 2")),
    ]


def test_the_exponent_of_a_power_is_its_exponent(script):
    lengths = [128, 256, 512, 1024]
    assert script("ssm").exponent(lengths, [3 * x**1.3 for x in lengths]) == pytest.approx(1.3)
    assert math.isclose(script("ssm").exponent([2, 4], [1.0, 1.0]), 0.0, abs_tol=1e-12)


@settings(deadline=None, max_examples=20)
@given(count=strategies.integers(1, 60))
def test_an_interval_of_the_median_holds_it_as_often_as_it_says(script, count):
    """Of n numbers that are each above or below the median with even chances, it lies outside as often as counted."""
    found = script("closer").interval([float(i) for i in range(1, count + 1)])
    k = int(found.low)
    assert found.high == count + 1 - k
    assert found.median == (count + 1) / 2

    def outside(k):
        return 2 * sum(math.comb(count, i) for i in range(k)) / 2**count

    assert outside(k) <= 0.05 or (k == 1 and count < 6)
    assert outside(k + 1) > 0.05


def test_aims_take_the_closer_times(script, folder):
    aims = script("aims")
    records = {stem: read(folder, stem) for stem in ("cost-gpt2-cpu", "closer-gpt2-cpu")}
    closer = records["closer-gpt2-cpu"]["times"]
    assert set(closer["step"]) == {"floor", "H-Res, block", "LoRA, usual targets"}
    assert set(closer["decode, 1 row"]) == {"frozen", "H-Res, block", "LoRA, usual targets"}
    own = closer["step"]["H-Res, block"]
    assert own["interval"]["low"] <= own["interval"]["median"] <= own["interval"]["high"]
    assert own["interval"]["median"] == pytest.approx(own["ratio"]["median"])
    told = {aim.what: aim.measured for aim in aims.aims_of(records)}
    assert told["gpt2: step ÷ floor"] == f"{Spread(**own['interval']):.3f}"
    alone = {aim.what: aim.measured for aim in aims.aims_of({"cost-gpt2-cpu": records["cost-gpt2-cpu"]})}
    first = records["cost-gpt2-cpu"]["times"]["step"]["H-Res, block"]["ratio"]
    assert alone["gpt2: step ÷ floor"] == f"{Spread(**first):.3f}"


def test_the_scan_and_the_fallback_that_it_is_timed_against_compute_the_same(script):
    ssm, shapes = script("ssm"), script("shapes")
    shape = shapes.SHAPES["mamba"]
    used, gradients = {}, []
    pytest.importorskip("mambapy")
    makers = {"scan": ssm.prepared, "fallback": ssm.plainly, "mambapy": ssm.through_mambapy}
    for name, prepare in makers.items():
        model = ssm.deep(prepare(shape.build(tiny=True)))
        torch.manual_seed(1)
        for parameter in rs.parameters(model):
            parameter.data = torch.randn_like(parameter) * 0.05
        mixer = rs.find_backbone(model).blocks[0].mixer
        used[name] = "forward" in mixer.__dict__
        inputs = shape.batch(model, 1, 6)
        model(input_ids=inputs, labels=inputs).loss.backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in rs.parameters(model)]))
        assert model.training
        ssm.step(model, inputs, None)
        assert all(parameter.grad is None for parameter in model.parameters())
    assert gradients[0].abs().max() > 1e-4
    for other in gradients[1:]:
        torch.testing.assert_close(gradients[0], other, rtol=1e-3, atol=1e-6)
    assert used == {"scan": True, "fallback": False, "mambapy": False}


def test_a_process_that_fails_is_an_error_of_one_line(script, monkeypatch, tmp_path, capsys):
    startup = script("startup")
    monkeypatch.setattr(startup, "CHILD", "raise SystemExit('no such thing')")
    assert startup.main(["--quick", "--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith("failed: no such thing")


def test_startup_measures_the_three_aims(script, folder):
    seconds = read(folder, "startup-cpu")["seconds"]
    assert set(seconds) == set(script("startup").AIMS)
    assert all(found["processes"][0] == found["median"] > 0 for found in seconds.values())


def test_loreft_says_where_it_runs(script, tmp_path, capsys):
    try:
        importlib.metadata.version("pyreft")
    except importlib.metadata.PackageNotFoundError:
        assert script("loreft").main(["--quick", "--output", str(tmp_path)]) == 1
        assert "make bench-loreft" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("low", "median", "high", "said"),
    [
        (1.0, 1.01, 1.02, "met"),
        (1.0, 1.02, 1.05, "met by the median"),
        (1.0, 1.03, 1.05, "not met by the median"),
        (1.03, 1.04, 1.05, "not met"),
    ],
)
def test_verdicts_know_the_spread(script, low, median, high, said):
    aims = script("aims")
    found = aims.judged(Spread(median, low, high), 1.02)
    assert found == said if "by" not in said else found.startswith(said)
    upside_down = aims.judged(Spread(-median, -high, -low), -1.02, least=True)
    assert upside_down == found


def test_ahead_and_behind_are_told_from_no_difference(script):
    aims = script("aims")

    def times(own, other):
        return {name: {"rounds": rounds} for name, rounds in (("H-Res, block", own), ("LoRA, usual targets", other))}

    same = {"peak": 5, "flops": 5, "trainable": 5}
    record = {
        "counts": {"H-Res, block": {"saved": 1, **same}, "LoRA, usual targets": {"saved": 2, **same}},
        "launched": {"frozen": 10, "H-Res, block": 14, "LoRA, usual targets": 12},
        "times": {
            "step": times([1.0, 1.0, 1.0], [2.0, 2.0, 2.0]),
            "prefill": times([2.0, 2.0, 2.0], [1.0, 1.0, 1.0]),
            "decode, 1 row": times([0.9, 0.95, 3.0], [1.0, 1.0, 1.0]),
        },
    }
    found = aims.against_lora(record)
    assert [text.split(" (")[0] for text in found["ahead"]] == ["saved bytes", "step"]
    assert [text.split(" (")[0] for text in found["behind"]] == ["operations added to a forward pass", "prefill"]
    assert found["no difference seen"][-1].startswith("decode, 1 row")
    assert aims.against_lora({"counts": {}, "times": {}}) == {"ahead": [], "behind": [], "no difference seen": []}


def test_a_run_that_diverged_is_a_dash(script, folder):
    last, page = script("experiments.last_blocks"), script("page")
    run = Run(0.1, 0, None, None, None, 1, 2, None, 1.0)
    arm = Arm("H-Res, last 1", "hres", (0.1,))
    entry = Entry(arm, 0.1, (), (run,))
    assert last.reached(entry, "accuracy", 1) == []
    record = read(folder, "last_blocks-digits-cpu")
    record["points"]["H-Res, last 1"] = []
    row = next(line for line in page.table_of_last_blocks(record).splitlines() if line.startswith("| H-Res, last 1"))
    assert row.split("|")[2].strip() == "–"
    assert page.plot_of_last_blocks(record).series[0].y[0] is None


def test_the_page_holds_every_row_and_says_what_was_not_run(script, folder, tmp_path):
    page = script("page")
    assert page.main(["--results", str(folder), "--page", str(folder / "BENCHMARKS.md")]) == 0
    text = (folder / "BENCHMARKS.md").read_text()
    for wanted in (
        "A TEST ON TINY SHAPES",
        "| H-Res, 8 fields",
        "| ShadowPEFT",
        "| full fine-tuning",
        "| LoRA, last 2",
        "LoReFT (pyreft) was not run",
        "No GPU was at hand",
        "## Beginning",
        "The exponent is",
    ):
        assert wanted in text
    lines = [line for line in text.splitlines() if line.startswith("| vit: cost") or line.startswith("| mamba: epoch")]
    assert len(lines) == 2
    assert all(line.split("|")[-2].strip() == "not run" for line in lines)
    shown = [line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]
    assert len(shown) == 6
    assert all((folder / path).read_bytes().startswith(b"<?xml") for path in shown)
    assert page.main(["--results", str(tmp_path), "--page", str(tmp_path / "page.md")]) == 1
    assert not (tmp_path / "page.md").exists()


def test_numbers_of_a_gpu_have_a_section_of_their_own(script, folder, tmp_path):
    page = script("page")
    record = {**read(folder, "cost-gpt2-cpu"), "machine": {"gpu": "a card"}}
    parts = page.gpu({"cost-gpt2-cuda-bf16-compiled": record}, None)
    assert "### cost-gpt2-cuda-bf16-compiled: a card" in parts
    assert page.NO_GPU not in parts
    for name, kept in (("cost-gpt2-cpu", False), ("cost-gpt2-cuda", True)):  # beside what `make gpu` left there
        results = tmp_path / name
        (results / "gpu" / "a-card").mkdir(parents=True)
        about = {**read(folder, "cost-gpt2-cpu"), "machine": {"gpu": "a card"}}
        (results / f"{name}.json").write_text(json.dumps(about))
        (results / "gpu" / "a-card" / "many.json").write_text(json.dumps({**about, "quick": False, "status": "done"}))
        assert page.main(["--results", str(results), "--page", str(results / "page.md")]) == 0
        shown = (results / "page.md").read_text()
        assert "### a card\n" in shown
        assert page.NO_GPU not in shown
        assert ("### cost-gpt2-cuda: a card\n" in shown) == kept


def test_a_part_that_fails_is_named_and_the_page_is_written(script, folder, tmp_path, monkeypatch, capfd):
    bench = script("bench")
    (tmp_path / "of_others.json").write_text("[]")
    for path in folder.glob("growth-*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(bench, "PARTS", (bench.Part("lost", ("no_such_script.py",), (), 3.0),))
    assert bench.main(["--quick", "--output", str(tmp_path)]) == 1
    told = capfd.readouterr()
    assert "1 of 1: lost; about 3 minutes left" in told.out
    assert "error: failed: lost; see above" in told.err
    assert "How the cost grows" in (tmp_path / "BENCHMARKS.md").read_text()


def test_a_part_is_not_run_again_within_a_day_with_the_same_versions(script, tmp_path):
    bench = script("bench")
    part = bench.Part("one", (), ("a", "b"), 1.0)
    now = datetime.datetime.now(datetime.timezone.utc)

    def leave(name, hours=0.0, **versions):
        date = (now - datetime.timedelta(hours=hours)).isoformat()
        record = {"date": date, "versions": {**bench.versions(), **versions}}
        (tmp_path / f"{name}.json").write_text(json.dumps(record))

    leave("a")
    assert not bench.is_fresh(part, tmp_path)  # half of it is missing
    leave("b")
    assert bench.is_fresh(part, tmp_path)
    leave("b", hours=25)
    assert not bench.is_fresh(part, tmp_path)
    leave("b", torch="1.0")
    assert not bench.is_fresh(part, tmp_path)


def test_commands_of_parts(script, tmp_path):
    bench = script("bench")
    assert len({part.name for part in bench.PARTS}) == len(bench.PARTS)
    for part in bench.PARTS:
        where = part.command[0]
        found = BENCHMARKS / where if where.endswith(".py") else BENCHMARKS.parent / f"{where.replace('.', '/')}.py"
        assert found.exists()
    part = next(part for part in bench.PARTS if part.name == "cost-vit")
    options = bench.parse(["--device", "cuda", "--dtype", "bf16", "--compile"])
    command = bench.command_of(part, options, tmp_path, False)
    assert command[-5:] == ["--device", "cuda", "--dtype", "bf16", "--compile"]
    assert "--quick" not in command
