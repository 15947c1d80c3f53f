"""Looking at a model while it runs: `record` keeps what enters and leaves its parts, `undisturbed` leaves no trace."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ._checks import check_integer
from ._frozen import follow
from ._undisturbed import changed, undisturbed, watch
from .backbone import Backbone, read_stream, site_of
from .errors import SteerError
from .registry import find_backbone

__all__ = ["Call", "Recording", "changed", "record", "record_sites", "uncompiled", "undisturbed", "watch"]


@dataclass(frozen=True)
class Call:
    """One call of a module: the tensor that entered and the one that left, detached."""

    entered: Tensor
    left: Tensor


@dataclass
class Recording:
    """What was recorded: `calls` by block index or key, where whatever was called last stands last."""

    calls: dict[Any, list[Call]] = field(default_factory=dict)

    @property
    def entering(self) -> dict[Any, Tensor]:
        """What entered in the last call, by block index or key: z_l of a block."""
        return {key: calls[-1].entered for key, calls in self.calls.items()}

    @property
    def leaving(self) -> dict[Any, Tensor]:
        """What left in the last call: z_{l+1} of a block, with what fields added there."""
        return {key: calls[-1].left for key, calls in self.calls.items()}


@contextlib.contextmanager
def record(
    where: nn.Module | Backbone | Mapping[Any, nn.Module],
    blocks: Iterable[int] | None = None,
    *,
    site: str = "block",
    alone: bool = False,
) -> Iterator[Recording]:
    """Record the residual stream at the blocks of a model, or what enters and leaves modules, in every call.

    >>> with undisturbed(model), record(model) as seen:
    ...     model(x)
    >>> seen.leaving[3]  # (batch, length, width), or (batch, channels, height, width) in a ConvNet

    Args:
        where: a model, its backbone, or modules by any key.
        blocks: which blocks; None is all. Those without a part for the site are passed over.
        site: at the whole block, its mixer or mlp, or a linear map; `"input"` is what enters the mixer before fields
            add to it; at `"after"` what enters is what the fields there read, and leaves the block.
        alone: whether what leaves is recorded as the module returns it, before fields add to it.

    Raises:
        SteerError: no such site or block, or none of the blocks has the site.
    """
    seen = Recording()
    read: Callable[..., Tensor] = read_stream
    leave: Callable[[Any], Tensor] = _first
    behind = False  # whether what enters has left the block
    if isinstance(where, Mapping):
        points: dict[Any, nn.Module | None] = dict(where)
        inplace = False
    else:
        backbone = find_backbone(where) if isinstance(where, nn.Module) else where
        count, place = len(backbone.blocks), site_of(site)
        for index in () if blocks is None else (blocks := tuple(blocks)):
            check_integer("blocks", index, -count, count - 1, meaning="each of them")
        points = {i: backbone.point(i, site) for i in (range(count) if blocks is None else blocks)}
        if points and all(point is None for point in points.values()):
            raise SteerError(f"none of these blocks of backbone {backbone.name!r} has the site {site!r}.")
        inplace = backbone.inplace  # the block writes into what enters, and the next one into what leaves
        behind = place.reads == "leaves"
        if place.part == "block":
            read, leave = backbone.read, backbone.left
    with contextlib.ExitStack() as stack:
        for key, module in points.items():
            if module is not None:
                enter, left, reach = _noting(seen, key, read, leave, inplace)
                if not behind:
                    stack.enter_context(watch([module], enter, first=alone or site == "input"))
                    stack.enter_context(watch([module], after=left, first=alone))
                    continue
                for hook, first in ((left, alone), (reach, True)):
                    handle = module.register_forward_hook(hook, with_kwargs=True, prepend=first)
                    stack.callback(handle.remove)
                    if first:
                        follow(module, handle)
        yield seen


@contextlib.contextmanager
def record_sites(
    backbone: Backbone, sites: Mapping[str, Iterable[int]], *, alone: bool = False
) -> Iterator[dict[str, Recording]]:
    """Record the blocks of several sites at once, and hand out what is recorded by site."""
    with contextlib.ExitStack() as stack:
        yield {
            site: stack.enter_context(record(backbone, blocks, site=site, alone=alone))
            for site, blocks in sites.items()
        }


def _noting(seen: Recording, key: Any, read: Any, leave: Any, inplace: bool) -> tuple[Any, Any, Any]:
    """Return the hooks that note what enters and what leaves a module, and what leaves it as what enters."""
    entered: list[Tensor] = []  # in calls that have not returned

    def kept(z: Tensor) -> Tensor:
        return z.detach().clone() if inplace else z.detach()

    def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
        entered.append(kept(read(args, kwargs)))

    def left(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen.calls[key] = [*seen.calls.pop(key, []), Call(entered.pop(), kept(leave(output)))]

    def reach(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        entered.append(kept(leave(output)))

    return enter, left, reach


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the model inside `torch.compile`'s, so that paths are those that it had before."""
    return dict(model.named_children()).get("_orig_mod", model)


def _first(output: Any) -> Tensor:
    found: Tensor = output if isinstance(output, Tensor) else output[0]
    return found
