"""`vllm serve` with fields, as its clients see it, and what goes wrong."""

import json
import os
import shutil
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import proof
import pytest
import requests
from proof import ASKED, FIELDS, Reference, answers, make_base, make_fields
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

NAMES = [*FIELDS]


def save_tokenizer(folder):
    """Save a tokenizer with a word for every number of the tiny models' vocabulary."""
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(proof.VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(folder)


def words(text):
    return " ".join(f"w{number}" for number in text)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    base = make_base(folder / "base", "llama")
    save_tokenizer(base)
    folders = make_fields(base, folder / "fields")
    make_fields(make_base(folder / "small", "llama", hidden_size=32), folder / "fields", {"narrow": {"rank": 2}})
    make_fields(
        base, folder / "fields", {"inner": {"rank": 2, "site": "mixer"}, "headed": {"rank": 2, "train": "lm_head"}}
    )
    texts = proof.prompts()
    reference = Reference(base, folders)
    return types.SimpleNamespace(
        folder=folder,
        base=str(base),
        folders=folders,
        texts=texts,
        reference=reference,
        wanted=answers(reference, texts, ASKED),
    )


@pytest.fixture(scope="module")
def server(case):
    """Two ranks, a slot for four fields, two fields from the start."""
    command = [case.base, "--served-model-name", "base", "--dtype", "float32", "--max-model-len", "256"]
    command += ["--tensor-parallel-size", "2", "--block-size", "32", "--enable-prefix-caching"]
    command += ["--enable-lora", "--max-loras", "4", "--max-lora-rank", "8"]
    command += ["--additional-config", '{"residual_steer": true}']
    command += ["--lora-modules", *(f"{name}={case.folders[name]}" for name in NAMES[:2])]
    with proof.serve(command, case.folder) as address:
        yield types.SimpleNamespace(address=address, client=openai.OpenAI(base_url=f"{address}/v1", api_key="none"))


def load(server, name, folder, **more):
    body = {"lora_name": name, "lora_path": str(folder), **more}
    return requests.post(f"{server.address}/v1/load_lora_adapter", json=body, timeout=60)


def unload(server, name):
    return requests.post(f"{server.address}/v1/unload_lora_adapter", json={"lora_name": name}, timeout=60)


def complete(server, model, text):
    done = server.client.completions.create(
        model=model,
        prompt=words(text),
        max_tokens=proof.NEW,
        temperature=0,
        logprobs=0,
        extra_body={"ignore_eos": True},
    )
    assert done.model == model
    found = done.choices[0].logprobs
    return proof.Answer([int(word.strip()[1:]) for word in found.tokens], found.token_logprobs)


def check(found, wanted):
    same, gap = proof.differ(found, wanted)
    print(f"\nserver: {same} of {len(wanted)} equal, largest difference of a log-probability {gap:.1e}")
    assert same == len(wanted)
    assert gap < 3e-5


def test_fields_are_models_beside_their_base(case, server):
    listed = {model.id: model for model in server.client.models.list()}
    assert set(listed) == {"base", *NAMES[:2]}
    assert listed["law"].parent == "base"
    ((folder, (weight, sha256)),) = json.loads(listed["law"].root).items()
    assert (folder, weight) == (case.folders["law"], 1.0)
    assert sha256 == proof.load_json(Path(folder, "steering.json"))["sha256"]


def test_twelve_clients_at_a_time(case, server):
    for name in NAMES[2:]:
        assert load(server, name, case.folders[name]).status_code == 200
    with ThreadPoolExecutor(12) as pool:
        jobs = [
            pool.submit(complete, server, name or "base", text) for name, text in zip(ASKED, case.texts, strict=True)
        ]
        check([job.result() for job in jobs], case.wanted)


def test_a_mix_is_loaded_as_one_model(case, server):
    mix = {case.folders["small"]: 0.7, case.folders["code"]: -0.3}
    assert load(server, "mix", json.dumps(mix)).status_code == 200
    check([complete(server, "mix", case.texts[0])], [case.reference(case.texts[0], {"small": 0.7, "code": -0.3})])


def test_a_bad_folder_is_an_error_and_the_server_lives_on(case, server, tmp_path):
    shutil.copytree(case.folders["law"], tmp_path / "torn")
    with open(tmp_path / "torn" / "steering.safetensors", "r+b") as file:
        file.seek(-5, os.SEEK_END)
        file.write(b"torn!")
    places = case.folder / "fields"
    for folder, message in (
        (tmp_path / "nowhere", "there is none, or a damaged one"),
        (tmp_path / "torn", "was changed after it was saved"),
        (places / "narrow", "4 blocks of width 32; this server has llama, 4 of width 64"),
        (places / "inner", "serves 'block' and 'after'"),
        (places / "headed", "trained base tensors"),
        (json.dumps({case.folders["law"]: 1, case.folders["last"]: 1}), "need 9 units of a slot"),
        (json.dumps({case.folders["law"]: "much"}), "is a finite number"),
        ("{", "weights by folder as JSON"),
    ):
        answer = load(server, "bad", folder)
        assert answer.status_code == 400, answer.text
        assert message in answer.json()["error"]["message"]
    assert load(server, "law", case.folders["law"], load_inplace=True).status_code == 400
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        complete(server, "bad", case.texts[0])
    check([complete(server, "law", case.texts[0])], case.wanted[:1])


def test_a_field_that_is_saved_anew_is_another_one(case, server, tmp_path):
    place, text = tmp_path / "field", proof.prompts(1, seed=5, low=80, high=81)[0]
    shutil.copytree(case.folders["law"], place)
    assert load(server, "mine", place).status_code == 200
    law = case.reference(text, "law")
    check([complete(server, "mine", text)], [law])
    shutil.rmtree(place)
    shutil.copytree(case.folders["squad"], place)
    check([complete(server, "mine", text)], [law])  # until it is loaded again
    for name in NAMES:  # its slot and its place in memory are taken
        complete(server, name, text)
    check([complete(server, "mine", text)], [law])
    assert unload(server, "mine").status_code == 200
    assert load(server, "mine", place).status_code == 200
    check([complete(server, "mine", text)], [case.reference(text, "squad")])
