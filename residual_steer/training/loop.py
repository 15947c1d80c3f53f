"""fit and evaluate: one loop for every architecture and every method, on accelerate.

It trains whatever requires a gradient and asks nothing else of the model: a steered SSM, LoRA on a Transformer, a
linear probe and full fine-tuning all go through it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.data_loader import prepare_data_loader
from accelerate.state import AcceleratorState
from accelerate.utils import send_to_device, set_seed
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from tqdm.auto import tqdm

from residual_steer.errors import SteerError
from residual_steer.files import make_folder

from . import checkpoint, randomness
from .history import History, Journal
from .losses import Loss, measure
from .options import FitOptions
from .stream import BatchStream

__all__ = ["evaluate", "fit"]

# What a run may be resumed with another value of: it does not change the weights.
_FREE = {"checkpoint_every", "eval_every", "log_every", "progress", "resume", "trackers"}


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
            with other options; a loss or gradient that is NaN or infinite, which leaves model and checkpoint as they
            were after the last good step.

    >>> history = fit(model, train, valid, steps=500, lr=1e-3, save_to="runs/squad", eval_every=100)
    """
    settings = FitOptions.of(options)
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise SteerError(f"`steps` is a positive integer; received {steps!r}.")
    if not isinstance(lr, (int, float)) or not 0 < lr < math.inf:
        raise SteerError(f"`lr` is a positive number; received {lr!r}.")
    folder = None if save_to is None else Path(save_to)
    if settings.trackers and folder is None:
        raise SteerError("`trackers` write their logs under `save_to`; give it a folder.")
    if not any(p.requires_grad for p in model.parameters()):
        raise SteerError("nothing to train: no parameter of the model requires a gradient. Steer it first.")
    resumed = _find_resumable(folder, settings)
    with _as_before(model):
        run = _Run(model, train, steps, lr, loss, optimizer, folder, settings)
        try:
            return run.go(valid, resumed)
        finally:
            run.stream.close()


def evaluate(model: nn.Module, loader: Iterable[Any], loss: Loss | None = None) -> dict[str, float]:
    """Measure a model in evaluation mode, on its own device; modes and random generators are left as they were.

    Args:
        model: any model.
        loader: batches as in `fit`.
        loss: as in `fit`.

    Returns:
        `loss`, the mean over all labels that count (rows where a batch has none), and for `(x, y)` pairs `accuracy`
        from 0 to 1.

    Raises:
        SteerError: the loader is empty, or a batch is unusable.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with _as_before(model), randomness.apart():
        return _means(_totals(model, loader, loss, device))


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
        self.accelerator = _accelerator(options, folder)
        if options.seed is not None:
            set_seed(options.seed)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.identity = {"steps": steps, "lr": float(lr), **_identity(options)}
        optimizer = optimizer or AdamW(self.trained.values(), lr=lr, weight_decay=options.weight_decay)
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.wrapped, self.optimizer, loader = self._prepare(model, optimizer, train)
        self.stream = BatchStream(loader)
        if options.seed is not None:
            set_seed(options.seed, device_specific=True)  # dropout differs between processes, the data order does not
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

    def go(self, valid: Iterable[Any] | None, resumed: Path | None) -> History:
        """Run from the start, or from a checkpoint, to the last step."""
        if resumed is not None:
            self._restore(resumed)
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
            self.model.train()
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
        return self.journal.history

    def _due(self, every: int | None) -> bool:
        return every is not None and self.step % every == 0

    def _advance(self) -> dict[str, float]:
        """Take one optimizer step and return its record."""
        started = time.perf_counter()
        options, parts = self.options, self.options.accumulate
        factor = options.factor(self.step, self.steps)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        self.optimizer.zero_grad()
        total: Tensor | None = None
        rows = 0
        for part in range(parts):
            batch = next(self.stream)
            synchronise = part == parts - 1
            with contextlib.nullcontext() if synchronise else self.accelerator.no_sync(self.wrapped):
                outcome = measure(self.wrapped, batch, self.loss)
                self.accelerator.backward(outcome.loss / parts)
            value = outcome.loss.detach() / parts
            total = value if total is None else total + value
            rows += outcome.rows
        mean = float(self.accelerator.reduce(total, reduction="mean"))
        norm = float(self.accelerator.clip_grad_norm_(self.trained.values(), options.clip or math.inf))
        scaled = self.accelerator.scaler is not None  # fp16 skips steps whose gradient overflows, and goes on
        if not math.isfinite(mean) or not (math.isfinite(norm) or scaled):
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
        self.optimizer.zero_grad()
        kept = checkpoint.newest(self.folder) if self.folder is not None else None
        what = f"loss became {loss}" if not math.isfinite(loss) else f"gradient's norm became {norm}"
        raise SteerError(
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
        return prepare_data_loader(
            loader,
            num_processes=self.accelerator.num_processes,
            process_index=self.accelerator.process_index,
            split_batches=True,
            even_batches=False,
        )

    def _evaluate(self, loader: Iterable[Any]) -> dict[str, float]:
        with _as_before(self.model), randomness.apart():
            totals = _totals(self.model, loader, self.loss, self.accelerator.device)
            return _means(self.accelerator.reduce(totals, reduction="sum"))

    def _tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds of the model: what trains, and the buffers beside it."""
        owners = {name.rpartition(".")[0] for name in self.trained}
        stored = set(self.model.state_dict(keep_vars=True))
        buffers = {
            name: tensor
            for name, tensor in self.model.named_buffers()
            if name in stored and name.rpartition(".")[0] in owners
        }
        return {**self.trained, **buffers}

    def _checkpoint(self, folder: Path) -> None:
        shared = {
            "step": self.step,
            "identity": self.identity,
            "model": dict(self._tensors()),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else None,
        }
        own = {"random": randomness.get_state(), "stream": self.stream.state()}
        accelerator = self.accelerator
        checkpoint.write(folder, self.step, shared, own, accelerator.process_index, accelerator.wait_for_everyone)

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
        here, there = self._tensors(), shared["model"]
        wrong = sorted(here.keys() ^ there.keys()) or [k for k in here if here[k].shape != there[k].shape]
        if wrong:
            raise SteerError(
                f"the checkpoint {path} belongs to a model that trains other tensors: {', '.join(wrong[:6])} differ."
            )
        with torch.no_grad():
            for key, tensor in here.items():
                tensor.copy_(there[key])
        self.optimizer.load_state_dict(shared["optimizer"])
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
    return {key: value for key, value in dataclasses.asdict(options).items() if key not in _FREE}


