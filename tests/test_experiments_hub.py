"""SQuAD and VTAB-1k as scripts, on tiny models and data of the real schemas, saved to folders here."""

import importlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import residual_steer as rs
from residual_steer import SteerError
from residual_steer.report import Measured, Result
from residual_steer.study import Arm, Entry
from residual_steer.study.sweep import Run

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")
Image = pytest.importorskip("PIL.Image")
for package in ("peft", "tokenizers", "sklearn", "mambapy"):
    pytest.importorskip(package)

EXAMPLES = Path(__file__).parents[1] / "examples"
WORDS = "the fox of a hen eats corn at dawn in red barns and sleeps near old wells while dogs bark".split()  # noqa: SIM905
LENGTH = 64


@pytest.fixture(scope="module", autouse=True)
def _scripts():
    """The scripts import their siblings as if they had been run."""
    sys.path.insert(0, str(EXAMPLES))
    yield
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module", autouse=True)
def _prepared(tmp_path_factory):
    """What `datasets` prepares goes into a folder of the tests'."""
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = str(tmp_path_factory.mktemp("prepared"))
    yield
    datasets.config.HF_DATASETS_CACHE = before


def script(name, *arguments):
    return importlib.import_module(name).main([*map(str, arguments)])


@pytest.fixture
def no_training(monkeypatch):
    """Whatever trains fails."""

    def refuse(*arguments, **options):
        raise AssertionError("a finished run was made again")

    monkeypatch.setattr(sys.modules["residual_steer.study.sweep"], "fit", refuse)


def rows_of(table):
    return {row["method"]: row for row in table.rows}


def entry(name, values, metric="loss"):
    """An entry as `sweep` returns it, one value for every seed; None for a run that diverged."""
    runs = [Run(0.1, i, None, None if v is None else {metric: v}, None, 1, 2, 0.1, 1.0) for i, v in enumerate(values)]
    return Entry(Arm(name, "hres", (0.1,)), 0.1, (), tuple(runs))


# SQuAD


def question(number):
    """A row of SQuAD; two follow each other on the same text."""
    start = number // 2
    words = [WORDS[(start + i) % len(WORDS)] for i in range(12)] + [str(start)]
    answer = words[1 + number % 10]
    place = len(" ".join(words[: 1 + number % 10])) + 1
    answers = {"text": [answer], "answer_start": [place]}
    return {"context": " ".join(words), "question": f"Who {words[0]}?", "answers": answers}


@pytest.fixture(scope="module")
def squad_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("squad")
    for split, count in (("train", 60), ("validation", 12)):
        rows = [json.dumps(question(i)) + "\n" for i in range(count)]
        (folder / f"{split}.jsonl").write_text("".join(rows))
    return folder


def tokenizer():
    import tokenizers

    model = tokenizers.ByteLevelBPETokenizer()
    texts = [f"{word} {word}." for word in WORDS] + ["Question: Answer:\n\nWho? 0 1 2 3 4 5 6 7 8 9"]
    model.train_from_iterator(texts * 3, vocab_size=400, special_tokens=["<end>"], show_progress=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model._tokenizer, eos_token="<end>")


@pytest.fixture(scope="module")
def language_models(tmp_path_factory):
    """Folders of a GPT-2 and a Mamba."""
    words = tokenizer()
    torch.manual_seed(0)
    both = {"vocab_size": len(words), "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0}
    gpt2 = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=96, **both)
    mamba = transformers.MambaConfig(hidden_size=16, num_hidden_layers=2, state_size=4, pad_token_id=0, **both)
    folders = {}
    models = (transformers.GPT2LMHeadModel(gpt2), transformers.MambaForCausalLM(mamba))
    for name, model in zip(("tiny-gpt2", "tiny-mamba"), models, strict=True):
        folders[name] = tmp_path_factory.mktemp("models") / name
        model.save_pretrained(folders[name])
        words.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def squad_run(language_models, squad_data, tmp_path_factory):
    """The arguments of a run, and its result."""
    out = tmp_path_factory.mktemp("out")
    models = [part for path in language_models.values() for part in ("--model", path)]
    sizes = ["--rank", 4, "--length", LENGTH, "--rates", 2, "--seeds", 2, "--full", "--longest", 16]
    arguments = ["--out", out, "--data", squad_data, *models, *sizes]
    few = ["--steps", 4, "--batch", 4, "--limit", 8, "--valid", 8, "--generate", 4]
    assert script("squad", *arguments, *few) == 0
    return arguments, Result.load(out / "squad.json")


