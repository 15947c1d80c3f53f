"""A training run in words: which model, which data, which field, how it trains; read from YAML, checked, and run."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

from ._checks import check_integer, check_number, import_optional
from ._files import as_path, make_folder, write_whole
from .data import ByteBlocks, TokenBlocks, images, splits, vtab, wikitext
from .errors import SteerError
from .steering import steer
from .storage import load, save
from .training import FitOptions, History, evaluate, fit

__all__ = ["Recipe", "open_model"]

KINDS = ("text", "wikitext", "images", "vtab")
_FIELD = tuple(name for name in inspect.signature(steer).parameters if name not in ("model", "arch"))
_FIT = ("steps", "lr", *(option.name for option in dataclasses.fields(FitOptions)))
_NEITHER = ("protect",)  # an object, which a file cannot name


@dataclass(frozen=True)
class Data:
    """What a run trains on: exactly one of the sources, and how it is cut.

    Attributes:
        text: a file, of which the last tenth is held out; bytes, if the model has no tokenizer.
        wikitext: text in rows, a name on the Hub or a local copy, as `residual_steer.data.wikitext`.
        images: labelled images, as `residual_steer.data.images`.
        vtab: a task of VTAB-1k, 800 rows to train on and 200 held out, as `residual_steer.data.vtab`.
        length: tokens of a row.
        batch: rows of a batch.
        limit: rows that are held out at most.
    """

    text: str | None = None
    wikitext: str | None = None
    images: str | None = None
    vtab: str | None = None
    length: int = 128
    batch: int = 16
    limit: int | None = None

    def __post_init__(self) -> None:
        for kind in KINDS:
            if not isinstance(getattr(self, kind), (str, type(None))):
                raise SteerError(f"`{kind}` is a path or a name, a string; received {getattr(self, kind)!r}.")
        check_integer("length", self.length, 2)
        check_integer("batch", self.batch, 1)
        if self.limit is not None:
            check_integer("limit", self.limit, 1)

    @property
    def kind(self) -> str:
        """Which of the sources is given; raise if none is, or several are."""
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise SteerError(f"the data are one of {', '.join(KINDS)}; received {', '.join(given) or 'none of them'}.")
        return given[0]


@dataclass(frozen=True)
class Recipe:
    """A training run in words.

    Attributes:
        model: a folder or a name on the Hub for transformers, or `timm:NAME`.
        data: see `Data`.
        field: what `steer` takes: name, rank, scale, layers, site, ….
        fit: what `fit` takes: steps, lr, and every one of `FitOptions`.
        arch: the backbone; None finds it.
        seed: of the new field and head; that of the data's order is `seed` of `fit`.

    >>> Recipe.of({"model": "gpt2", "data": {"text": "my.txt"}, "fit": {"steps": 500}}).train("my-task")
    """

    model: str
    data: Data
    field: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    fit: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    arch: str | None = None
    seed: int = 0

    @classmethod
    def of(cls, words: Any) -> Recipe:
        """Check a recipe that was read; raise if a key is unknown or missing, or a value is not allowed."""
        words = _keys("the recipe", words, [option.name for option in dataclasses.fields(cls)])
        for name in ("model", "data"):
            if not words.get(name):
                raise SteerError(f"the recipe lacks `{name}`; it has {', '.join(words) or 'nothing'}.")
        if not isinstance(words["model"], str):
            raise SteerError(f"`model` is a folder, a name on the Hub or timm:NAME; received {words['model']!r}.")
        with _at("data"):
            data = Data(**_keys("data", words["data"], [option.name for option in dataclasses.fields(Data)]))
            _ = data.kind  # raises unless one source is given
        field = _keys("field", words.get("field") or {}, _FIELD)
        options = _keys("fit", words.get("fit") or {}, [name for name in _FIT if name not in _NEITHER])
        if "steps" not in options:
            raise SteerError("the recipe lacks `fit.steps`, the number of optimizer steps.")
        with _at("fit"):
            FitOptions.of({key: value for key, value in options.items() if key not in ("steps", "lr")})
            check_integer("steps", options["steps"], 1)
            if options.get("lr") is not None:
                check_number("lr", options["lr"], above=0)
        seed = check_integer("seed", words.get("seed", 0), 0, 2**32 - 1)
        return cls(words["model"], data, field, options, words.get("arch"), seed)

    @classmethod
    def read(cls, path: str | Path, changes: Mapping[str, Any] | None = None) -> Recipe:
        """Read a recipe from a YAML file, with changes put over it by key, `{"field.rank": 8}`; raise if it is none."""
        path = as_path(path)
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SteerError(f"the recipe {str(path)!r} cannot be read: {error}.") from error
        return cls.of(changed(read_yaml(f"the recipe {str(path)!r}", text), changes or {}))

    def words(self) -> dict[str, Any]:
        """Return the recipe as it is written, without what was left out."""
        data = {key: value for key, value in vars(self.data).items() if value is not None}
        words = {"model": self.model, "arch": self.arch, "data": data, "field": dict(self.field), "fit": dict(self.fit)}
        return {key: value for key, value in words.items() if value not in (None, {})} | {"seed": self.seed}

    def train(self, folder: str | Path) -> tuple[nn.Module, History]:
        """Steer the model, train its field, save field and recipe in a folder; return the model and the history."""
        import yaml

        folder = as_path(folder)
        torch.manual_seed(self.seed)
        model, train, valid = self._open()
        steer(model, self.arch, **{"name": "default", **self.field})
        make_folder(folder)  # before the hours that the training may take
        history = fit(model, self._batches(train, shuffle=True), self._batches(valid), **self.fit)
        save(model, folder)
        write_whole({folder / "recipe.yaml": yaml.safe_dump(self.words(), sort_keys=False).encode()})
        return model, history

    def read_field(self, folder: str | Path) -> nn.Module:
        """Return the model under the field in a folder; the data are read too, to know how many classes there are."""
        torch.manual_seed(self.seed)
        return load(self._open()[0], folder, arch=self.arch)

    def evaluate(self, folder: str | Path) -> dict[str, dict[str, float]]:
        """Measure the held-out data under the field in a folder, and under the frozen model."""
        torch.manual_seed(self.seed)
        model, _, valid = self._open()
        frozen = evaluate(model, self._batches(valid))
        load(model, folder, arch=self.arch)
        return {"frozen": frozen, "steered": evaluate(model, self._batches(valid))}

    def _batches(self, rows: Dataset[Any], shuffle: bool = False) -> DataLoader[Any]:
        return DataLoader(rows, batch_size=self.data.batch, shuffle=shuffle)

    def _open(self) -> tuple[nn.Module, Dataset[Any], Any]:
        """Return the model, and what it trains on and is held out."""
        data, kind = self.data, self.data.kind
        source = getattr(data, kind)
        train: Any
        valid: Any
        if kind in ("text", "wikitext"):
            model = open_model(self.model, head="CausalLM")
            train, valid = _text(self.model, data, kind, source)
        else:
            prepare = _prepare(self.model)
            if kind == "vtab":
                train, valid = (vtab(source, split, prepare=prepare) for split in ("train800", "val200"))
            else:
                train, valid = (images(source, split, prepare=prepare) for split in _two_splits(source))
            model = open_model(self.model, head="ImageClassification", classes=len(train.classes))
        if data.limit is not None and len(valid) > data.limit:
            valid = Subset(valid, range(data.limit))
        return model, train, valid


def read_yaml(name: str, text: str) -> Any:
    """Return what a text says, by YAML 1.2 where 1.1 surprises: 1e-3 is a number, `no` is a word, a key stands once."""
    import yaml  # which huggingface_hub needs

    class Loader(yaml.SafeLoader):  # type: ignore[misc]  # yaml has no types
        yaml_implicit_resolvers = {  # noqa: RUF012 – yaml's own
            first: [one for one in each if one[0].rpartition(":")[2] not in ("bool", "float")]
            for first, each in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            keys = [str(key.value) for key, _ in node.value]
            twice = next((key for key in keys if keys.count(key) > 1), None)
            if twice is not None:
                raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} stands twice", node.start_mark)
            return super().construct_mapping(node, deep=deep)

    number = r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?$|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(number), list("-+.0123456789"))
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:bool", re.compile("(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
    )
    try:
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        raise SteerError(f"{name} is no YAML: {error}.") from error


def changed(words: Any, changes: Mapping[str, Any]) -> Any:
    """Return nested words with the values of some keys, `field.rank`, replaced or added."""
    words = dict(words) if isinstance(words, Mapping) else words
    for key, value in changes.items():
        place, _, rest = key.partition(".")
        if isinstance(words, dict):
            below = words.get(place) or {}
            if rest and not isinstance(below, Mapping):
                raise SteerError(f"{key!r} is to be set inside {place!r}, which is {below!r:.100} and has no keys.")
            words[place] = changed(below, {rest: value}) if rest else value
    return words


def open_model(name: str, *, head: str | None = None, classes: int | None = None, weights: bool = True) -> nn.Module:
    """Return a model of transformers or timm.

    Args:
        name: a name on the Hub, a folder, a `config.json` alone, or `timm:NAME`.
        head: as in transformers' class names: `"CausalLM"`, `"ImageClassification"`; None is what the config names.
        classes: of the head.
        weights: read them; otherwise the model stands on the meta device, which takes neither time nor memory.

    Raises:
        SteerError: it cannot be had, or the package that makes it is not installed.
    """
    if name.startswith("timm:"):
        timm = _package("timm")
        options = {} if classes is None else {"num_classes": classes}
        with _reading(name), torch.device("cpu" if weights else "meta"):
            return cast(nn.Module, timm.create_model(name[5:], pretrained=weights, **options))
    transformers = _package("transformers")
    if not name or (Path(name).suffix == ".json" and weights):
        raise SteerError(f"a model is a name on the Hub, a folder with weights, or timm:NAME; received {name!r}.")
    with _reading(name):
        config = transformers.AutoConfig.from_pretrained(name)
        named = next(iter(getattr(config, "architectures", None) or ()), "")
        kind = getattr(transformers, f"AutoModelFor{head}" if head else named, transformers.AutoModel)
        if not weights:
            with torch.device("meta"):
                return cast(nn.Module, getattr(kind, "from_config", kind)(config))
        labels = {"num_labels": classes, "ignore_mismatched_sizes": True}
        return cast(nn.Module, kind.from_pretrained(name, **({"dtype": "auto"} if classes is None else labels)))


def _text(name: str, data: Data, kind: str, source: str) -> tuple[Dataset[Any], Dataset[Any]]:
    """Return what a language model trains on, and what is held out."""
    tokenizer = _tokenizer(name)
    if kind == "wikitext":
        if tokenizer is None:
            raise SteerError(f"`data.wikitext` is read by the model's tokenizer, and there is none with {name!r}.")
        first, second = (wikitext(source, s, tokenizer=tokenizer, length=data.length) for s in _two_splits(source))
        return first, second
    try:
        text = Path(source).read_bytes()
    except OSError as error:
        raise SteerError(f"`data.text` is a file; {source!r} cannot be read: {error}.") from error
    if tokenizer is None:  # a model of bytes
        return ByteBlocks(text, data.length), ByteBlocks(text, data.length, "valid")
    try:
        words = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SteerError(f"`data.text` is a file of text in UTF-8; {source!r} is not: {error}.") from error
    ids = torch.tensor(tokenizer(words, verbose=False)["input_ids"], dtype=torch.int64)
    return TokenBlocks(ids, data.length), TokenBlocks(ids, data.length, "valid")


def _tokenizer(name: str) -> Any:
    """Return the tokenizer that stands with a model, None if there is none and the model reads bytes."""
    transformers = _package("transformers")
    with _reading(name):
        made = transformers.AutoTokenizer.from_pretrained(name)
    if made("text")["input_ids"]:  # transformers makes an empty one where it finds no file
        return made
    vocabulary = getattr(transformers.AutoConfig.from_pretrained(name), "vocab_size", None)
    if vocabulary != 256:
        raise SteerError(f"no tokenizer stands with {name!r}, and its vocabulary, {vocabulary}, is not that of bytes.")
    return None


def _two_splits(source: str) -> tuple[str, str]:
    """Return the names of the split to train on and of the one that is held out."""
    there = list(splits(source))
    held = next((name for name in ("validation", "valid", "test") if name in there), None)
    if "train" not in there or held is None:
        raise SteerError(
            f"the data have a split train, and validation or test; {source!r} has {', '.join(map(repr, there))}."
        )
    return "train", held


def _prepare(name: str) -> Callable[[Any], Any] | None:
    """Return what turns a PIL image into what the model takes."""
    if name.startswith("timm:"):
        return None
    transformers = _package("transformers")
    with _reading(name):
        processor = transformers.AutoImageProcessor.from_pretrained(name)
    return lambda image: processor(image, return_tensors="pt")["pixel_values"][0]


def _keys(where: str, words: Any, known: Any) -> dict[str, Any]:
    """Return a mapping whose keys are all known."""
    if not isinstance(words, Mapping):
        raise SteerError(f"{where} is a mapping with some of {', '.join(known)}; received {words!r:.200}.")
    for key in words:
        if key not in known:
            raise SteerError(f"{where} has no key {key!r}, which is {words[key]!r:.100}; it has {', '.join(known)}.")
    return dict(words)


@contextlib.contextmanager
def _at(where: str) -> Iterator[None]:
    """Let an error say where in the recipe it is."""
    try:
        yield
    except SteerError as error:
        raise SteerError(f"{where}: {error}") from error


def _package(name: str) -> Any:
    return import_optional(name, f"this needs {name}", name)


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn what another library raises of a name into an error of ours."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise SteerError(f"the model {name!r} cannot be had: {lines[0]}") from error
