"""The module that sits on a point: it holds the point's fields and adds those that act to the stream.

It is a registered child of the module it serves, and its hooks are its own bound methods: so the base keys of the state
dict stay as they are, and `copy.deepcopy` and pickling carry it along without a reference back to the original. Nothing
of a call is kept on it: several threads may run one model.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from ._internals import version
from .backbone import Backbone, compute_dtype, read_stream, replace_stream, write_stream
from .errors import SteerError
from .field import HRes
from .routing import OFF, Mix, Route, Tables, route, row_factor
from .selection import current_call, selection_of_backward

__all__ = ["Injector"]


class _Calls(threading.local):
    """What enters the blocks that are running in this thread, by the id of their injector, until they are left."""

    def __init__(self) -> None:
        self.entered: dict[int, Any] = {}


_calls = _Calls()


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
        self.site, self.index = site, index
        if hasattr(host, self.key):
            raise SteerError(f"this {type(host).__name__} has a {self.key!r} of its own, where steering would stand.")
        self.read = backbone.read if site == "block" else read_stream
        self.write = backbone.write if site == "block" else write_stream
        self.fields = nn.ModuleDict()
        self.mix, self.route = OFF, Route()
        self._ran: Route | None = None  # in the last forward pass that was no recomputation
        self._compute_dtype = compute_dtype(host)
        self._host = (host,)  # in a tuple, since a module would become a child
        self._entered: Tensor | None = None  # inside torch.compile alone
        self._trusted = False  # not to overwrite what enters
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
    def host(self) -> nn.Module:
        """The module at the point."""
        return self._host[0]

    @property
    def compute_dtype(self) -> torch.dtype:
        """What the fields compute in: what the frozen block does."""
        return self._compute_dtype

    @property
    def key(self) -> str:
        """The name under which the injector is registered in its host."""
        return f"steering_{self.site}"

    @property
    def held(self) -> dict[str, HRes]:
        """The fields that stand here, by name."""
        return {name: cast(HRes, field) for name, field in self.fields.items()}

    def detach(self) -> None:
        """Take away the child and the hooks that were added to the host, and nothing else."""
        for handle in self._handles:
            handle.remove()
        delattr(self.host, self.key)

    def select(self, mix: Mix, tables: Tables | None = None) -> None:
        """Let those fields of `mix` act that stand at this point; points with the same fields share `tables`."""
        self.mix, self.route = mix, route(mix, self.held, {} if tables is None else tables)

    def _after(self, host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """M(z) + λ·H(z): eq. 1 with M the whole block, the mixer or the mlp."""
        route = self._route_now()
        if not route.on:
            return output
        z = self._leave(host)
        return self.write(output, partial(self._add, z=self.read(args, kwargs) if z is None else z, route=route))

    def _before(self, host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """M(x + λ·H(x)): the control input u(t) of §4.2."""
        route = self._route_now()
        if not route.on:
            return args, kwargs
        return replace_stream(args, kwargs, lambda x: self._add(x, x, route))

    def _route_now(self) -> Route:
        """Return what is selected; in a recomputation, what was selected when it was first computed.

        Raises:
            SteerError: it cannot be known, or cannot be computed again as it was.
        """
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return self.route
        backward, selection = selection_of_backward()
        if not backward:
            if self._ran is not self.route:
                self._ran = self.route
            return self.route
        if selection is None:
            if self._ran is not self.route:
                raise SteerError(
                    "activation checkpointing computes a block again in `backward()`, and another selection was made "
                    "since. Call backward() before the selection changes, inside the `with`."
                )
            return self.route
        held = self.held
        for name in selection.mix.names:
            gone = (name, self.site, self.index) in selection.points and name not in held
            if gone or (name in selection.trains and name in held and not held[name].up.weight.requires_grad):
                what = "it was removed" if gone else "a selection was made in which it does not train"
                raise SteerError(
                    f"backward() reached field {name!r} after {what}: its gradient would be lost. Call backward() "
                    "before the selection changes, inside the `with`."
                )
        if selection.mix == self.mix:
            return self.route
        if selection.inner & {*selection.mix.names, *self.mix.names}:
            raise SteerError(
                "activation checkpointing computes a block again in `backward()`, whose own tensors another selection "
                "has replaced since. Call backward() before the selection changes, inside the `with`."
            )
        return route(selection.mix, held, {})

    def _add(self, y: Tensor, z: Tensor, route: Route) -> Tensor:
        """Add the fields that act, as functions of z, to y.

        Raises:
            SteerError: the batch does not fit the rows of the mix, or the stream is no dense tensor.
        """
        if z.is_nested:
            _refuse_nested()
        if torch.compiler.is_compiling():
            if route.every is not None:
                return route.every.add_to(y, z, self._compute_dtype, self.fields)
        elif route.rows is not None:
            _check_rows(route.rows, y.shape[0])
        if route.some is not None:
            return route.some.add_to(y, z, self._compute_dtype, self.fields)
        if route.alone is None:
            return y
        name, weight = route.alone
        return cast(HRes, self.fields[name]).add_to(y, z, self._compute_dtype, weight)

    def _keep(self, host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Copy the stream that enters, before a block that works in place overwrites it."""
        if torch.compiler.is_compiling():
            self._entered = self.read(args, kwargs).clone() if self.route.on else None
        elif self._route_now().on:
            _calls.entered[id(self)] = self.read(args, kwargs).clone()

    def _watch(self, host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note the versions of what enters, so that a block that overwrites it does not go unnoticed."""
        if torch.compiler.is_compiling() or self._trusted or not self.route.on:
            return
        tensors = [
            t
            for t in (*args, *kwargs.values())
            if isinstance(t, Tensor) and t.is_floating_point() and not t.is_inference()
        ]
        _calls.entered[id(self)] = [(tensor, version(tensor)) for tensor in tensors]

    def _leave(self, host: nn.Module) -> Tensor | None:
        """Return the copy of what entered, if one was kept; refuse a block that changed what it was given.

        One call that did not is enough to trust a block.

        Raises:
            SteerError: the block works in place.
        """
        if torch.compiler.is_compiling():
            entered, self._entered = self._entered, None
            return entered
        noted = _calls.entered.pop(id(self), None)
        if noted is None or isinstance(noted, Tensor):
            return noted
        if any(version(tensor) != before for tensor, before in noted):
            raise SteerError(
                f"a field reads the stream that enters, and this {type(host).__name__} overwrites it (`x += …`). Write "
                "`x = x + …` in its forward, or describe it with Backbone(..., inplace=True), which keeps a copy."
            )
        if noted:
            self._trusted = True
        return None

    def _apply(self, fn: Any, recurse: bool = True) -> Injector:
        """Follow the backbone when it is cast: a model moved to bf16 computes its fields there too."""
        probe = fn(torch.empty(0, dtype=self._compute_dtype))
        if probe.is_floating_point():
            self._compute_dtype = probe.dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.select(self.mix)  # the coefficients follow the fields to their device
        return self

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse torch.jit.script, which compiles neither hooks nor what it finds in them.

        Raises:
            SteerError: always.
        """
        raise SteerError(
            "torch.jit.script cannot compile a steered model, whose fields run from hooks, not even switched off. Use "
            "torch.export.export or torch.jit.trace, which record what the hooks do, or `unsteer` first."
        )

    def extra_repr(self) -> str:
        """Name the site and what acts."""
        return f"site={self.site}, acting={self.mix}"


def _check_rows(rows: int, batch: int) -> None:
    """Raise if the stream has not the rows of the mix, or of the batch that was checked when the model was called."""
    if row_factor(rows, batch) == 1:
        return
    call = current_call()
    backward, _ = selection_of_backward()
    if not backward and (call is None or call.batch is None):
        raise SteerError(
            f"the list given to `use` has {rows} rows, and this batch has {batch}. Give one name or None for every "
            "row, also of a part of a model that is called by itself."
        )


def _refuse_nested() -> NoReturn:
    raise SteerError(
        "a field acts on a dense stream, (batch, length, width); this one is a nested tensor. Pad it, and keep torch "
        "from nesting it: nn.TransformerEncoder(..., enable_nested_tensor=False)."
    )
