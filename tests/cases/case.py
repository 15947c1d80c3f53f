"""One row of the table, and how the models of its libraries are made."""

from __future__ import annotations

import ast
import copy
import functools
import importlib
import importlib.metadata
import importlib.util
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor, nn

from mamba_ssm_on_cpu import compiled

VOCABULARY, LENGTH, WIDTH, RANK = 50, 7, 16, 4
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
Points = dict[str, tuple["str | None", ...]]


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return what enters most modules: the first positional tensor, or `hidden_states`."""
    return next((value for value in args if isinstance(value, Tensor)), kwargs.get("hidden_states"))


def first_output(output: Any) -> Tensor:
    """Return what leaves most modules: a tensor, or the first of a tuple."""
    return output if isinstance(output, Tensor) else output[0]


def entering_pair(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return what enters a block of `mamba_ssm`: hidden + residual, or hidden alone in the first block."""
    hidden, residual = args
    return hidden if residual is None else hidden + residual


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: the case's name in test ids.
        make: builds the model.
        batch: the keywords of a call.
        points: site to the path of its module in every block, None where a block has none; written out, so that the
            backbones are checked.
        head: modules that `train` opens.
        enter: the stream that enters a block, from its call.
        leave: the stream that leaves a block, from its output.
        generates: whether it is a language model of transformers, which generates with and without a cache.
        scans: whether steering trains it through our scan, which agrees with the model's own scan to rounding.
        kernels: whether it runs compiled kernels where they are installed.
        mixes_rows: whether the rows of a batch depend on one another in training, by batch norm.
        beams_fail: how the library's own model refuses to generate with beams and a cache.
        pickle_fails: how the library's own model, unsteered, fails to be pickled.
        untraced: why `torch.compile` and `torch.export` are left out; another case of its layout goes through both.
        broken: what the installed release of a library cannot do with the model unsteered (`generate`, `checkpoint` or
            `export`), and why; see `before`.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Any]]
    points: Points
    head: str
    enter: Callable[[tuple[Any, ...], dict[str, Any]], Tensor] = first_tensor
    leave: Callable[[Any], Tensor] = first_output
    generates: bool = False
    scans: bool = False
    kernels: bool = False
    mixes_rows: bool = False
    beams_fail: str = ""
    pickle_fails: str = ""
    untraced: str = ""
    broken: dict[str, str] = field(default_factory=dict)

    def needs(self, what: str) -> None:
        """Skip the test if the installed release cannot do what it needs, whoever steers the model."""
        if what in self.broken:
            pytest.skip(self.broken[what])

    def build(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return a frozen model in evaluation mode; the same weights each time."""
        if self.kernels and device == "cpu" and compiled():
            pytest.skip("the kernels that are installed here take CUDA tensors alone; the cuda cases run them")
        model = _copies(self.make)()
        return model.to(device, dtype).eval().requires_grad_(False)

    def inputs(self, model: nn.Module) -> dict[str, Any]:
        """Return the keywords of a call, on the model's device and in its dtype."""
        torch.manual_seed(1)
        like = next(model.parameters())
        return {key: _like(value, like) if isinstance(value, Tensor) else value for key, value in self.batch().items()}

    def run(self, model: nn.Module, **more: Any) -> Tensor:
        """Return the model's output as one tensor."""
        output = model(**self.inputs(model), **more)
        for name in ("logits", "last_hidden_state"):
            output = getattr(output, name, output)
        return output

    def loss(self, model: nn.Module) -> Tensor:
        """Return a loss to which every entry of the output matters differently."""
        output = self.run(model).float()
        generator = torch.Generator().manual_seed(2)
        return (output * torch.randn(output.shape, generator=generator).to(output.device)).mean()

    def paths(self, site: str) -> tuple[str | None, ...]:
        """Return the path of the module that `site` steers in every block."""
        return self.points["mixer" if site == "input" else site]

    def layers(self, site: str) -> list[int]:
        """Return the blocks that have a site."""
        return [index for index, path in enumerate(self.paths(site)) if path is not None]

    def modules(self, model: nn.Module, site: str) -> list[nn.Module]:
        """Return the module that `site` steers in every block that has it."""
        return [model.get_submodule(path) for path in self.paths(site) if path is not None]


def points(blocks: list[str], mixer: str | list[str | None] | None, mlp: str | list[str | None] | None) -> Points:
    """Return a table of points from the paths of blocks, and those of their parts inside, one or one per block."""
    found: Points = {"block": tuple(blocks)}
    for site, parts in (("mixer", mixer), ("input", mixer), ("mlp", mlp)):
        inner = parts if isinstance(parts, list) else [parts] * len(blocks)
        if any(inner):
            found[site] = tuple(f"{block}.{part}" if part else None for block, part in zip(blocks, inner, strict=True))
    return found


def pair(block: str, mixer: str | list[str | None] | None, mlp: str | list[str | None] | None = "mlp") -> Points:
    """Return the points of two blocks, whose paths differ in a number."""
    return points([block.format(index) for index in range(2)], mixer, mlp)


def _like(value: Tensor, like: Tensor) -> Tensor:
    return value.to(like.device, like.dtype) if value.is_floating_point() else value.to(like.device)


@functools.cache
def _copies(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """Return what makes copies of a model; by pickle, but for its tensors: in half the time of `deepcopy`."""
    torch.manual_seed(0)
    model, tensors, file = make(), {}, io.BytesIO()

    def key_of(thing: object) -> int | None:
        if isinstance(thing, Tensor):
            tensors[id(thing)] = thing
            return id(thing)
        return None

    pickler = pickle.Pickler(file)
    pickler.persistent_id = key_of
    try:
        pickler.dump(model)
    except Exception:  # of what has no name
        return functools.partial(copy.deepcopy, model)

    def unpickled() -> nn.Module:
        memo: dict[int, Any] = {}
        unpickler = pickle.Unpickler(io.BytesIO(file.getvalue()))
        unpickler.persistent_load = lambda key: copy.deepcopy(tensors[key], memo)
        return unpickler.load()

    return unpickled


def before(package: str, release: str, **broken: str) -> dict[str, str]:
    """Return what a package could not do before a release, by keyword; nothing where a newer one is installed."""
    installed = importlib.metadata.version(package) if importlib.util.find_spec(package) else release
    if Version(installed) >= Version(release):
        return {}
    return {what: f"{package} {installed}, unsteered: {why}" for what, why in broken.items()}


def of_timm(module: str, name: str, *args: Any, **settings: Any) -> nn.Module:
    """Build a model of timm from its class."""
    package = pytest.importorskip("timm", reason="timm is not installed")
    return getattr(importlib.import_module(f"{package.__name__}.models.{module}"), name)(*args, **settings)


def of_transformers(model: str, config: str, **settings: Any) -> nn.Module:
    """Build a model of transformers from its config."""
    package = pytest.importorskip("transformers", reason="transformers is not installed")
    return getattr(package, model)(getattr(package, config)(**settings))


def text(model: str, config: str, **more: Any) -> nn.Module:
    """Build a small model over tokens, whose config calls things as most do."""
    shape = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    return of_transformers(model, config, **{**shape, "intermediate_size": 32, "num_labels": 3, **SPECIAL, **more})


def read(settings: str) -> dict[str, Any]:
    """Return settings from words: `a=1 b=[2,3]`."""
    pairs = (word.split("=") for word in settings.split())
    return {key: ast.literal_eval(value) for key, value in pairs}


def of_text(name: str, kind: str, points: Points, head: str, settings: str = "", **more: Any) -> Case:
    """Return the case of a model over tokens of transformers: `XForY`, whose config is `XConfig` unless it is named."""
    config = more.pop("config", f"{kind.partition('For')[0]}Config")
    make = functools.partial(text, kind, config, **read(settings))
    return Case(name, make, more.pop("batch", tokens), points, head, **more)


def causal(name: str, kind: str, points: Points, head: str, settings: str = "", **more: Any) -> Case:
    """Return the case of a language model of transformers, which is called without its cache, and generates."""
    return of_text(name, f"{kind}ForCausalLM", points, head, settings, batch=WITHOUT_CACHE, generates=True, **more)


def tokens(**more: Any) -> dict[str, Any]:
    """Return a batch of tokens."""
    return {"input_ids": torch.randint(3, VOCABULARY, (2, LENGTH)), **more}


WITHOUT_CACHE = functools.partial(tokens, use_cache=False)


def floats(keyword: str, *shape: int) -> Callable[[], dict[str, Tensor]]:
    """Return what makes a batch of random numbers."""
    return functools.partial(_floats, keyword, shape)


def _floats(keyword: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    return {keyword: torch.randn(2, *shape)}
