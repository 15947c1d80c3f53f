"""How hard a field pushes, where, and in how many directions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from residual_steer._batches import batches, require_finite, tokens_of
from residual_steer._controller import steering_of
from residual_steer.backbone import site_of
from residual_steer.errors import SteerError
from residual_steer.field import HRes
from residual_steer.recording import record, record_sites, undisturbed
from residual_steer.steering import use

from ._moments import Sums, exact
from ._results import Axes, Figure, Table, lines, table_of

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
        site: where in the block it runs.
    """

    layer: int
    effort: float
    cosine: float | None
    rank: float | None
    share: float | None
    bottleneck: int
    tokens: int
    site: str = "block"


@dataclass(frozen=True)
class ControlEffort:
    """What a field does, block by block.

    Attributes:
        name: of the field.
        site: where it runs; a tuple of several.
        scale: λ.
        layers: one for every steered block, site by site.
    """

    name: str
    site: str | tuple[str, ...]
    scale: float
    layers: tuple[LayerEffort, ...]

    def table(self) -> Table:
        """Return one row for every steered block."""
        heads = {
            "layer": "block",
            "effort": "‖λH(z)‖ / ‖z‖",
            "share": "share of squared effort, %",
            "cosine": "cosine with own update",
            "rank": "effective rank",
            "bottleneck": "rank",
        }
        if isinstance(self.site, tuple):
            heads = {"site": "site", **heads}
        columns = {key: (head, [getattr(one, key) for one in self.layers]) for key, head in heads.items()}
        columns["share"] = heads["share"], [None if one.share is None else 100 * one.share for one in self.layers]
        padding = "padding is left out, except in an encoder-decoder"
        sites = self.site if isinstance(self.site, tuple) else (self.site,)
        note = f"Site {', '.join(map(repr, sites))}, λ = {self.scale:g}. z is what the field reads; {padding}."
        return table_of(f"Control effort of {self.name!r}", columns, note)

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw the effort against the block."""
        title, label = f"Control effort of {self.name!r}", "mean ‖λH(z)‖ / ‖z‖"
        blocks = sorted({one.layer for one in self.layers})
        found = {(one.site, one.layer): one.effort for one in self.layers}
        several = isinstance(self.site, tuple)
        drawn = {
            f"{self.name}, {site}" if several else self.name: [found.get((site, block)) for block in blocks]
            for site in dict.fromkeys(one.site for one in self.layers)
        }
        return lines(ax, title, "block", label, drawn, at=blocks)


def control_effort(model: nn.Module, loader: Iterable[Any], *, name: str | None = None) -> ControlEffort:
    """Measure how hard a field steers, at every block that it steers.

    Besides the effort ‖λH(z)‖ / ‖z‖ of eq. 1, it says how H(z) stands to what the frozen module itself does at the
    token, M(z) − z of a block, also where the field reads what left it, M(z) of a mixer or mlp, and P(x) of a linear
    map; for the site `input`, u is what the mixer returns. The effective rank is that of Roy and Vetterli 2007: exp of
    the entropy of the eigenvalues of E[H Hᵀ], not centred, divided by their sum. H is computed in fp64 from the stream
    as the model has it.

    The field `name`, or the one that acts, is measured alone, with weight 1, whatever mix is selected; that comes back
    after. Tokens at which z is 0 are left out of the effort.

    Raises:
        SteerError: besides what all raise, there is no such field, several act and none is named, or none was called.
    """
    model, state = steering_of(model)  # without wrappers
    name = state.name_of(name)
    spec, backbone, fields = state.specs[name], state.backbone, state.fields(name)
    places = [(site, index) for site, ranks in spec.sites.items() for index in sorted(ranks)]
    sums = {place: Sums() for place in places}
    with undisturbed(model), use(model, name):
        for batch in batches(model, loader):
            around = record(backbone, spec.sites.get("after", ()), alone=True)
            with record_sites(backbone, spec.sites, alone=True) as seen, around as whole:
                batch.run(model)
            for site, index in places:
                field, calls = fields[site, index], seen[site].calls.get(index, [])
                outer = whole.calls[index] if site == "after" else calls
                for call, one in zip(calls, outer, strict=True):
                    own = one.left - one.entered if site_of(site).part == "block" else call.left
                    tokens = (tokens_of(part, field.channels, batch) for part in (call.entered, own))
                    _add(sums[site, index], field, *map(exact, tokens))
    unused = [f"{index} ({site})" for (site, index), found in sums.items() if not found]
    if unused:
        raise SteerError(f"the model ran without calling what field {name!r} steers at the blocks {', '.join(unused)}.")
    squares = {place: float(found["squared"] / found["kept"].clamp_min(1)) for place, found in sums.items()}
    total = sum(squares.values())
    layers = tuple(
        LayerEffort(
            layer=place[1],
            effort=float(found["effort"] / found["kept"].clamp_min(1)),
            cosine=float(found["cosines"] / found["pointed"]) if found["pointed"] else None,
            rank=_effective_rank(fields[place], found["hidden"]),
            share=squares[place] / total if total else None,
            bottleneck=fields[place].rank,
            tokens=int(found["tokens"]),
            site=place[0],
        )
        for place, found in sums.items()
    )
    return ControlEffort(name, spec.site, spec.scale, layers)


def _add(sums: Sums, field: HRes, z: Tensor, own: Tensor) -> None:
    """Add tokens: what the field reads and the module's own update, `(tokens, width)` in fp64 both."""
    bias = field.up.bias
    require_finite("the stream that a field reads", z)
    hidden = field.hidden(z, z.dtype)
    steered = F.linear(hidden, exact(field.up.weight), None if bias is None else exact(bias))
    require_finite("what a field adds to it", steered)
    require_finite("the update of what a field steers", own)
    size, length = steered.norm(dim=1), z.norm(dim=1)
    ratio = abs(field.scale) * size[length > 0] / length[length > 0]
    both = (size > 0) & (own.norm(dim=1) > 0)
    ones = hidden if bias is None else F.pad(hidden, (0, 1), value=1.0)
    sums.add("tokens", torch.tensor(len(z)))
    sums.add("kept", (length > 0).sum())
    sums.add("effort", ratio.sum())
    sums.add("squared", ratio.square().sum())
    sums.add("cosines", F.cosine_similarity(steered[both], own[both], dim=1, eps=0.0).sum())
    sums.add("pointed", both.sum())
    sums.add("hidden", ones.T @ ones)


def _effective_rank(field: HRes, hidden: Tensor) -> float | None:
    """Return exp of the entropy of the eigenvalues of Σ H Hᵀ, given K = Σ (h, 1)(h, 1)ᵀ."""
    # with H = A·(h, 1), A = (W_up, b_up), they are those of K^½ AᵀA K^½: as small as the bottleneck
    parts = [field.up.weight] if field.up.bias is None else [field.up.weight, field.up.bias[:, None]]
    out = torch.cat([exact(part).cpu() for part in parts], 1)
    values, vectors = torch.linalg.eigh(hidden)
    half = vectors * values.clamp_min(0).sqrt()
    spectrum = torch.linalg.eigvalsh(half.T @ (out.T @ out) @ half).clamp_min(0)
    part = spectrum / spectrum.sum()
    return float(torch.special.entr(part).sum().exp()) if bool(spectrum.sum() > 0) else None
