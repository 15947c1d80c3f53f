"""Which tools train, shard, quantise and export a steered model: a row for each, by the test that tries it.

    python benchmarks/tools_table.py [--site FOLDER] [--only FILE …]    # writes docs/how-to/tools-table.md; no timing

A row says *works* or *refused* because its tests passed just now, and *not tried* with the reason of those that were
skipped. FOLDER holds packages that constraints.txt leaves out.
"""

import argparse
import json
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE, RESULTS = ROOT / "docs/how-to/tools-table.md", ROOT / "benchmarks/results/tools.json"

# Tool, package, what was run, what is refused (in the words of the error or warning; "" where it works), tests.
ROWS = [
    ("DistributedDataParallel", "torch", "two processes: losses, file and resumed run of one", "", ["shards@[ddp]"]),
    ("FSDP2, `fully_shard`", "torch", "the same, with clipping; killed and resumed", "", ["shards@[fsdp2]", "shards@killed"]),
    ("FSDP2 by accelerate", "accelerate", "parameters are looked up after `prepare`, which needs a GPU", "", ["resume@prepare_has_replaced"]),
    ("FSDP1, `use_orig_params`", "torch", "as FSDP2; its wrapper is what `fit` and `save` take", "", ["shards@[fsdp1]"]),
    ("tensor parallelism, `tp_plan`", "transformers", "two processes compute one batch: losses and file of one", "", ["shards@[tp]"]),
    ("a part that is sharded", "torch", "`fit`, `save`, `steer`", "applied to a part of what trains; Give the outermost wrapper; Steer first, wrap after", ["shards@cannot_be_gathered"]),
    ("`cache_prefix` on several processes", "torch", "two processes lend each other rows", "", ["shards@lend_each_other"]),
    ("`cache_prefix` of a sharded model", "torch", "`fit`", "calls blocks alone; this model is sharded: its blocks have no weights", ["shards@cannot_be_gathered"]),
    ("DeepSpeed ZeRO-2 and ZeRO-3, its engine", "deepspeed", "two processes: `save` gathers the field", "", ["shards@zero_sharded"]),
    ("DeepSpeed, `fit`", "deepspeed", "under its engine, and on what ZeRO-3 marked", "DeepSpeed takes the steps itself, so `fit` does not", ["shards@left_to_its_engine"]),
    ("bitsandbytes nf4, quantised twice", "bitsandbytes", "natively, in PEFT and by Trainer; trained, reloaded to the same output", "", ["quantised@[bitsandbytes nf4]", "peft_trainer@4_bit"]),
    ("bitsandbytes int8", "bitsandbytes", "natively and in PEFT", "", ["quantised@[bitsandbytes int8]"]),
    ("torchao int8, weights", "torchao", "natively and in PEFT", "", ["quantised@[torchao int8]"]),
    ("torchao int8, dynamic", "torchao", "natively and in PEFT", "", ["quantised@[torchao int8 dynamic]"]),
    ("torchao float8", "torchao", "natively and in PEFT; weights stored in float8 by hand", "", ["quantised@[torchao float8]", "silent_places@stored_in"]),
    ("HQQ, 4 bits", "hqq", "natively and in PEFT", "", ["quantised@[hqq]"]),
    ("quanto int8", "optimum-quanto", "natively and in PEFT", "", ["quantised@[quanto]"]),
    ("GPTQ and AWQ", "transformers", "their layout: packed int32 with scales, no float weight; not their kernels", "", ["quantised@gptq_and_awq"]),
    ("`prepare_model_for_kbit_training` before", "peft", "nf4, int8, torchao, HQQ, quanto", "", ["quantised@natively_and_by_peft"]),
    ("the same after `get_peft_model`", "peft", "it closes the field; `use` opens it", "is selected and does not train: somebody closed its parameters since", ["quantised@preparing_a_base"]),
    ("offloading, `device_map`", "accelerate", "steered before or after, saved and loaded", "", ["silent_places@offloaded_models"]),
    ("offloaded module in `train=`", "accelerate", "`steer`", "which is to train along, is offloaded. Keep it on a device", ["silent_places@blocks_execute"]),
    ("PEFT", "peft", "GPT-2, LLaMA, Mamba, Mamba-2, ViT, T5, BERT: names, two adapters, rows, beams, checkpointing, bf16, heads, AutoPeftModel", "", ["peft@"]),
    ("PEFT, merging", "peft", "`merge_and_unload`", "H-Res cannot be merged: H(z) is no linear map", ["peft_hosts@merging"]),
    ("LoRA and a field on one model", "peft", "both orders: both train, off is the base, both reload", "", ["peft_hosts@lora_and_a_field", "silent_saving@both_orders"]),
    ("Trainer", "transformers", "examples/integrations/train_with_trainer.py; exact resume, best model", "", ["integrations@[train_with_trainer]", "peft_trainer@small"]),
    ("TRL: SFT, DPO, GRPO, reward", "trl", "examples/integrations/train_with_trl.py", "", ["integrations@trl", "peft_trl@"]),
    ("QLoRA's setting", "bitsandbytes", "examples/integrations/train_in_4_bit.py", "", ["integrations@[train_in_4_bit]"]),
    ("FSDP2, a script", "torch", "examples/integrations/train_with_fsdp2.py", "", ["integrations@fsdp2"]),
    ("Lightning", "lightning", "examples/integrations/train_with_lightning.py", "", ["integrations@lightning"]),
    ("sentence-transformers", "sentence-transformers", "examples/integrations/train_sentence_embeddings.py", "", ["integrations@sentence"]),
    ("timm", "timm", "examples/integrations/train_timm.py", "", ["integrations@timm"]),
    ("lm-eval", "lm-eval", "`--model hf --model_args pretrained=…,peft=…`, after `import residual_steer.peft`", "", ["integrations@lm_eval"]),
    ("torch.export", "torch", "to a file and back, under a sum and by row", "", ["graphs@torch_export"]),
    ("ONNX, dynamo", "onnx", "run by onnxruntime, under a sum and by row", "", ["graphs@onnx"]),
]  # fmt: skip


