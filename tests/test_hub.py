"""The Hub, through the real client, against a server on this machine; one session of a user, seen from many sides."""

import json
from pathlib import Path

import pytest
import torch

import residual_steer as rs
from apart import printed
from fields import refused, shake, vit
from hub_server import TOKEN, HubServer
from residual_steer._controller import steering_of
from residual_steer._field_file import DESCRIPTION, TENSORS, describe
from residual_steer.hub import model_card

PROGRAM = Path(__file__).parent / "programs" / "hub_session.py"


def session(folder, hub, mode):
    options = {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": str(int(mode == "offline"))}
    options |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(folder / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    code = f"{PROGRAM.read_text()}\n{mode}()\nimport json; print(json.dumps(DONE))"
    return json.loads(printed(code, folder, [PROGRAM.parent], **options)[0].splitlines()[-1])


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What a session online and one offline came to, and the server with all that it holds then."""
    folder = tmp_path_factory.mktemp("hub")
    with HubServer() as hub:
        hub.add("other/gated", {DESCRIPTION: b"{}", TENSORS: b""}, gated=True)
        hub.add("other/empty", {"README.md": b"nothing here"})
        hub.add("other/half", {TENSORS: b""})
        steps = session(folder, hub, "online")
    return steps | session(folder, hub, "offline"), hub


GIVES = {
    "load A": "A",
    "load B": "B",
    "load the first": "A",
    "load privately": "A",
    "load an adapter": "A",
    "another name here": "B",
    "a local folder wins": "C",
    "server gone, cached": "B",
    "offline, cached": "B",
}


@pytest.mark.parametrize("step", GIVES)
def test_what_was_pushed_comes_back(told, step):
    assert told[0][step].get("gave") == [GIVES[step]], told[0][step]


REFUSES = {
    "unknown repository": r"no local folder 'me/absent', and on the Hub, me/absent: there is none.*hf auth login",
    "unknown revision": r"me/field at revision 'v9': there is no such revision\. Name a branch, tag or commit",
    "unknown commit": "there is no such revision",
    "gated": "other/gated: access to it is gated. Ask for access on its page, then log in",
    "no field": f"other/empty: it holds no {TENSORS} and no {DESCRIPTION}",
    "half a field": f"other/half: it holds no {DESCRIPTION}",
    "a name that cannot be": r"that is no name.*two--dashes.*'owner/name'",
    "another's repository": "could not push to other/field: your token does not allow that. Check the owner",
    "no repository's name": "a repository on the Hub is named 'owner/name'; received 'field'",
    "push privately to a public one": "it is there already, and public. Nothing was uploaded",
    "a revision of a local folder": "`revision` is a branch.* on the Hub.*received 'main' with 'me/field'",
    "a path is no name": "could not read a field from me/absent: .*No such file",
    "privately, not logged in": "me/secret.*there is none that you may use.*hf auth login",
    "push, not logged in": "could not push to me/field: there is none that you may use.*hf auth login",
    "server gone": r"no local folder 'me/never'.*the Hub could not be asked.*refused.*Check the connection",
    "push, server gone": "could not push to me/field: the Hub could not be asked.*Check the connection",
    "offline": "no local folder 'me/never'.*the Hub was not asked, since HF_HUB_OFFLINE is set. Unset it to",
    "push, offline": "could not push to me/field: the Hub was not asked, since HF_HUB_OFFLINE is set",
}


@pytest.mark.parametrize("step", REFUSES)
def test_what_cannot_be_says_why_and_what_to_do_and_changes_nothing(told, step):
    error = told[0][step].get("error", told[0][step])
    with pytest.raises(rs.SteerError, match=REFUSES[step]):
        raise rs.SteerError(error)
    assert told[0][step]["unchanged"]


def test_a_push_is_one_commit_and_leaves_the_model_and_other_files_alone(told):
    steps, hub = told
    for step in ("push A", "push B", "push privately"):
        assert steps[step]["unchanged"]
    assert steps["push A"]["gave"] == steps["push B"]["gave"] == f"{hub.address}/me/field"
    whole = {".gitattributes", "README.md", DESCRIPTION, TENSORS}
    assert [set(files) for _, files in hub.repos["me/field"].commits] == [{".gitattributes"}, whole, whole]
    assert hub.repos["me/secret"].private
    assert not hub.repos["me/field"].private


def test_both_files_are_fetched_from_the_same_commit_and_no_other_file_is(told):
    asked = [line.split("/resolve/")[1].split("/") for line in told[1].asked if "/resolve/" in line]
    assert {file for _, file in asked} <= {TENSORS, DESCRIPTION, "adapter_config.json", "adapter_model.safetensors"}
    assert {revision for revision, _ in asked} <= {
        commit for repo in told[1].repos.values() for commit, _ in repo.commits
    }


def test_the_card_on_the_hub_states_what_is_known(told):
    card = told[1].repos["me/field"].commits[-1][1]["README.md"].decode()
    size = len(told[1].repos["me/field"].commits[-1][1][TENSORS])
    assert "base_model" not in card
    for line in (
        "library_name: residual-steer",
        "| backbone | net: `small_net.Net`, 2 blocks of width 8 |",
        "| base model | not recorded |",
        "| site | `block` |",
        "| steered blocks | 0, 1 |",
        "| rank | 3 |",
        "| trained base tensors | `head.weight` (3, 8), `head.bias` (3,) |",
        "| parameters | 145 |",
        f"| size | {size:,} bytes |",
        'rs.load(model, "me/field")',
    ):
        assert line in card.splitlines(), line


def gpt2(name):
    transformers = pytest.importorskip("transformers")
    shape = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 9, "bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))
    model.config._name_or_path = name
    return rs.steer(model, rank=4)


def card_of(model):
    base, state = steering_of(model)
    described = describe(state.specs["default"], base, state.backbone)
    return model_card("me/field", base, base, described, state.tensors(base, "default"), 1)


def test_the_code_on_a_card_runs(tmp_path, monkeypatch):
    """The card of a model of transformers says how to load it; here its base model is a folder in the Hub's cache."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(tmp_path)
    card = card_of(gpt2("someone/small-gpt2"))
    data = hub.ModelCard(card).data
    told = data.to_dict()
    assert (told["library_name"], told["base_model"], told["tags"]) == (
        "residual-steer",
        "someone/small-gpt2",
        ["residual-steer", "gpt2"],
    )
    model = gpt2("someone/small-gpt2")
    rs.save(shake(model), "me/field")
    ids = torch.arange(8).reshape(2, 4)
    expected = model.eval()(ids).logits
    rs.unsteer(model).save_pretrained("someone/small-gpt2")
    names = {}
    exec(card.partition("```python\n")[2].partition("```")[0], names)
    assert torch.equal(names["model"].eval()(ids).logits, expected)


@pytest.mark.parametrize("name", ["", "./run", "/data/gpt2", "C:\\models\\gpt2", "gpt2", "runs/mine", None])
def test_a_card_names_no_base_model_that_the_hub_does_not_have(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    card = card_of(gpt2(name))
    assert "base_model" not in card
    assert "from_pretrained" not in card


@pytest.mark.parametrize("revision", ["", 5])
def test_a_revision_is_a_name(revision):
    with refused(model := vit(), "`revision` is a branch, tag or commit"):
        rs.load(model, "me/field", revision=revision)
