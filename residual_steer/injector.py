"""The module that sits on a point: it holds the point's fields and adds those that act to the stream.

It is a registered child of the module it serves, and its hooks are its own bound methods: so the base keys of the state
dict stay as they are, and `copy.deepcopy` and pickling carry it along without a reference back to the original.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from .backbone import Backbone, bulk_dtype, read_stream, replace_stream, write_stream
from .blend import Blend, Tables
from .errors import SteerError
from .field import HRes
from .mix import OFF, Mix, row_factor

__all__ = ["Injector"]


class Injector(nn.Module):
    """Attach fields to one point of a backbone.

    With no field acting, the hooks hand the module's own tensors through untouched, so the frozen model's output
    comes back bit for bit.

    Args:
        backbone: says how the stream is read and written where the point is a whole block.
        index: which block.
        site: `"block"`, `"mixer"`, `"mlp"` or `"input"`.
    """

    def __init__(self, backbone: Backbone, index: int, site: str) -> None:
        super().__init__()
        host = backbone.point(index, site)
        if host is None:
            raise SteerError(f"block {index} has no {site!r}.")
        self.site = site
        if hasattr(host, self.key):
            raise SteerError(f"this {type(host).__name__} has a {self.key!r} of its own, where steering would stand.")
        self.read = backbone.read if site == "block" else read_stream
        self.write = backbone.write if site == "block" else write_stream
        self.fields = nn.ModuleDict()
        self.select(OFF, {})
        self._compute_dtype = bulk_dtype(host)
        self._host = (host,)  # in a tuple, since a module would become a child
        self._entered: Tensor | None = None
        self._see: Callable[[Tensor, torch.dtype], None] | None = None
        self._versions: list[tuple[Tensor, int]] | None = None
        host.add_module(self.key, self)
        self.train(host.training)
        if site == "input":
            self._handles = [host.register_forward_pre_hook(self._before, with_kwargs=True)]
        else:
            # First in line: transformers captures hidden states with hooks of its own, and must see the steered stream.
            after = host.register_forward_hook(self._after, with_kwargs=True, prepend=True)
            before = host.register_forward_pre_hook(self._keep if backbone.inplace else self._watch, with_kwargs=True)
            self._handles = [after, before]

    def forward(self, z: Any) -> Any:
        """Return what comes in: a host that calls all its children, an `nn.Sequential`, calls this too."""
        return z

    @property
    def key(self) -> str:
        """The name under which the injector is registered in its host."""
        return f"steering_{self.site}"

    def detach(self) -> None:
        """Take away the child and the hooks that were added to the host, and nothing else."""
        for handle in self._handles:
            handle.remove()
        delattr(self._host[0], self.key)

    def select(self, mix: Mix, tables: Tables) -> None:
        """Let those fields of `mix` act that stand at this point.

        One field that acts on every row alike takes a path of its own. Otherwise only the fields that act are computed,
        but under `torch.compile` all that stand here: so neither other weights nor other rows make another graph.

        Args:
            mix: which fields act.
            tables: of coefficients, which points with the same fields share.
        """
        fields = {name: cast(HRes, field) for name, field in self.fields.items()}
        acting = {name: field for name, field in fields.items() if name in mix.names}
        self.mix = mix
        self._alone: tuple[str, float] | None = None
        self._some = self._every = None
        if acting:
            name, *others = acting
            if not others and len(set(mix.columns[name])) == 1:
                self._alone = name, mix.columns[name][0]
            else:
                self._some = Blend.of(mix, acting, tables)
        if fields and not mix.by_name:
            self._every = self._some if self._some is not None and acting == fields else Blend.of(mix, fields, tables)
        self._on = bool(acting) or self._every is not None

    @contextlib.contextmanager
    def shown(self, see: Callable[[Tensor, torch.dtype], None]) -> Iterator[None]:
        """Show every stream that the fields here are about to read, and the dtype in which they compute.

        Args:
            see: called with both; what it raises reaches whoever called the model.
        """
        before, self._see = self._see, see
        try:
            yield
        finally:
            self._see = before

    def _after(self, host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """M(z) + λ·H(z): eq. 1 with M the whole block, the mixer or the mlp."""
        if not self._on:
            return output
        if self._versions is not None:
            self._judge(host)
        z = self._entered
        if z is None:
            z = self.read(args, kwargs)
        else:
            self._entered = None
        return self.write(output, partial(self._add, z=z))

    def _add(self, y: Tensor, z: Tensor) -> Tensor:
        """Add the fields that act, as functions of z, to y.

        Raises:
            SteerError: the batch does not fit the rows of the mix.
        """
        if self._see is not None:
            self._see(z, self._compute_dtype)
        if self._every is not None and torch.compiler.is_compiling():
            return self._every.add_to(y, z, self._compute_dtype, self.fields)
        if self._some is not None:
            return self._some.add_to(y, z, self._compute_dtype, self.fields)
        if self.mix.rows is not None:
            row_factor(self.mix.rows, y.shape[0])
        if self._alone is None:
            return y
        name, weight = self._alone
        return cast(HRes, self.fields._modules[name]).add_to(y, z, self._compute_dtype, weight)

    def _keep(self, host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Copy the stream that enters, before a block that works in place overwrites it."""
        self._entered = self.read(args, kwargs).clone() if self._on else None

    def _watch(self, host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note the versions of what enters, so that a block that overwrites it does not go unnoticed."""
        if not self._on or torch.compiler.is_compiling():
            return
        tensors = [
            t
            for t in (*args, *kwargs.values())
            if isinstance(t, Tensor) and t.is_floating_point() and not t.is_inference()
        ]
        self._versions = [(tensor, tensor._version) for tensor in tensors]

    def _judge(self, host: nn.Module) -> None:
        """Refuse a block that changed its input; one call that did not is enough to trust it.

        Raises:
            SteerError: the block works in place.
        """
        versions, self._versions = self._versions or [], None
        if any(tensor._version != version for tensor, version in versions):
            raise SteerError(
                f"a field reads the stream that enters, and this {type(host).__name__} overwrites it (`x += …`). Write "
                "`x = x + …` in its forward, or describe it with Backbone(..., inplace=True), which keeps a copy."
            )
        if versions:
            self._handles.pop().remove()

    def _before(self, host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """M(x + λ·H(x)): the control input u(t) of §4.2."""
        if not self._on:
            return args, kwargs
        return replace_stream(args, kwargs, lambda x: self._add(x, x))

    def _apply(self, fn: Any, recurse: bool = True) -> Injector:
        """Follow the backbone when it is cast: a model moved to bf16 computes its fields there too."""
        probe = fn(torch.empty(0, dtype=self._compute_dtype))
        if probe.is_floating_point():
            self._compute_dtype = probe.dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.select(self.mix, {})  # the coefficients follow the fields to their device
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of copies what belongs to a call, or was left by one that failed."""
        return {**self.__dict__, "_entered": None, "_see": None, "_versions": None}

    def extra_repr(self) -> str:
        """Name the site and what acts."""
        return f"site={self.site}, acting={self.mix}"
