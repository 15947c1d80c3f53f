"""Learning task after task without forgetting: a field moves only where the features of earlier tasks are not (eq. 6).

As printed, eq. 6 gives zero for every covariance that can be inverted. So the null space is the eigenspace outside the
leading directions, as in gradient projection memory (GPM, Saha et al. 2021, arXiv 2103.09762), on covariances, which
need no stored features, as in Adam-NSCL (Wang et al. 2021, arXiv 2103.07113).

It is exact by induction over the blocks: while the stream z of an old task enters a block as it did, an update of
[W_down, b_down] that is orthogonal to every [z, 1] leaves the hidden units h, one of [W_up, b_up] that is orthogonal
to every [h, 1] leaves H(z), and so the stream enters the next block as it did.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.optim import Optimizer

from ._batches import batches, require_finite, tokens_of
from ._checks import check_number
from ._controller import Steering, steering_of
from ._files import as_path, make_folder, write_whole
from ._subspace import Protected, Protection, SecondMoment, inputs_of, unwrapped
from .diagnostics._results import Table, table_of
from .errors import SteerError, some
from .field import Projection
from .recording import record_sites, undisturbed

__all__ = ["NullSpace"]

_KEY, _FORMAT = "residual_steer.null_space", 1
_PARTS = ("basis", "response")
_ORTHONORMAL = 1e-6  # how far UᵀU may be from the identity


class NullSpace:
    """The directions in which a field can still learn without changing what it does on the tasks seen so far.

    A field has two projections at every point, `blocks.3.down` and `blocks.3.up` (with several sites, the site comes
    before the last dot: `blocks.3.after.up`). What enters each, [z, 1] and
    [σ(W_down·z + b_down), 1], spans directions that later updates must leave alone. They are found task by task: those
    that hold `energy` of that task's energy, what earlier tasks keep counted in, so that a task with many tokens does
    not swamp one with few. What trains along with the field (`steer(..., train=...)`), such as a head, is not
    protected: give every task a head of its own, or keep the head still.

    Args:
        model: a steered model.
        energy: the part of the features' energy to protect, above 0 and up to 1, which protects all that the numbers
            can tell from zero: where that is not everything, old tasks stay as they are. Energy is not importance:
            where a few directions of the stream are far larger than all others, as in large language models, even a
            share close to 1 leaves much of what the field reads to later tasks.
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
        self.energy = check_number("energy", energy, above=0, at_most=1)
        self.name, self._model = state.name_of(name), model
        self._protected = {key: Protected.of(linear) for key, linear in self._linears().items()}
        self._protections: WeakKeyDictionary[Optimizer, Protection] = WeakKeyDictionary()

    @property
    def tasks(self) -> int:
        """How many tasks were observed."""
        return len(next(iter(self._protected.values())).shares)

    @property
    def left(self) -> dict[str, int]:
        """How many dimensions every projection has left to learn in, by its point: `{"blocks.0.down": 51, …}`."""
        return {key: one.left for key, one in self._protected.items()}

    def observe(self, loader: Iterable[Any], *, padding: bool = False) -> None:
        """Take in a task, in one pass over its data: from now on its features are protected.

        Call it once a task, when it has been learned, with the fields selected as the task uses them; under several
        processes each observes all of the data. The pass changes nothing in the model, and keeps the sums of x·xᵀ over
        the inputs x of every projection, `(inputs, inputs)` in fp64, but no features.

        Args:
            loader: batches as in `fit`: dicts, pairs `(x, y)`, or x alone.
            padding: whether padding counts too. It needs to in a recurrent model that is given padding in front of the
                text and ignores the mask. In an encoder-decoder it always does: the mask is not that of both halves.

        Raises:
            SteerError: the loader is empty, a feature is NaN or infinite, no token counts, or the field does not act on
                every row. Nothing was taken in then, as after an error of the loader's or model's own.

        Warns:
            UserWarning: a projection has no dimension left.
        """
        base, state = self._steering()
        state.mix.check_whole("a space that is protected")
        if self.name not in state.mix.names or state.mix.rows is not None:
            raise SteerError(
                f"the field {self.name!r} is observed where it acts on every row; now acting: {state.mix}. Select it "
                f"with residual_steer.use(model, {self.name!r})."
            )
        linears, spec, fields = self._linears(), state.specs[self.name], state.fields(self.name)
        moments = {key: SecondMoment(linear) for key, linear in linears.items()}
        with undisturbed(base):
            for batch in batches(base, loader):
                with record_sites(state.backbone, spec.sites) as seen:
                    batch.run(base)
                for place, field in fields.items():
                    dtype, point = state.injectors[place].compute_dtype, spec.point(place)
                    for call in seen[place[0]].calls.get(place[1], ()):
                        x = tokens_of(call.entered, field.channels, None if padding else batch).to(dtype)
                        for side, features in (("down", x), ("up", field.hidden(x, dtype))):
                            require_finite(f"what enters {point}.{side}", features)
                            moments[f"{point}.{side}"].add(features)
        unseen = [key for key, moment in moments.items() if not moment.count]
        if unseen:
            raise SteerError(
                f"no token of this task entered {', '.join(unseen)}: all were padding, or the block was not called. "
                "Give data with tokens that count, or `padding=True`."
            )
        before = self._protected
        grown = {key: one.grown(linears[key], moments[key].sum, self.energy) for key, one in before.items()}
        full = [key for key, one in grown.items() if not one.left and before[key].left]
        self._protected.update(grown)
        self._warn(full)

    def protect(self, optimizer: Optimizer) -> Protection:
        """Project every update that an optimizer makes to the field onto the null space of what was observed.

        This is done behind its steps, whatever it does in them: momentum, scaling, weight decay. Costs 4·outputs·
        inputs·protected operations a projection and step. What is observed later is protected from then on. The handle
        that is returned ends it by `remove()`, or at the end of a `with`. `fit(..., protect=space)` calls this.

        Args:
            optimizer: one of torch, or accelerate's around it, with weight and bias of both projections or of one.

        Raises:
            SteerError: it is no optimizer, has nothing of the field or half of a projection, or is protected already.

        Warns:
            UserWarning: a projection has no dimension left; in a step, that the field was changed otherwise since it
                was observed, so that what it does now is protected from then on.
        """
        self._steering()
        inner = unwrapped(optimizer)
        if inner in self._protections and self._protections[inner].active:
            raise SteerError("this NullSpace protects from this optimizer already. Call `remove()` of that first.")
        there, linears = {id(parameter) for group in inner.param_groups for parameter in group["params"]}, {}
        for key, linear in self._linears().items():
            mine = [id(parameter) in there for parameter in linear.parameters()]
            if any(mine) and not all(mine):
                raise SteerError(
                    f"weight and bias of a projection are projected together, and this optimizer has one of {key} "
                    "without the other. Give it residual_steer.parameters(model)."
                )
            if all(mine):
                linears[key] = linear
        if not linears:
            raise SteerError(
                f"this optimizer has no parameter of field {self.name!r}. Give it residual_steer.parameters(model)."
            )
        self._warn([key for key in linears if not self._protected[key].left])
        self._protections[inner] = Protection(inner, linears, self._protected)
        return self._protections[inner]

    def report(self) -> Table:
        """Return what is protected and what is left, projection by projection."""
        every = self._protected.values()
        spec = self._steering()[1].specs[self.name]
        notes = ["The 1 of a bias is one of the dimensions."] if spec.bias else []
        if spec.train:
            notes.append(f"Not protected, since it trains along with the field: {some(spec.train)}.")
        columns = {
            "point": ("projection", self._protected),
            "inputs": ("dimensions", [one.basis.shape[0] for one in every]),
            "held": ("protected", [one.basis.shape[1] for one in every]),
            "left": ("left", self.left.values()),
            "share": ("energy protected, least of all tasks", [min(one.shares, default=None) for one in every]),
        }
        tasks = f"{self.tasks} task{'s' * (self.tasks != 1)}"
        title = f"Null space of field {self.name!r} after {tasks}, energy {self.energy:g}"
        return table_of(title, columns, *notes, digits=6)

    def __str__(self) -> str:
        return str(self.report())

    def __repr__(self) -> str:
        left = self.left.values()
        return f"<NullSpace of {self.name!r}: tasks {self.tasks}, {min(left)} to {max(left)} dimensions left>"

    def state_dict(self) -> dict[str, Any]:
        """Return the protected directions, and what the field makes of them, as tensors and plain values."""
        points = {
            key: {"basis": one.basis, "response": one.response, "shares": list(one.shares)}
            for key, one in self._protected.items()
        }
        return {**self._where(), "points": points}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what `state_dict` returned, in place of what was observed here.

        Raises:
            SteerError: it belongs to another backbone, site, rank, width or energy, or is damaged. Nothing has changed.
        """
        self._protected.update(_parse(state, self._where(), self._linears()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state as one safetensors file, whole or not at all.

        Raises:
            SteerError: it cannot be written; what was there before is untouched.
        """
        place, state = as_path(path), self.state_dict()
        parts = {f"{key}.{part}": point.pop(part) for key, point in state["points"].items() for part in _PARTS}
        tensors = {name: tensor.contiguous() for name, tensor in parts.items()}
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
        site = ", ".join(state.specs[self.name].sites)
        return {"format": _FORMAT, "backbone": state.backbone.name, "site": site, "energy": self.energy}

    def _steering(self) -> tuple[nn.Module, Steering]:
        """Return the steered module and its steering, or raise if the field is gone or another one by now."""
        base, state = steering_of(self._model)
        name = state.name_of(self.name)
        found = {key: (linear.out_features, inputs_of(linear)) for key, linear in self._linears().items()}
        made = {key: (len(one.response), len(one.basis)) for key, one in self._protected.items()}
        if found != made:
            raise SteerError(f"the field {name!r} is not the one that this NullSpace was made for. Make a new one.")
        return base, state

    def _linears(self) -> dict[str, Projection]:
        """Return the projections of the field by the names of their points."""
        _, state = steering_of(self._model)
        fields = state.fields(state.name_of(self.name))
        return {
            f"{state.specs[self.name].point(place)}.{side}": linear
            for place, field in fields.items()
            for side, linear in (("down", field.down), ("up", field.up))
        }

    def _warn(self, full: list[str]) -> None:
        if full:
            warnings.warn(
                f"no room is left for another task at {some(full)} of field {self.name!r}: all directions are "
                "protected, and nothing there will learn. Lower `energy`, or steer with a larger rank.",
                stacklevel=3,
            )


