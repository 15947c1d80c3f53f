"""The command `residual-steer`: look at a model, train a field, measure and export it, and check an installation.

Every command is a few lines over the public calls.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from torch import nn

from ._checks import import_optional
from ._files import write_whole
from .backbone import Backbone
from .errors import SteerError
from .export import export
from .recipe import KINDS, Recipe, changed, open_model, read_yaml
from .registry import find_backbone
from .steering import parameters, steer, unsteer
from .storage import card

__all__ = ["main"]

_SHORT = {  # flags of `train`, and the keys of a recipe that they are
    "--model": "model",
    "--arch": "arch",
    **{f"--{kind}": f"data.{kind}" for kind in KINDS},
    "--length": "data.length",
    "--batch": "data.batch",
    "--rank": "field.rank",
    "--site": "field.site",
    "--name": "field.name",
    "--steps": "fit.steps",
    "--lr": "fit.lr",
}
_OPTIONAL = {  # packages that other things need, and what they are for
    "transformers": "models of transformers",
    "timm": "models of timm",
    "datasets": "data from the Hub",
    "peft": "fields inside PEFT, and LoRA to compare with",
    "matplotlib": "plots of diagnostics",
    "mamba-ssm": "the CUDA kernels of Mamba",
    "causal-conv1d": "the CUDA kernels of Mamba",
    "trl": "TRL's trainers",
    "bitsandbytes": "4-bit and 8-bit bases",
    "vllm": "serving",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, or 1 where something is wrong, which is printed."""
    parser = argparse.ArgumentParser("residual-steer", description=str(__doc__).splitlines()[0])
    parser.add_argument("--version", action="version", version=importlib.metadata.version("residual-steer"))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    add = commands.add_parser

    inspect = add("inspect", help="where a model can be steered, and what a field costs, from its config alone")
    inspect.add_argument("model", help="a name on the Hub, a folder, a config.json alone, or timm:NAME")
    inspect.add_argument("--arch", help="the backbone; found if left out")
    inspect.add_argument("--rank", type=int, default=32, help="of the fields that are counted")
    inspect.set_defaults(run=_inspect)

    train = add("train", help="train a field from a recipe, from flags, or from both")
    train.add_argument("recipe", nargs="?", help="a YAML file with model, data, field and fit")
    for flag, key in _SHORT.items():
        several: dict[str, Any] = {"nargs": "+"} if flag == "--site" else {}
        train.add_argument(flag, dest=key, metavar="VALUE", help=f"`{key}` of the recipe", **several)
    train.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key, as fit.warmup=0.1")
    train.add_argument("--out", required=True, help="the folder of the saved field, and of its recipe")
    train.set_defaults(run=_train)

    evaluate = add("eval", help="measure a trained field on the data that its recipe held out")
    evaluate.add_argument("field", help="a folder that `train` wrote")
    evaluate.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="as train, but of field and fit"
    )
    evaluate.add_argument("--json", action="store_true", help="print JSON")
    evaluate.set_defaults(run=_eval)

    carded = add("card", help="write the card that `push` would put beside a trained field; the Hub is not asked")
    carded.add_argument("field", help="a folder that `train` wrote")
    carded.add_argument("--repo", default="owner/name", help="what it will be called on the Hub")
    carded.set_defaults(run=_card)

    exported = add("export", help="bake a trained field into a folder that transformers loads without this library")
    exported.add_argument("field", help="a folder that `train` wrote")
    exported.add_argument("out", help="the folder to write")
    exported.set_defaults(run=_export)

    add("doctor", help="what is installed, what is missing, and what to do").set_defaults(run=_doctor)
    add("demo", help="make, steer, save and load a small model; a minute, no download").set_defaults(run=_demo)

    chosen = parser.parse_args(arguments)
    try:
        return int(chosen.run(chosen) or 0)
    except SteerError as error:
        print(f"residual-steer: {error}", file=sys.stderr)
        return 1


def _inspect(chosen: argparse.Namespace) -> None:
    model = open_model(chosen.model, weights=False)
    total = sum(parameter.numel() for parameter in model.parameters())
    print(f"{type(model).__name__}, {total:,} parameters{_stored(model)}")
    backbone = _backbone(model, chosen.arch)
    print(backbone)
    print(f"\n{'site':8} {'points':>6} {f'rank {chosen.rank}':>14} {'share':>7}")
    for site in backbone.sites:
        steer(model, backbone, rank=chosen.rank, site=site)
        trained = sum(parameter.numel() for parameter in parameters(model))
        points = sum(backbone.point(index, site) is not None for index in range(len(backbone.blocks)))
        unsteer(model)
        print(f"{site:8} {points:6} {trained:14,} {trained / total:7.2%}")
    print(f"and linear maps: {', '.join(backbone.projections) or 'none'}")


def _backbone(model: nn.Module, arch: str | None) -> Backbone:
    """Return the backbone of a model on the meta device; one that no family knows must be run to be found."""
    try:
        return find_backbone(model, arch)
    except (SteerError, NotImplementedError) as error:
        raise SteerError(
            f"no backbone was found from the config alone: {error} What no family describes is found by a run: "
            "find_backbone(model) on the model with its weights."
        ) from error


def _stored(model: nn.Module) -> str:
    """Return in what types the weights are, and how they are quantised."""
    types = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
    quantised = getattr(getattr(model, "config", None), "quantization_config", None)
    method = quantised.get("quant_method") if isinstance(quantised, dict) else getattr(quantised, "quant_method", None)
    return f", {', '.join(types)}" + (f", stored by {getattr(method, 'value', method)}" if method else "")