def test_squad_has_a_table_for_every_model(squad_run):
    _, result = squad_run
    assert [table.title for table in result.tables] == ["tiny-gpt2", "tiny-mamba"]
    gpt2, mamba = (rows_of(table) for table in result.tables)
    methods = ["frozen, as it came", "H-Res", "LoRA", "LoRA, merged", "prompt", "prefix", "full fine-tuning"]
    assert list(gpt2) == methods
    assert list(mamba) == [name for name in methods if name != "prefix"]
    for table in (gpt2, mamba):
        for name, row in table.items():
            cells = [row[key] for key in ("loss", "exact_match", "f1")]
            assert all(isinstance(cell, float if name == methods[0] else Measured) for cell in cells), name
        assert table["LoRA"]["loss"].mean == pytest.approx(table["LoRA, merged"]["loss"].mean, abs=1e-3)
        assert table["full fine-tuning"]["loss"].mean < table["frozen, as it came"]["loss"]
    assert any("prefix: 'prefix' extends the keys" in note for note in result.tables[1].notes)
    assert [series.name for series in result.plots[0].series] == [n for n in methods[1:] if "merged" not in n]
    assert [verdict.claim for verdict in result.verdicts] == [1, 9]
    assert "tiny-mamba, H-Res minus LoRA" in result.verdicts[0].ours
    assert "tiny-gpt2" not in result.verdicts[1].ours
    assert result.settings["frozen"]["tiny-gpt2"]["loss"] == gpt2["frozen, as it came"]["loss"]


def test_squad_matches_budgets(squad_run):
    _, result = squad_run
    for table in result.tables:
        rows = rows_of(table)
        budget = rows["H-Res"]["trainable"]
        short = {name for name in rows if any(note.startswith(f"{name}: 16 tokens") for note in table.notes)}
        assert "prompt" in short
        assert "LoRA" not in short
        for name in ({"LoRA", "prompt", "prefix"} & rows.keys()) - short:
            assert rows[name]["trainable"] == pytest.approx(budget, rel=0.25), name
        assert all(rows[name]["trainable"] < budget for name in short)
        assert rows["full fine-tuning"]["trainable"] > 4 * budget


def test_squad_chooses_the_rate_of_the_lowest_loss(squad_run):
    _, result = squad_run
    for title in ("tiny-gpt2", "tiny-mamba"):
        for method in ("H-Res", "LoRA", "prompt", "full fine-tuning"):
            runs = [r for r in result.records if (r["problem"], r["method"]) == (title, method)]
            best = min((run for run in runs if run["seed"] == 0), key=lambda run: run["valid"]["loss"])
            assert {run["rate"] for run in runs if run["chosen"]} == {best["rate"]}


def test_a_second_call_of_squad_trains_nothing(squad_run, no_training, capsys):
    arguments, first = squad_run
    assert script("squad", *arguments, "--quick") == 0  # whose sizes are the same
    again = Result.load(arguments[1] / "squad.json")
    assert again.tables == first.tables
    assert again.seconds == first.seconds
    assert again.verdicts == ()  # a test is no result
    assert "finished runs are read" in capsys.readouterr().out


@pytest.mark.parametrize("change", [["--batch", 2], ["--generate", 2], ["--length", 63], ["--limit", 4]])
def test_other_sizes_are_other_runs(squad_run, no_training, change):
    arguments, _ = squad_run
    few = {"--steps": 4, "--batch": 4, "--limit": 8, "--valid": 8, "--generate": 4, **dict([change])}
    with pytest.raises(AssertionError, match="made again"):
        script("squad", *arguments, *(part for pair in few.items() for part in pair))


def test_no_paragraph_is_on_both_sides():
    from squad_task import hold_out

    rows = datasets.Dataset.from_list([question(i) for i in range(40)])
    train, valid = hold_out(rows, 9)
    assert len(valid) == 10  # whole paragraphs, of two questions each
    assert len(train) == 30
    assert not set(train["context"]) & set(valid["context"])
    assert hold_out(rows, 9)[1]["context"] == valid["context"]
    assert len(hold_out(rows, 1000)[0]) == 2  # something is left to train on
    with pytest.raises(SteerError, match="one paragraph alone"):
        hold_out(rows.select([0, 1]), 1)


