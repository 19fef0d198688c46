"""The mechanics of one training: a step on any number of cells, devices and processes, and the best weights so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from scdlkit._settings import logger

from ._adamw import AdamW
from ._compiled import compile_blocks, release_blocks
from ._device import autocast_dtype
from ._graphs import Recorder, Unrecordable
from ._overlap import host_copy, on_host, prepared, to_device
from ._preflight import pieces, preflight, token_budget
from ._processes import join
from ._random import generator, seeded
from ._training_state import Progress, Saved
from .batching import AnyBatch
from .strategies import CellData, GradientStrategy, TrainingConfig

_COMPILED_CELLS = 8  # of a step, which is enough to compile for any number
_RECORDED_SHARE = 0.5  # of the largest piece that fits: a record holds on to its memory


class Fit:
    """Module, optimizer, and how far they have come.

    Parameters
    ----------
    strategy
        Built; its module goes to ``device``, and is wrapped while it trains.
    train
        Training cells, with codes.
    class_weights
        float32 ``[classes]``, weight of each class in the loss.
    seed, device
        Of order and dropout, and where to train.
    """

    def __init__(
        self, strategy: GradientStrategy, train: CellData, *, class_weights: np.ndarray, seed: int, device: torch.device
    ) -> None:
        self.strategy, self.train, self.seed, self.device = strategy, train, seed, device
        self.config = config = strategy.training
        self.accelerator = join(device)
        self.rank, self.n_processes = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main = self.rank == 0
        self.module = strategy.trained_module().to(device)
        self.optimizer = AdamW(_parameter_groups(strategy, config), fused=device.type in ("cpu", "cuda"))
        self.wrapped = self.accelerator.prepare_model(self.module, device_placement=False)
        head_alone = strategy.frozen and config.precision == "auto"  # too little work to be faster in half precision
        self._dtype = autocast_dtype("fp32" if head_alone else config.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self._dtype is torch.float16)
        self.codes = np.asarray(train.codes, dtype=np.int64)
        self.weights = class_weights
        self.lengths = strategy.token_lengths(train)
        self.max_tokens = token_budget(device, strategy.bytes_per_token())
        self.recorder = self._recorder() if self._records() else None
        self.steps_per_epoch = len(self.batches(1))
        self.progress = Progress(accumulation=config.accumulation)
        self.best_weights: dict[str, Tensor] = {}

    def autocast(self) -> torch.autocast:
        """Mixed precision of the forward pass, as the config asks for."""
        return torch.autocast(self.device.type, dtype=self._dtype, enabled=self._dtype is not None)

    def batches(self, epoch: int) -> list[np.ndarray]:
        """Positions of the cells of each step of an epoch."""
        return self.strategy.batches(self.train, self.config.batch_size, generator(self.seed, epoch))

    def run_epoch(self, bar: tqdm) -> float:
        """Train on every cell once; returns the mean loss."""
        progress = self.progress
        progress.epoch += 1
        total, seen = 0.0, 0
        shown: dict[str, str] = {}
        if progress.history:
            shown["val_macro_f1"] = f"{progress.history[-1]['val_macro_f1']:.3f}"
        self.strategy.module = self.wrapped
        self.wrapped.train()
        cells = ((rows, self._read(rows)) for rows in self.batches(progress.epoch))
        with (
            seeded(self.seed, progress.epoch, self.rank, device=self.device),  # dropout
            prepared(cells, self.device) as ready,
        ):
            # losses of a GPU arrive some steps later: it need not wait until the host has seen them
            for (step, rows), loss in on_host(self._steps(ready)):
                value = float(loss)
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"The loss of {self.strategy.name!r} is {value} at epoch {progress.epoch}, step {step} (batch of "
                        f"{len(rows)} training cells, positions {', '.join(map(str, rows[:5]))}, …); lower learning_rate "
                        f"({self.config.learning_rate:g}) and check the input for extreme values."
                    )
                total, seen = total + value * len(rows), seen + len(rows)
                bar.set_postfix({"loss": f"{total / seen:.3f}", **shown}, refresh=False)
                bar.update()
        self.strategy.module = self.module
        return total / len(self.codes)

    def _steps(self, ready: Iterable[tuple[np.ndarray, CellData]]) -> Iterator[tuple[tuple[int, np.ndarray], Tensor]]:
        """Train on each batch; yields number, cells and loss of a step before its weights change."""
        n_steps = self.config.max_epochs * self.steps_per_epoch
        for step, (rows, own) in enumerate(ready, start=1):
            yield (step, rows), self.gradients(rows, own)
            rate = self.config.learning_rate_at(self.progress.step, n_steps)
            for group in self.optimizer.param_groups:
                group["lr"] = group["highest"] * rate
            self.scaler.unscale_(self.optimizer)
            if self.config.gradient_clip is not None:
                torch.nn.utils.clip_grad_norm_(self.module.parameters(), self.config.gradient_clip)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.progress.step += 1

    def _read(self, rows: np.ndarray) -> CellData:
        """What this process takes of a step's cells, in memory."""
        # with fewer cells than processes, some take part with a cell that counts nothing
        own = rows[self.rank :: self.n_processes]
        return self.strategy.read(self.train, own if len(own) else rows[:1])

    def gradients(self, rows: np.ndarray, own: CellData | None = None) -> Tensor:
        """Leave the gradients of a step's mean loss, which is returned, in the parameters.

        The step is cut finer where the device is too small.

        ``own`` is what this process takes of ``rows``, if it was read already.
        """
        own = self._read(rows) if own is None else own
        recorder = self.recorder
        share = self.n_processes / len(rows) if self.rank < len(rows) else 0.0
        n_cells, lengths = own.n_cells, self.strategy.token_lengths(own)
        while True:
            if recorder is None:
                self.optimizer.zero_grad(set_to_none=True)
            else:
                recorder.clear()
            at_least = self.progress.accumulation
            parts = pieces(np.arange(n_cells), lengths, at_least=at_least, max_tokens=self.max_tokens)
            try:
                return self._gradients(own, parts, share)
            except Unrecordable:
                continue
            except torch.cuda.OutOfMemoryError as error:
                # the others wait for this one, or nothing to cut
                if not self._holds_records and (self.n_processes > 1 or len(parts) == n_cells):
                    error.add_note("Lower batch_size, raise accumulation, or set gradient_checkpointing=True.")
                    raise
            # out of the handler, whose traceback holds on to the tensors
            if self._forget_records():
                continue
            self.progress.accumulation = 2 * len(parts)
            logger.warning(
                "%s: the GPU has not enough memory for %d cells at once; goes on with %d at once and %d pieces a step.",
                self.strategy.name, len(parts[0]), -(-n_cells // self.progress.accumulation), self.progress.accumulation,
            )  # fmt: skip

    def _gradients(self, own: CellData, parts: list[np.ndarray], share: float) -> Tensor:
        total = torch.zeros((), device=self.device)
        for part in parts:
            # processes exchange gradients once a step, with the last piece
            last = part is parts[-1]
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                total += self._piece(own if len(parts) == 1 else own.subset(part), share)
        reduced: Tensor = self.accelerator.reduce(total, "mean")
        return reduced

    def _piece(self, cells: CellData, share: float) -> Tensor:
        """Add the gradients of some cells to those of others; their part of the loss."""
        codes = np.asarray(cells.codes, dtype=np.int64)
        weights = self.weights[codes] * np.float32(share)
        with self.autocast():
            batch = None if self.recorder is None else self.strategy.inputs(cells)
        if self.recorder is not None and batch is not None:
            lengths = self.strategy.token_lengths(cells)
            n_tokens = 0 if lengths is None else int(lengths.max()) * len(lengths)
            fits = n_tokens <= _RECORDED_SHARE * self.max_tokens
            needs = n_tokens * self.strategy.bytes_per_token() if fits else None
            return self.recorder.run(self._step_on, batch, codes, weights, needs=needs)
        on_device = (
            to_device(host_copy(part, kind, self.device), self.device)
            for part, kind in ((codes, torch.int64), (weights, torch.float32))
        )
        return self._backward(lambda: self.strategy.logits(cells), *on_device)

    def _step_on(self, batch: AnyBatch, codes: Tensor, weights: Tensor) -> Tensor:
        return self._backward(lambda: self.wrapped(batch), codes, weights)

    def _backward(self, logits: Callable[[], Tensor], codes: Tensor, weights: Tensor) -> Tensor:
        with self.autocast():
            found = logits()
        losses = torch.nn.functional.cross_entropy(
            found.float(), codes, reduction="none", label_smoothing=self.config.label_smoothing
        )
        loss = (losses * weights).sum()
        self.accelerator.backward(self.scaler.scale(loss))
        return loss.detach()

    def _records(self) -> bool:
        """Whether steps may become CUDA graphs: not what exchanges gradients, is compiled, or sets generators back.

        Nor in float32, which keeps a GPU busy, and whose padded cells have a form of their own nearly every time.
        """
        config, alone = self.config, self.device.type == "cuda" and self.n_processes == 1
        by_config = config.cuda_graphs and not config.compile and not config.gradient_checkpointing
        return alone and by_config and self._dtype is not None and _logits_come_from_inputs(type(self.strategy))

    def _recorder(self) -> Recorder:
        parameters = [value for _, value in _trained(self.module)]
        longest = 0 if self.lengths is None else int(self.lengths.max())
        return Recorder(parameters, longest=longest, device=self.device)

    @property
    def _holds_records(self) -> bool:
        return self.recorder is not None and self.recorder.holds_memory

    def _forget_records(self) -> bool:
        """Give the GPU free what it does not use; whether recorded steps were part of that, of which there are none now."""
        held = self._holds_records
        if self.recorder is not None:
            self.recorder.stop()
        torch.cuda.empty_cache()
        return held

    def probabilities(self, cells: CellData, n_classes: int) -> np.ndarray:
        """Of the classes of some cells, float32 ``[cells, classes]``, by the weights as they are."""
        with self.autocast():
            try:
                return self.strategy.probabilities(cells, n_classes)
            except torch.cuda.OutOfMemoryError:
                if not self._holds_records:
                    raise
            self._forget_records()
            return self.strategy.probabilities(cells, n_classes)

    def compile(self) -> None:
        """Compile what the config asks for, by steps that change nothing."""
        if not self.config.compile:
            return
        self.module.train()
        with seeded(self.seed, device=self.device):
            compile_blocks(self.strategy.name, self.module, self._try_steps)
        self.optimizer.zero_grad(set_to_none=True)

    def _try_steps(self) -> None:
        # by the module itself: a process whose compiler fails must not leave the others waiting for its gradients
        for rows in self._cells_to_compile():
            with self.autocast():
                loss = self.strategy.logits(self.strategy.read(self.train, rows)).float().sum()
            self.scaler.scale(loss).backward()

    def _cells_to_compile(self) -> list[np.ndarray]:
        """Cells of one step with padding and of one without, as far as there are such: each is compiled by itself."""
        lengths = np.zeros(self.train.n_cells) if self.lengths is None else self.lengths
        found: dict[bool, np.ndarray] = {}
        for rows in self.batches(1):
            some = rows[[*range(min(len(rows), _COMPILED_CELLS - 1)), -1]]  # sorted by length: the last differs most
            found.setdefault(len(np.unique(lengths[some])) > 1, some)
        return list(found.values())

    def preflight(self) -> None:
        """Log what the run will take, from the most costly step of an epoch."""
        if self.lengths is None:
            return
        self.wrapped.train()
        self.strategy.module = self.wrapped
        with seeded(self.seed, device=self.device):
            preflight(
                self.strategy.name,
                lambda rows: float(self.gradients(rows)),  # waits until it is there
                self.batches(1),
                self.lengths,
                n_trainable=sum(value.numel() for _, value in _trained(self.module)),
                max_epochs=self.config.max_epochs,
                device=self.device,
            )
        self.optimizer.zero_grad(set_to_none=True)
        self.strategy.module = self.module

    def judge(self, row: dict[str, float]) -> None:
        """Take an epoch into the history, keep its weights if it is the best, and say whether it was the last."""
        progress = self.progress
        quality = (row["val_macro_f1"], -row["val_loss"])
        if progress.best is None or quality > progress.best:
            self.best_weights = {name: value.detach().clone() for name, value in _trained(self.module)}
            progress.best, progress.waited = quality, 0
        else:
            progress.waited += 1
        progress.history.append(row)
        progress.finished = progress.waited >= self.config.patience or progress.epoch >= self.config.max_epochs

    def leave_best(self) -> None:
        """Give the strategy its module back, in eval mode and with the weights of the best epoch."""
        self.strategy.module = self.module
        release_blocks(self.module)
        if self.recorder is not None:
            self.recorder.stop()
        _set_weights(self.module, self.best_weights)
        self.optimizer.zero_grad(set_to_none=True)
        self.module.eval()

    def saved(self) -> Saved:
        """All that :meth:`restore` needs, as of the end of an epoch."""
        weights = {name: value.detach() for name, value in _trained(self.module)}
        return Saved(self.progress, weights, self.best_weights, self.optimizer.state_dict(), self.scaler.state_dict())

    def restore(self, saved: Saved) -> None:
        """Go on from a saved epoch."""
        self.progress = saved.progress
        _set_weights(self.module, saved.weights)
        self.best_weights = {name: value.to(self.device) for name, value in saved.best_weights.items()}
        self.optimizer.load_state_dict(saved.optimizer)
        if saved.scaler:  # empty where the run began on a device that needs none
            self.scaler.load_state_dict(saved.scaler)


def _trained(module: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, value) for name, value in module.named_parameters() if value.requires_grad]


def _logits_come_from_inputs(kind: type[GradientStrategy]) -> bool:
    """False where a class has logits of its own and the inputs of another, which say nothing of them then."""
    owners = {name: next(owner for owner in kind.__mro__ if name in vars(owner)) for name in ("inputs", "logits")}
    return issubclass(owners["inputs"], owners["logits"])


def _set_weights(module: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)


def _parameter_groups(strategy: GradientStrategy, config: TrainingConfig) -> list[dict[str, object]]:
    """Groups with equal learning rate and weight decay; embeddings, biases and norms do not decay."""
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
    for name, value in _trained(strategy.trained_module()):
        decay = config.weight_decay if value.ndim > 1 and "embedding" not in name else 0.0
        groups.setdefault((config.learning_rate * strategy.learning_rate_scale(name), decay), []).append(value)
    return [
        {"params": values, "lr": rate, "highest": rate, "weight_decay": decay}
        for (rate, decay), values in groups.items()
    ]