def _train(chosen: argparse.Namespace) -> None:
    flags = {key: getattr(chosen, key) for key in _SHORT.values()}
    flags["field.site"] = flags["field.site"][0] if len(flags["field.site"] or ()) == 1 else flags["field.site"]
    changes = {key: _value(text) if key not in _WORDS else text for key, text in flags.items() if text is not None}
    changes |= _changes(chosen.set)
    recipe = Recipe.of(changed({}, changes)) if chosen.recipe is None else Recipe.read(chosen.recipe, changes)
    _, history = recipe.train(chosen.out)
    print(f"saved to {chosen.out}; held out: {_line(history.valid[-1]) if history.valid else 'nothing'}")


_WORDS = {"model", "arch", *(f"data.{kind}" for kind in KINDS), "field.name", "field.site"}


def _eval(chosen: argparse.Namespace) -> None:
    changes = _changes(chosen.set)
    idle = [key for key in changes if key.partition(".")[0] in ("field", "fit")]
    if idle:
        raise SteerError(
            f"`eval` measures a field as it was trained: `--set` changes model, arch, data and seed; received {idle}."
        )
    recipe = Recipe.read(Path(chosen.field) / "recipe.yaml", changes)
    found = recipe.evaluate(chosen.field)
    if chosen.json:
        print(json.dumps(found))
        return
    for name, values in found.items():
        print(f"{name:8} {_line(values)}")


def _card(chosen: argparse.Namespace) -> None:
    path = Path(chosen.field) / "README.md"
    write_whole({path: card(_trained(chosen), chosen.repo).encode()})
    print(f"wrote {path}")


def _export(chosen: argparse.Namespace) -> None:
    print(f"wrote {export(_trained(chosen), chosen.out)}")


def _trained(chosen: argparse.Namespace) -> nn.Module:
    """Return the model under the field of a folder that `train` wrote."""
    return Recipe.read(Path(chosen.field) / "recipe.yaml").read_field(chosen.field)


def _line(values: Any) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in dict(values).items() if isinstance(value, float))


def _changes(given: Sequence[str]) -> dict[str, Any]:
    """Return what `--set KEY=VALUE` asks for."""
    for text in given:
        if "=" not in text:
            raise SteerError(f"`--set` takes KEY=VALUE, as fit.warmup=0.1; received {text!r}.")
    return {key: _value(text) for key, _, text in (each.partition("=") for each in given)}


def _value(text: str) -> Any:
    """Return a value as YAML has it."""
    return read_yaml(f"the value {text!r}", text)


def _doctor(chosen: argparse.Namespace) -> int:
    """Print the machine and every package, with what to do; 1 if something that is needed is wrong."""
    print(f"residual-steer {importlib.metadata.version('residual-steer')}, Python {platform.python_version()}")
    print(f"{platform.platform()}, {torch.get_num_threads()} threads")
    cards = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    for index in cards:
        card = torch.cuda.get_device_properties(index)
        print(f"GPU {index}: {card.name}, {card.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}")
    if not cards:
        print("GPU: none that torch can use")
    print()
    wrong = 0
    asked: dict[str, tuple[SpecifierSet, bool]] = {}
    for line in importlib.metadata.requires("residual-steer") or ():
        one = Requirement(line)
        if one.specifier:
            asked.setdefault(one.name.replace("_", "-"), (one.specifier, "extra" not in str(one.marker)))
    for name in dict.fromkeys([*(name for name, (_, needed) in asked.items() if needed), *_OPTIONAL]):
        releases, needed = asked.get(name, (SpecifierSet(), False))
        how = f"pip install '{name}{releases}'"
        try:
            there = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            wrong += needed
            print(f"{name:16} –          {_OPTIONAL.get(name, 'needed')}: {how}")
            continue
        fits = releases.contains(there, prereleases=True)
        wrong += not fits
        print(f"{name:16} {there:10} {'ok' if fits else f'another release is asked for: {how}'}")
    return int(wrong > 0)


def _demo(chosen: argparse.Namespace) -> None:
    """Pre-train a GPT-2 of bytes on Python, steer it to English, and take the field off and on again."""
    from tempfile import TemporaryDirectory

    from torch.utils.data import DataLoader, Subset

    from . import fit, load, save, summary, use
    from .data import ByteBlocks, english_prose, python_source
    from .training import evaluate

    transformers = import_optional("transformers", "the demo needs transformers", "transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "n_embd": 96, "n_layer": 4, "n_head": 4, "n_positions": 64}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    code, prose = python_source(2_000_000), english_prose()
    fit(model, DataLoader(ByteBlocks(code, 64), 16, shuffle=True), steps=300, lr=3e-3)
    base = {key: value.clone() for key, value in model.state_dict().items()}
    held = DataLoader(Subset(ByteBlocks(prose, 64, "valid"), range(64)), 16)
    steer(model, rank=16)
    print(summary(model))
    print(f"English under the frozen model of Python: {evaluate(model, held)['loss']:.3f} nats a byte")
    fit(model, DataLoader(ByteBlocks(prose, 64), 16, shuffle=True), steps=200, lr=2e-2)
    print(f"with a field of rank 16:                  {evaluate(model, held)['loss']:.3f}")
    with TemporaryDirectory() as folder:
        save(model, folder)
        again: nn.Module = transformers.GPT2LMHeadModel(config)
        again.load_state_dict(base)
        load(again, folder)
    print(f"saved, and loaded on a fresh copy:        {evaluate(again, held)['loss']:.3f}")
    use(again, None)
    print(f"switched off:                             {evaluate(again, held)['loss']:.3f}")
