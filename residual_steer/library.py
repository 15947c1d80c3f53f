"""A library of fields: many on disk, of which a model holds those that were named last."""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import nn

from ._checks import check_integer, check_model
from ._controller import steered_part, steering_of
from ._field_file import DESCRIPTION, TENSORS
from ._files import as_path
from ._internals import version
from .backbone import Backbone
from .config import FieldConfig, check_name
from .errors import SteerError, some
from .routing import OFF, Asked, Mix
from .steering import unsteer
from .storage import load

__all__ = ["Library", "library"]

_Stamp = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class _Loaded:
    """A field that was loaded: from which files, as what, and how often its tensors had been changed then."""

    stamp: _Stamp
    spec: FieldConfig
    versions: tuple[int, ...]


def library(model: nn.Module, folder: str | Path, *, slots: int = 64, arch: str | Backbone | None = None) -> Library:
    """Return a library of the fields that `save` wrote into a folder, one sub-folder each, for batches to choose from.

    Args:
        model: steered or not; the library loads fields into it and takes them away.
        folder: has a folder for each field, whose name is the field's.
        slots: the number of fields of the library that the model holds at most; the least recently used goes out.
        arch: as in `load`.

    Raises:
        SteerError: no folder, or fewer than one slot.

    >>> served = rs.library(model, "fields", slots=64)
    >>> with served.use(["law", "art", None, "law"]) as errors:
    ...     logits = model(batch).logits       # rows whose field could not be loaded are in `errors`, and not steered
    """
    return Library(check_model(model), as_path(folder), check_integer("slots", slots, 1), arch)


@dataclass(eq=False)
class Library:
    """Fields on disk, of which a model holds some. Threads take turns in `with`: a selection is the whole model's."""

    model: nn.Module
    folder: Path
    slots: int = 64
    arch: str | Backbone | None = None
    _there: OrderedDict[str, _Loaded] = field(default_factory=OrderedDict, repr=False)  # least recently used first
    _lock: Any = field(default_factory=threading.RLock, repr=False)

    def __post_init__(self) -> None:
        if not self.folder.is_dir():
            raise SteerError(f"a library is a folder with a folder for each field; {str(self.folder)!r} is none.")

    def __deepcopy__(self, memo: Any) -> Library:
        raise SteerError("a library belongs to one model: make another one for the copy, `rs.library(copy, folder)`.")

    @property
    def names(self) -> list[str]:
        """The names of all fields on disk, in alphabetical order."""
        return sorted(path.parent.name for path in self.folder.glob(f"*/{DESCRIPTION}"))

    @property
    def loaded(self) -> list[str]:
        """The names of the fields that the model holds, the least recently used first."""
        return [name for name, one in self._there.items() if self._specs().get(name) is one.spec]

    def use(self, mix: Asked, *, on: str = "all") -> Borrowed:
        """Select as `residual_steer.use` does, after the fields that are named were loaded.

        A file that changed since is loaded again. In a list, a field that is not there, is damaged or does not fit is
        the error of the rows that name it: they get the frozen model, and a warning names them. For a name or weights
        it is raised.

        Args:
            mix: as for `residual_steer.use`.
            on: as for `residual_steer.use`.

        Returns:
            What was selected, with `errors` by row; in a `with` statement it gives these errors, and restores on
            leaving what was selected before.

        Raises:
            SteerError: no mix, more fields than slots, or a field of a name or weights that cannot be loaded. What was
                selected stays, as far as it was not loaded anew.
        """
        with self._lock:
            before, rows = self._mix(), _rows(mix)
            if not rows and not isinstance(mix, (str, Mapping)):
                Mix.parse(mix, ())  # None, or an error
            asked = rows or ([mix] if isinstance(mix, str) else [*(mix or ())])
            wanted = list(dict.fromkeys(name for name in asked if name is not None))
            if len(wanted) > self.slots:
                raise SteerError(f"the library has {self.slots} slots, and {len(wanted)} fields are to act at once.")
            try:
                failed = self._load(wanted)
                if rows is None:
                    for error in failed.values():
                        raise error
                else:
                    mix = [None if name in failed else name for name in rows]
                self._select(mix, on, failed)
            except BaseException:
                self._restore(before)
                raise
            errors = {row: failed[name] for row, name in enumerate(asked) if name in failed}
            if errors:
                warnings.warn(
                    f"rows {some([*map(str, errors)])} get the frozen model, since their field could not be loaded: "
                    f"{next(iter(errors.values()))}",
                    stacklevel=2,
                )
            return Borrowed(self, self._mix(), before, errors)

    def _specs(self) -> Mapping[str, Any]:
        return {} if steered_part(self.model) is None else steering_of(self.model)[1].specs

    def _mix(self) -> Mix:
        return OFF if steered_part(self.model) is None else steering_of(self.model)[1].mix

    def _load(self, wanted: Sequence[str], keep: Sequence[str] = ()) -> dict[str, SteerError]:
        """Load fields that are not there, or not as the files are now; return the errors of those that cannot be."""
        failed = {}
        for name in list(self._there):
            if self._specs().get(name) is not self._there[name].spec:
                del self._there[name]  # somebody took it away, and may have put another one there
        for name in wanted:
            try:
                self._bring(name)
            except SteerError as error:
                failed[name] = error
                continue
            self._there.move_to_end(name)
            spare = [other for other in self._there if other not in wanted and other not in keep]
            for other in spare[: max(0, len(self._there) - self.slots)]:
                self._drop(other)
        return failed

    def _bring(self, name: str) -> None:
        check_name(name, ())
        folder = self.folder / name
        stamp = _stamp(folder)
        if name in self._there and self._there[name].stamp == stamp:
            return
        if name in self._there:
            self._drop(name)
        if stamp is None:
            raise SteerError(f"no field {name!r} is in {str(self.folder)!r}: it has no {DESCRIPTION} and {TENSORS}.")
        if name in self._specs():
            raise SteerError(f"the model has a field {name!r} that the library did not load: rename one of them.")
        load(self.model, folder, name, arch=self.arch)
        self._there[name] = _Loaded(stamp, self._specs()[name], self._versions(name))

    def _versions(self, name: str) -> tuple[int, ...]:
        base, state = steering_of(self.model)
        return tuple(version(tensor) for tensor in state.tensors(base, name).values() if not tensor.is_inference())

    def _drop(self, name: str) -> None:
        one = self._there.pop(name)
        if one.versions != self._versions(name) and one.stamp == _stamp(self.folder / name):
            warnings.warn(
                f"the field {name!r} was changed since the library loaded it, and goes out unsaved to make room. Save "
                "what is trained, or give the library more `slots`.",
                stacklevel=5,
            )
        unsteer(self.model, name)

    def _select(self, mix: Asked, on: str, failed: dict[str, SteerError]) -> None:
        """Select; fields in which the rows of one batch cannot differ go to `failed`, and their rows get none."""
        if steered_part(self.model) is None:
            return  # nothing was loaded, and nothing acts
        base, state = steering_of(self.model)
        try:
            state.select(base, Mix.parse(mix, state.specs, on))
        except SteerError:
            if not isinstance(mix, list):
                raise
            for name in dict.fromkeys(name for name in mix if name is not None):
                try:
                    state.select(base, Mix.parse([name, None], state.specs, on))
                except SteerError as error:
                    failed[name] = error
            rest = [None if name in failed else name for name in mix]
            if rest == mix:
                raise
            state.select(base, Mix.parse(rest, state.specs, on))

    def _restore(self, mix: Mix) -> None:
        """Select what was selected before, after what was taken away since is there again; raise if it cannot be."""
        gone = [name for name in mix.names if name not in self._specs()]
        failed = self._load(gone, keep=mix.names)
        if steered_part(self.model) is None:
            return
        base, state = steering_of(self.model)
        state.select(base, OFF if failed else mix)
        if failed:
            raise SteerError(f"what was selected is off now: {next(iter(failed.values()))}")


