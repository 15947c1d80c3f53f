"""fit: one loop for every architecture and every method, on accelerate.

It trains whatever requires a gradient and asks nothing else of the model: a steered SSM, LoRA on a Transformer, a
linear probe and full fine-tuning all go through it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from residual_steer._files import as_path, make_folder
from residual_steer._progress import progress
from residual_steer.errors import DivergedError, SteerError

from . import checkpoint, undisturbed
from .data_order import BatchStream, Share
from .evaluation import Evaluation
from .history import History, Journal
from .losses import IGNORE, Counts, Loss, Outcome, counting, counts, measure, rows_of
from .options import Cache, FitOptions, cache_makers
from .processes import Processes, like, seed_all, to_device, whole
from .undisturbed import as_before, train_mode

__all__ = ["fit"]

# What a run may be resumed with another value of: it does not change the weights.
_FREE = {"cache_limit", "cache_prefix", "checkpoint_every", "eval_every", "log_every", "progress", "resume", "trackers"}
_NO_VALUE = {"protect"}  # its state is in the checkpoint


def fit(
    model: nn.Module,
    train: Iterable[Any],
    valid: Iterable[Any] | None = None,
    *,
    steps: int,
    lr: float = 1e-3,
    loss: Loss | None = None,
    optimizer: Optimizer | None = None,
    save_to: str | Path | None = None,
    **options: Any,
) -> History:
    """Train every parameter of `model` that requires a gradient.

    Under `accelerate launch` the same call runs on several processes; a loader's batch is then the global batch, split
    among them, so that the losses do not depend on their number. A model that `fully_shard` was applied to stays so.

    A step of several batches, or processes, is the step of one batch with all their rows: each weighs as much as labels
    count in it, those that are not -100 and, in a causal model, not the first of a row; or rows, where there are none.
    What weighs nothing changes nothing.

    Args:
        model: for example a steered one. It is changed in place, on the device that accelerate chooses.
        train: a DataLoader of dicts, run as `model(**batch).loss`, or of pairs `(x, y)`, run through cross-entropy.
            Its epochs are repeated as needed.
        valid: such a DataLoader to evaluate on.
        steps: number of optimizer steps.
        lr: peak learning rate; unused if an `optimizer` is given, which brings its own.
        loss: a function of the model and a batch that returns a scalar, its mean, in place of the above. If that mean
            is over something else than labels or rows, give the function a `weight`: from a batch to a number.
        optimizer: any torch optimizer over the model's parameters; AdamW by default.
        save_to: folder for checkpoints, `metrics.jsonl` and trackers' logs; nothing is written without it.
        **options: see `FitOptions`.

    Returns:
        The records of the run, those before a resume included.

    Raises:
        SteerError: nothing to train, an unknown option, an unusable batch; a folder that holds a run already, or one
            with other options.
        DivergedError: a loss or gradient that is NaN or infinite, which leaves model and checkpoint as they were after
            the last good step.

    >>> history = fit(model, train, valid, steps=500, lr=1e-3, save_to="runs/squad", eval_every=100)
    """
    settings = FitOptions.of(options)
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise SteerError(f"`steps` is a positive integer; received {steps!r}.")
    if isinstance(lr, bool) or not isinstance(lr, (int, float)) or not 0 < lr < math.inf:
        raise SteerError(f"`lr` is a positive number; received {lr!r}.")
    if not isinstance(model, nn.Module):
        raise SteerError(f"a model is a torch.nn.Module; received {type(model).__name__}.")
    if loss is not None and not callable(loss):
        raise SteerError(f"`loss` is a function of the model and a batch; received {loss!r}.")
    _check_loader("train", train)
    if valid is not None:
        _check_loader("valid", valid)
    folder = None if save_to is None else as_path(save_to)
    if settings.trackers and folder is None:
        raise SteerError("`trackers` write their logs under `save_to`; give it a folder.")
    if not any(p.requires_grad for p in model.parameters()):
        raise SteerError(
            "nothing to train: no parameter of the model requires a gradient. Steer it, select a field by its name, or "
            "`thaw` one."
        )
    resumed = _find_resumable(folder, settings)
    with as_before(model):
        run = _Run(model, train, steps, lr, loss, optimizer, folder, settings)
        try:
            return run.go(valid, resumed)
        finally:
            run.close()


class _Run:
    """One call of `fit`."""

    def __init__(
        self,
        model: nn.Module,
        train: Iterable[Any],
        steps: int,
        lr: float,
        loss: Loss | None,
        optimizer: Optimizer | None,
        folder: Path | None,
        options: FitOptions,
    ) -> None:
        self.steps, self.loss, self.folder, self.options = steps, loss, folder, options
        self.processes = Processes(options.precision, options.trackers, folder)
        self.closing = contextlib.ExitStack()
        self.closing.callback(self.processes.close)
        with contextlib.ExitStack() as failing:
            failing.callback(self.close)
            self._begin(model, train, lr, optimizer)
            failing.pop_all()

    def _begin(self, model: nn.Module, train: Iterable[Any], lr: float, optimizer: Optimizer | None) -> None:
        options, processes = self.options, self.processes
        if options.seed is not None:
            seed_all(options.seed)
        params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optimizer or AdamW(params, lr=lr, weight_decay=options.weight_decay)
        self.identity = {
            "steps": self.steps,
            "lr": float(lr),
            "optimizer": type(self.optimizer).__name__,
            **_identity(options),
        }
        self.wrapped = processes.prepare(model, self.optimizer)
        self.model = processes.unwrapped(self.wrapped)
        opened = {name: p for name, p in self.model.named_parameters() if p.requires_grad}  # as they are from now on
        optimized = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        self.trained = {name: p for name, p in opened.items() if id(p) in optimized}
        if not self.trained:
            raise SteerError("the optimizer holds no parameter of this model that requires a gradient.")
        self.open = list(opened.values())
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.closing.callback(self._set_rates, 1.0)
        self.scaler = processes.scaler()
        self.evaluation = Evaluation(self.model, self.loss, processes.device, processes.autocast, processes.sum)
        with undisturbed.apart() if options.seed is None else contextlib.nullcontext():
            if options.seed is None:  # one order of the data for all
                undisturbed.set_state(processes.from_first(undisturbed.get_state(devices=False)))
            self.stream = BatchStream(Share(train, processes.index, processes.number), options.seed)
        self.closing.callback(self.stream.close)
        self.cache = self._make_cache(train) if options.cache_prefix is not False else None
        self.buffers = self._find_buffers()
        if options.seed is not None:
            seed_all(options.seed, device_specific=True)  # dropout differs between processes, the data order does not
        self.step = 0

    def close(self) -> None:
        """Give the user's optimizer its learning rates back, his loader its generators, and accelerate its state."""
        self.closing.close()

    def _set_rates(self, factor: float) -> None:
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(peak * factor)
            else:
                group["lr"] = peak * factor

    def go(self, valid: Iterable[Any] | None, resumed: Path | None) -> History:
        """Run from the start, or from a checkpoint, to the last step."""
        if resumed is not None:
            self._restore(resumed)
        if self.options.protect is not None:  # last, with the weights and the device that the steps begin with
            self.closing.callback(self.options.protect.protect(self.optimizer).remove)
        main = self.processes.main
        if self.folder is not None and main:
            make_folder(self.folder)
        self.processes.every(True)  # wait for the folder
        self.journal = Journal(self.folder if main else None, until=self.step)
        if self.options.trackers:
            self.processes.track({k: str(v) for k, v in self.identity.items()})
        shared = None if valid is None else Share(valid, self.processes.index, self.processes.number)
        every = self.options.checkpoint_every or max(1, self.steps // 10)
        shown = self.options.progress and main
        with progress(total=self.steps, initial=self.step, unit="step", disable=not shown) as bar:
            train_mode(self.model, self.trained)
            while self.step < self.steps:
                record = self._advance()
                bar.set_postfix_str(
                    f"loss {record['loss']:.4f}, lr {record['lr']:.1e}, {record['samples_per_s']:.0f} samples/s",
                    refresh=False,
                )
                bar.update()
                last = self.step == self.steps
                if last or self.step % self.options.log_every == 0:
                    self._record("train", record)
                if shared is not None and (last or self._due(self.options.eval_every)):
                    self._record("valid", {"step": self.step, **self.evaluation.over(shared)})
                if self.folder is not None and (last or self._due(every)):
                    self._checkpoint(self.folder)
        if self.cache is not None:
            self.journal.history.cache = self.cache.report()
        return self.journal.history

    def _make_cache(self, train: Any) -> Cache:
        if self.processes.number > 1:
            raise SteerError(
                "`cache_prefix` works on one process, since rows go to others of several in every epoch; here are "
                f"{self.processes.number}. Leave it out, or launch one."
            )
        cache = cache_makers[-1](
            self.wrapped, train, lambda batch: self._measure(batch).loss, self.options, self.processes.precision
        )
        self.closing.callback(cache.close)
        return cache

    def _measure(self, batch: Any) -> Outcome:
        with self.processes.autocast():
            return measure(self.wrapped, batch, self.loss)

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _next_parts(self) -> tuple[list[tuple[Any, float]], float]:
        """Return the batches of a step, each with its share of the step's mean, and the rows of all processes.

        A step whose labels count for nothing, on all processes, is no step: the next batches take its place.

        Raises:
            SteerError: no label of a whole epoch counts.
        """
        began = self.stream.epoch
        while True:
            parts = [self._next_batch() for _ in range(self.options.accumulate)]
            found = [counts(batch, self.loss) if here else Counts(0, 0) for batch, here in parts]
            rows = sum(rows_of(batch) for batch, here in parts if here)
            every, behind, rows = self.processes.sum(
                [sum(c.all for c in found), sum(c.behind for c in found), rows]
            ).tolist()
            if self.evaluation.first is None and every != behind:
                differ = any(c.all * behind != c.behind * every or c.behind < 1 <= c.all for c in found)
                if not self.processes.every(not differ):
                    self.evaluation.settle(parts[max(range(len(parts)), key=lambda part: found[part].all)][0])
            total = every if self.evaluation.first else behind
            if total:
                weights = [count.weight(self.evaluation.first) / total for count in found]
                return [(batch, weight) for (batch, _), weight in zip(parts, weights, strict=True)], rows
            if self.stream.epoch > began + 1:
                raise SteerError(f"no label of the training data counts: all are {IGNORE}. Look at the labels.")

    def _next_batch(self) -> tuple[Any, bool]:
        epoch = self.stream.epoch
        batch = next(self.stream)
        if self.cache is not None and self.stream.epoch != epoch:
            self.cache.end_epoch()
        return batch

    def _advance(self) -> dict[str, float]:
        """Take one optimizer step and return its record."""
        started = time.perf_counter()
        factor = self.options.factor(self.step, self.steps)
        self._set_rates(factor)
        parts, rows = self._next_parts()
        mean, norm = self._backward(parts)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.step += 1
        seconds = time.perf_counter() - started
        return {
            "step": self.step,
            "loss": mean,
            "lr": self.peaks[0] * factor,
            "grad_norm": norm,
            "samples_per_s": rows / seconds,
            "seconds_per_step": seconds,
        }

    def _backward(self, parts: Sequence[tuple[Any, float]]) -> tuple[float, float]:
        """Fill in the gradients of a step, clipped; return its loss and the gradient's norm before.

        Raises:
            DivergedError: one of them is not finite; in fp16 a norm at any scale from 1 upwards.
        """
        before = [tensor.clone() for tensor in self.buffers.values()]
        while True:
            self._forget_gradients()
            value = torch.zeros((), device=self.processes.device)
            for part, (batch, weight) in enumerate(parts):
                moved = to_device(batch if weight else counting(batch, self.loss), self.processes.device)
                with self.processes.apart(self.wrapped, until=part == len(parts) - 1):
                    with contextlib.nullcontext() if self.cache is None else self.cache.over(moved):
                        loss = self._measure(moved).loss
                    # data parallelism takes the mean over processes of what has to be a sum
                    scaled = loss * (weight * self.processes.number)
                    (scaled if self.scaler is None else self.scaler.scale(scaled)).backward()  # type: ignore[no-untyped-call]
                if weight:
                    value += loss.detach() * weight
            mean, norm = float(self.processes.sum(value)), self._clip()
            if math.isfinite(mean) and math.isfinite(norm):
                return mean, norm
            for tensor, kept in zip(self.buffers.values(), before, strict=True):
                tensor.copy_(kept)
            if self.scaler is None or not math.isfinite(mean) or self.scaler.get_scale() <= 1:
                self._stop(mean, norm)
            self.scaler.update(self.scaler.get_scale() / 2)

    def _clip(self) -> float:
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.trained.values(), self.options.clip or math.inf)
        return float(whole(norm))

    def _stop(self, loss: float, norm: float) -> NoReturn:
        self._forget_gradients()
        kept = checkpoint.newest(self.folder) if self.folder is not None else None
        what = f"loss became {loss}" if not math.isfinite(loss) else f"gradient's norm became {norm}"
        raise DivergedError(
            f"the {what} at step {self.step + 1} of {self.steps}. The model is as it was after step {self.step}; "
            f"{f'the last checkpoint is {kept[1]}' if kept else 'there is no checkpoint'}. "
            "Lower `lr`, lengthen `warmup`, or look at the data of this step."
        )

    def _record(self, kind: str, record: dict[str, float]) -> None:
        self.journal.add(kind, record)
        if self.options.trackers:
            values = {f"{kind}/{key}": value for key, value in record.items() if key != "step"}
            self.processes.log(values, step=int(record["step"]))

    def _forget_gradients(self) -> None:
        """Drop every gradient, also of what the optimizer does not hold."""
        for parameter in self.open:
            parameter.grad = None

    def _find_buffers(self) -> dict[str, Tensor]:
        """Return the stored buffers of modules that train, such as the running statistics of a head's BatchNorm."""
        owners = {name.rpartition(".")[0] for name in self.trained}
        found = {}
        for path, module in self.model.named_modules():
            if path in owners and (own := dict(module.named_buffers(recurse=False))):
                stored = module.state_dict(keep_vars=True)
                found.update({f"{path}.{name}" if path else name: own[name] for name in own if name in stored})
        return found

    def _checkpoint(self, folder: Path) -> None:
        shared = whole(
            {
                "step": self.step,
                "identity": self.identity,
                "model": {**self.trained, **self.buffers},  # what trains, and the buffers beside it
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict() if self.scaler is not None else None,
                "protect": self.options.protect.state_dict() if self.options.protect is not None else None,
            }
        )
        own = {"random": undisturbed.get_state(), "stream": self.stream.state()}
        checkpoint.write(folder, self.step, shared, own, self.processes.index, self.processes.every)

    def _restore(self, path: Path) -> None:
        shared, own = checkpoint.read(path, self.processes.index)
        changed = [
            f"{key} {shared['identity'].get(key)!r} → {value!r}"
            for key, value in self.identity.items()
            if shared["identity"].get(key) != value
        ]
        if changed:
            raise SteerError(
                f"a run is resumed with the options it was started with; changed are {', '.join(changed)}. "
                "Give the old values, or another `save_to`."
            )
        here, there = {**self.trained, **self.buffers}, shared["model"]
        wrong = sorted(here.keys() ^ there.keys()) or [k for k in here if here[k].shape != there[k].shape]
        if wrong:
            raise SteerError(
                f"the checkpoint {path} belongs to a model that trains other tensors: {', '.join(wrong[:6])} differ."
            )
        try:
            self.optimizer.load_state_dict(shared["optimizer"])
        except (ValueError, KeyError) as error:
            raise SteerError(
                f"the optimizer's state in {path} does not fit this optimizer ({error}). Resume with one made as the "
                "first was."
            ) from error
        if self.options.protect is not None:
            self.options.protect.load_state_dict(shared["protect"])
        with torch.no_grad():
            for key, tensor in here.items():
                tensor.copy_(like(there[key], tensor))
        for parameter, state in self.optimizer.state.items():
            state.update({key: like(value, parameter) for key, value in state.items()})
        if self.scaler is not None:
            self.scaler.load_state_dict(shared["scaler"])
        self.stream.restore(own["stream"])
        undisturbed.set_state(own["random"])
        self.step = shared["step"]


