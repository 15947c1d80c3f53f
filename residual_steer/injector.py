"""The module that sits on a point: it holds the point's fields and adds those that act to the stream.

Nothing of a call is kept on it: several threads may run one model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn

from ._calls import Given, Selected, running, selection_of_backward
from ._checks import is_exporting, is_tracing
from ._frozen import Attachment, follow
from ._internals import version
from ._prompt import compiled_prompt
from ._row_by_row import add_runs
from ._row_order import rows_in_order
from ._segments import Segments
from ._shards import flat_units, is_sharded
from .backbone import Backbone, compute_dtype, read_stream, replace_stream, site_of, write_stream
from .errors import SteerError
from .field import HRes
from .routing import OFF, SIDE_BY_SIDE, Blend, Mix, Route, Tables, misfit, route, row_factor

__all__ = ["Injector", "key_of"]


class Injector(Attachment):
    """Attach fields to one point of a backbone.

    With no field acting, the hooks hand the module's own tensors through untouched, so the frozen model's output
    comes back bit for bit.

    Args:
        backbone: says how the stream is read and written where the point is a whole block.
        index: which block.
        site: one of the table in `residual_steer.backbone`.
    """

    def __init__(self, backbone: Backbone, index: int, site: str) -> None:
        part, reads, moves, projection = site_of(site)
        host = backbone.point(index, site)
        if host is None:
            raise SteerError(f"block {index} has no {site!r}.")
        super().__init__(host, key_of(site))
        self.site, self.index = site, index
        whole = part == "block"
        self.read, self.write = (backbone.read, backbone.write) if whole else (read_stream, write_stream)
        self.left = backbone.left
        self.fields = nn.ModuleDict()
        self.compute_dtype = compute_dtype(host)  # what the fields compute in: what the frozen block does
        self.mix, self.route = OFF, Route()
        self._every: Blend | None = None  # of all fields, once a mix has needed it
        self._ran: Route | None = None  # in the last forward pass that was no recomputation
        self._place: Any = None  # of this module for compiled graphs, once many fields stand here
        self._entered: Tensor | None = None  # inside torch.compile alone
        self._trusted = False  # not to overwrite what enters
        self._met: bool | None = None  # inside torch.compile alone: whether a linear map that has to be called was
        self._rows: int | None = None  # inside torch.compile alone: of the batch that enters the block
        self._ordered: set[int] = set()  # in streams of how many dimensions the batch's rows stand one after the other
        self.train(host.training)
        self._enter, block = backbone.read, backbone.blocks[index]
        self._projects = bool(projection)
        self._widths, self._channels = backbone.features(index, site), -1 if projection else backbone.channels
        if moves == "enters":
            self._handles = [host.register_forward_pre_hook(self._before, with_kwargs=True)]
            self._handles.append(block.register_forward_pre_hook(self._expect, with_kwargs=True))
            return
        # First in line: transformers captures hidden states with hooks of its own, and must see the steered stream.
        hook = self._behind if reads == "leaves" else self._through if projection else self._after
        self._handles = [host.register_forward_hook(hook, with_kwargs=True, prepend=True)]
        if not whole:
            self._handles.append(block.register_forward_pre_hook(self._expect, with_kwargs=True))
        if projection:
            self._handles.append(block.register_forward_hook(self._require))
        elif reads == "leaves":
            follow(host, self._handles[0])
        else:
            before = self._keep if backbone.inplace else self._watch
            self._handles.append(host.register_forward_pre_hook(before, with_kwargs=True))

    def forward(self, z: Any) -> Any:
        """Return what comes in: a host that calls all its children, an `nn.Sequential`, calls this too."""
        return z

    @property
    def held(self) -> dict[str, HRes]:
        """The fields that stand here, by name."""
        return {name: cast(HRes, field) for name, field in self.fields.items()}

    def add(self, name: str, field: HRes) -> None:
        """Let a field stand here."""
        field.train(self.training)
        self.fields[name], self._every = field, None

    def discard(self, name: str) -> bool:
        """Take a field away, and with the last one the injector; return whether that was the last one."""
        if name in self.fields:
            del self.fields[name]
        self._every = None
        if not self.fields:
            self.detach()
        return not self.fields

    def select(self, mix: Mix, tables: Tables) -> Route:
        """Let those fields of `mix` act that stand here; points with the same fields share `tables`."""
        fields = self.fields  # once: finding a module's attributes takes as long as all else here
        if not fields:
            return self.route
        acting = {name: cast(HRes, fields[name]) for name in mix.names if name in fields}
        every, many = None, not mix.by_name and len(fields) > SIDE_BY_SIDE and mix.segments is None
        if many and self._place is None:
            from ._one_graph import Place  # takes time to import

            self._place = Place(self)
        if not mix.by_name and not many and mix.segments is None:
            if self._every is None or not self._every.fits(acting):
                self._every = Blend.of(self.held)
            every = self._every
        like = cast(HRes, next(iter(fields.values()))).down.weight
        self.mix, self.route = mix, route(mix, acting, every, tables, like, many=many)
        return self.route

    def _after(self, host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """M(z) + λ·H(z): eq. 1 with M the whole block, the mixer or the mlp."""
        route = self._route_now()
        if not route.on:
            return output
        z = self._leave(host)
        return self.write(output, partial(self._add, z=self.read(args, kwargs) if z is None else z, route=route))

    def _behind(self, host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """Return z' + λ·H(z'), where z' is what leaves the block, with what fields beside the block added."""
        route = self._route_now()
        return self.write(output, partial(self._add, z=self.left(output), route=route)) if route.on else output

    def _through(self, host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """P(x) + λ·H(x) of a linear map P, which was called."""
        if torch.compiler.is_compiling():
            self._met = True
        else:
            running.entered.pop(id(self), None)
            self._met = None if self._met is None else True
        return self._after(host, args, kwargs, output)

    def _expect(self, block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note that a block begins, which has to call the linear map, and what its rows and tokens are."""
        if torch.compiler.is_compiling():
            self._met = False if self.route.on and self._projects else None
            self._rows = self._enter(args, kwargs).shape[0] if self.route.rows and not self._ordered else None
            return
        if self.route.names and self._projects:
            running.entered[id(self)] = ()
        if self.route.names and (self.mix.differs or self.mix.by_token) and (self._projects or not self._ordered):
            running.blocks[id(self)] = (block, (args, kwargs), self._enter(args, kwargs).shape[0])

    def _require(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Raise if the block did not call the linear map: a field there would change nothing, without a word."""
        # where torch.compile takes a part of the hooks, each part has its own notes
        waits = not torch.compiler.is_compiling() and running.entered.pop(id(self), None) is not None
        running.blocks.pop(id(self), None)
        met, self._met = self._met, None
        if met is False or (waits and met is None):
            raise SteerError(
                f"a field at {self.site!r} would do nothing: this {type(block).__name__} ran without calling that "
                f"{type(self.host).__name__}, whose weight a fused kernel or the mixer itself reads. Switch the fused "
                f"path off, or steer another site: 'input', 'after', {self.site.partition('.')[0]!r} or 'block'."
            )

    def _before(self, host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """M(x + λ·H(x)): the control input u(t) of §4.2."""
        route = self._route_now()
        if not route.on:
            return args, kwargs
        return replace_stream(args, kwargs, lambda x: self._add(x, x, route))

    def _route_now(self) -> Route:
        """Return what is selected; in a recomputation, what was selected when it was first computed."""
        if torch.compiler.is_compiling():
            if self.mix.by_token:
                raise compiled_prompt()  # also of a block that is compiled alone, or after a break of the graph
            return self.route
        if not torch.is_grad_enabled():
            running.again = True
            return _on_prompt(self.route, self.mix)
        backward, selected = selection_of_backward()
        if selected is not None:
            return _on_prompt(self._route_then(selected), selected.mix, selected.prompt)
        if self._ran is not self.route:
            if backward:
                raise SteerError(
                    "activation checkpointing computes a block again in `backward()`, and another selection was made "
                    "since. Call backward() before the selection changes, inside the `with`."
                )
            self._ran = self.route
        return _on_prompt(self.route, self.mix)

    def _route_then(self, selected: Selected) -> Route:
        """Return the route of an earlier selection; raise if what it needs is no more as it was."""
        then = selected.routes.get((self.site, self.index), Route())
        for name in then.names:
            gone = name not in self.fields
            if gone or (name in selected.trains and not cast(HRes, self.fields[name]).up.weight.requires_grad):
                what = "it was removed" if gone else "a selection was made in which it does not train"
                raise SteerError(
                    f"backward() reached field {name!r} after {what}: its gradient would be lost. Call backward() "
                    "before the selection changes, inside the `with`."
                )
        if selected.mix == self.mix:
            return self.route
        if selected.inner & {*selected.mix.names, *self.mix.names}:
            raise SteerError(
                "activation checkpointing computes a block again in `backward()`, whose own tensors another selection "
                "has replaced since. Call backward() before the selection changes, inside the `with`."
            )
        return then

    def _add(self, y: Tensor, z: Tensor, route: Route) -> Tensor:
        """Add the fields that act, as functions of z, to y; raise if z is nested or the rows do not fit."""
        if z.is_nested:
            raise SteerError(
                "a field acts on a dense stream, (batch, length, width); this one is a nested tensor. Pad it, and keep "
                "torch from nesting it: nn.TransformerEncoder(..., enable_nested_tensor=False)."
            )
        if torch.compiler.is_compiling():
            rows, self._rows = self._rows, None
            if rows is not None:
                _check_shape(y, rows, self.host)
            if route.every is not None:
                return route.every.add_to(y, z, self.compute_dtype, self.fields)
            if route.many and not torch.is_grad_enabled() and not is_exporting():
                from ._one_graph import add_selected

                added: Tensor = add_selected(y, z, self._place.number)
                return added
        else:
            at, (read, written) = self._channels, self._widths
            if not is_tracing() and (z.shape[at] != read or not y.dim() or y.shape[at] != written):
                raise SteerError(
                    f"the Backbone says that the width is {written}, and this {type(self.host).__name__} is given "
                    f"{tuple(z.shape)} and returns {tuple(y.shape)}. Describe the blocks with the width they have, and "
                    "with `read` and `write` if the stream is not the first tensor."
                )
            if route.rows is not None:
                _check_rows(route.rows, y.shape[0])
            differs = route.some is not None and self.mix.differs
            if y.dim() not in self._ordered and (differs or route.tokens is not None or route.segments is not None):
                self._check_order(y)
        added = self._add_now(y, z, route)
        if route.tokens is None:
            return added
        if y.shape[:2] != route.tokens.shape:
            raise SteerError(
                f"the prompt is a part of {tuple(route.tokens.shape)} tokens, and the stream here is {tuple(y.shape)}: "
                "the model has changed how many there are. Use on='all'."
            )
        return torch.where(route.tokens.to(y.device).view(*y.shape[:2], *[1] * (y.dim() - 2)), added, y)

    def _check_order(self, y: Tensor) -> None:
        """Raise unless the rows of y are the batch's, one after the other: a mixer may get `(length, batch, width)`."""
        call = running.calls[-1] if running.calls else None
        if torch.compiler.is_compiling():  # as a graph of its own, behind a break
            noted = running.blocks.get(id(self)) or (None if call is None else call.given)
            if noted is not None:
                _check_shape(y, noted[2], self.host)
            return
        if call is None or call.given is None or is_tracing() or selection_of_backward()[0] or not len(y):
            return  # in a backward pass it was checked before; no row is in no order
        inside = running.blocks.get(id(self))
        if inside is None:
            self._check_given(call.given, self.host, self.read, y, call.ordered)
        else:
            block, (args, kwargs), _ = inside
            self._check_given(call.given, block, self._enter, self._enter(args, kwargs), call.ordered)
            self._check_given(inside, self.host, self.read, y, set())
        self._ordered.add(y.dim())
        if not self._projects:
            running.blocks.pop(id(self), None)

    @staticmethod
    def _check_given(
        given: Given, host: nn.Module, read: Callable[..., Tensor], y: Tensor, ordered: set[torch.Size]
    ) -> None:
        """Raise unless the rows of y, at a host, are those that a module around it was given; note shapes that are."""
        model, call, rows = given
        if rows < 2 or (y.dim() > 2 and len(y) == rows != y.shape[1]) or y.shape in ordered:
            return
        if flat_units(model) or any(map(is_sharded, model.parameters())):
            _check_shape(y, rows, host)  # to run again is no way: processes would wait for one another
            return
        with running.aside():
            in_order = rows_in_order(model, call, host, read, rows, y)
        if not in_order:
            raise SteerError(
                f"rows have fields or tokens of their own, and a {type(model).__name__} that is given {rows} rows "
                f"calls its {type(host).__name__} with {tuple(y.shape)}, where they do not stand one after the other, "
                "such as (length, batch, width). Steer another site, or use one field at a time."
            )
        ordered.add(y.shape)

    def add_selected(self, y: Tensor, z: Tensor) -> Tensor:
        """Return y with the fields added that act now: what a compiled graph calls where many stand."""
        return self._add_now(y, z, self.route)

    def _add_now(self, y: Tensor, z: Tensor, route: Route) -> Tensor:
        """Add the fields of a route."""
        if route.segments is not None:
            return self._add_segments(y, z, route.segments)
        if route.some is not None:
            return route.some.add_to(y, z, self.compute_dtype, self.fields)
        if route.alone is None:
            return y
        name, weight = route.alone
        return cast(HRes, self.fields[name]).add_to(y, z, self.compute_dtype, weight)

    def _add_segments(self, y: Tensor, z: Tensor, segments: Segments) -> Tensor:
        """Add to every token its own field."""
        here = self.fields
        runs = [run for run in segments.runs if run.name in here]
        fields = {run.name: cast(HRes, here[run.name]) for run in runs}
        if y.shape[:2] != segments.shape or y.dim() < 3 or any(field.channels == 1 for field in fields.values()):
            raise SteerError(
                f"the `tokens` that `use` was given are {segments.shape}, and the stream here is {tuple(y.shape)}. "
                "Give one number for each token, (batch, length), of a model whose stream is (batch, length, width)."
            )
        if not runs:
            return y
        return add_runs(y, z, runs, segments.shape[0] * segments.shape[1], fields, self.compute_dtype)

    def _keep(self, host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Copy the stream that enters, before a block that works in place overwrites it."""
        if torch.compiler.is_compiling():
            self._entered = self.read(args, kwargs).clone() if self.route.on else None
        elif self._route_now().on:
            running.entered[id(self)] = self.read(args, kwargs).clone()

    def _watch(self, host: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note the versions of what enters, so that a block that overwrites it does not go unnoticed."""
        if torch.compiler.is_compiling() or self._trusted or not self._route_now().on:
            return
        tensors = [
            t
            for t in (*args, *kwargs.values())
            if isinstance(t, Tensor) and t.is_floating_point() and not t.is_inference()
        ]
        running.entered[id(self)] = [(tensor, version(tensor)) for tensor in tensors]

    def _leave(self, host: nn.Module) -> Tensor | None:
        """Return the copy of what entered, if one was kept; raise if the block changed what it was given."""
        if torch.compiler.is_compiling():
            entered, self._entered = self._entered, None
            return entered
        noted = running.entered.pop(id(self), None)
        if noted is None or isinstance(noted, Tensor):
            return noted
        if any(version(tensor) != before for tensor, before in noted):
            raise SteerError(
                f"a field reads the stream that enters, and this {type(host).__name__} overwrites it (`x += …`). Write "
                "`x = x + …` in its forward, or describe it with Backbone(..., inplace=True), which keeps a copy."
            )
        self._trusted = self._trusted or bool(noted)  # one call that did not is enough
        return None

    def _apply(self, fn: Any, recurse: bool = True) -> Injector:
        """Follow the backbone when it is cast: a model moved to bf16 computes its fields there too."""
        probe = fn(torch.empty(0, dtype=self.compute_dtype))
        if probe.is_floating_point():
            self.compute_dtype = probe.dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.select(self.mix, {})  # the coefficients follow the fields to their device
        return self

    def __prepare_scriptable__(self) -> NoReturn:
        """Refuse torch.jit.script, which compiles neither hooks nor what it finds in them."""
        raise SteerError(
            "torch.jit.script cannot compile a steered model, whose fields run from hooks, not even switched off. Use "
            "torch.export.export or torch.jit.trace, which record what the hooks do, or `unsteer` first."
        )

    def extra_repr(self) -> str:
        """Name the site and what acts."""
        return f"site={self.site}, acting={self.mix}"


def key_of(site: str) -> str:
    """Return under which name the fields of a site stand in their module."""
    return f"steering_{site.replace('.', '_')}"


def _on_prompt(route: Route, mix: Mix, prompt: bool | Tensor | None = None) -> Route:
    """Return what a route is on the tokens of a call, where its fields act on the prompt alone."""
    if not mix.by_token or not route.on or route.segments is not None:
        return route
    if mix.segments is not None:
        if not running.calls or running.calls[-1].segments is None:
            raise SteerError("each request has its own field, and this call is none of `generate_batch`'s.")
        return Route(*route[:-2], segments=running.calls[-1].segments)
    if prompt is None:
        if not running.calls:
            raise SteerError(
                "fields act on the prompt alone, and which tokens that is is seen in a call of the whole model; this "
                "is a part of it that is called by itself. Call the model, or use on='all'."
            )
        prompt = running.calls[-1].prompt
    if isinstance(prompt, Tensor):
        return Route(*route[:-1], tokens=prompt)
    return route if prompt else Route()


def _check_shape(y: Tensor, rows: int, host: nn.Module) -> None:
    """Raise if y looks like (length, batch, …), where the order of the rows cannot be seen."""
    if y.dim() > 2 and y.shape[0] != rows == y.shape[1]:
        raise SteerError(
            f"the rows of a batch may not stand one after the other in {tuple(y.shape)}, as a {type(host).__name__} "
            "gets them: run one batch first without torch.compile and in one process, which shows it."
        )


def _check_rows(rows: int, batch: int) -> None:
    """Raise if the stream has not the rows of the mix, or of the batch that was checked when the model was called."""
    if row_factor(rows, batch) == 1:
        return
    backward, _ = selection_of_backward()
    if not backward and not (running.calls and running.calls[-1].batch is not None):
        raise misfit(rows, batch, ", also of a part of a model that is called by itself")
