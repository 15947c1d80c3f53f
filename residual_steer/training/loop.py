"""fit: one loop for whatever requires a gradient: a steered SSM, LoRA, a linear probe, full fine-tuning."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Sequence, Sized
from contextlib import ExitStack, nullcontext, suppress
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from residual_steer._batches import check_loader, to_device
from residual_steer._checks import check_integer, check_model, check_number
from residual_steer._files import as_path, make_folder
from residual_steer._shards import is_sharded, like, whole
from residual_steer._undisturbed import apart, as_before, get_state, seed, set_state, train_mode
from residual_steer.errors import DivergedError, SteerError, some

from . import checkpoint
from .data_order import BatchStream, Share
from .history import History, Journal, progress
from .losses import IGNORE, Loss, MeanLoss, counting, measure
from .options import FitOptions, cache_makers
from .processes import Processes

RATE_OF_FEW, RATE_OF_MANY = 2e-2, 1e-3  # by default; experiments/placement.py holds the first to sweeps
# What a run may be resumed with another value of: it does not change the weights.
_FREE = {"cache_limit", "cache_prefix", "checkpoint_every", "eval_every", "log_every", "progress", "resume", "trackers"}


def fit(
    model: nn.Module,
    train: Iterable[Any],
    valid: Iterable[Any] | None = None,
    *,
    steps: int,
    lr: float | None = None,
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
        lr: peak learning rate; None is 0.02 where a tenth of the parameters train or fewer, as with fields and adapters
            and heads, and 0.001 where more do. Unused if an `optimizer` is given, which brings its own.
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
    steps = check_integer("steps", steps, 1)
    check_model(model)
    lr = _usual_rate(model) if lr is None else check_number("lr", lr, above=0)
    if loss is not None and not callable(loss):
        raise SteerError(f"`loss` is a function of the model and a batch; received {loss!r}.")
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise SteerError(f"`optimizer` is a torch optimizer that was made, or None; received {optimizer!r}.")
    _check_loader("train", train)
    if valid is not None:
        _check_loader("valid", valid)
    folder = None if save_to is None else as_path(save_to)
    if folder is None and (settings.trackers or settings.resume):
        raise SteerError("`trackers` and `resume` need `save_to`, the folder of the run's logs and checkpoints.")
    if not any(p.requires_grad for p in model.parameters()):
        raise SteerError(
            "nothing to train: no parameter of the model requires a gradient. Steer it, select a field by its name, or "
            "`thaw` one."
        )
    if any(p.requires_grad and p.is_meta for p in model.parameters()):
        raise SteerError("what trains is on the meta device and has no values. Load the weights, then train.")
    found = None if folder is None else checkpoint.newest(folder)
    if found is not None and not settings.resume:
        raise SteerError(
            f"{folder} holds a run already, at step {found[0]}. Go on with it by resume=True, or choose another folder."
        )
    run = _Run(model, steps, lr, loss, optimizer, folder, settings)
    with run.closing:
        run.prepare(train)
        return run.go(valid, None if found is None else found[1])


def _usual_rate(model: nn.Module) -> float:
    """Return the rate of a run that is given none."""
    train = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return RATE_OF_FEW if 10 * train <= sum(p.numel() for p in model.parameters()) else RATE_OF_MANY


def _check_loader(name: str, loader: Any) -> None:
    """Refuse what cannot be read again and again."""
    check_loader(name, loader, read="in every epoch")
    if isinstance(loader, Sized):
        with suppress(TypeError):  # a loader over an IterableDataset has no length
            if len(loader) == 0:
                raise SteerError(f"`{name}` gave no batch: it is empty. Give it data; drop_last drops a small batch.")


@dataclass
class _Run:
    """One call of `fit`; `closing` gives back what it borrows, in the opposite order."""

    model: nn.Module
    steps: int
    lr: float
    loss: Loss | None
    given: Optimizer | None
    folder: Path | None
    options: FitOptions
    closing: ExitStack = field(default_factory=ExitStack)
    step: int = 0

    def _seed(self, *, device_specific: bool = False) -> None:
        from accelerate.utils import set_seed

        if self.options.seed is not None:
            set_seed(self.options.seed, device_specific=device_specific)

    def prepare(self, train: Iterable[Any]) -> None:
        """Get ready for the first step."""
        options = self.options
        self.closing.enter_context(as_before(self.model))
        self.processes = processes = Processes(options.precision, options.trackers, self.folder)
        self.closing.callback(processes.close)
        self.scaler = processes.scaler
        self._seed()
        params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = self.given or AdamW(params, lr=self.lr, weight_decay=options.weight_decay)
        self.identity = {
            **{f.name: getattr(options, f.name) for f in fields(options) if f.name not in _FREE},
            "protect": None if options.protect is None else type(options.protect).__name__,
            "steps": self.steps,
            "lr": self.lr,
            "optimizer": type(self.optimizer).__name__,
        }
        self.wrapped = processes.prepare(self.model, self.optimizer)
        self.model = processes.accelerate.unwrap_model(self.wrapped)
        self.closing.callback(self.model.zero_grad)  # or a loop of one's own would begin with the last step's gradient
        opened = {name: p for name, p in self.model.named_parameters() if p.requires_grad}  # as they are from now on
        optimized = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        self.trained = {name: p for name, p in opened.items() if id(p) in optimized}
        if not self.trained:
            raise SteerError("the optimizer holds no parameter of this model that requires a gradient.")
        self.buffers = self._find_buffers()
        self.peaks = [float(group["lr"]) for group in self.optimizer.param_groups]
        self.closing.callback(self._set_rates, 1.0)
        self.mean = MeanLoss(self.model, self.loss, processes.device, processes.autocast, processes.sum)
        seed, share = options.seed, Share(train, processes.index, processes.number)
        if seed is None:
            with apart():  # one order of the data for all processes: that which the first one draws
                seed = processes.first(int(torch.randint(2**24, ())))
        self.stream = BatchStream(share, seed, shuffles=options.seed is not None)
        self.closing.callback(self.stream.close)
        self.cache: Any = self._make_cache(train) if options.cache_prefix is not False else None
        # dropout differs between processes that have other rows, the data order does not
        self._seed(device_specific=processes.number > 1)

    def _find_buffers(self) -> dict[str, Tensor]:
        """Return the stored buffers of modules that train, such as the running statistics of a head's BatchNorm."""
        found: dict[str, Tensor] = {}
        for path in dict.fromkeys(name.rpartition(".")[0] for name in self.trained):
            module = self.model.get_submodule(path)
            stored = module.state_dict(prefix=f"{path}." if path else "")
            found.update({key: own for key, own in module.named_buffers(path, recurse=False) if key in stored})
        return found

    def _around(self) -> dict[str, str]:
        """Return what the modules around everything that trains say of themselves, such as a field's scale."""
        parts = (path.split(".")[:-1] for path in self.trained)
        paths = dict.fromkeys(".".join(part[:end]) for part in parts for end in range(len(part) + 1))
        return {path: words for path in paths if (words := self.model.get_submodule(path).extra_repr())}

    def _make_cache(self, train: Any) -> Any:
        if any(map(is_sharded, self.model.parameters())) or self.processes.flat:
            raise SteerError(
                "`cache_prefix` calls blocks alone, and this model is sharded: its blocks have no weights."
            )
        alone = partial(self._measure, self.model)  # without the other processes
        cache = cache_makers[-1](self.model, train, alone, self.options, self.processes)
        self.closing.callback(cache.close)
        return cache

    def _set_rates(self, factor: float) -> None:
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(peak * factor)
            else:
                group["lr"] = peak * factor

    def go(self, valid: Iterable[Any] | None, resumed: Path | None) -> History:
        """Run from the start, or from a checkpoint, to the last step."""
        options, processes, main = self.options, self.processes, self.processes.main
        if resumed is not None:
            self._restore(resumed)
        if options.protect is not None:  # last, with the weights and the device that the steps begin with
            self.closing.callback(options.protect.protect(self.optimizer).remove)
        if self.folder is not None and main:
            make_folder(self.folder)
            checkpoint.sweep(self.folder)
        processes.every(True)  # wait for the folder
        self.journal = Journal(self.folder if main else None, until=self.step)
        if options.trackers and self.folder is not None:
            processes.open_logs(self.folder, {k: str(v) for k, v in self.identity.items()})
        shared = None if valid is None else Share(valid, processes.index, processes.number)
        every = options.checkpoint_every or max(1, self.steps // 10)
        hidden = not (options.progress and main)
        with progress(total=self.steps, initial=self.step, unit="step", disable=hidden) as bar:
            train_mode(self.model, self.trained)
            while self.step < self.steps:
                record = self._advance()
                bar.set_postfix_str(
                    f"loss {record['loss']:.4f}, lr {record['lr']:.1e}, {record['samples_per_s']:.0f} samples/s",
                    refresh=False,
                )
                bar.update()
                if self._is_due(options.log_every):
                    self._record("train", record)
                if shared is not None and self._is_due(options.eval_every or self.steps):
                    self._record("valid", self._evaluate(shared))
                if self.folder is not None and self._is_due(every):
                    self._checkpoint(self.folder)
        if self.cache is not None:
            self.journal.history.cache = self.cache.report()
        return self.journal.history

    def _is_due(self, every: int) -> bool:
        return self.step % every == 0 or self.step == self.steps

    def _evaluate(self, shared: Share) -> dict[str, float]:
        with apart():
            seed(self.stream.seed)  # a loader that shuffles gives every process the same batches
            return {"step": self.step, **self.mean.over(shared)}

    def _record(self, kind: str, record: dict[str, float]) -> None:
        self.journal.add(kind, record)
        if self.options.trackers:
            values = {f"{kind}/{key}": value for key, value in record.items() if key != "step"}
            self.processes.accelerate.log(values, step=int(record["step"]))

    def _measure(self, model: nn.Module, batch: Any) -> Tensor:
        with self.processes.autocast():
            return measure(model, batch, self.loss).loss

    def _next_parts(self) -> tuple[list[tuple[Any, float]], int]:
        """Return the batches of a step, each with its share of the step's mean, and the rows of all processes."""
        began = self.stream.epoch
        while (epoch := self.stream.epoch) <= began + 1:
            parts = [next(self.stream) for _ in range(self.options.accumulate)]
            if self.cache is not None and self.stream.epoch != epoch:
                self.cache.end_epoch()
            shares, rows = self.mean.shares(parts)
            if shares:  # else no label counts on any process, and the next batches take the place of these
                return [(batch, share) for (batch, _), share in zip(parts, shares, strict=True)], rows
        raise SteerError(f"no label of the training data counts: all are {IGNORE}. Look at the labels.")

    def _advance(self) -> dict[str, float]:
        """Take one optimizer step and return its record."""
        started = time.perf_counter()
        factor = self.options.factor(self.step, self.steps)
        self._set_rates(factor)
        parts, rows = self._next_parts()
        mean, norm = self._backward(parts)
        if not self.step and self.processes.number == 1:
            self._warn_of_idle()
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
        """Fill in a step's clipped gradients; return its loss and their norm before; raise if one is not finite."""
        before = [tensor.clone() for tensor in self.buffers.values()]
        while True:
            self.model.zero_grad()  # also what the optimizer does not hold
            value = torch.zeros((), device=self.processes.device)
            for part, (batch, share) in enumerate(parts):
                moved = to_device(batch if share else counting(batch, self.loss), self.processes.device)
                model, more = self.wrapped, part < len(parts) - 1
                apart = model.no_sync() if more and isinstance(model, DistributedDataParallel) else nullcontext()
                with apart:
                    with nullcontext() if self.cache is None else self.cache.over(moved):
                        loss = self._measure(model, moved)
                    if not loss.requires_grad:
                        raise SteerError("the loss depends on nothing that trains: it is detached, or under no_grad.")
                    # data parallelism takes the mean over processes of what has to be a sum
                    self.scaler.scale(loss * (share * self.processes.number)).backward()  # type: ignore[no-untyped-call]
                if share:
                    value += loss.detach() * share
            mean = float(self.processes.sum(value))
            self.scaler.unscale_(self.optimizer)
            norm = self.processes.clip(self.wrapped, self.trained.values(), self.options.clip or math.inf)
            if math.isfinite(mean) and math.isfinite(norm):
                return mean, norm
            for tensor, kept in zip(self.buffers.values(), before, strict=True):
                tensor.copy_(kept)
            if not math.isfinite(mean) or self.scaler.get_scale() <= 1:  # which is 1 in other precisions than fp16
                self._stop(mean, norm)
            self.scaler.update(self.scaler.get_scale() / 2)

    def _warn_of_idle(self) -> None:
        """Warn of what trains and has no part in the loss, as fields of blocks that the model does not call."""
        idle = [name for name, parameter in self.trained.items() if parameter.grad is None]
        if idle:
            warnings.warn(
                f"{some(idle)} got no gradient in the first step, and stay as they are: the loss does not depend on "
                "them. Look at what the model calls, and at what its blocks return.",
                stacklevel=4,
            )

    def _stop(self, loss: float, norm: float) -> NoReturn:
        self.model.zero_grad()
        kept = checkpoint.newest(self.folder) if self.folder is not None else None
        what = f"loss became {loss}" if not math.isfinite(loss) else f"gradient's norm became {norm}"
        raise DivergedError(
            f"the {what} at step {self.step + 1} of {self.steps}. The model is as it was after step {self.step}; "
            f"{f'the last checkpoint is {kept[1]}' if kept else 'there is no checkpoint'}. "
            "Lower `lr`, lengthen `warmup`, or look at the data of this step."
        )

    def _checkpoint(self, folder: Path) -> None:
        protect, flat = self.options.protect, self.processes.flat
        # what trains, and the buffers beside it
        weights = {"model": {**self.trained, **self.buffers}, "optimizer": self.optimizer.state_dict()}
        weights["modules"] = self._around()
        shared = {
            "step": self.step,
            "identity": self.identity,
            "weights": None if flat else weights,
            "scaler": self.scaler.state_dict(),
            "protect": None if protect is None else protect.state_dict(),
        }
        own = {
            "random": get_state(),
            "stream": self.stream.state(),
            "weights": weights if flat else None,  # each process has its pieces
        }
        checkpoint.write(folder, self.step, whole(shared), own, self.processes)

    def _restore(self, path: Path) -> None:
        shared, own = checkpoint.read(path, self.processes.rank)
        stored = shared["identity"]
        changed = [f"{k} {stored.get(k)!r} → {v!r}" for k, v in self.identity.items() if stored.get(k) != v]
        if changed:
            raise SteerError(
                f"a run is resumed with the options it was started with; changed are {', '.join(changed)}. "
                "Give the old values, or another `save_to`."
            )
        weights = shared["weights"] or own["weights"]
        here, there = {**self.trained, **self.buffers}, weights["model"]
        wrong = sorted(here.keys() ^ there.keys()) or [k for k in here if here[k].shape != there[k].shape]
        if wrong:
            raise SteerError(
                f"the checkpoint {path} belongs to a model that trains other tensors: {', '.join(wrong[:6])} differ."
            )
        modules = self._around()
        changed = [f"{k} {v} → {modules.get(k)}" for k, v in weights.get("modules", {}).items() if modules.get(k) != v]
        if changed:
            raise SteerError(
                f"the checkpoint {path} belongs to a model that computes otherwise: {some(changed)}. Steer and select "
                "as in the first run, or give another `save_to`."
            )
        try:
            self.optimizer.load_state_dict(weights["optimizer"])
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
        self.scaler.load_state_dict(shared["scaler"])
        self.stream.restore(own["stream"])
        set_state(own["random"])
        self.step = shared["step"]