def _accelerator(options: FitOptions, folder: Path | None) -> Accelerator:
    state = AcceleratorState._shared_state
    if state and options.precision is not None and state.get("_mixed_precision") != options.precision:
        AcceleratorState._reset_state()  # one process may train in several precisions, one after another
    return Accelerator(
        mixed_precision=options.precision,
        dataloader_config=DataLoaderConfiguration(
            split_batches=True, dispatch_batches=False, use_seedable_sampler=True, data_seed=options.seed
        ),
        log_with=list(options.trackers) or None,
        project_dir=None if folder is None else str(folder),
    )


@contextlib.contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Give back every module's mode, and the `forward` that accelerate wraps for mixed precision."""
    modes = {module: module.training for module in model.modules()}
    attributes = ("forward", "_original_forward")
    kept = {name: model.__dict__[name] for name in attributes if name in model.__dict__}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for name in attributes:
            model.__dict__.pop(name, None)
        model.__dict__.update(kept)


@torch.no_grad()
def _totals(model: nn.Module, loader: Iterable[Any], loss: Loss | None, device: torch.device) -> Tensor:
    """Return the sums of loss · weight, weight, correct rows, classified rows; in fp64 where the device has it."""
    model.eval()
    dtype = torch.float32 if device.type == "mps" else torch.float64
    totals = torch.zeros(4, dtype=dtype, device=device)
    for batch in loader:
        outcome = measure(model, send_to_device(batch, device), loss)
        totals[0] += outcome.loss.to(dtype) * outcome.weight
        totals[1] += outcome.weight
        if outcome.correct is not None:
            totals[2] += outcome.correct
            totals[3] += outcome.rows
    return totals


def _means(totals: Tensor) -> dict[str, float]:
    loss, weight, correct, rows = totals.tolist()
    if not weight:
        raise SteerError("the loader gave nothing to evaluate: no batch, or no label that counts.")
    return {"loss": loss / weight, **({"accuracy": correct / rows} if rows else {})}
