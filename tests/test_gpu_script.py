"""The script for a card, rehearsed on the CPU without an installation of this package, cut off and resumed."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from beside import BENCHMARKS, scripts

if missing := [name for name in ("transformers", "timm", "peft") if importlib.util.find_spec(name) is None]:
    pytest.skip(f"no {', '.join(missing)} here", allow_module_level=True)

PARTS = ("contract", "training", "marked", "examples", "costs", "many")


def command(folder, *more):
    return [sys.executable, str(BENCHMARKS / "gpu"), "--device", "cpu", "--quick", "--out", str(folder), *more]


def read(path):
    return json.loads(path.read_text())


def running():
    """The command lines of this machine's processes."""
    return subprocess.run(
        ["ps", "-eww", "-o", "args"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout.splitlines()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What the script leaves."""
    folder = tmp_path_factory.mktemp("gpu")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(folder), env=environment, stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return folder


def test_every_part_is_run(folder):
    records = {name: read(folder / f"{name}.json") for name in (*PARTS, "machine", "summary")}
    assert {name: record["status"] for name, record in records.items()} == dict.fromkeys(records, "done")
    assert all(record["quick"] for record in records.values())
    assert not [line for record in records.values() for line in record.get("wrong", [])]
    assert set(records["contract"]["points"]) == {"gpt2", "llama", "vit", "mamba", "mamba2"}
    assert records["marked"]["counts"]["passed"] > 0
    assert list(records["examples"]["scripts"]) == ["register_backbone"]
    assert list(records["many"]["held"]) == ["1", "3"]


def test_every_column_is_measured_and_judged(folder):
    found = read(folder / "costs.json")["found"]
    assert set(found) == {"gpt2", "vit", "mamba"}
    for name, record in found.items():
        assert record["refused"] == {}
        assert {"step, eager", "prefill, eager"} <= set(record["times"])
        assert ("decode, 2 rows, eager" in record["times"]) == (name != "vit")
    compiled = {"step, compiled", "decode, 2 rows, compiled", "prefill, compiled"}
    assert compiled <= set(found["gpt2"]["times"])
    graphs = found["gpt2"]["graphs"]  # a method whose graph breaks where the others' do not would look slow
    assert {(column, number) for column, made in graphs.items() for number in made.values()} == {
        (column, 1) for column in compiled
    }
    aims = {row["what"]: row for row in read(folder / "summary.json")["aims"]}
    assert aims["gpt2: step, eager ÷ floor"]["aim"] == "≤ 1.03"
    assert aims["gpt2: saved bytes ÷ floor"]["ahead of it"] == "yes"
    assert aims["gpt2: prefill, eager ÷ frozen"]["aim"] == "–"


@pytest.fixture(scope="module")
def modules():
    """Import parts as the script does."""
    with scripts(BENCHMARKS):
        yield


def test_the_shape_that_is_not_rehearsed_is_built(modules):
    from gpu.models import SUBJECTS

    subject = SUBJECTS["llama"]
    model = subject.build(True, "cpu", torch.float32)
    assert model(subject.shape.batch(model, 2, 8)).logits.shape == (2, 8, 64)
    assert {f"layers.0.self_attn.{name}" for name in subject.targets} <= {*dict(model.model.named_modules())}


def test_a_card_gets_a_section_of_the_page_and_a_rehearsal_none(modules, folder, tmp_path):
    from gpu import summary

    page, results = tmp_path / "page.md", tmp_path / "results"
    text = "# What\n\n## On a GPU\n\nNothing.\n\n## After\n\nMore.\n"
    page.write_text(text)
    (results / "a-card").mkdir(parents=True)
    for path in folder.glob("*.json"):
        (results / "a-card" / path.name).write_bytes(path.read_bytes())
    assert not summary.write_page(page, results)
    assert page.read_text() == text
    for path in (results / "a-card").glob("*.json"):
        record = read(path)
        path.write_text(json.dumps({**record, "quick": False, "machine": {**record["machine"], "gpu": "A card"}}))
    for _ in range(2):  # written again it is the same
        assert summary.write_page(page, results)
        shown = page.read_text()
        assert shown.count("## On a GPU") == shown.count("### A card") == 1
        assert "Nothing." not in shown
        assert shown.endswith("## After\n\nMore.\n")
        assert "| gpt2: step, eager ÷ floor" in shown


def test_without_a_card_the_reason_is_written_down(modules, tmp_path):
    from gpu import machine
    from gpu.part import Job

    if torch.cuda.is_available():
        pytest.skip("there is a card here")
    with pytest.raises(RuntimeError, match="sees no GPU"):
        machine.work(Job([], tmp_path / "machine.json", "cuda", False, None))
    assert read(tmp_path / "machine.json")["machine"]["gpu"] is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_part_ends_by_itself_when_the_script_is_killed_and_leaves_what_it_had(modules, tmp_path):
    from gpu.part import run_part

    def work(job):
        job.save(process=os.getpid())
        time.sleep(60)

    out = tmp_path / "part.json"
    script = os.fork()
    if script == 0:
        if os.fork() == 0:
            os.setsid()
            os._exit(run_part(work, ["--out", str(out), "--device", "cpu", "--quick"]))
        time.sleep(60)
        os._exit(1)
    deadline = time.monotonic() + 60
    while not out.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(script, signal.SIGKILL)
    os.waitpid(script, 0)
    state = ["ps", "-o", "stat=", "-p", str(read(out)["process"])]
    while subprocess.run(state, stdout=subprocess.PIPE, text=True, check=False).stdout.strip()[:1] not in ("", "Z"):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert read(out)["status"] == "unfinished"


PLAN = """
import json, pathlib, sys, time
name, given = sys.argv[0].split("/")[-1][:-3], sys.argv[1:]
out = pathlib.Path(given[given.index("--out") + 1])
turn = pathlib.Path(given[given.index("--turn") + 1]) if "--turn" in given else None
def save(status, **found):
    out.write_text(json.dumps({"status": status, "began": began, **found}))
began = time.time()
if name == "slow":
    save("unfinished")
    time.sleep(60)
if turn:
    turn.with_suffix(".ready").touch()
    while not turn.exists():
        time.sleep(0.01)
save("done", turned=time.time(), wrong=["one thing"] if name == "odd" else [], argv=given)
"""


@pytest.fixture
def plan(modules, monkeypatch, tmp_path):
    """Run the script over parts that need nothing but Python; return the status and their JSON files."""
    from gpu import runner

    package = tmp_path / "benchmarks" / "gpu"
    for folder in (package, tmp_path / "residual_steer", tmp_path / "backbones"):
        folder.mkdir(parents=True)
    for name in ("__init__", "machine", "summary", "slow", "odd", "early", "well"):
        (package / f"{name}.py").write_text("" if name == "__init__" else PLAN)
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setattr(runner, "COSTS", [])

    def run(parts, *more):
        monkeypatch.setattr(runner, "CHECKS", [runner.Part(*part) for part in parts])
        status = runner.main(["--out", str(tmp_path / "out"), "--only", *(part[0] for part in parts), *more])
        return status, {path.stem: read(path) for path in (tmp_path / "out").glob("*.json")}

    yield run
    signal.signal(signal.SIGTERM, before)


def test_a_part_that_takes_too_long_leaves_what_it_had_and_the_others_are_run(plan, capsys):
    status, found = plan([("slow", 2), ("odd", 9), ("early", 9, "", (), True), ("well", 9)])
    assert status == 1
    assert {name: record["status"] for name, record in found.items()} == {
        **{"machine": "done", "slow": "unfinished", "odd": "done", "early": "done", "well": "done", "summary": "done"}
    }
    assert found["early"]["began"] < found["odd"]["began"] < found["early"]["turned"] < found["well"]["began"]
    shown = capsys.readouterr().out
    assert "slow: not done, status -15" in shown
    assert "odd: done, 1 wrong" in shown
    assert "4 parts were run; not well: slow, odd\n" in shown

    status, again = plan([("slow", 2), ("well", 9)], "--resume")
    assert status == 1  # only what is not done is run again
    assert again["slow"]["began"] > found["slow"]["began"]
    assert again["well"] == found["well"]


def test_what_an_earlier_run_found_is_not_shown_as_this_ones(plan, tmp_path):
    status, found = plan([("well", 9)])
    assert status == 0
    (tmp_path / "benchmarks" / "gpu" / "well.py").write_text("import sys; sys.exit(3)")
    status, found = plan([("well", 9)])
    assert status == 1
    assert "well" not in found


def test_the_end_is_kept_for_the_summary(plan, capsys):
    began = time.monotonic()
    status, found = plan([("slow", 99), ("well", 9)], "--minutes", "0.45")
    assert time.monotonic() - began < 27
    assert (status, found["slow"]["status"], found["summary"]["status"]) == (1, "unfinished", "done")
    assert "well: no time left" in capsys.readouterr().out


def test_a_part_that_there_is_not_is_refused(plan):
    with pytest.raises(SystemExit, match=r"--only takes well, many; received wel"):
        plan([("well", 9)], "--only", "wel")


def test_a_part_that_hangs_is_ended_with_what_it_started(modules, tmp_path):
    from gpu import runner

    script = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', sys.argv[1]]); time.sleep(60)"
    inner = f"import time; open({str(tmp_path / 'begun')!r}, 'w'); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", script, inner], start_new_session=True)
    while not (tmp_path / "begun").exists():
        time.sleep(0.05)
    runner.end(process)
    assert process.returncode == -signal.SIGTERM
    deadline = time.monotonic() + 20
    while any(inner in line for line in running()):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_compiler_of_one_architecture_stands_in_for_nvcc(modules, tmp_path):
    from gpu import kernels

    echo, script = tmp_path / "echo", tmp_path / "nvcc"
    echo.write_text('#!/bin/sh\necho "$@"\n')
    echo.chmod(0o755)
    script.write_text(kernels.NVCC.format(python=sys.executable, nvcc=str(echo), code="arch=compute_90,code=sm_90"))
    script.chmod(0o755)
    given = [
        "-O3",
        "-gencode",
        "arch=compute_75,code=sm_75",
        "--threads",
        "4",
        "-gencode=arch=compute_80",
        "-c",
        "a.cu",
    ]
    shown = subprocess.run([str(script), *given], stdout=subprocess.PIPE, text=True, check=True).stdout.split()
    assert shown == ["-gencode", "arch=compute_90,code=sm_90", "-O3", "-c", "a.cu"]
