"""Where the stream stands in a block's call, and in what the block returns.

The places are plain values, not closures, so that copies and pickles of a steered model carry them along.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from residual_steer.backbone import read_stream, write_stream
from residual_steer.errors import SteerError
from residual_steer.nested import dense, moved

__all__ = ["Enter", "Layout", "Leave", "Path", "tensors"]

Path = tuple[int | str, ...]


@dataclass(frozen=True)
class Layout:
    """How a stream is turned so that rows stand first and, if asked for, the width stands last.

    Attributes:
        rows: which dimension is the batch.
        turned: the numbers of dimensions at which the width is the second one and is moved to the end.
    """

    rows: int = 0
    turned: tuple[int, ...] = ()

    def read(self, z: Tensor) -> Tensor:
        """Return a view with rows first."""
        z = z.movedim(self.rows, 0) if self.rows else z
        return z.movedim(1, -1) if z.dim() in self.turned else z

    def back(self, z: Tensor) -> Tensor:
        """Return the view that a tensor like the original is."""
        z = z.movedim(-1, 1) if z.dim() in self.turned else z
        return z.movedim(0, self.rows) if self.rows else z


@dataclass(frozen=True)
class Enter:
    """Read the stream that enters a block.

    Attributes:
        path: an argument, by position or keyword, then positions inside it; () is where `read_stream` looks.
        keyword: what the argument is called where a call names it.
        layout: how the stream is turned.
    """

    path: Path = ()
    keyword: str | None = None
    layout: Layout = Layout()

    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Return the stream.

        Raises:
            SteerError: the call has no tensor there.
        """
        if not self.path:
            return self.layout.read(read_stream(args, kwargs))
        given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        key = self.keyword if self.keyword is not None and self.keyword in given else self.path[0]
        return self.layout.read(dense(_at(given, (key, *self.path[1:]), "entered")))


@dataclass(frozen=True)
class Leave:
    """Replace the stream in what a block returns.

    Attributes:
        path: positions or keys in the output; () is where `write_stream` looks.
        layout: how the stream is turned.
    """

    path: Path = ()
    layout: Layout = Layout()

    def __call__(self, output: Any, f: Callable[[Tensor], Tensor]) -> Any:
        """Return the output with its stream z replaced by f(z).

        Raises:
            SteerError: the output has no tensor there.
        """

        def turned(z: Tensor) -> Tensor:
            return self.layout.back(f(self.layout.read(z)))

        if not self.path:
            return write_stream(output, turned)
        return _replaced(output, self.path, moved(_at(output, self.path, "left"), turned))


def tensors(tree: Any, path: Path = (), depth: int = 2) -> Iterator[tuple[Path, Tensor]]:
    """Yield the floating tensors of nested tuples, lists and mappings with their places."""
    if isinstance(tree, Tensor):
        if tree.is_floating_point() and tree.dim() > 1:
            yield path, tree
    elif depth and isinstance(tree, (tuple, list, Mapping)):
        for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            if isinstance(key, (int, str)):
                yield from tensors(value, (*path, key), depth - 1)


def _at(tree: Any, path: Path, went: str) -> Tensor:
    """Return the stream at a place, or refuse a call that is not like the one of the probe."""
    found = tree
    for key in path:
        try:
            found = found[key]
        except (KeyError, IndexError, TypeError):
            found = None
    if not isinstance(found, Tensor):
        raise SteerError(
            f"the stream {went} these blocks as {''.join(f'[{key!r}]' for key in path)} when they were probed; this "
            f"call has no tensor there, in a {type(tree).__name__}. Call the model as it was probed, or give "
            "find_backbone(model, example=batch) such a batch."
        )
    return found


def _replaced(tree: Any, path: Path, value: Tensor) -> Any:
    if not path:
        return value
    key, new = path[0], _replaced(tree[path[0]], path[1:], value)
    if isinstance(tree, Mapping):
        changed = copy.copy(tree)
        changed[key] = new  # type: ignore[index]
        return changed
    items = list(tree)
    items[int(key)] = new
    return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
