"""Where the residual stream of a frozen network is found.

Glossary, code to paper (arXiv 2606.24396):

=============  ==================================================================================
`z`            the residual stream, `(batch, length, width)`, or `(batch, channels, height, width)`
`width`        d, the number of features of the stream
`block`        one residual layer l, which maps z_l to z_{l+1}
`mixer`        the part of a block that moves information along the sequence: attention or an SSM
`mlp`          the feed-forward part of a block
`field`        H, the zero-initialised bottleneck of eq. 2 (`residual_steer.field.HRes`)
`scale`        λ of eq. 1
`point`        a module beside which fields run
`site`         which point of a block, and what fields read and add to there: the table below
=============  ==================================================================================

==================  ==================  ==================  =====================================
site                read                added to            in the paper
==================  ==================  ==================  =====================================
`block`             enters the block    leaves the block    eq. 1
`mixer`, `mlp`      enters that part    leaves that part    lemma 2 (`mixer`)
`input`             enters the mixer    enters the mixer    the control input u(t) of §4.2
`after`             leaves the block    leaves the block
`mixer.q_proj`, …   enters that map     leaves that map
==================  ==================  ==================  =====================================

The last line is a linear map by its path inside the mixer or mlp (`Backbone.projections` lists them): H maps its inputs
to its outputs. `after` reads what the fields at `block` have added to, and `mixer` what those at `input` have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ._checks import check_choice
from ._frozen import COMPUTED, Attachment, base_modules
from ._internals import offload_hooks
from .errors import SteerError
from .stream import dense, moved


class Site(NamedTuple):
    """What fields at a site read, and what they add to: what `enters` or `leaves` a part of a block."""

    part: str  # "block", "mixer" or "mlp"
    reads: str = "enters"
    moves: str = "leaves"
    projection: str = ""  # path of a linear map in that part, in whose place it then is


SITES = {
    "block": Site("block"),
    "mixer": Site("mixer"),
    "mlp": Site("mlp"),
    "input": Site("mixer", "enters", "enters"),
    "after": Site("block", "leaves", "leaves"),
}
ATTRIBUTE = "_residual_steering"  # under which a steered model keeps what was done to it
_PATH = "an attribute path or None"

Read = Callable[[tuple[Any, ...], Mapping[str, Any]], Tensor]
Write = Callable[[Any, Callable[[Tensor], Tensor]], Any]
Leave = Callable[[Any], Tensor]


class LayoutError(SteerError):
    """A model is not laid out as its description has it: blocks elsewhere, or none, or of other widths."""


class Handle(Protocol):
    """What was changed in a model, until `remove`; the handle of a hook is one."""

    def remove(self) -> None:
        """Put back what was there before."""


Prepare = Callable[[Sequence[nn.Module]], Sequence[Handle]]


def _stream(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the stream in a call as it stands there, maybe nested."""
    for value in (*args, kwargs.get("hidden_states")):
        if isinstance(value, Tensor):
            return value
    if any(type(value).__name__ == "Proxy" for value in (*args, *kwargs.values())):  # of torch.fx, unimported
        raise SteerError(
            "torch.fx cannot trace a field, which runs from a hook. Use torch.export.export or torch.jit.trace, which "
            "can, or trace the frozen model: use(model, None)."
        )
    received = [type(value).__name__ for value in args] + [f"{key}=" for key in kwargs]
    raise SteerError(
        "the stream is the first positional tensor of a block's call, or `hidden_states=`; "
        f"this call had ({', '.join(received)}). Give the Backbone a `read` that finds it."
    )


