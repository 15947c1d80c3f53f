"""The habits of the house: public names stay, private names of other libraries are fenced, hooks stand in few files.

`public_names.json` holds the signature of every public name. A change there is a change for users: edit it by hand.
"""

import ast
import importlib
import inspect
import json
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

import residual_steer

PACKAGE = Path(residual_steer.__file__).parent
FILES = {
    **{str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))},
    **{f"backbones/{path.name}": path for path in sorted((PACKAGE.parent / "backbones").glob("*.py"))},
}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in FILES.items()}

# Private names of other libraries, by file; True is a fenced file, which says on what versions it was tried.
PRIVATE = {
    "_internals.py": True,
    "discovery/graph.py": True,
    "_controller.py": {"_orig_mod"},
    "_frozen.py": {"_orig_mod", "_fsdp_wrapped_module"},
    "exported.py": {"_dynamo"},
    "field.py": {
        "_apply",
        "_load_from_state_dict",
        "_parameters",
        "_is_hf_initialized",
    },  # torch's seams for subclasses
    "hub.py": {"_name_or_path"},  # an entry of a config
    "injector.py": {"_apply"},
    "peft/_model.py": {"_mark_only_adapters_as_trainable", "_remove_adapter_name_from_key"},  # PEFT's seams for tuners
    "peft/_registry.py": True,
    "_undisturbed.py": {"_dynamo"},
    "recording.py": {"_orig_mod"},
    "trained_modules.py": {"_apply"},
    "training/processes.py": {"_original_forward"},  # of accelerate 1.10 and 1.15; training imports nothing of ours
}
TREES_OF_TENSORS = {"_pytree"}  # torch.utils._pytree, which torch.export documents and everybody imports

# Where hooks are registered, and what for.
HOOKS = {
    "_controller.py": "a steered model's call begins and ends; the gradients of idle fields are watched",
    "_subspace.py": "an optimizer's step is projected",
    "exported.py": "fields act where this library is not",
    "baselines/_attach.py": "methods to compare with",
    "injector.py": "fields act",
    "_state_dict.py": "a state dict has the heads of all fields, and one that is loaded finds them",
    "peft/_model.py": "PEFT's wrappers of `modules_to_save` learn whose each row is, as PEFT's own tuners tell them",
    "_undisturbed.py": "everything that only looks",
    "recording.py": "what leaves a block, behind the fields there",
    "trained_modules.py": "heads and norms that train with a field",
}

MODULES = ("", ".baselines", ".continual", ".data", ".diagnostics")
STANDARD = {"_fields", "_sysconfigdata", "_distutils_system_mod"}  # Python's own: of a namedtuple, and two modules
OF_TORCH = {
    name
    for made in (nn.Module(), torch.zeros(1), torch.optim.SGD([torch.zeros(1)]))
    for name in dir(made)
    if name.startswith("_")
}


def _is_private(name):
    return name.startswith("_") and not name.endswith("__") and name.strip("_").isidentifier()


def _own_names():
    """Return the private names that the package defines, those with which it overrides torch's left out."""
    names = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
                names.add(node.attr)
            elif isinstance(node, ast.Constant) and str(node.value).startswith(("_residual_", "_steering_")):
                names.add(node.value)  # keys under which we keep something in a model
    return names - OF_TORCH


def _is_self(node):
    return isinstance(node, ast.Name) and node.id in {"self", "cls"}


def _private_names(tree, own):
    """Yield the private names of other libraries that a file reads, writes, overrides, names or imports."""
    words = set()  # constants that are parts of words: in f-strings, and where a string's ends are looked at
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) or (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in {"endswith", "startswith", "removesuffix", "removeprefix"}
        ):
            words.update(part for part in ast.walk(node) if isinstance(part, ast.Constant))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            name = node.attr
        elif isinstance(node, ast.ClassDef):
            yield from (
                part.name
                for part in node.body
                if isinstance(part, ast.FunctionDef) and part.name in OF_TORCH and _is_private(part.name)
            )
            continue
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in words:
            for part in node.value.split("."):
                if _is_private(part) and " " not in node.value and part not in own | STANDARD:
                    yield part
            continue
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and not str(node.module).startswith("residual_steer"):
            yield from (part for part in str(node.module).split(".") if _is_private(part))
            yield from (alias.name for alias in node.names if _is_private(alias.name))
            continue
        else:
            continue
        if _is_private(name) and name not in own:
            yield name