def _parse(
    state: Mapping[str, Any], where: Mapping[str, Any], linears: Mapping[str, Projection]
) -> dict[str, Protected]:
    """Return what a state protects at every projection; raise if it does not fit, or is damaged."""
    if not isinstance(state, Mapping) or state.get("format") != _FORMAT or not isinstance(state.get("points"), Mapping):
        raise SteerError("this is no state of a NullSpace, or one of another version; it comes from `state_dict()`.")
    wrong = [f"{key} {state.get(key)!r}, here {value!r}" for key, value in where.items() if state.get(key) != value]
    if state["points"].keys() != linears.keys():
        there, here = (some([*map(str, keys)]) or "none" for keys in (state["points"], linears))
        wrong.append(f"projections {there}, here {here}")
    if wrong:
        raise SteerError(f"this state belongs to another NullSpace: {'; '.join(wrong)}. Make this one as that one was.")
    found: dict[str, Protected] = {}
    for key, linear in linears.items():
        point, inputs, outputs = state["points"][key], inputs_of(linear), linear.out_features
        try:
            basis, response = (point[part].detach().cpu().double().clone() for part in _PARTS)
            shares, dimensions = tuple(float(share) for share in point["shares"]), basis.shape[1]
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise SteerError(f"the state of {key} is damaged ({type(error).__name__}: {error}).") from error
        if (basis.shape, response.shape) != ((inputs, dimensions), (outputs, dimensions)):
            raise SteerError(
                f"this state belongs to a model of other sizes: at {key} it has {tuple(basis.shape)} and "
                f"{tuple(response.shape)}, where this model has {inputs} inputs and {outputs} outputs. Steer with the "
                "same rank."
            )
        off = (basis.t() @ basis - torch.eye(dimensions, dtype=basis.dtype)).abs()
        if not bool(torch.isfinite(response).all()) or not bool((off < _ORTHONORMAL).all()):
            raise SteerError(f"the state of {key} is damaged: its directions are not orthonormal, or not finite.")
        found[key] = Protected(basis, response, shares)
    if len({len(each.shares) for each in found.values()}) > 1:
        raise SteerError("this state is damaged: its projections saw different numbers of tasks.")
    return found