def test_questions_come_from_where_they_should(squad_data):
    from argparse import Namespace

    from squad_task import questions_of

    words = tokenizer()
    sizes = Namespace(data=squad_data, valid=8, limit=5, steps=3, batch=4, length=LENGTH)
    parts = questions_of(sizes, words)
    assert {name: len(part) for name, part in parts.items()} == {"train": 12, "valid": 8, "test": 5}
    texts = {
        name: {words.decode(prompt).partition("\n\nQuestion")[0] for prompt in part.prompts}
        for name, part in parts.items()
    }
    assert not texts["train"] & texts["valid"]
    assert texts["test"] <= {question(i)["context"] for i in range(12)}
    assert parts["test"].references[0] == question(0)["answers"]["text"]


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-mamba"])
@pytest.mark.parametrize(("method", "size"), [("hres", {"rank": 4}), ("prompt", {"length": 4})])
def test_answers_are_those_of_one_question_at_a_time(language_models, name, method, size):
    from pretrained import language_model
    from squad_task import ROOM, answers

    model, words = language_model(str(language_models[name]))
    rs.baselines.apply(model, method, **size)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.5 * torch.randn_like(parameter)
    model.eval()
    prompts = [torch.tensor(words(text)["input_ids"]) for text in ("the fox", "corn at dawn in red barns", "hen eats")]
    wanted = []
    for prompt in prompts:
        ids = prompt[None]
        for _ in range(ROOM):
            token = model(input_ids=ids).logits[0, -1].argmax()
            ids = torch.cat([ids, token[None, None]], dim=1)
            if token == words.eos_token_id:
                break
        said = words.decode(ids[0, len(prompt) :], skip_special_tokens=True).strip()
        wanted.append(said.split("\n")[0] if said else "")
    assert any(wanted)
    assert answers(model, words, prompts, batch=2) == wanted


def test_answers_end_with_the_line_and_with_the_text(language_models):
    from pretrained import language_model
    from squad_task import answers

    model, words = language_model(str(language_models["tiny-gpt2"]))
    rows = {"the fox": " hen\n dogs<end>", "corn at": " dawn<end> dogs bark dogs"}
    batches = [
        {"input_ids": (ids := torch.tensor([words(a + b)["input_ids"]])), "labels": ids} for a, b in rows.items()
    ]
    rs.fit(model, batches, steps=120, lr=1e-2, progress=False)
    prompts = [torch.tensor(words(text)["input_ids"]) for text in rows]
    assert answers(model.eval(), words, prompts, batch=2) == ["hen", "dawn"]


def fail(capsys, name, *arguments):
    """Run a script that fails; return the one line that it says."""
    assert script(name, *arguments) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--model": "owner/nothing"}, "the model 'owner/nothing' cannot be had: .*Hub, and a network"),
        ({"--data": "owner/nothing"}, "the data set 'owner/nothing' cannot be had: .*save_to_disk"),
        ({"--length": 96}, "--length is below the 96 positions of 'tiny-gpt2'.*received 96"),
        ({"--length": 33}, "Give a larger `length`"),
    ],
)
def test_squad_says_what_is_missing(language_models, squad_data, tmp_path, capsys, change, said):
    given = {"--model": language_models["tiny-gpt2"], "--data": squad_data, "--length": LENGTH, "--out": tmp_path}
    arguments = [part for pair in (given | change).items() for part in pair]
    line = fail(capsys, "squad", "--quick", *arguments)
    assert re.search(said, line)
    assert not (tmp_path / "squad.json").exists()


def test_models_of_one_name(capsys, tmp_path):
    line = fail(capsys, "squad", "--model", "one/gpt2", "--model", "two/gpt2", "--out", tmp_path)
    assert "another last name; received one/gpt2, two/gpt2" in line


def subject(name, *, recurrent=False, frozen=5.0):
    from types import SimpleNamespace

    from squad import Subject

    return Subject(SimpleNamespace(name=name), recurrent, None, {"loss": frozen})


LOW, MIDDLE, HIGH = [3.0, 3.1, 2.9], [4.0, 4.1, 4.0], [5.0, 5.1, 5.05]


@pytest.mark.parametrize(
    ("lora", "prompt", "word"),
    [
        (MIDDLE, HIGH, "holds"),
        (LOW, HIGH, "partly holds"),
        (LOW, [2.0, 2.1, 2.2], "does not hold"),
        ([4.0, None, 4.0], HIGH, "partly holds"),
        ([3.0, 3.2, 2.9], [2.9, 3.1, 3.0], "does not hold"),  # no difference can be seen
    ],
)
def test_squads_verdict_on_claim_1(lora, prompt, word):
    from squad import verdicts

    entries = {name: entry(name, values) for name, values in (("H-Res", LOW), ("LoRA", lora), ("prompt", prompt))}
    (found,) = verdicts([subject("gpt2")], [entries], 100)
    assert (found.claim, found.verdict) == (1, word)
    assert ("LoRA: a run diverged" in found.ours) == (None in lora)