def read_stream(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the stream that enters a module: its first positional tensor, or `hidden_states`; padded if nested."""
    return dense(args[0] if args and isinstance(args[0], Tensor) else _stream(args, kwargs))


def replace_stream(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], f: Callable[[Tensor], Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the same call with its stream z replaced by f(z), as query, key and value too where it is all three."""
    z = _stream(args, kwargs)
    new = moved(z, f)
    return tuple(new if x is z else x for x in args), {key: new if x is z else x for key, x in kwargs.items()}


def write_stream(output: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """Return a module's output with its stream z, the tensor itself or the first of a tuple, replaced by f(z)."""
    if isinstance(output, Tensor):
        return moved(output, f)
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        rest = (moved(output[0], f), *output[1:])
        return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)
    raise SteerError(
        f"a block returns its stream as a tensor or first in a tuple; this one returned {type(output).__name__}. "
        "Give the Backbone a `write` that replaces it."
    )


@dataclass(frozen=True)
class Backbone:
    """Where the residual stream of a model is found.

    Attributes:
        blocks: the residual blocks, in the order of the stream, whose first dimension is the batch.
        width: the width d of the stream; one number, or one per block where it changes.
        mixer: attribute path of the attention or SSM inside a block (`"attn"`), None if there is none; one for all
            blocks, or one per block where they differ (`parts` finds them).
        mlp: attribute path of the feed-forward, in the same way.
        read: `(args, kwargs) -> z`, the stream that enters a block, from the block's call.
        write: `(output, f) -> output`, a block's output with its stream z moved by f: where f(z) = z + δ, the stream is
            δ further. Where the stream is a sum, f may be given one part of it.
        channels: which dimension of the stream is the width: -1, or 1 in a ConvNet.
        inplace: whether blocks overwrite the stream they are given (`x += …`); the fields then read a copy of it.
        prepare: called with the blocks when steering begins; the handles it returns are removed by `unsteer`. For what
            a family needs besides fields, such as a faster path for training. In evaluation mode it changes nothing.
        leave: `output -> z`, the stream in a block's output; None where it is what `write` hands to f.
        name: the registered name (the registry fills it in).
        path: where in the model the backbone stands, "" for the model itself (the registry fills it in).
        origin: how it was found, where that was not by name.
        site: the best place for a field in this family, one or several: where `steer` puts it unless it is given one.

    Raises:
        LayoutError: no blocks, a width below 1, one width or path too few or too many, or another `channels`.
    """

    blocks: Sequence[nn.Module]
    width: int | Sequence[int]
    mixer: str | Sequence[str | None] | None = None
    mlp: str | Sequence[str | None] | None = None
    read: Read = read_stream
    write: Write = write_stream
    channels: int = -1
    inplace: bool = False
    prepare: Prepare | None = None
    leave: Leave | None = None
    name: str = ""
    path: str = ""
    origin: str = ""
    site: str | Sequence[str] = "block"

    def __post_init__(self) -> None:
        if not len(self.blocks):
            raise LayoutError("a Backbone has at least one block; `blocks` is empty.")
        for index, block in enumerate(self.blocks):
            if not isinstance(block, nn.Module):
                raise LayoutError(f"every block is a torch.nn.Module; block {index} is a {type(block).__name__}.")
        for name, kind in (("width", "a positive integer"), ("mixer", _PATH), ("mlp", _PATH)):
            given, each = getattr(self, name), self._each(name)
            right = [type(x) is int and x > 0 if name == "width" else isinstance(x, (str, type(None))) for x in each]
            if len(each) != len(self.blocks) or not all(right):
                many = f"or one per block ({len(self.blocks)} blocks)"
                raise LayoutError(f"`{name}` is {kind}, {many}; received {given!r}.")
        if self.channels not in (-1, 1):
            raise LayoutError(f"`channels` is -1 (width last) or 1 (ConvNets); received {self.channels!r}.")

    def _each(self, name: str) -> tuple[Any, ...]:
        """Return the width, the mixer or the mlp of every block."""
        given = getattr(self, name)
        if given is None or isinstance(given, (int, str)):
            return (given,) * len(self.blocks)
        return tuple(given) if isinstance(given, Sequence) else ()

    @property
    def widths(self) -> tuple[int, ...]:
        """The width of the stream at every block."""
        return self._each("width")

    def left(self, output: Any) -> Tensor:
        """Return the stream in a block's output."""
        if self.leave is not None:
            return self.leave(output)
        found: list[Tensor] = []
        self.write(output, lambda z: found.append(z) or z)  # type: ignore[func-returns-value]
        return found[0]

    def point(self, index: int, site: str) -> nn.Module | None:
        """Return the module of block `index` beside which fields of `site` run, None where it has no such part."""
        part, _, _, inside = site_of(site)
        if part == "block":
            return self.blocks[index]
        path = self._each(part)[index]
        host = None if path is None else _part(self.blocks[index], path)
        return host if host is None or not inside else _linear_maps(host).get(inside)

    def features(self, index: int, site: str) -> tuple[int, int]:
        """Return how many features a field reads at a site of block `index`, and to how many it adds."""
        point = self.point(index, site) if site_of(site).projection else None
        return (self.widths[index],) * 2 if point is None else linear_sizes(point) or (0, 0)

    @property
    def sites(self) -> tuple[str, ...]:
        """The sites that at least one block has, those at linear maps apart."""
        return tuple(s for s in SITES if any(self.point(i, s) is not None for i in range(len(self.blocks))))

    @property
    def projections(self) -> tuple[str, ...]:
        """The sites at linear maps that at least one block has: `mixer.in_proj`, `mlp.c_fc`, …."""
        found: dict[str, None] = {}
        for part in ("mixer", "mlp"):
            for index in range(len(self.blocks)):
                host = self.point(index, part)
                found |= dict.fromkeys(f"{part}.{path}" for path in (_linear_maps(host) if host is not None else ()))
        return tuple(found)

    def __str__(self) -> str:
        """Describe the backbone as a short tree."""
        widths = self.widths
        width = str(widths[0]) if len(set(widths)) == 1 else f"{widths[0]} … {widths[-1]}"
        kinds = dict.fromkeys(type(block).__name__ for block in self.blocks)
        found = {site: dict.fromkeys(f".{path}" for path in self._each(site) if path) for site in ("mixer", "mlp")}
        where = [f"{site}: {', '.join(paths)}" for site, paths in found.items() if paths]
        lines = [
            f"{self.name or 'unregistered'} at {self.path or 'the model itself'}",
            f"├─ blocks: {len(self.blocks)} × {', '.join(kinds)}",
            f"├─ width:  {width}" + (" (channels first)" if self.channels == 1 else ""),
            f"├─ sites:  {', '.join(self.sites)}" + (f"  ({'; '.join(where)})" if where else ""),
            *([f"├─ origin: {self.origin}"] if self.origin else []),
        ]
        lines[-1] = lines[-1].replace("├", "└", 1)
        return "\n".join(lines)


def first_of(module: Any, *paths: str) -> Any:
    """Return what stands at the first of several attribute paths (`"encoder.layers"`) that `module` has, or None."""
    for path in paths:
        found = module
        for name in path.split("."):
            found = getattr(found, name, None)
        if found is not None:
            return found
    return None


def blocks_at(model: nn.Module, *paths: str) -> Sequence[nn.Module]:
    """Return the list of blocks that stands at the first of several attribute paths of `model`, or raise."""
    found: Sequence[nn.Module] | None = first_of(model, *paths)
    if found is None:
        raise LayoutError(
            f"the blocks of a {type(model).__name__} were looked for at {', '.join(paths)}, and are elsewhere in this "
            "release of its library. Describe the model yourself, with residual_steer.register_backbone."
        )
    return found


def parts(blocks: Sequence[nn.Module], *paths: str) -> tuple[str | None, ...]:
    """Return for every block the first of several attribute paths that it has: in a hybrid, `"mamba", "self_attn"`."""
    return tuple(next((path for path in paths if _part(block, path)), None) for block in blocks)


def site_of(site: str) -> Site:
    """Return what a site is, by its name: one of `SITES`, or `mixer.…` or `mlp.…` with the path of a linear map."""
    part, _, path = site.partition(".")
    return Site(part, projection=path) if path else SITES[check_choice("site", site, SITES)]


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Return the features that a linear map takes and returns, quantised or transformers' `Conv1D` too; None else."""
    its: Any = module
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return int(its.weight.shape[0]), int(its.weight.shape[1])
    sizes = getattr(its, "in_features", None), getattr(its, "out_features", None)
    return (sizes[0], sizes[1]) if all(isinstance(size, int) for size in sizes) else None  # type: ignore[return-value]


def _linear_maps(module: nn.Module, path: str = "") -> dict[str, nn.Module]:
    """Return the linear maps inside a module by their paths, but for those in lists: experts see some tokens each."""
    found: dict[str, nn.Module] = {}
    for name, child in module.named_children():
        at = f"{path}.{name}" if path else name
        if linear_sizes(child) is not None:
            found[at] = child
        elif not isinstance(child, (Attachment, nn.ModuleList, nn.ModuleDict)):
            found |= _linear_maps(child, at)
    return found


def _part(block: nn.Module, path: str) -> nn.Module | None:
    """Return the module at a path, None where there is none, or one that does nothing."""
    module = first_of(block, path)
    return module if isinstance(module, nn.Module) and not isinstance(module, nn.Identity) else None


def stacked(
    model: Any, *lists: str, mixer: Sequence[str] = (), mlp: Sequence[str] = (), width: int | None = None, **more: Any
) -> Backbone:
    """Return the backbone of a model with its blocks in one list: list, mixer and mlp at the first path that there is.

    The width is the config's `hidden_size` unless it is given; `more` is as in `Backbone`.
    """
    blocks = blocks_at(model, *lists)
    width = model.config.hidden_size if width is None else width
    return Backbone(blocks, width, parts(blocks, *mixer), parts(blocks, *mlp), **more)


def compute_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype a module computes in, which is not always the one that its weights are stored in.

    It is what a quantised layer says (`compute_dtype`, as bitsandbytes and HQQ have it), else that of the largest
    parameter in a type that matrix products are computed in, so neither float8 nor packed integers.
    """
    own = [part for _, part in base_modules(module)]
    found: list[torch.dtype] = [dtype for part in own if (dtype := getattr(part, "compute_dtype", None)) in COMPUTED]
    if found:
        return max(set(found), key=found.count)
    floating = [p for part in own for p in part.parameters(recurse=False) if p.dtype in COMPUTED]
    return max(floating, key=lambda p: p.numel()).dtype if floating else torch.get_default_dtype()


def execution_device(module: nn.Module) -> torch.device:
    """Return the device a module runs on: where its weights are, or where accelerate brings offloaded ones."""
    own = [part for _, part in base_modules(module)]
    for part in own:
        for each in offload_hooks(part):
            if getattr(each, "execution_device", None) is not None:
                return torch.device(each.execution_device)
    tensors: list[Tensor] = [p for part in own for p in part.parameters(recurse=False)]
    tensors += [b for part in own for b in part.buffers(recurse=False)]
    return tensors[0].device if tensors else torch.device("cpu")