@dataclass
class Borrowed:
    """What `Library.use` selected; no other thread selects by the library while a `with` statement lasts.

    Attributes:
        errors: why rows have no field, by their place in the list.
    """

    _library: Library = field(repr=False)
    _mix: Mix = field(repr=False)
    _before: Mix = field(repr=False)
    errors: dict[int, SteerError] = field(default_factory=dict)

    def __enter__(self) -> dict[int, SteerError]:
        """Return the errors; what another thread selected since is selected again afterwards."""
        library = self._library
        library._lock.acquire()
        try:
            if library._mix() != self._mix:
                self._before = library._mix()
                library._restore(self._mix)
        except BaseException:
            library._lock.release()
            raise
        return self.errors

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore what was selected before; what cannot be is an error, after an exception a warning."""
        try:
            self._library._restore(self._before)
        except SteerError as failed:
            if error is None:
                raise
            warnings.warn(str(failed), stacklevel=2)
        finally:
            self._library._lock.release()


def _rows(mix: Asked) -> list[str | None] | None:
    """Return a mix row by row, None if it is none; raise if an entry is no name."""
    if not isinstance(mix, Sequence) or isinstance(mix, (str, bytes)):
        return None
    for name in mix:
        if name is not None and not isinstance(name, str):
            raise SteerError(f"a list for `use` has a name or None for every row of the batch; received {name!r}.")
    return list(mix)


def _stamp(folder: Path) -> _Stamp | None:
    """Return what changes when a field is saved anew: which files they are, of which size and when; None if none."""
    try:
        found = [(folder / name).stat() for name in (DESCRIPTION, TENSORS)]
    except OSError:
        return None
    return tuple((each.st_ino, each.st_size, each.st_mtime_ns) for each in found)
