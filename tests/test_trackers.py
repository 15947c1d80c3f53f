"""What a run leaves behind it: metrics, events of trackers, and lines in a log."""

import io
import json
import re
import sys
import time

import pytest

import residual_steer as rs
from residual_steer.training import history as records
from residual_steer.training import progress
from runs import classifier, fit, pairs


def test_metrics_are_json_lines_and_tensorboard_events(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    history = fit(classifier(), pairs(), pairs(), save_to=tmp_path, log_every=3, trackers=["tensorboard"])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line for line in lines if line["kind"] == "train"] == [{"kind": "train", **r} for r in history.train]
    events = EventAccumulator(str(tmp_path / "logs" / "residual-steer"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [3, 6]
    assert events.Scalars("valid/accuracy")[0].value == pytest.approx(history.valid[-1]["accuracy"])


def read_wandb(folder):
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    return file.read_bytes().count(b"train/loss") > 0, b"river" in file.read_bytes()


def read_mlflow(folder):
    import mlflow

    (run,) = mlflow.MlflowClient().search_runs(["0", mlflow.get_experiment_by_name("residual-steer").experiment_id])
    return run.data.metrics["train/loss"] > 0, run.info.run_name == "river"


def read_trackio(folder):
    import sqlite3
    from contextlib import closing

    with closing(sqlite3.connect(folder / "residual-steer.db")) as base:
        rows = base.execute("SELECT run_name, metrics FROM metrics").fetchall()
    return any(b"train/loss" in metrics for _, metrics in rows), {name for name, _ in rows} == {"river"}


@pytest.mark.filterwarnings("ignore")  # of the packages themselves
@pytest.mark.parametrize(
    ("name", "read"),
    [("wandb", read_wandb), ("mlflow", read_mlflow), ("trackio", read_trackio)],
    ids=["wandb", "mlflow", "trackio"],
)
def test_trackers_that_need_no_account(name, read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))  # which it reads when it is imported
    pytest.importorskip(name)
    fit(classifier(), pairs(), save_to="runs/river", trackers=[name], log_every=3, progress=False)
    for _ in range(100):  # a process of wandb's own writes behind
        if read(tmp_path) == (True, True):
            return
        time.sleep(0.1)
    assert read(tmp_path) == (True, True)


def test_a_tracker_that_is_not_installed_is_an_error(tmp_path):
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    absent = sorted(set(LoggerType.list()) - {*map(str, get_available_trackers()), "all"})
    if not absent:
        pytest.skip("every tracker is installed")
    with pytest.raises(rs.SteerError, match=rf"`trackers` has {absent[0]}, which cannot be imported"):
        fit(classifier(), pairs(), save_to=tmp_path, trackers=["tensorboard", absent[0]])


def test_a_log_that_is_no_terminal_gets_few_lines(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    fit(classifier(), pairs(), steps=30, progress=True)
    assert log.getvalue() in ("", "\r")  # done within five seconds
    monkeypatch.setattr(records, "EVERY", 0.2)
    began = time.monotonic()
    with progress(total=200, desc="work", unit="step") as bar:
        for step in range(200):
            time.sleep(0.004)
            bar.set_postfix_str(f"loss {step}")
            bar.update()
    lines = [line for line in log.getvalue().replace("\r", "").split("\n") if line]
    assert 2 <= len(lines) <= (time.monotonic() - began) / 0.2 + 1
    assert all(re.match(r"work: .*/200 .*loss \d+", line) for line in lines)
    log.isatty = lambda: True
    assert progress(total=3).mininterval < 1
    log.truncate(0)