class Outcomes:
    """What became of every test."""

    def __init__(self):
        self.found = {}

    def pytest_collection_modifyitems(self, items):
        """Leave out the tests of no row."""
        asked = [each for row in ROWS for each in row[4]]
        items[:] = [item for item in items if any(tries(each, item.nodeid) for each in asked)]

    def pytest_runtest_logreport(self, report):
        """Keep the worst outcome of a test's parts."""
        word = report.outcome
        if word == "skipped":
            word = f"not tried: {report.longrepr[2].removeprefix('Skipped: ')}"
        if word != "passed" or report.when == "call":
            self.found[report.nodeid] = word


def tries(asked, test):
    """Return whether a test is one that a row asks for, `file@part of its name`."""
    file, _, part = asked.partition("@")
    return test.startswith(f"tests/test_{file}.py::") and part in test


def outcome(asked, refusal, found):
    """Return the last cell of a row."""
    tried = [[word for test, word in found.items() if tries(each, test)] for each in asked]
    words = [word for each in tried for word in each or ["not tried"]]
    worst = "failed" if "failed" in words else next((word for word in words if word != "passed"), None)
    if worst:
        return worst
    return f"refused: “{refusal}”" if refusal else "works"


def installed(package):
    """Return a package's version."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "–"


def main(arguments=None):
    """Run the tests and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--site", type=Path, help="a folder with more packages")
    parser.add_argument("--only", nargs="*", metavar="FILE", help="test files to run, as `shards`; the rest is kept")
    options = parser.parse_args(arguments)
    if options.site:
        sys.path.append(str(options.site))
        os.environ["PYTHONPATH"] = str(options.site)  # of the programs that tests start
    files = dict.fromkeys(each.partition("@")[0] for row in ROWS for each in row[4])
    files = [file for file in files if options.only is None or file in options.only]
    outcomes = Outcomes()
    if files:
        pytest.main(["-q", "-p", "no:cacheprovider", *(f"{ROOT}/tests/test_{file}.py" for file in files)], [outcomes])
    kept = json.loads(RESULTS.read_text("utf-8")) if RESULTS.exists() and options.only is not None else {}
    packages = {row[1]: installed(row[1]) for row in ROWS}
    known = {**kept.get("versions", {}), **{name: number for name, number in packages.items() if number != "–"}}
    stored = {"versions": known, "tests": {**kept.get("tests", {}), **outcomes.found}}
    RESULTS.write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", "utf-8")
    lines = [
        f"| {tool} | {outcome(asked, refusal, stored['tests'])} | {what} | "
        f"{package} {stored['versions'].get(package, '–')} |"
        for tool, package, what, refusal, asked in ROWS
    ]
    head = "| tool | outcome | what was run | version |\n| --- | --- | --- | --- |"
    PAGE.write_text(f"{TITLE}\n{head}\n" + "\n".join(lines) + "\n", "utf-8")


TITLE = """# Every tool, tried

Made by `python benchmarks/tools_table.py`: a row says *works*, or *refused* and in which words, because its tests passed
in that run, on a CPU; two processes are gloo's. The words are those of the error, or of the warning.
"""

if __name__ == "__main__":
    main()
