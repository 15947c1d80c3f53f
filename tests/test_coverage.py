"""The table of coverage: a handful of its rows, built and checked as the script does, and what is written of them."""

import importlib.util
import json
import re
import sys

import pytest
import torch
from torch import nn

import residual_steer as rs
from beside import BENCHMARKS, scripts
from streams import Block, ConvBlock, Model, PlainNet

pytest.importorskip("transformers")
pytest.importorskip("timm")


@pytest.fixture(scope="module")
def table():
    """The script as a module, under another name than that of the coverage of tests."""
    with scripts(BENCHMARKS) as script:
        specified = importlib.util.spec_from_file_location("coverage_table", BENCHMARKS / "coverage.py")
        module = importlib.util.module_from_spec(specified)
        specified.loader.exec_module(module)
        module.check = script("coverage_check").check
        module.models = sys.modules["coverage_models"]
        module.shrink = script("coverage_shrink")
        module.report = sys.modules["coverage_report"]
        yield module


@pytest.mark.parametrize(
    ("kind", "name", "blocks"),
    [
        ("causal", "qwen3", 4),
        ("causal", "jamba", 4),
        ("masked", "bert", 4),
        ("causal", "mllama", 4),  # with states of images
        ("seq2seq", "t5", 6),
        ("seq2seq", "kyutai_speech_to_text", 4),  # with columns of ids, as which it does not generate
        ("image", "siglip2", 4),  # with patches in a row
        ("image", "convnext", 8),
        ("audio", "audio-spectrogram-transformer", 4),
        ("timm", "fasternet", None),
        ("timm", "sknet", 5),
    ],
)
def test_rows(table, kind, name, blocks):
    entry = next(entry for entry in table.entries(kind) if entry.name == name)
    row = table.result_of(entry)
    assert row["status"] == "works", row["why"]
    assert blocks in (None, row["blocks"])
    assert (row["generates"] != "") is (kind in {"causal", "seq2seq"} and name != "kyutai_speech_to_text")


class Head(Model):
    """A model whose last block is not called by the output's path with the stream that it returned."""

    def __init__(self, fault):
        super().__init__()
        self.fault, self.calls = fault, 0

    def forward(self, ids):
        self.calls += 1
        out = super().forward(ids)
        if self.fault == "random":
            return out + self.calls
        if self.fault == "detached":
            return out.detach()
        return out


def entry(table, model, name="mine", kind="timm"):
    return table.Entry(kind, name, "", lambda: model)


@pytest.mark.parametrize(
    ("fault", "why"), [("random", "computes something else"), ("detached", "no gradient|no residual stream")]
)
def test_faults_are_told(table, fault, why):
    row = table.result_of(entry(table, Head(fault)))
    assert row["status"] == "failed"
    assert re.search(why, row["why"])


def test_a_field_that_was_not_at_zero_is_told(table, monkeypatch):
    steer = rs.steer

    def wrong(model, **more):
        steer(model, **more)
        with torch.no_grad():
            rs.parameters(model)[-1].add_(1)

    monkeypatch.setattr(rs, "steer", wrong)
    assert table.result_of(entry(table, Model()))["why"] == "a fresh field changes the output"


def test_what_has_no_stream_is_refused_where_that_is_known(table):
    assert table.result_of(entry(table, PlainNet(), "vgg"))["status"] == "refused"
    assert table.result_of(entry(table, PlainNet(), "mine"))["status"] == "failed"


def test_what_cannot_be_built_is_untested(table):
    def build():
        raise table.UnbuiltError("31M parameters")

    row = table.result_of(table.Entry("causal", "huge", "", build))
    assert row == {"status": "untested", "why": "31M parameters"}


def test_a_shrunk_config_keeps_its_kinds_of_layers(table):
    import transformers

    config = table.shrink.shrunk(transformers.Gemma3TextConfig, ["gemma3_text"])
    assert config.num_hidden_layers == 4
    assert set(config.layer_types) == {"sliding_attention", "full_attention"}
    assert table.shrink.kinds(["a"] * 5 + ["b"] + ["a"] * 6, 3) == ["a", "a", "b"]
    nested = table.shrink.shrunk(transformers.LlavaConfig, ["llava"])
    assert nested.text_config.hidden_size == nested.vision_config.hidden_size == 64


def test_results_are_kept_line_by_line_and_written_as_tables(table, tmp_path, monkeypatch, capsys):
    built = []

    def entries(kind):
        def make(block):
            built.append(block)
            return nn.Sequential(nn.Conv2d(3, 6, 4, 4), block(6), block(6)) if block is ConvBlock else Model(block)

        return [table.Entry(kind, block.__name__, "", lambda block=block: make(block)) for block in (Block, ConvBlock)]

    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    monkeypatch.setattr(table, "entries", entries)
    monkeypatch.setattr(table, "ROOT", tmp_path)
    arguments = ["--kind", "masked", "--lines", str(tmp_path / "runs" / "lines.jsonl")]
    table.main(arguments)
    assert "2/2 masked ConvBlock: works auto" in capsys.readouterr().out
    table.main(arguments)
    assert "0 models" in capsys.readouterr().out
    written = json.loads((tmp_path / "benchmarks" / "results" / "coverage.json").read_text())
    assert [row["status"] for row in written["models"]] == ["works", "works"]
    assert set(written["versions"]) == {"torch", "transformers", "timm"}
    text = (tmp_path / "COVERAGE.md").read_text()
    assert "| Masked language models (transformers) | 2 | 0 | 0 | 0 | 100.0 % |" in text
    assert "| ConvBlock |  | works | auto | 2 × ConvBlock | 6 |  |" in text
    assert str(tmp_path) not in text
    assert built == [], "every model is built in a process of its own"


def test_a_failure_is_told_in_words_where_there_are_some(table):
    row = {"kind": "masked", "model": "M", "status": "failed", "why": "KeyError: a | b"}
    text = table.report.markdown([{**row, "name": "xlm"}, {**row, "name": "mine"}])
    assert "| xlm | M | fails: a layer is no module: " in text
    assert "| mine | M | fails: KeyError: a / b |" in text


def test_a_line_of_another_release_is_not_counted(table, tmp_path):
    lines = tmp_path / "lines.jsonl"
    now = {"kind": "timm", "name": "vgg", "key": "", "status": "failed", "versions": table.versions()}
    rows = [now, {**now, "status": "works"}, {**now, "name": "old", "versions": {**now["versions"], "timm": "0.1"}}]
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [(key, row["status"]) for key, row in table._read(lines).items()] == [("timm vgg ", "works")]


def test_a_model_that_hangs_or_dies_is_told(table, monkeypatch):
    import os
    import time

    hangs = table.Entry("masked", "hangs", "", lambda: time.sleep(60))
    turns = table.Entry("masked", "turns", "", lambda: [0 for _ in iter(int, 1)])
    dies = table.Entry("masked", "dies", "", lambda: os._exit(3))
    rows = list(table._all([turns, dies], jobs=2, seconds=1.0))
    monkeypatch.setattr(table, "PATIENCE", 1)
    rows += table._all([hangs], jobs=1, seconds=1.0)
    told = {row["name"]: (row["status"], row["why"]) for row in rows}
    assert told["hangs"] == ("untested", "took more than 1 s")
    assert told["turns"] == ("untested", "took more than 1 s")
    assert told["dies"] == ("failed", "its process died, of memory perhaps")
