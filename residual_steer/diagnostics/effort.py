"""How hard a field pushes, where, and in how many directions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from residual_steer._controller import Steering, steering_of
from residual_steer.backbone import read_stream
from residual_steer.errors import SteerError
from residual_steer.field import HRes
from residual_steer.passes import Batch, batches, reading, require_finite, tokens_of
from residual_steer.report import Axis, Column, Plot, Series, Table
from residual_steer.steering import use

from .moments import exact

__all__ = ["ControlEffort", "LayerEffort", "control_effort"]


@dataclass(frozen=True)
class LayerEffort:
    """What a field does at one block.

    Attributes:
        layer: index of the block.
        effort: the mean of ‖λH(z)‖ / ‖z‖ over tokens.
        cosine: the mean of cos(H(z), u) over tokens, u being the frozen module's own update; None where either is 0.
        rank: the effective rank of H(z), from 1 to the field's rank + 1 (for its bias); None where H is 0.
        share: of the mean of (‖λH(z)‖ / ‖z‖)², summed over blocks, which falls to this one; None where H is 0 in all.
        bottleneck: the rank r of the field.
        tokens: over how many tokens.
    """

    layer: int
    effort: float
    cosine: float | None
    rank: float | None
    share: float | None
    bottleneck: int
    tokens: int


@dataclass(frozen=True)
class ControlEffort:
    """What a field does, block by block.

    Attributes:
        name: of the field.
        site: where it runs.
        scale: λ.
        layers: one for every steered block.
    """

    name: str
    site: str
    scale: float
    layers: tuple[LayerEffort, ...]

    def table(self) -> Table:
        """Return one row for every steered block."""
        columns = (
            Column("layer", "block"),
            Column("effort", "‖λH(z)‖ / ‖z‖", digits=4),
            Column("share", "share of squared effort", "%", digits=1),
            Column("cosine", "cosine with own update"),
            Column("rank", "effective rank", digits=1),
            Column("bottleneck", "rank"),
        )
        rows = tuple(
            {
                "layer": one.layer,
                "effort": one.effort,
                "share": None if one.share is None else 100 * one.share,
                "cosine": one.cosine,
                "rank": one.rank,
                "bottleneck": one.bottleneck,
            }
            for one in self.layers
        )
        padding = "padding is left out, except in an encoder-decoder"
        note = f"Site {self.site!r}, λ = {self.scale:g}. z is what the field reads; {padding}."
        return Table(f"Control effort of {self.name!r}", columns, rows, (note,))

    def plot(self) -> Plot:
        """Return the effort against the block."""
        line = Series(self.name, tuple(one.layer for one in self.layers), tuple(one.effort for one in self.layers))
        return Plot("Control effort", "lines", Axis("block"), Axis("mean ‖λH(z)‖ / ‖z‖"), (line,))


def control_effort(model: nn.Module, loader: Iterable[Any], *, name: str | None = None) -> ControlEffort:
    """Measure how hard a field steers, at every block that it steers.

    Besides the effort ‖λH(z)‖ / ‖z‖ of eq. 1, it says how H(z) stands to what the frozen module itself does at the
    token, M(z) − z of a block and M(z) of a mixer or mlp; for the site `input`, whose H is added to what the mixer
    receives, u is what the mixer returns. The effective rank is that of Roy and Vetterli 2007: exp of the entropy of
    the eigenvalues of E[H Hᵀ], not centred, divided by their sum. H is computed in fp64 from the stream as the model
    has it.

    The field is measured alone, with weight 1, whatever mix is selected; that comes back after. Tokens at which z is 0
    are left out of the effort. Padding counts in an encoder-decoder alone, whose mask is not that of both halves.

    Args:
        model: a steered model; it is run in evaluation mode.
        loader: batches; labels are not needed. It is read once.
        name: of the field; None takes the one that acts.

    Raises:
        SteerError: the model is not steered, has no such field or several act and none is named; the loader gives
            nothing; a state is NaN or infinite.
    """
    model, state = steering_of(model)  # without wrappers
    name = state.name_of(name)
    spec = state.specs[name]
    found = {index: _Tally(module) for index, module in sorted(state.fields(name).items())}
    running: list[Batch | None] = [None]
    handles = []
    try:
        with reading(model), use(model, name):
            for index, tally in found.items():
                handles += _watch(state, spec.site, index, tally, running)
            for batch in batches(model, loader):
                running[0] = batch
                batch.run(model)
    finally:
        for handle in handles:
            handle.remove()
    unused = [index for index, tally in found.items() if not tally.tokens]
    if unused:
        raise SteerError(f"the model ran without calling what field {name!r} steers at the blocks {unused}.")
    total = sum(tally.squared / tally.kept for tally in found.values() if tally.kept)
    layers = tuple(tally.layer(index, total) for index, tally in found.items())
    return ControlEffort(name, spec.site, spec.scale, layers)


@dataclass
class _Tally:
    """Sums over the tokens at one point."""

    field: HRes
    tokens: int = 0
    kept: int = 0
    effort: float = 0.0
    squared: float = 0.0
    cosines: float = 0.0
    pointed: int = 0
    hidden: Tensor = field(default_factory=lambda: torch.zeros(0))

    def add(self, z: Tensor, own: Tensor) -> None:
        """Add tokens.

        Args:
            z: what the field reads, `(tokens, width)`.
            own: the module's own update, of the same shape.
        """
        z, own = exact(z), exact(own)
        up, bias = exact(self.field.up.weight), self.field.up.bias
        require_finite("the stream that a field reads", z)
        hidden = self.field.hidden(z, z.dtype)
        steered = F.linear(hidden, up, None if bias is None else exact(bias))
        require_finite("what a field adds to it", steered)
        require_finite("the update of what a field steers", own)
        size, length = steered.norm(dim=1), z.norm(dim=1)
        there = length > 0
        ratio = abs(self.field.scale) * size[there] / length[there]
        both = (size > 0) & (own.norm(dim=1) > 0)
        cosine = F.cosine_similarity(steered[both], own[both], dim=1, eps=0.0)
        ones = hidden if bias is None else torch.cat([hidden, torch.ones_like(hidden[:, :1])], 1)
        products = ones.T @ ones
        self.hidden = self.hidden + products if self.tokens else products
        self.tokens += len(z)
        self.kept += int(there.sum())
        self.effort += float(ratio.sum())
        self.squared += float(ratio.square().sum())
        self.cosines += float(cosine.sum())
        self.pointed += int(both.sum())

    def layer(self, index: int, total: float) -> LayerEffort:
        """Return the means."""
        return LayerEffort(
            layer=index,
            effort=self.effort / max(self.kept, 1),
            cosine=self.cosines / self.pointed if self.pointed else None,
            rank=self._effective_rank(),
            share=self.squared / max(self.kept, 1) / total if total else None,
            bottleneck=self.field.rank,
            tokens=self.tokens,
        )

    def _effective_rank(self) -> float | None:
        """Return exp of the entropy of the eigenvalues of Σ H Hᵀ.

        H = A·(h, 1) with A = (W_up, b_up), so that they are those of K^½ AᵀA K^½, K = Σ (h, 1)(h, 1)ᵀ: as small as the
        bottleneck, however wide the stream.
        """
        up, bias = exact(self.field.up.weight), self.field.up.bias
        out = up if bias is None else torch.cat([up, exact(bias)[:, None]], 1)
        values, vectors = torch.linalg.eigh(self.hidden)
        half = vectors * values.clamp_min(0).sqrt()
        spectrum = torch.linalg.eigvalsh(half.T @ (out.T @ out) @ half).clamp_min(0)
        if not bool(spectrum.sum() > 0):
            return None
        part = spectrum / spectrum.sum()
        return float(torch.special.entr(part).sum().exp())


def _watch(state: Steering, site: str, index: int, tally: _Tally, running: list[Batch | None]) -> list[Any]:
    """Hang two hooks before those that steer: what enters and leaves the module is then what it makes of it alone.

    Raises:
        SteerError: the block has no such part any more.
    """
    backbone = state.backbone
    host = backbone.point(index, site)
    if host is None:
        raise SteerError(f"block {index} has no {site!r}.")
    block = site == "block"
    read = backbone.read if block else read_stream
    entered: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        z = read(args, kwargs)
        entered[:] = [z.clone() if backbone.inplace else z]

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        z = entered.pop()
        own = backbone.left(output) - z if block else output if isinstance(output, Tensor) else output[0]
        tally.add(*(tokens_of(part, backbone.channels, running[0]) for part in (z, own)))

    return [
        host.register_forward_pre_hook(before, with_kwargs=True, prepend=True),
        host.register_forward_hook(after, prepend=True),
    ]
