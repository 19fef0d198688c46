"""Configs: frozen, validated, and plain values in a manifest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, ClassVar, Literal, Self, get_type_hints


@dataclass(frozen=True)
class Config:
    """A frozen dataclass that goes through a manifest and back."""

    strategy: ClassVar[str] = ""  # name of the strategy it belongs to

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild a config from :meth:`to_dict`, or from a part of it.

        Raises
        ------
        ValueError
            If a setting is unknown or out of range.
        """
        types = get_type_hints(cls)
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(f"{cls.__name__} has no setting {', '.join(unknown)}; it has {', '.join(known)}.")
        given = dict(values)
        defaults = {field.name: field.default_factory for field in fields(cls) if field.default_factory is not MISSING}
        for name, value in given.items():
            kind = types[name]
            if isinstance(value, Mapping) and isinstance(kind, type) and issubclass(kind, Config):
                # what is not given is this strategy's default, not that of the inner config
                start = defaults[name]().to_dict() if name in defaults else {}
                given[name] = kind.from_dict({**start, **value})
        return cls(**given)


def check_number(
    name: str,
    value: object,
    *,
    low: float,
    high: float = math.inf,
    integer: bool = False,
    open_low: bool = False,
    optional: bool = False,
) -> None:
    """Raise a ValueError unless ``value`` is a number in range (or None where optional)."""
    if value is None and optional:
        return
    right_type = isinstance(value, int) if integer else isinstance(value, int | float)
    if right_type and not isinstance(value, bool):
        number = float(value)  # type: ignore[arg-type]
        if (number > low if open_low else number >= low) and number <= high and math.isfinite(number):
            return
    bounds = f"{'above' if open_low else 'at least'} {low:g}" + (f" and at most {high:g}" if high < math.inf else "")
    kind = "an integer" if integer else "a number"
    raise ValueError(f"{name} must be {kind} {bounds}{', or None' if optional else ''}, found {value!r}.")


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise a ValueError unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, found {value!r}.")


@dataclass(frozen=True)
class TrainingConfig(Config):
    """How a strategy is trained by gradient descent (AdamW, Loshchilov & Hutter 2019).

    Parameters
    ----------
    learning_rate
        Step size of AdamW at its highest.
    schedule
        Learning rate after the warm-up: ``"cosine"``, down to 0 at ``max_epochs`` (Loshchilov & Hutter 2017,
        https://arxiv.org/abs/1608.03983), or ``"constant"``.
    warmup
        Share of all steps over which the learning rate rises linearly to its highest.
    weight_decay
        Decoupled weight decay; not applied to biases, layer norms and embeddings.
    batch_size
        Cells of a step, over all processes.
    accumulation
        Pieces, at least, in which a step is computed; the gradients are summed, so memory falls and the result stays
        (but for dropout). A step that is too large for the device is cut further.
    max_epochs
        Passes over the training cells, at most.
    patience
        Stop after this many epochs without a better validation macro-F1 (or an equal one with a lower loss).
    class_weight
        Weights of the classes in the training loss: None; ``"balanced"``, one over the number of cells; or
        ``"effective"``, one over the effective number of cells (Cui et al. 2019, beta 0.999), which is milder for
        large classes. Weights average 1 over the training cells.
    label_smoothing
        Share of the target that is spread over all classes (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567).
    gradient_clip
        Largest norm of a gradient, None for no limit.
    precision
        ``"fp32"``; ``"bf16"`` or ``"fp16"``: mixed precision, weights stay float32; ``"auto"``: float32 on a CPU, and on a
        GPU what is fastest there for strategies that train inside the encoder. Predictions after training have a
        precision of their own.
    gradient_checkpointing
        Compute the blocks of the encoder again on the way back instead of keeping what they hold: the same result, far
        less memory, about a third more time.
    attention_dropout
        Drop attention weights as well while the encoder trains, as scGPT does. Off by default: on a GPU it costs time and
        memory, on a CPU some time, and it made no difference to the macro-F1 on three data sets (see the page on
        strategies). All other dropout stays as in the checkpoint.
    compile
        Train the blocks of the encoder through ``torch.compile``, for strategies that train inside it; predictions do
        not go through it. Never required: it takes seconds to minutes before the first step, which are logged, and needs
        a C++ compiler (on a GPU also Triton, which comes with PyTorch on Linux); without one a warning is logged and the
        training goes on as usual. The result is the same but for rounding and for what dropout draws. On a CPU it gained
        nothing (0.91 times as fast in fp32, 1.09 times in bf16), and on a GPU in mixed precision it takes the place of
        something faster.
    cuda_graphs
        On a GPU, record what a step asks of it as a CUDA graph, the second time a batch of about that size comes, and
        repeat the record for all further ones: asking takes a host longer than computing takes a fast GPU. Only for
        strategies that train inside the encoder in mixed precision, and not with several processes, ``compile`` or
        ``gradient_checkpointing``. It holds on to the memory of one step, next to what other steps take, and is given up
        where that is too much, or where the host takes part in a step. Batches without padding are filled up by 1 % on
        average, with cells that count nothing. The result is the same but for rounding and for what dropout draws.

    Raises
    ------
    ValueError
        If a value is out of range.
    """

    learning_rate: float = 1e-3
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: float = 0.1
    weight_decay: float = 0.01
    batch_size: int = 64
    accumulation: int = 1
    max_epochs: int = 30
    patience: int = 10
    class_weight: Literal["balanced", "effective"] | None = None
    label_smoothing: float = 0.0
    gradient_clip: float | None = 1.0
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "auto"
    gradient_checkpointing: bool = False
    attention_dropout: bool = False
    compile: bool = False
    cuda_graphs: bool = True

    def __post_init__(self) -> None:
        check_number("learning_rate", self.learning_rate, low=0, open_low=True)
        check_choice("schedule", self.schedule, ("cosine", "constant"))
        check_number("warmup", self.warmup, low=0, high=0.9)
        check_number("weight_decay", self.weight_decay, low=0)
        check_number("batch_size", self.batch_size, low=1, integer=True)
        check_number("accumulation", self.accumulation, low=1, integer=True)
        check_number("max_epochs", self.max_epochs, low=1, integer=True)
        check_number("patience", self.patience, low=1, integer=True)
        check_choice("class_weight", self.class_weight, (None, "balanced", "effective"))
        check_number("label_smoothing", self.label_smoothing, low=0, high=0.9)
        check_number("gradient_clip", self.gradient_clip, low=0, open_low=True, optional=True)
        check_choice("precision", self.precision, ("fp32", "bf16", "fp16", "auto"))
        check_choice("gradient_checkpointing", self.gradient_checkpointing, (True, False))
        check_choice("attention_dropout", self.attention_dropout, (True, False))
        check_choice("compile", self.compile, (True, False))
        check_choice("cuda_graphs", self.cuda_graphs, (True, False))

    def learning_rate_at(self, step: int, n_steps: int) -> float:
        """Learning rate of a step (from 0) of ``n_steps``, as a share of the highest."""
        warming = round(self.warmup * n_steps)
        if step < warming:
            return (step + 1) / warming
        if self.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (step - warming) / max(1, n_steps - warming)))