def test_private_attributes_of_other_libraries_are_fenced():
    own = _own_names()
    found = {name: set(_private_names(tree, own)) - TREES_OF_TENSORS for name, tree in TREES.items()}
    loose = {name: names for name, names in found.items() if PRIVATE.get(name) is not True}
    loose = {name: left for name, names in loose.items() if (left := names - set(PRIVATE.get(name, ())))}
    assert not loose, f"private names of other libraries belong into _internals.py: {loose}"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("module._forward_hooks", {"_forward_hooks"}),
        ("self._parameters", {"_parameters"}),
        ("getattr(module, '_hf_hook', None)", {"_hf_hook"}),
        ("'torch._dynamo' in sys.modules", {"_dynamo"}),
        ("from torch._dynamo import reset", {"_dynamo"}),
        ("from transformers.utils import _is_there", {"_is_there"}),
        ("class Mine(nn.Module):\n    def _apply(self, fn): ...", {"_apply"}),
        ("self._mine; model._mine; f'{name}_mean'; name.endswith('_bias')", set()),
        ("from ._internals import version", set()),
    ],
)
def test_the_fence_finds_what_it_should(line, found):
    assert set(_private_names(ast.parse(line), {"_mine"})) == found


def test_hooks_are_registered_in_few_files():
    registering = {
        name
        for name, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr.startswith("register_")
        and node.func.attr.endswith("hook")
    }
    assert registering <= set(HOOKS), f"only {', '.join(HOOKS)} register hooks; look with `recording.watch`"


class _Said:
    """A default value as it is written down."""

    def __init__(self, value):
        self.value = value

    def __repr__(self):
        return getattr(self.value, "__qualname__", None) or repr(self.value)


def _signature(thing):
    """Return names, kinds and defaults of parameters as Python writes them."""
    kept = inspect.signature(thing)
    given = [
        one.replace(annotation=one.empty, default=one.default if one.default is one.empty else _Said(one.default))
        for one in kept.parameters.values()
    ]
    return str(kept.replace(parameters=given, return_annotation=kept.empty))


def _members(thing):
    """Yield the public methods and properties of a class that the package defines."""
    for name in dir(thing):
        owner = next((cls for cls in thing.__mro__ if name in vars(cls)), object)
        given = name in inspect.signature(thing).parameters  # a field of a dataclass
        if name.startswith("_") or name == "extra_repr" or given or not owner.__module__.startswith("residual_steer"):
            continue
        member = inspect.getattr_static(thing, name)
        if isinstance(member, (classmethod, staticmethod)) or inspect.isfunction(member):
            yield name, _signature(getattr(thing, name))
        elif isinstance(member, property):
            yield name, "property"


def public_names():
    """Return the signature of every public name, and of what is public in the classes, by its path."""
    names = {}
    for place in MODULES:
        module = importlib.import_module(f"residual_steer{place}")
        for name in module.__all__:
            thing, path = getattr(module, name), f"residual_steer{place}.{name}"
            if inspect.ismodule(thing):
                names[path] = "module"
            elif inspect.isclass(thing):
                names[path] = "exception" if issubclass(thing, Exception) else _signature(thing)
                if not issubclass(thing, Exception):
                    names |= {f"{path}.{member}": kind for member, kind in _members(thing)}
            else:
                names[path] = _signature(thing)
    return names


def test_no_file_of_a_run_is_committed():
    listed = subprocess.run(["git", "ls-files"], cwd=PACKAGE.parent, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a clone")
    folders = {Path(name).parts[0] for name in listed.stdout.splitlines() if "/" in name}
    rooms = {"residual_steer", "backbones", "tests", "examples", "experiments", "benchmarks", "docs"}
    assert folders == rooms | {".ci", ".github"}


def test_public_names_and_signatures_stay():
    frozen = json.loads(Path(__file__).with_name("public_names.json").read_text("utf-8"))
    assert public_names() == frozen
