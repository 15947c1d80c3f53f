"""SQuAD as a script, on tiny models and data of its schema, saved to folders here."""

import json
import re

import pytest
import torch

import residual_steer as rs
from experiments.results import Measured, Result
from residual_steer import SteerError
from scripts import LENGTH, WORDS, _prepared, entry, fail, no_training, rows_of, script  # noqa: F401

datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")
Image = pytest.importorskip("PIL.Image")
for package in ("peft", "tokenizers", "sklearn"):
    pytest.importorskip(package)


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


@pytest.mark.usefixtures("no_training")
def test_a_second_call_of_squad_trains_nothing(squad_run, capsys):
    arguments, first = squad_run
    assert script("squad", *arguments, "--quick") == 0  # whose sizes are the same
    again = Result.load(arguments[1] / "squad.json")
    assert again.tables == first.tables
    assert again.seconds == first.seconds
    assert again.verdicts == ()  # a test is no result
    assert "finished runs are read" in capsys.readouterr().out


@pytest.mark.parametrize("change", [["--batch", 2], ["--generate", 2], ["--length", 63], ["--limit", 4]])
@pytest.mark.usefixtures("no_training")
def test_other_sizes_are_other_runs(squad_run, change):
    arguments, _ = squad_run
    few = {"--steps": 4, "--batch": 4, "--limit": 8, "--valid": 8, "--generate": 4, **dict([change])}
    with pytest.raises(AssertionError, match="made again"):
        script("squad", *arguments, *(part for pair in few.items() for part in pair))


def test_no_paragraph_is_on_both_sides():
    from experiments.squad_task import hold_out

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

    from experiments.squad_task import questions_of

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
    from experiments.hub import language_model
    from experiments.squad_task import ROOM, answers

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
    from experiments.hub import language_model
    from experiments.squad_task import answers

    model, words = language_model(str(language_models["tiny-gpt2"]))
    rows = {"the fox": " hen\n dogs<end>", "corn at": " dawn<end> dogs bark dogs"}
    batches = [
        {"input_ids": (ids := torch.tensor([words(a + b)["input_ids"]])), "labels": ids} for a, b in rows.items()
    ]
    rs.fit(model, batches, steps=120, lr=1e-2, progress=False)
    prompts = [torch.tensor(words(text)["input_ids"]) for text in rows]
    assert answers(model.eval(), words, prompts, batch=2) == ["hen", "dawn"]


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

    from experiments.squad import Subject

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
    from experiments.squad import verdicts

    entries = {name: entry(name, values) for name, values in (("H-Res", LOW), ("LoRA", lora), ("prompt", prompt))}
    (found,) = verdicts([subject("gpt2")], [entries], 100)
    assert (found.claim, found.verdict) == (1, word)
    assert ("LoRA: a run diverged" in found.ours) == (None in lora)


@pytest.mark.parametrize(("values", "word"), [(LOW, "holds"), (HIGH, "does not hold"), ([3.0, None], "does not hold")])
def test_squads_verdict_on_claim_9(values, word):
    from experiments.squad import verdicts

    entries = {name: entry(name, values) for name in ("H-Res", "LoRA", "prompt")}
    found = verdicts([subject("gpt2"), subject("mamba", recurrent=True)], [entries, entries], 100)
    assert [(v.claim, v.verdict) for v in found[1:]] == [(9, word)]
