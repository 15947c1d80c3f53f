"""An input for a model that was given none: tiny, made from what the model says of itself."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from residual_steer.errors import SteerError

__all__ = ["Example", "examples", "given"]

ROWS, LENGTHS = 2, (7, 16, 64)
IMAGES = (32, 64, 224, 28)
SAMPLES = (4000, 16000)
_NAMES = ("input_ids", "pixel_values", "input_values", "input_features")
_BINS = ("num_mel_bins", "input_feat_per_channel", "feature_projection_input_dim", "input_dim", "feat_dim")


@dataclass(frozen=True)
class Example:
    """One call of a model: what it is given by position and by name, and the rows of that batch."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    rows: int

    def __str__(self) -> str:
        """Return names and shapes."""
        named = [(f"{key} " if isinstance(key, str) else "", value) for key, value in self._given()]
        return ", ".join(f"{name}{tuple(x.shape)}" for name, x in named if isinstance(x, Tensor)) or "no tensors"

    @property
    def kind(self) -> tuple[Any, ...]:
        """Names, numbers of dimensions and types: what examples of several sizes have in common."""
        return tuple((key, x.dim(), x.dtype) if isinstance(x, Tensor) else (key,) for key, x in self._given())

    def _given(self) -> list[tuple[int | str, Any]]:
        return [*enumerate(self.args), *self.kwargs.items()]

    def on(self, device: torch.device, dtype: torch.dtype) -> Example:
        """Return the same call on a model's device, floats in its type and in the graph."""

        def move(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            value = value.detach().to(device).clone()
            return value.to(dtype).requires_grad_().clone() if value.is_floating_point() else value

        return Example(tuple(map(move, self.args)), {key: move(value) for key, value in self.kwargs.items()}, self.rows)


def given(example: Any) -> Example:
    """Take a user's batch: a tensor, a tuple of arguments or a mapping of keywords."""
    args = (example,) if isinstance(example, Tensor) else tuple(example) if isinstance(example, (tuple, list)) else ()
    kwargs = dict(example) if isinstance(example, Mapping) else {}
    rows = next((x.shape[0] for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.dim()), 0)
    if not rows:
        raise SteerError(
            "`example` is a batch that the model can be called with: a tensor, a tuple of arguments or a dict of "
            f"keywords, with at least one row; received {type(example).__name__}."
        )
    return Example(args, kwargs, rows)


def examples(model: nn.Module) -> Iterator[Example]:
    """Yield inputs that the model may take, the likeliest first."""
    main = getattr(model, "main_input_name", None)
    config: Any = getattr(model, "config", None)
    names_it = isinstance(main, str) and config is not None  # as models of transformers do
    accepted = inspect.signature(model.forward).parameters
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    vocabulary = _vocabulary(model) or next(iter(_numbers([text], "vocab_size")), 0)
    more: dict[str, Tensor] = {}
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted and vocabulary:
        more["decoder_input_ids"] = _ids(getattr(text, "vocab_size", vocabulary), LENGTHS[0], config)
    if "cross_attention_states" in accepted and getattr(text, "cross_attention_layers", None):
        # of images, as in Mllama, which leaves out the layers that read them where there are none
        more["cross_attention_states"] = torch.randn(ROWS, LENGTHS[0], text.hidden_size)
    if "spatial_shapes" in accepted and main == "pixel_values":
        # as in SigLIP 2: patches in a row, which of them are there, and how many each way
        width = next((module.in_features for module in model.modules() if isinstance(module, nn.Linear)), 0)
        mask, shapes = torch.ones(ROWS, 16, dtype=torch.long), torch.full((ROWS, 2), 4)
        pixels = torch.randn(ROWS, 16, width)
        yield given({"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes})
    for name in dict.fromkeys(([main] if names_it else []) + [name for name in _NAMES if name in accepted]):
        if name == "input_ids" and vocabulary:
            yield from _texts(vocabulary, config, more)
        elif name == "pixel_values":
            yield from (given({name: image, **more}) for image in _images(model))
        elif name in {"input_values", "input_features"}:
            yield from (given({name: sound, **more}) for sound in _sounds(config))
    dummy: Any = getattr(model, "dummy_inputs", None)
    if isinstance(dummy, Mapping) and any(isinstance(value, Tensor) for value in dummy.values()):
        yield given({key: value for key, value in dummy.items() if isinstance(value, Tensor)})
    if not names_it:
        yield from map(given, _for_the_first_layer(model))


def _for_the_first_layer(model: nn.Module) -> Iterator[Tensor]:
    """Yield what the first layer with parameters may read."""
    leaves = (m for m in model.modules() if not list(m.children()) and next(m.parameters(), None) is not None)
    first = next(leaves, None)
    if isinstance(first, nn.Embedding):
        yield from (_ids(first.num_embeddings, length) for length in LENGTHS)
    elif isinstance(first, nn.Conv1d):
        yield from (torch.randn(ROWS, first.in_channels, length) for length in (64, *SAMPLES))
    elif isinstance(first, nn.Conv3d):
        yield from (torch.randn(ROWS, first.in_channels, 8, size, size) for size in IMAGES)
    elif first is not None:
        if not isinstance(first, nn.Conv2d):
            width = first.in_features if isinstance(first, nn.Linear) else next(first.parameters()).shape[-1]
            yield from (torch.randn(ROWS, *shape) for shape in ((LENGTHS[0], width), (width,)))
        yield from _images(model)
    another = next((m for m in model.modules() if isinstance(m, nn.Embedding) and m is not first), None)
    if another is not None:  # whatever comes first, a model with an embedding may take ids
        yield _ids(another.num_embeddings, LENGTHS[0])


def _texts(vocabulary: int, config: Any, more: Mapping[str, Tensor]) -> Iterator[Example]:
    texts = [{"input_ids": _ids(vocabulary, length, config), **more} for length in LENGTHS]
    yield from map(given, texts)
    if hasattr(config, "use_cache"):
        yield given({**texts[0], "use_cache": False})
    books, ids = getattr(config, "num_codebooks", None), texts[0]["input_ids"]
    if isinstance(books, int):  # as in MusicGen, whose rows are split over codebooks; and as in Kyutai's, with text
        yield replace(given({"input_ids": ids.repeat(books, 1), **more}), rows=ROWS)
        yield given({"input_ids": ids[:, :, None].repeat(1, 1, books + 1), **more})


def _ids(vocabulary: int, length: int, config: Any = None) -> Tensor:
    """Return `(rows, length)` ids, none of which the config gives a meaning of its own."""
    special: set[int] = set()
    for part in (config, *vars(config or object).values()):
        for key, value in vars(part).items() if hasattr(part, "to_dict") else ():
            if key.endswith(("_token_id", "_token_index", "_token_ids")):
                special.update(value if isinstance(value, (list, tuple)) else [value])
    free = [i for i in range(min(vocabulary, 1000)) if i not in special] or [0]
    generator = torch.Generator().manual_seed(0)
    return torch.tensor(free)[torch.randint(len(free), (ROWS, length), generator=generator)]


def _vocabulary(model: Any) -> int:
    """Return how many ids a model has embeddings for, 0 where it does not say."""
    try:
        size = model.get_input_embeddings().num_embeddings
    except (AttributeError, NotImplementedError):
        return 0
    return size if isinstance(size, int) else 0


def _numbers(parts: list[Any], *names: str) -> list[int]:
    """Return the whole numbers that stand under these names in some configs."""
    return [n for part in parts for name in names if isinstance(n := getattr(part, name, None), int)]


def _images(model: nn.Module) -> Iterator[Tensor]:
    """Yield batches of images of the sizes that the model names, and of some that ConvNets take."""
    first = next((m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d))), None)
    settings = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}
    shape = settings.get("input_size") if isinstance(settings, Mapping) else None
    config: Any = getattr(model, "config", None)
    parts = [config, *(getattr(config, key, None) for key in ("vision_config", "backbone_config", "encoder"))]
    named = [shape[0]] if isinstance(shape, (tuple, list)) and len(shape) == 3 else []
    channels = [*_numbers(parts, "num_channels"), *named, 3 if first is None else first.in_channels][0]
    sizes: dict[tuple[int, ...], None] = {}
    named = [getattr(getattr(model, "patch_embed", None), "img_size", None), shape]
    for value in (*named, *(getattr(part, "image_size", None) for part in parts)):
        pair = (value.get("height"), value.get("width")) if isinstance(value, Mapping) else value
        pair = (pair, pair) if isinstance(pair, int) else pair
        if isinstance(pair, (tuple, list)) and len(pair) >= 2 and all(isinstance(n, int) for n in pair):
            sizes[tuple(pair[-2:])] = None
    for size in dict.fromkeys((*sizes, *((n, n) for n in IMAGES))):
        yield torch.randn(ROWS, channels, *size)
    for frames in _numbers(parts, "num_frames")[:1]:
        yield from (torch.randn(ROWS, frames, channels, *size) for size in dict.fromkeys((*sizes, (32, 32))))


def _sounds(config: Any) -> Iterator[Tensor]:
    """Yield batches of sound: features `(rows, bins, frames)` or `(rows, frames, bins)`, or samples."""
    parts = [config, *(getattr(config, key, None) for key in ("encoder_config", "audio_config", "encoder"))]
    positions, frames = _numbers(parts, "max_source_positions"), _numbers(parts, "max_length")
    for bins in _numbers(parts, *_BINS):
        for length in (*(2 * n for n in positions), *frames, 64, 160):
            yield torch.randn(ROWS, bins, length)
            yield torch.randn(ROWS, length, bins)
    yield from (torch.randn(ROWS, *channels, samples) for channels in ((), (1,)) for samples in SAMPLES)
