"""Learning task after task without forgetting: a field moves only where the features of earlier tasks are not (eq. 6).

As printed, eq. 6 gives zero for every covariance that can be inverted. So the null space is the eigenspace outside the
leading directions, as in gradient projection memory (GPM, arXiv 2103.09762) and Adam-NSCL (arXiv 2103.07113), and
what is projected is the update, after the optimizer's own scaling and weight decay.

Where it is exact, it is so by induction over the blocks: while the stream z of an old task enters a block as it did,
an update of [W_down, b_down] that is orthogonal to every [z, 1] leaves the hidden units h, one of [W_up, b_up] that is
orthogonal to every [h, 1] leaves H(z), and so the stream enters the next block as it did.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ._batches import batches, require_finite, tokens_of
from ._controller import Steering, steering_of
from ._subspace import Protected, Protection, SecondMoment, Subspace, inputs_of, listed, unwrapped
from .diagnostics._results import Table, table_of
from .errors import SteerError
from .field import Projection
from .files import as_path, make_folder, write_whole
from .recording import record, undisturbed

__all__ = ["NullSpace"]

_KEY, _FORMAT = "residual_steer.null_space", 1
_PARTS = ("basis", "response")
_ORTHONORMAL = 1e-6  # how far UᵀU may be from the identity


class NullSpace:
    """The directions in which a field can still learn without changing what it does on the tasks seen so far.

    A field has two projections at every steered block, `blocks.3.down` and `blocks.3.up`. What enters each, [z, 1] and
    [σ(W_down·z + b_down), 1], spans directions that later updates must leave alone. They are found task by task: those
    that hold `energy` of that task's energy, what earlier tasks keep counted in (GPM). So a task with many tokens does
    not swamp one with few, as it would in one covariance of all, and every task keeps its share.

    It speaks of the field alone: what trains along with it (`steer(..., train=...)`), such as a head, is not protected.
    Give every task a head of its own, or keep the head still.

    Args:
        model: a steered model.
        energy: the part of the features' energy to protect, above 0 and up to 1. 1 protects all that the numbers can
            tell from zero; where that is not everything, what the model computes on the old tasks stays the same.
            Energy is not importance: where a few directions of the stream are far larger than all others, as in large
            language models, even a share close to 1 leaves much of what the field reads to later tasks.
        name: which field; None is the one that acts.

    Raises:
        SteerError: the model is not steered, has no such field, or `energy` is out of range.

    >>> space = NullSpace(model)
    >>> for task in tasks:
    ...     rs.fit(model, task, steps=500, protect=space)
    ...     space.observe(task)
    """

    def __init__(self, model: nn.Module, energy: float = 0.999, *, name: str | None = None) -> None:
        _, state = steering_of(model)
        if isinstance(energy, bool) or not isinstance(energy, (int, float)) or not 0 < energy <= 1:
            raise SteerError(f"`energy` is a number above 0 and up to 1; received {energy!r}.")
        self.energy, self.name = float(energy), state.name_of(name)
        self._model = model
        linears = self._linears()
        self._protected = {
            key: Protected.of(linear, Subspace.nothing(inputs_of(linear))) for key, linear in linears.items()
        }
        self._shares: dict[str, list[float]] = {key: [] for key in linears}
        self._protections: list[Protection] = []

    @property
    def tasks(self) -> int:
        """How many tasks were observed."""
        return len(next(iter(self._shares.values())))

    @property
    def left(self) -> dict[str, int]:
        """How many dimensions every projection has left to learn in, by its point: `{"blocks.0.down": 51, …}`."""
        return {key: one.space.left for key, one in self._protected.items()}

    def observe(self, loader: Iterable[Any], *, padding: bool = False) -> None:
        """Take in a task, in one pass over its data: from now on its features are protected.

        Every projection gets the sums of x·xᵀ over its inputs x, `(inputs, inputs)` in fp64; no features are kept.
        The pass is in evaluation mode and changes nothing in the model. Call it once for each task, when it has been
        learned, with the fields selected as the task uses them. Where several processes train, each of them observes
        all of the data.

        Args:
            loader: batches as in `fit`: dicts, pairs `(x, y)`, or x alone.
            padding: whether tokens that a dict's `attention_mask` leaves out count too. They do not need to where the
                model lets no real token see them, as in attention, or behind the text in a causal model. Say True for
                a recurrent model that is given padding in front of the text and ignores the mask. In an
                encoder-decoder every token counts, since the mask is not that of both halves.

        Raises:
            SteerError: the loader is empty, a feature is NaN or infinite, no token counts, the field does not act, or
                it acts on some rows only. Nothing was taken in then, as after an error of the loader's or model's own.

        Warns:
            UserWarning: a projection has no dimension left.
        """
        base, state = self._steering()
        if self.name not in state.mix.names or state.mix.rows is not None:
            raise SteerError(
                f"the field {self.name!r} is observed where it acts on every row; now acting: {state.mix}. Select it "
                f"with residual_steer.use(model, {self.name!r})."
            )
        linears = self._linears()
        moments = {key: SecondMoment(linear) for key, linear in linears.items()}
        self._pass(base, state, moments, loader, padding)
        unseen = [key for key, moment in moments.items() if not moment.count]
        if unseen:
            raise SteerError(
                f"no token of this task entered {', '.join(unseen)}: all were padding, or the block was not called. "
                "Give data with tokens that count, or `padding=True`."
            )
        spaces = {key: self._protected[key].space.extend(moment.sum, self.energy) for key, moment in moments.items()}
        full = [key for key, space in spaces.items() if not space.left and self._protected[key].space.left]
        for key, space in spaces.items():
            self._protected[key] = self._protected[key].extended(linears[key], space)
            self._shares[key].append(space.share(moments[key].sum))
        self._warn(full)

    def protect(self, optimizer: Optimizer) -> Protection:
        """Project every update that an optimizer makes to the field onto the null space of what was observed.

        This is done behind its steps, whatever it does in them: momentum, scaling, weight decay. Costs 4·outputs·
        inputs·protected operations a projection and step. Before the first task was observed nothing is held. What is
        observed later is held from then on. `fit(..., protect=space)` calls it.

        Args:
            optimizer: one of torch, which holds the parameters of the field, of both projections or of one, and both
                weight and bias of each; or accelerate's around it.

        Returns:
            A handle: `remove()` it, or use it in a `with`.

        Raises:
            SteerError: it is no optimizer, holds nothing of the field, holds a bias without its weight or a weight
                without its bias, or is protected by this space already.

        Warns:
            UserWarning: a projection has no dimension left; in a step, that the field was changed otherwise since it
                was observed, so that what is held from then on is what it does now.
        """
        self._steering()
        inner = unwrapped(optimizer)
        self._protections = [protection for protection in self._protections if protection.active]
        if any(protection.covers(inner) for protection in self._protections):
            raise SteerError("this NullSpace protects from this optimizer already. Call `remove()` of that first.")
        linears = self._optimized(inner)
        self._warn([key for key in linears if not self._protected[key].space.left])
        protection = Protection(inner, linears, self._protected)
        self._protections.append(protection)
        return protection

    def report(self) -> Table:
        """Return what is protected and what is left, projection by projection."""
        spaces = [one.space for one in self._protected.values()]
        spec = self._steering()[1].specs[self.name]
        notes = ["The 1 of a bias is one of the dimensions."] if spec.bias else []
        if spec.train:
            notes.append(f"Not protected, since it trains along with the field: {listed(list(spec.train))}.")
        shares = [min(self._shares[key], default=None) for key in self._protected]
        columns = {
            "point": ("projection", self._protected),
            "inputs": ("dimensions", [space.basis.shape[0] for space in spaces]),
            "held": ("protected", [space.basis.shape[1] for space in spaces]),
            "left": ("left", [space.left for space in spaces]),
            "share": ("energy protected, least of all tasks", shares),
        }
        title = f"Null space of field {self.name!r} after {self._counted()}, energy {self.energy:g}"
        return table_of(title, columns, *notes, digits=6)

    def __str__(self) -> str:
        """Write the report as text."""
        return str(self.report())

    def __repr__(self) -> str:
        left = self.left.values()
        return f"<NullSpace of {self.name!r}: {self._counted()}, {min(left)} to {max(left)} dimensions left>"

    def _counted(self) -> str:
        return f"{self.tasks} task{'s' * (self.tasks != 1)}"

    def state_dict(self) -> dict[str, Any]:
        """Return the directions that are held, and what the field makes of them, as tensors and plain values."""
        points = {
            key: {"basis": one.space.basis, "response": one.response, "shares": list(self._shares[key])}
            for key, one in self._protected.items()
        }
        return {**self._where(), "points": points}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned, in place of what was observed here.

        Raises:
            SteerError: it belongs to another backbone, site, rank, width or energy, or is damaged. Nothing has changed.
        """
        protected, shares = _parse(state, self._where(), self._linears())
        self._protected.update(protected)
        self._shares.update(shares)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state as one safetensors file, whole or not at all.

        Raises:
            SteerError: it cannot be written; what was there before is untouched.
        """
        place, state = as_path(path), self.state_dict()
        parts = {(key, part): point.pop(part) for key, point in state["points"].items() for part in _PARTS}
        tensors = {".".join(name): tensor.contiguous() for name, tensor in parts.items()}
        make_folder(place.parent)
        write_whole({place: safetensors.torch.save(tensors, {_KEY: json.dumps(state)})})

    def load(self, path: str | os.PathLike[str]) -> None:
        """Read what `save` wrote, for a model that has the weights of the field already.

        Raises:
            SteerError: the file is missing or damaged, or belongs to another model. Nothing has changed.
        """
        place = as_path(path)
        try:
            with safetensors.safe_open(place, framework="pt") as file:
                state = json.loads(file.metadata()[_KEY])
                for key, point in state["points"].items():
                    point.update({part: file.get_tensor(f"{key}.{part}") for part in _PARTS})
        except OSError as error:
            raise SteerError(f"could not read {place}: {error.strerror or error}.") from error
        except Exception as error:  # bytes from anywhere can fail in any way
            raise SteerError(
                f"{place} is damaged or was not written by NullSpace.save ({type(error).__name__}: {error})."
            ) from error
        self.load_state_dict(state)

    def _where(self) -> dict[str, Any]:
        """Return what a state has to agree with."""
        _, state = self._steering()
        site = state.specs[self.name].site
        return {"format": _FORMAT, "backbone": state.backbone.name, "site": site, "energy": self.energy}

    def _steering(self) -> tuple[nn.Module, Steering]:
        """Return the steered module and its steering, still with the field that this space was made for.

        Raises:
            SteerError: the field is gone, or is another one by now.
        """
        base, state = steering_of(self._model)
        name = state.name_of(self.name)
        found = {key: (linear.out_features, inputs_of(linear)) for key, linear in self._linears().items()}
        made = {key: (len(one.response), len(one.space.basis)) for key, one in self._protected.items()}
        if found != made:
            raise SteerError(f"the field {name!r} is not the one that this NullSpace was made for. Make a new one.")
        return base, state

    def _linears(self) -> dict[str, Projection]:
        """Return the projections of the field by the names of their points."""
        _, state = steering_of(self._model)
        return {
            f"blocks.{index}.{side}": linear
            for index, field in state.fields(self.name).items()
            for side, linear in (("down", field.down), ("up", field.up))
        }

    def _optimized(self, optimizer: Optimizer) -> dict[str, Projection]:
        """Return the projections that an optimizer holds.

        Raises:
            SteerError: it holds none, or half of one.
        """
        there = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        found = {}
        for key, linear in self._linears().items():
            mine = [id(parameter) in there for parameter in linear.parameters()]
            if any(mine) and not all(mine):
                raise SteerError(
                    f"weight and bias of a projection are projected together, and this optimizer holds one of "
                    f"{key} without the other. Give it residual_steer.parameters(model)."
                )
            if all(mine):
                found[key] = linear
        if not found:
            raise SteerError(
                f"this optimizer holds no parameter of field {self.name!r}. Give it residual_steer.parameters(model)."
            )
        return found

    def _pass(
        self,
        base: nn.Module,
        state: Steering,
        moments: Mapping[str, SecondMoment],
        loader: Iterable[Any],
        padding: bool,
    ) -> None:
        """Run a loader through the model and add what enters every projection to its moment."""
        site, fields = state.specs[self.name].site, state.fields(self.name)
        with undisturbed(base):
            for batch in batches(base, loader):
                with record(state.backbone, fields, site=site) as seen:
                    batch.run(base)
                for index, calls in seen.calls.items():
                    field, dtype = fields[index], state.injectors[site, index].compute_dtype
                    for call in calls:
                        x = tokens_of(call.entered, field.channels, None if padding else batch).to(dtype)
                        for side, features in (("down", x), ("up", field.hidden(x, dtype))):
                            require_finite(f"what enters blocks.{index}.{side}", features)
                            moments[f"blocks.{index}.{side}"].add(features)

    def _warn(self, full: list[str]) -> None:
        if full:
            warnings.warn(
                f"no room is left for another task at {listed(full)} of field {self.name!r}: all directions are "
                "protected, and nothing there will learn. Lower `energy`, or steer with a larger rank.",
                stacklevel=3,
            )


def _parse(
    state: Mapping[str, Any], where: Mapping[str, Any], linears: Mapping[str, Projection]
) -> tuple[dict[str, Protected], dict[str, list[float]]]:
    """Return what is protected at every projection, and the share of every task's energy; raise if it does not fit."""
    if not isinstance(state, Mapping) or state.get("format") != _FORMAT or not isinstance(state.get("points"), Mapping):
        raise SteerError("this is no state of a NullSpace, or one of another version; it comes from `state_dict()`.")
    wrong = [f"{key} {state.get(key)!r}, here {value!r}" for key, value in where.items() if state.get(key) != value]
    if state["points"].keys() != linears.keys():
        there, here = (listed(list(map(str, keys))) or "none" for keys in (state["points"], linears))
        wrong.append(f"projections {there}, here {here}")
    if wrong:
        raise SteerError(f"this state belongs to another NullSpace: {'; '.join(wrong)}. Make this one as that one was.")
    protected: dict[str, Protected] = {}
    shares: dict[str, list[float]] = {}
    for key, linear in linears.items():
        point, inputs, outputs = state["points"][key], inputs_of(linear), linear.out_features
        try:
            basis, response, shares[key] = point["basis"], point["response"], [float(s) for s in point["shares"]]
            sizes, dimensions = (tuple(basis.shape), tuple(response.shape)), basis.shape[1]
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise SteerError(f"the state of {key} is damaged ({type(error).__name__}: {error}).") from error
        if sizes != ((inputs, dimensions), (outputs, dimensions)):
            raise SteerError(
                f"this state belongs to a model of other sizes: at {key} it has {sizes[0]} and {sizes[1]}, where this "
                f"model has {inputs} inputs and {outputs} outputs. Steer with the same rank."
            )
        basis, response = (tensor.detach().cpu().double().clone() for tensor in (basis, response))
        off: Tensor = basis.t() @ basis - torch.eye(basis.shape[1], dtype=basis.dtype)
        if not bool(torch.isfinite(response).all()) or not float(off.abs().amax() if off.numel() else 0) < _ORTHONORMAL:
            raise SteerError(f"the state of {key} is damaged: its directions are not orthonormal, or not finite.")
        protected[key] = Protected(Subspace(basis), response)
    if len({len(each) for each in shares.values()}) > 1:
        raise SteerError("this state is damaged: its projections saw different numbers of tasks.")
    return protected, shares