def _find_resumable(folder: Path | None, options: FitOptions) -> Path | None:
    if folder is None:
        if options.resume:
            raise SteerError("`resume` needs `save_to`, the folder of the run.")
        return None
    found = checkpoint.newest(folder)
    if found is not None and not options.resume:
        raise SteerError(
            f"{folder} holds a run already, at step {found[0]}. Go on with it by resume=True, or choose another folder."
        )
    return found[1] if found is not None else None


def _identity(options: FitOptions) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(options) if field.name not in _FREE | _NO_VALUE]
    protector = None if options.protect is None else type(options.protect).__name__
    return {**{name: getattr(options, name) for name in names}, "protect": protector}


def _check_loader(name: str, loader: Any) -> None:
    """Refuse what cannot be read again and again.

    Raises:
        SteerError: it cannot be iterated, only once, or it says that it is empty.
    """
    if not isinstance(loader, Iterable) or isinstance(loader, Iterator):
        raise SteerError(
            f"`{name}` is a DataLoader, or a list of batches: it is read in every epoch; received "
            f"{type(loader).__name__}."
        )
    if isinstance(loader, Sized):
        with contextlib.suppress(TypeError):  # a loader over an IterableDataset has no length
            if len(loader) == 0:
                raise SteerError(f"`{name}` gave no batch: it is empty. Give it data; drop_last drops a small batch.")
