"""The comparison, end to end, on backbones that learn next to nothing: what is checked is that it hangs together."""

import json
import sys
from pathlib import Path

import pytest
import torch

for package in ("transformers", "timm", "datasets", "sklearn", "matplotlib"):
    pytest.importorskip(package)

EXAMPLES = Path(__file__).parents[1] / "examples"
METHODS = {"before", "H-Res", "full fine-tuning"}


@pytest.fixture(scope="module")
def example():
    """The script as a module; its siblings are imported as if it had been run."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import compare_transformer_mamba

        yield compare_transformer_mamba
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def run(example, cache, out, *arguments):
    assert example.main(["--quick", "--cache", str(cache), "--out", str(out), *map(str, arguments)]) == 0
    return json.loads((out / "results.json").read_text())


def metrics(record):
    return {(row["backbone"], name): m["metric"] for row in record["results"] for name, m in row["methods"].items()}


@pytest.fixture(scope="module")
def first(example, cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return out, run(example, cache, out)


def test_table_record_and_picture_agree(first):
    out, record = first
    rows = {row["backbone"]: row for row in record["results"]}
    assert set(rows) == {"GPT-2", "Mamba", "ViT"}
    lines = {line.split("|")[1].strip(): line for line in (out / "table.md").read_text().splitlines() if "|" in line}
    for name, row in rows.items():
        cells = [cell.strip() for cell in lines[name].split("|")[3:-1]]
        before, steered, full = (row["methods"][m] for m in ("before", "H-Res", "full fine-tuning"))
        digits = 1 if name == "ViT" else 3
        assert cells[0] == f"{steered['trainable']:,}"
        assert cells[2:5] == [f"{m['metric']:.{digits}f}" for m in (before, steered, full)]
        assert steered["trainable"] < full["trainable"] == full["total"] < steered["total"]
        gap = (steered["metric"] - before["metric"]) / (full["metric"] - before["metric"])
        assert row["gap_closed"] == pytest.approx(gap)
        assert [step for step, _ in steered["curve"]] == [1, 2, 3, 4]
        assert steered["curve"][-1][1] == steered["metric"]
        assert steered["seconds_per_step"] > 0
    assert set(rows["GPT-2"]["methods"]) == METHODS
    assert set(rows["ViT"]["methods"]) == METHODS | {"new head alone"}
    assert rows["ViT"]["methods"]["before"] == rows["ViT"]["methods"]["new head alone"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_record_says_how_to_get_it_again(first):
    _, record = first
    assert record["seed"] == 0
    assert record["options"]["quick"] is True
    assert record["versions"]["torch"] == torch.__version__
    assert {"cpu", "cores", "threads", "system"} <= set(record["machine"])
    assert record["command"]


def test_second_run_reads_the_cache_and_gives_the_same(example, cache, tmp_path, first, capsys):
    record = run(example, cache, tmp_path)
    said = capsys.readouterr().out
    assert said.count("from the cache") == 3
    assert "pre-trained in" not in said
    assert metrics(record) == metrics(first[1])


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no record", "record of nothing"])
def test_a_damaged_cache_is_made_again(example, cache, first, capsys, damage):
    import small_backbones
    from tasks import quicker

    recipe = quicker(small_backbones.RECIPES["ViT"])
    sound = small_backbones.get_backbone(recipe, cache)
    assert sound.was_cached
    (folder,) = cache.glob("vit-*")
    weights, record = folder / "model.safetensors", folder / "recipe.json"
    content = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "no record":
        record.unlink()
    else:
        record.write_text("[]")
    made = small_backbones.get_backbone(recipe, cache)
    assert not made.was_cached
    assert "damaged" in capsys.readouterr().err
    assert small_backbones.get_backbone(recipe, cache).was_cached
    for name, tensor in sound.model.state_dict().items():
        assert torch.equal(tensor, made.model.state_dict()[name])
    assert [path.name for path in cache.iterdir() if path.name.startswith(".")] == []


def test_another_recipe_is_another_backbone(example):
    import dataclasses

    import small_backbones as small

    recipe = small.RECIPES["ViT"]
    train, _ = small.pretraining_data("ViT")
    keys = {small.key_of(recipe, train), small.key_of(dataclasses.replace(recipe, steps=1), train)}
    keys.add(small.key_of(recipe, small.digits(range(4))))
    assert len(keys) == 3


def test_cache_lies_in_the_users_cache_folder(example, monkeypatch, tmp_path):
    import backbone_cache

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert backbone_cache.default_cache() == tmp_path / "residual-steer" / "backbones"


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "story.txt"
    path.write_text("".join(f"Line {i} tells of the {'fox' if i % 3 else 'hen'}.\n" for i in range(1500)))
    return path


@pytest.fixture(scope="module")
def language_model(tmp_path_factory, text_file):
    """A GPT-2 and a tokenizer in a folder, as anybody would save them."""
    import transformers
    from tokenizers import ByteLevelBPETokenizer

    folder = tmp_path_factory.mktemp("model") / "tiny-gpt2"
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train([str(text_file)], vocab_size=300, show_progress=False)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<|endoftext|>")
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_model_and_a_text_of_ones_own(example, cache, tmp_path, language_model, text_file):
    record = run(example, cache, tmp_path, "--model", language_model, "--data", text_file, "--rank", 4)
    (row,) = record["results"]
    assert row["backbone"] == "tiny-gpt2"
    assert row["unit"] == "bits per byte"
    tokens = row["methods"]["before"]["metric"]
    assert 0.5 < tokens < 8.3  # an untrained model knows nothing: log2(300) bits per token, of at least a byte


def test_small_backbones_on_a_text_of_ones_own(example, cache, first, tmp_path, text_file):
    record = run(example, cache, tmp_path, "--data", text_file, "--site", "mixer")
    assert {row["backbone"] for row in record["results"]} == {"GPT-2", "Mamba"}


def test_text_in_other_files(example, cache, tmp_path, language_model):
    (tmp_path / "data").mkdir()
    for name, count in (("train", 800), ("valid", 80)):
        lines = [json.dumps({"id": i, "text": f"Row {i} of many rows."}) for i in range(count)]
        (tmp_path / "data" / f"{name}.json").write_text("\n".join(lines))
    run(example, tmp_path / "cache", tmp_path / "out", "--model", language_model, "--data", tmp_path / "data")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three classes of grey pictures, one folder each."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for label, grey in (("dark", 20), ("middle", 120), ("light", 220)):
        (folder / label).mkdir()
        for i in range(12):
            Image.new("L", (20, 20), grey + i).save(folder / label / f"{i}.png")
    return folder


def test_pictures_of_ones_own(example, cache, first, tmp_path, pictures):
    import transformers

    model = tmp_path / "tiny-vit"
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    transformers.ViTForImageClassification(config).save_pretrained(model)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(model)
    record = run(example, tmp_path / "c", tmp_path / "a", "--model", model, "--data", pictures, "--rank", 4)
    (row,) = record["results"]
    assert row["methods"]["new head alone"]["trainable"] == 3 * 16 + 3
    assert row["methods"]["H-Res"]["trainable"] == 2 * (2 * 4 * 16 + 4 + 16) + 3 * 16 + 3
    run(example, tmp_path / "c", tmp_path / "b", "--model", model, "--rank", 4)  # without data: the digits
    record = run(example, cache, tmp_path / "d", "--data", pictures)  # without a model: the small ViT
    assert [row["backbone"] for row in record["results"]] == ["ViT"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "no/such-model"], "the model 'no/such-model' cannot be had"),
        (["--data", "no/such-data"], "the data set 'no/such-data' cannot be had"),
        (["--data", "EMPTY"], "has none of these"),
        (["--model", "EMPTY"], "cannot be had"),
        (["--model", "T5"], "takes a causal language model or an image classifier; "),
        (["--model", "GPT2", "--data", "PICTURES"], "language model, and the data is images"),
        (["--out", "FILE"], "--out"),
    ],
)
def test_errors_are_one_line(example, tmp_path, language_model, pictures, text_file, capsys, arguments, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5" / "config.json").write_text('{"model_type": "t5"}')
    places = {
        "EMPTY": tmp_path / "empty",
        "T5": tmp_path / "t5",
        "GPT2": language_model,
        "PICTURES": pictures,
        "FILE": text_file,
    }
    arguments = [str(places.get(argument, argument)) for argument in arguments]
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    assert example.main(["--quick", "--cache", str(tmp_path / "cache"), *out, *arguments]) == 1
    error = capsys.readouterr().err.strip()
    assert said in error
    assert error.count("\n") == 0
    assert error.startswith("error: ")


@pytest.fixture(scope="module")
def service(example):
    """The script that serves many tasks, as a module."""
    import serve_many_tasks

    return serve_many_tasks


@pytest.fixture(scope="module")
def served(service, cache, tmp_path_factory):
    out = tmp_path_factory.mktemp("fields")
    return out, service.serve_all(service.parse(["--quick", "--cache", str(cache), "--out", str(out)]))


def test_rows_of_a_mixed_batch_are_served_as_alone(service, served):
    out, found = served
    assert set(found) == {"GPT-2", "Mamba", "ViT"}
    for backbone, result in found.items():
        fields = {path.name for path in (out / backbone.lower()).iterdir()}
        assert len(fields) == 3
        text = backbone != "ViT"
        assert {field for _, field in result.metric} == fields | {None}
        assert {task for task, _ in result.metric} == fields | ({"Python"} if text else set())
        assert result.scoring <= service.TOLERANCE
        assert result.ratio > 0
        assert (result.generation is not None) == (result.generation_ratio is not None) == text
        assert not text or result.generation <= service.TOLERANCE
        assert all((out / backbone.lower() / field / "steering.json").exists() for field in fields)


def test_a_row_that_is_served_by_another_field_is_an_error(service, served):
    """Rows of a batch that do not get their own field: the example must say so rather than print a number."""
    import residual_steer as rs
    from small_backbones import RECIPES, build_gpt2
    from tasks import quicker

    out, _ = served
    model = build_gpt2(quicker(RECIPES["GPT-2"]).config).eval()
    for name in ("prose", "capitals"):
        rs.load(model, out / "gpt-2" / name)
    ids = torch.arange(4 * 8).view(4, 8)
    rows = ["prose", "capitals", None, "prose"]
    assert service.largest_difference(model, rows, lambda own: service.logits(model, ids[own])) <= service.TOLERANCE

    def shuffled(own):
        return service.logits(model, ids[own]).flip(0)

    with pytest.raises(rs.SteerError, match="differ from separate runs"):
        service.largest_difference(model, rows, shuffled)

    def reselected(own):
        with rs.use(model, None) if len(own) < 4 else rs.use(model, rows):
            return service.logits(model, ids[own])

    with pytest.raises(rs.SteerError, match="differ from separate runs"):
        service.largest_difference(model, rows, reselected)


def test_the_best_of_every_row_is_bold(service):
    from types import SimpleNamespace

    metric = {("a", None): 3.0, ("a", "f"): 1.0, ("b", None): 2.0, ("b", "f"): 2.004}
    for kind, bold in (("text", ["1.00", "2.00", "2.00"]), ("images", ["3.0", "2.0", "2.0"])):
        lines = service.table(metric, SimpleNamespace(kind=kind, unit="u", backbone="B")).splitlines()
        assert len({len(line) for line in lines}) == 1
        assert [part for line in lines for part in line.split("**")[1::2]] == bold
