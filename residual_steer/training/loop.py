"""fit: one loop for every architecture and every method, on accelerate.

It trains whatever requires a gradient and asks nothing else of the model: a steered SSM, LoRA on a Transformer, a
linear probe and full fine-tuning all go through it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Sized
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from tqdm.auto import tqdm

from residual_steer.errors import DivergedError, SteerError
from residual_steer.files import as_path, make_folder

from . import checkpoint, randomness
from .environment import accelerate_as_before, make_accelerator, seed_all, sharded, to_device
from .evaluation import means, totals
from .history import History, Journal
from .losses import Loss, measure
from .modes import as_before, train_mode
from .options import FitOptions
from .prefix import Prefix
from .stream import BatchStream

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
    among them, so that the losses do not depend on their number.

    Args:
        model: for example a steered one. It is changed in place, on the device that accelerate chooses.
        train: a DataLoader of dicts, run as `model(**batch).loss`, or of pairs `(x, y)`, run through cross-entropy.
            Its epochs are repeated as needed.
        valid: such a DataLoader to evaluate on.
        steps: number of optimizer steps.
        lr: peak learning rate; unused if an `optimizer` is given, which brings its own.
        loss: a function of the model and a batch that returns a scalar, in place of the above.
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
    with as_before(model), accelerate_as_before(settings):
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
        self.model, self.steps, self.loss, self.folder, self.options = model, steps, loss, folder, options
        self.accelerator = make_accelerator(options, folder)
        if options.seed is not None:
            seed_all(options.seed)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimizer = optimizer or AdamW(trained.values(), lr=lr, weight_decay=options.weight_decay)
        optimized = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.trained = {name: p for name, p in trained.items() if id(p) in optimized}
        if not self.trained:
            raise SteerError("the optimizer holds no parameter of this model that requires a gradient.")
        self.open = list(trained.values())
        self.identity = {"steps": steps, "lr": float(lr), "optimizer": type(optimizer).__name__, **_identity(options)}
        self.peaks = [float(group["lr"]) for group in optimizer.param_groups]
        self.sampler = getattr(getattr(train, "batch_sampler", None), "sampler", None)
        self.train = train
        self.bare = optimizer  # not as accelerate wraps it
        self.protection: Any = None
        self.wrapped, self.optimizer, loader = self._prepare(model, optimizer, train)
        self.stream = BatchStream(loader)
        self.prefix = self._make_prefix(loss) if options.cache_prefix is not False else None
        self.buffers = self._find_buffers()
        if options.seed is not None:
            seed_all(options.seed, device_specific=True)  # dropout differs between processes, the data order does not
        self.step = 0

    def _prepare(self, model: nn.Module, optimizer: Optimizer, train: Any) -> tuple[nn.Module, Optimizer, Any]:
        try:
            model, optimizer, loader = self.accelerator.prepare(model, optimizer, train)
        except ValueError as error:
            raise SteerError(
                f"accelerate refused the data: {error} A loader's batch is the global one; its size must be a multiple "
                f"of the number of processes, here {self.accelerator.num_processes}."
            ) from error
        return model, optimizer, loader

    def close(self) -> None:
        """Give the optimizer its learning rates back, and the user's loader its sampler, which accelerate replaced."""
        if self.protection is not None:
            self.protection.remove()
        self._set_rates(1.0)
        self.stream.close()
        if self.prefix is not None:
            self.prefix.close()
        if self.sampler is not None:
            self.train.batch_sampler.sampler = self.sampler  # type: ignore[attr-defined]

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
            self.protection = self.options.protect.protect(self.bare)
        if self.folder is not None and self.accelerator.is_main_process:
            make_folder(self.folder)
        self.accelerator.wait_for_everyone()
        main = self.accelerator.is_main_process
        self.journal = Journal(self.folder if main else None, until=self.step)
        if self.options.trackers:
            self.accelerator.init_trackers("logs", config={k: str(v) for k, v in self.identity.items()})
        valid = None if valid is None else self._shard(valid)
        every = self.options.checkpoint_every or max(1, self.steps // 10)
        bar = tqdm(
            total=self.steps, initial=self.step, unit="step", disable=not (self.options.progress and main), leave=False
        )
        with bar:
            train_mode(self.model, self.trained)
            while self.step < self.steps:
                record = self._advance()
                bar.update()
                bar.set_postfix_str(
                    f"loss {record['loss']:.4f}, lr {record['lr']:.1e}, {record['samples_per_s']:.0f} samples/s"
                )
                last = self.step == self.steps
                if last or self.step % self.options.log_every == 0:
                    self._record("train", record)
                if valid is not None and (last or self._due(self.options.eval_every)):
                    self._record("valid", {"step": self.step, **self._evaluate(valid)})
                if self.folder is not None and (last or self._due(every)):
                    self._checkpoint(self.folder)
        if self.options.trackers:
            self.accelerator.end_training()
        if self.prefix is not None:
            self.journal.history.cache = self.prefix.told()
        return self.journal.history

    def _make_prefix(self, loss: Loss | None) -> Prefix:
        if self.accelerator.num_processes > 1:
            raise SteerError(
                "`cache_prefix` works on one process, since rows go to others of several in every epoch; here are "
                f"{self.accelerator.num_processes}. Leave it out, or launch one."
            )
        return Prefix(self.wrapped, self.train, loss, self.options)

    def _next_batch(self) -> Any:
        epoch = self.stream.epoch
        batch = next(self.stream)
        if self.prefix is not None and self.stream.epoch != epoch:
            self.prefix.end_epoch()
        return batch

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _advance(self) -> dict[str, float]:
        """Take one optimizer step and return its record."""
        started = time.perf_counter()
        options, parts = self.options, self.options.accumulate
        factor = options.factor(self.step, self.steps)
        self._set_rates(factor)
        self._forget_gradients()
        buffers = [tensor.clone() for tensor in self.buffers.values()]
        total: Tensor | None = None
        rows = 0
        for part in range(parts):
            batch = to_device(self._next_batch(), self.accelerator.device)
            synchronise = part == parts - 1
            with contextlib.nullcontext() if synchronise else self.accelerator.no_sync(self.wrapped):
                with contextlib.nullcontext() if self.prefix is None else self.prefix.over(batch):
                    outcome = measure(self.wrapped, batch, self.loss)
                self.accelerator.backward(outcome.loss / parts)
            value = outcome.loss.detach() / parts
            total = value if total is None else total + value
            rows += outcome.rows
        mean = float(self.accelerator.reduce(total, reduction="mean"))
        norm = float(self.accelerator.clip_grad_norm_(self.trained.values(), options.clip or math.inf))
        scaled = self.accelerator.scaler is not None  # fp16 skips steps whose gradient overflows, and goes on
        if not math.isfinite(mean) or not (math.isfinite(norm) or scaled):
            for tensor, before in zip(self.buffers.values(), buffers, strict=True):
                tensor.copy_(before)
            self._stop(mean, norm)
        self.optimizer.step()
        self.step += 1
        seconds = time.perf_counter() - started
        return {
            "step": self.step,
            "loss": mean,
            "lr": self.peaks[0] * factor,
            "grad_norm": norm,
            "samples_per_s": rows * self.accelerator.num_processes / seconds,
            "seconds_per_step": seconds,
        }

    def _stop(self, loss: float, norm: float) -> None:
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
            self.accelerator.log(values, step=int(record["step"]))

    def _shard(self, loader: Any) -> Any:
        """Give each process its part of the validation data, no row twice."""
        if not isinstance(loader, torch.utils.data.DataLoader) or self.accelerator.num_processes == 1:
            return loader
        return sharded(loader, self.accelerator.num_processes, self.accelerator.process_index)

    def _evaluate(self, loader: Iterable[Any]) -> dict[str, float]:
        with as_before(self.model), randomness.apart():
            sums = totals(self.model, loader, self.loss, self.accelerator.device)
            return means(self.accelerator.reduce(sums, reduction="sum"))

    def _forget_gradients(self) -> None:
        """Drop every gradient, also of what the optimizer does not hold."""
        for parameter in self.open:
            parameter.grad = None

    def _find_buffers(self) -> dict[str, Tensor]:
        """Return the stored buffers of modules that train, such as the running statistics of a head's BatchNorm."""
        owners = {name.rpartition(".")[0] for name in self.trained}
        found = {}
        for path, module in self.model.named_modules():
            if path in owners:
                for name, tensor in module.named_buffers(recurse=False):
                    if name not in module._non_persistent_buffers_set:
                        found[f"{path}.{name}" if path else name] = tensor
        return found

    def _checkpoint(self, folder: Path) -> None:
        shared = {
            "step": self.step,
            "identity": self.identity,
            "model": {**self.trained, **self.buffers},  # what trains, and the buffers beside it
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
            "protect": self.options.protect.state_dict() if self.options.protect is not None else None,
        }
        own = {"random": randomness.get_state(), "stream": self.stream.state()}
        accelerator = self.accelerator
        checkpoint.write(folder, self.step, shared, own, accelerator.process_index, self._all)

    def _all(self, here: bool) -> bool:
        """Say whether something is true on every process."""
        return bool(self.accelerator.reduce(torch.tensor(float(here), device=self.accelerator.device), "mean") == 1.0)

    def _restore(self, path: Path) -> None:
        shared, own = checkpoint.read(path, self.accelerator.process_index)
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
                tensor.copy_(there[key])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(shared["scaler"])
        self.stream.restore(own["stream"])
        randomness.set_state(own["random"])
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
