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

__all__ = ["Enter", "Layout", "Leave", "Path", "at", "tensors"]

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
        z = at(given[self.keyword] if self.keyword in given else given.get(self.path[0]), self.path[1:])
        if not isinstance(z, Tensor):
            raise SteerError(
                f"the stream entered these blocks as {_told(self.path)} when they were probed; this call has no tensor "
                "there."
            )
        return self.layout.read(z)


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
        if not isinstance(at(output, self.path), Tensor):
            raise SteerError(
                f"the stream left these blocks as {_told(self.path)} when they were probed; this output, "
                f"{type(output).__name__}, has none there."
            )
        return _replaced(output, self.path, turned)


def at(tree: Any, path: Path) -> Any:
    """Return what stands at a place, None where there is no such place."""
    for key in path:
        try:
            tree = tree[key]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def tensors(tree: Any, path: Path = (), depth: int = 2) -> Iterator[tuple[Path, Tensor]]:
    """Yield the floating tensors of nested tuples, lists and mappings with their places."""
    if isinstance(tree, Tensor):
        if tree.is_floating_point() and tree.dim() > 1:
            yield path, tree
    elif depth and isinstance(tree, (tuple, list)):
        for index, value in enumerate(tree):
            yield from tensors(value, (*path, index), depth - 1)
    elif depth and isinstance(tree, Mapping):
        for key, value in tree.items():
            if isinstance(key, (int, str)):
                yield from tensors(value, (*path, key), depth - 1)


def _replaced(tree: Any, path: Path, f: Callable[[Tensor], Tensor]) -> Any:
    if not path:
        return f(tree)
    key, value = path[0], _replaced(tree[path[0]], path[1:], f)
    if isinstance(tree, Mapping):
        changed = copy.copy(tree)
        changed[key] = value  # type: ignore[index]
        return changed
    items = list(tree)
    items[int(key)] = value
    return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)


def _told(path: Path) -> str:
    return "".join(f"[{key!r}]" for key in path)