@pytest.mark.parametrize(("values", "word"), [(LOW, "holds"), (HIGH, "does not hold"), ([3.0, None], "does not hold")])
def test_squads_verdict_on_claim_9(values, word):
    from squad import verdicts

    entries = {name: entry(name, values) for name in ("H-Res", "LoRA", "prompt")}
    found = verdicts([subject("gpt2"), subject("mamba", recurrent=True)], [entries, entries], 100)
    assert [(v.claim, v.verdict) for v in found[1:]] == [(9, word)]


# VTAB-1k


@pytest.fixture(scope="module")
def vtab_data(tmp_path_factory):
    """A data set in CIFAR-100's schema, a thousand images and a few of tiny size."""
    random = np.random.default_rng(0)
    features = datasets.Features({
        "img": datasets.Image(),
        "fine_label": datasets.ClassLabel(names=[f"fine{i}" for i in range(5)]),
        "coarse_label": datasets.ClassLabel(names=["coarse0", "coarse1"]),
    })  # fmt: skip

    def part(count):
        levels = random.integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
        labels = [i % 5 for i in range(count)]
        columns = {"img": [Image.fromarray(one) for one in levels], "fine_label": labels}
        return datasets.Dataset.from_dict({**columns, "coarse_label": [i % 2 for i in labels]}, features=features)

    folder = tmp_path_factory.mktemp("data") / "cifar100"
    datasets.DatasetDict(train=part(1010), test=part(20)).save_to_disk(folder)
    return folder


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    shape = {"img_size": 16, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 2}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **shape)
    folder = tmp_path_factory.mktemp("models") / "tiny-vit"
    timm.models.save_for_hf(model, folder, model_args=shape)
    return folder


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory):
    shape = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(transformers.ViTConfig(**shape, intermediate_size=32, num_labels=3))
    folder = tmp_path_factory.mktemp("models") / "their-vit"
    model.save_pretrained(folder)
    about = {"image_processor_type": "ViTImageProcessor", "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (folder / "preprocessor_config.json").write_text(json.dumps(about))
    return folder


@pytest.fixture(scope="module")
def vtab_run(timm_folder, vtab_data, tmp_path_factory):
    """The arguments of a run, and its result."""
    out = tmp_path_factory.mktemp("out")
    arguments = ["--model", timm_folder, "--data", vtab_data, "--out", out, "--rates", 2, "--seeds", 2]
    assert script("vtab", *arguments, "--steps", 2, "--batch", 8) == 0
    return arguments, Result.load(out / "vtab.json")


def test_vtab_keeps_to_the_protocol(vtab_run):
    _, result = vtab_run
    assert result.settings["images"] == {
        "cifar100": {"train800": 800, "val200": 200, "train800val200": 1000, "test": 20}
    }
    names = {record["method"] for record in result.records}
    assert len(names) == 8
    for name in names:
        runs = [record for record in result.records if record["method"] == name]
        chose = [run for run in runs if run["valid"] is not None]
        reported = [run for run in runs if run["test"] is not None]
        assert [run["seed"] for run in chose] == [0, 0]
        assert [run["seed"] for run in reported] == [0, 1]
        assert len(runs) == 4
        best = max(chose, key=lambda run: run["valid"]["accuracy"])["rate"]
        assert {run["rate"] for run in reported} == {best}


def test_vtab_tables(vtab_run):
    _, result = vtab_run
    ours, theirs = result.tables
    rows = rows_of(ours)
    sized = ["VPT-shallow", "VPT-deep", "LoRA", "AdaptFormer"]
    others = ["H-Res, rank 8", "H-Res, rank 32", "full fine-tuning"]
    assert list(rows) == ["head alone", *sized[:3], "LoRA, merged", *sized[3:], *others]
    budget, head = rows["H-Res, rank 8"]["trainable"], rows["head alone"]["trainable"]
    assert head == 32 * 5 + 5
    assert budget == head + 2 * (2 * 32 * 8 + 8 + 32)
    for name in sized:
        assert rows[name]["trainable"] == pytest.approx(budget, rel=0.15), name
    assert "where training takes the validation data too" in ours.notes[0]
    assert theirs.title.startswith("Published by others, not measured here")
    assert "None of these numbers is ours" in theirs.notes[0]
    assert rows_of(theirs)["VPT-Deep"] == {"method": "VPT-Deep", "parameters": 0.53, "cifar100": 78.8, "svhn": 78.1}
    assert [verdict.claim for verdict in result.verdicts] == [3]


def test_a_second_call_of_vtab_trains_nothing(vtab_run, no_training):
    arguments, first = vtab_run
    assert script("vtab", *arguments, "--quick") == 0  # whose sizes are the same
    again = Result.load(arguments[5] / "vtab.json")
    assert again.tables == first.tables
    assert again.verdicts == ()
    with pytest.raises(AssertionError, match="made again"):
        script("vtab", *arguments, "--quick", "--draw", 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--model": "vit_base_patch16_224.orig_in21k"}, "the model 'vit_base_patch16_224.orig_in21k' cannot be had: "),
        ({"--model": "vit_base_patch16_224.no_such"}, "Invalid pretrained tag"),
        ({"--model": "owner/nothing"}, "the model 'owner/nothing' cannot be had: "),
        ({"--data": "svhn"}, r"'ufldl-stanford/svhn' (cropped_digits) cannot be had"),
    ],
)
def test_vtab_says_what_is_missing(timm_folder, vtab_data, tmp_path, capsys, change, said):
    given = {"--model": timm_folder, "--data": vtab_data, "--out": tmp_path}
    line = fail(capsys, "vtab", "--quick", *(part for pair in (given | change).items() for part in pair))
    assert said in line


