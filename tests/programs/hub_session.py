"""A user of the Hub: pushes, loads, and asks for what is not there; `DONE` is what came of each step, for JSON."""

import os
import urllib.request
from pathlib import Path

import torch
from huggingface_hub import HfApi, constants
from small_net import BATCH, fresh, steer

import residual_steer as rs
from residual_steer.hub import upload


def state(model):
    hooks = [(name, len(module._forward_hooks)) for name, module in model.named_modules()]
    gradients = [(name, parameter.requires_grad) for name, parameter in model.named_parameters()]
    return hooks, gradients, {key: tensor.tolist() for key, tensor in model.state_dict().items()}


FIELDS = {name: steer(fresh(), seed, train="head") for seed, name in enumerate("ABC")}
OUTPUTS = {name: model(BATCH) for name, model in FIELDS.items()}
DONE = {}


def attempt(step, call, model):
    """Note which field the model has after the call, or the error, and whether it left the model alone."""
    before = state(model)
    try:
        found = call(model)
    except rs.SteerError as error:
        DONE[step] = {"error": str(error), "unchanged": state(model) == before}
    else:
        DONE[step] = {
            "gave": found if isinstance(found, str) else recognise(model),
            "unchanged": state(model) == before,
        }


def recognise(model):
    return [name for name, expected in OUTPUTS.items() if torch.equal(model(BATCH), expected)]


def load(step, repo, **options):
    attempt(step, lambda model: rs.load(model, repo, **options), fresh())


def push(step, repo, which="A", **options):
    attempt(step, lambda model: rs.push(model, repo, **options), FIELDS[which])


def online():
    push("push A", "me/field")
    first = HfApi().model_info("me/field").sha
    load("load A", "me/field")
    push("push B", "me/field", "B", message="Better")
    load("load B", "me/field")
    load("load the first", "me/field", revision=first)
    push("push privately", "me/secret", private=True)
    load("load privately", "me/secret")
    push("push privately to a public one", "me/field", private=True)

    rs.save(FIELDS["A"], "adapter", format="peft")
    upload("me/adapter", {file.name: file.read_bytes() for file in Path("adapter").iterdir()}, "A", private=False)
    load("load an adapter", "me/adapter")

    load("unknown repository", "me/absent")
    load("unknown revision", "me/field", revision="v9")
    load("unknown commit", "me/field", revision="0" * 40)
    load("gated", "other/gated")
    load("no field", "other/empty")
    load("half a field", "other/half")
    load("a name that cannot be", "me/two--dashes")
    push("another's repository", "other/field")
    push("no repository's name", "field")
    load("another name here", "me/field", name="mine")

    rs.save(FIELDS["C"], "me/field")
    load("a local folder wins", "me/field")
    load("a revision of a local folder", "me/field", revision="main")
    attempt("a path is no name", lambda model: rs.load(model, Path("me/absent")), fresh())
    os.rename("me", "moved")

    token = os.environ.pop("HF_TOKEN")
    load("privately, not logged in", "me/secret", revision="0" * 40)
    push("push, not logged in", "me/field")
    os.environ["HF_TOKEN"] = token

    urllib.request.urlopen(f"{constants.ENDPOINT}/stop", data=b"").close()
    load("server gone, cached", "me/field")
    load("server gone", "me/never")
    push("push, server gone", "me/field")


def offline():
    load("offline, cached", "me/field")
    load("offline", "me/never")
    push("push, offline", "me/field")