def test_random_weights_give_no_verdict(timm_folder, vtab_data, tmp_path, monkeypatch):
    import vtab

    made = []
    monkeypatch.setattr(vtab, "arms_of", lambda problem, rates: [Arm("head alone", "linear", (0.01,))])
    monkeypatch.setattr(vtab, "verdict", made.append)
    shape = ["--model", timm_folder, "--random-weights", "--steps", 1, "--batch", 200, "--seeds", 2]
    assert script("vtab", "--data", vtab_data, "--out", tmp_path, *shape) == 0
    result = Result.load(tmp_path / "vtab.json")
    assert result.settings["random_weights"] is True
    assert not made


def test_classifiers_of_both_libraries(timm_folder, transformers_folder):
    from pretrained import classifier

    ours, theirs = classifier(str(timm_folder), 7), classifier(str(transformers_folder), 7)
    assert (ours.head, theirs.head) == ("head", "classifier")
    assert (ours.prepare.size, theirs.prepare.size) == (16, 16)
    assert (theirs.prepare.mean, theirs.prepare.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    kept = timm.create_model(f"local-dir:{timm_folder}", pretrained=True).state_dict()
    assert torch.equal(ours.model.state_dict()["blocks.1.attn.qkv.weight"], kept["blocks.1.attn.qkv.weight"])
    kept = transformers.ViTForImageClassification.from_pretrained(transformers_folder).state_dict()
    same = {name for name, tensor in theirs.fresh(3).state_dict().items() if torch.equal(tensor, kept[name])}
    assert kept.keys() - same == {"classifier.weight", "classifier.bias"}
    one, again, other = (theirs.fresh(seed).state_dict()["classifier.weight"] for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert one.shape == (7, 32)
    untrained = classifier(str(transformers_folder), 7, random=True).model.state_dict()
    query = next(name for name in kept if name.endswith("weight") and "attention" in name)
    assert not torch.equal(untrained[query], kept[query])


POOR, FAIR, GOOD = [0.5, 0.51, 0.5], [0.7, 0.71, 0.7], [0.7, 0.709, 0.702]


@pytest.mark.parametrize(
    ("hres", "shallow", "deep", "word"),
    [
        (FAIR, POOR, POOR, "holds"),
        (FAIR, GOOD, POOR, "holds"),  # on a par is enough
        (POOR, FAIR, GOOD, "does not hold"),
        (FAIR, POOR, [0.9, 0.9, 0.91], "partly holds"),
        ([0.7, None, 0.7], POOR, POOR, "partly holds"),
        ([0.6, 0.7, 0.8], FAIR, FAIR, "partly holds"),  # too wide a spread to say
    ],
)
def test_vtabs_verdict(hres, shallow, deep, word):
    from vtab import verdict

    values = {"H-Res, rank 8": hres, "VPT-shallow": shallow, "VPT-deep": deep}
    found = verdict({"svhn": [entry(name, numbers, "accuracy") for name, numbers in values.items()]})
    assert (found.claim, found.verdict) == (3, word)
    assert ("a run diverged" in found.ours) == (None in hres)
