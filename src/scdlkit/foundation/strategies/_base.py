"""What a strategy is: something that learns labels from cells, and is saved as tensors and plain values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import numpy as np

from ._cells import CellData
from ._config import Config, TrainingConfig

if TYPE_CHECKING:
    import torch

    from scdlkit.foundation.batching import AnyBatch
    from scdlkit.foundation.model import ScGPTEncoder

_PREDICT_CELLS = 4096  # cells of a forward pass when predicting


class Trainer(Protocol):
    """What trains a :class:`GradientStrategy`: :class:`scdlkit.foundation.training.Trainer`."""

    def train(
        self, strategy: GradientStrategy, train: CellData, val: CellData, *, n_classes: int, seed: int, device: str
    ) -> list[dict[str, float]]:
        """Train ``strategy.module`` in place, leave its best epoch in it, return one row an epoch.

        ``strategy.history`` grows with every finished epoch.
        """


class EncoderSource(Protocol):
    """Where the pretrained encoder comes from."""

    @property
    def cls_id(self) -> int:
        """Vocabulary id of ``<cls>``."""

    @property
    def pad_id(self) -> int:
        """Vocabulary id of ``<pad>``."""

    def encoder(self, token_ids: np.ndarray) -> ScGPTEncoder:
        """A fresh pretrained encoder with rows for these tokens."""

    def gene_rows(self, token_ids: np.ndarray) -> torch.Tensor:
        """Pretrained rows ``[tokens, embsize]`` of the gene embedding."""


class Strategy(ABC):
    """One way to turn labelled cells into a classifier.

    A subclass is one file: it states ``name``, ``config_class``, ``role`` and ``needs``, and is registered with
    :func:`register`. ``fit`` sets ``history`` (rows of epoch, train_loss, val_loss, val_macro_f1; a closed-form fit has
    one row, epoch 0) and ``n_trainable``. All that is learnt goes through :meth:`state_dict` (tensors) and
    :meth:`metadata` (plain values, fit for JSON), and nothing else is needed to predict.

    Parameters
    ----------
    config
        Instance of ``config_class``, or a mapping of its settings; its defaults by default.
    name
        Name in the comparison, where one class stands there more than once.

    Raises
    ------
    ValueError
        If ``config`` belongs to another strategy.
    """

    name: str
    config_class: ClassVar[type[Config]]
    role: ClassVar[Literal["strategy", "baseline"]] = "strategy"
    needs: ClassVar[frozenset[str]]
    libraries: ClassVar[tuple[str, ...]] = ()  # modules that fit imports, which are loaded before it is timed
    package: ClassVar[str] = ""  # that fit needs and that an extra of its name brings
    needs_to_fit: ClassVar[frozenset[str]] = frozenset()  # further parts that fit reads
    frozen: ClassVar[bool] = True  # whether the encoder stays as it was pretrained
    source: EncoderSource | None = None  # set before fit or load_state, for strategies that change the encoder
    precision: str | None = None  # of a changed encoder that predicts; the setting by default

    def __init__(self, config: Config | Mapping[str, Any] | None = None, *, name: str | None = None) -> None:
        if name is not None:
            self.name = name
        if config is None:
            config = self.config_class()
        elif isinstance(config, Mapping):
            config = self.config_class.from_dict(config)
        elif not isinstance(config, self.config_class):
            owner = f", which belongs to strategy {config.strategy!r}" if isinstance(config, Config) else ""
            raise ValueError(
                f"Strategy {self.name!r} takes a {self.config_class.__name__}, found {type(config).__name__}{owner}."
            )
        self.config: Any = config
        self.history: list[dict[str, float]] = []
        self.n_trainable = 0
        self.n_classes = 0

    def unfitted(self) -> Strategy:
        """Another of the same kind, name, settings and source, to be fitted on other cells."""
        other = type(self)(self.config, name=self.name)
        other.source = self.source
        return other

    @property
    def uses_encoder(self) -> bool:
        """Whether it reads what the pretrained encoder makes of the cells.

        A baseline that does, such as nearest neighbours in the embedding, says nothing against the foundation model.
        """
        return not self.needs.isdisjoint({"embedding", "tokens"})

    @abstractmethod
    def fit(
        self,
        train: CellData,
        val: CellData,
        *,
        n_classes: int,
        seed: int = 0,
        device: str = "cpu",
        trainer: Trainer | None = None,
    ) -> None:
        """Learn from ``train``, choose by ``val``.

        Parameters
        ----------
        train, val
            Labelled cells with the parts in ``needs``.
        n_classes
            Number of classes; codes run from 0 to ``n_classes - 1``.
        seed
            Of all randomness.
        device
            Where to train.
        trainer
            Training loop, for strategies that are trained by gradient descent.
        """

    @abstractmethod
    def predict_proba(self, cells: CellData) -> np.ndarray:
        """Class probabilities, float32 ``[n, n_classes]``; rows sum to 1."""

    def outputs(self, cells: CellData) -> tuple[np.ndarray, np.ndarray]:
        """:meth:`predict_proba` and :meth:`latent`, which have much in common where the encoder is changed."""
        return self.predict_proba(cells), self.latent(cells)

    @abstractmethod
    def state_dict(self) -> dict[str, torch.Tensor]:
        """What was learnt, as CPU tensors: the delta to the checkpoint, not the checkpoint."""

    @abstractmethod
    def load_state(self, state: Mapping[str, torch.Tensor], metadata: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` and :meth:`metadata` gave.

        Raises
        ------
        ValueError
            If a tensor is missing, unknown or misshapen, or ``metadata`` incomplete.
        """

    def to(self, device: torch.device) -> None:  # noqa: B027  (plain numbers have no device)
        """Move what predicts to a device."""

    def cover(self, gene_ids: np.ndarray) -> None:  # noqa: B027  (only encoders have rows for genes)
        """Get ready for cells with these tokens; what this takes is then not repeated for every piece of the cells."""

    def latent(self, cells: CellData) -> np.ndarray:
        """Cell embedding float32 ``[n, d]``, not normalised: the frozen one unless the strategy changes the encoder."""
        if cells.embedding is None:
            raise ValueError(f"Strategy {self.name!r} needs the embedding of the cells, which was not given.")
        return cells.embedding

    def metadata(self) -> dict[str, Any]:
        """What was learnt and is no tensor: plain values, fit for JSON."""
        self._check_fitted()
        return {"n_classes": self.n_classes, "n_trainable": self.n_trainable}

    def _load_metadata(self, metadata: Mapping[str, Any], *required: str) -> None:
        names = ("n_classes", "n_trainable", *required)
        if missing := [name for name in names if name not in metadata]:
            raise ValueError(f"The saved strategy {self.name!r} lacks {', '.join(missing)} in its metadata.")
        self.n_classes, self.n_trainable = int(metadata["n_classes"]), int(metadata["n_trainable"])

    def _check_fitted(self) -> None:
        if self.n_classes == 0:
            raise RuntimeError(f"Strategy {self.name!r} is not fitted; call fit or load_state first.")

    def _check_cells(self, cells: CellData, extra: frozenset[str] = frozenset()) -> None:
        if absent := sorted(name for name in self.needs | extra if getattr(cells, name) is None):
            raise ValueError(f"Strategy {self.name!r} needs {', '.join(absent)} of the cells, which was not given.")

    def _check_training_cells(self, train: CellData, val: CellData, n_classes: int) -> None:
        for split, cells in (("training", train), ("validation", val)):
            self._check_cells(cells, self.needs_to_fit)
            if cells.codes is None or cells.n_cells == 0:
                raise ValueError(f"Strategy {self.name!r} needs labelled {split} cells, found none.")
            if cells.codes.min() < 0 or cells.codes.max() >= n_classes:
                raise ValueError(
                    f"codes of the {split} cells must be in [0, {n_classes}), "
                    f"found {cells.codes.min()} to {cells.codes.max()}."
                )
        if len(np.unique(train.codes)) < 2:  # type: ignore[arg-type]
            raise ValueError(f"Strategy {self.name!r} needs at least two classes among the training cells, found one.")


class GradientStrategy(Strategy):
    """A strategy trained by gradient descent: it says what trains and how logits come about, the trainer does the rest.

    ``build`` sets ``module``; parameters of it that require gradients are trained. ``config.training`` is a
    :class:`TrainingConfig`.
    """

    module: torch.nn.Module | None = None

    @abstractmethod
    def build(self, train: CellData, *, n_classes: int, seed: int) -> None:
        """Set ``module``, initialised by ``seed`` alone, on the CPU."""

    @abstractmethod
    def logits(self, cells: CellData) -> torch.Tensor:
        """Differentiable logits ``[n, n_classes]``, on the device of ``module``."""

    def inputs(self, cells: CellData) -> AnyBatch | None:
        """What ``module`` makes the logits of, on the host; None where there is more to :meth:`logits` than that.

        A class that overrides :meth:`logits` and wants its steps recorded as CUDA graphs overrides this as well.
        """
        return None

    def batches(self, cells: CellData, batch_size: int, generator: torch.Generator) -> list[np.ndarray]:
        """Positions of the cells of each batch of one epoch, every cell once, in random order."""
        import torch

        order = torch.randperm(cells.n_cells, generator=generator).numpy()
        return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]

    def read(self, cells: CellData, rows: np.ndarray) -> CellData:
        """The cells at ``rows``, with all that :meth:`logits` needs of them in memory; any thread may call this."""
        return cells.subset(rows)

    def token_lengths(self, cells: CellData) -> np.ndarray | None:
        """Tokens of each cell that a forward pass goes through; None where its cost does not depend on them."""
        return None

    def bytes_per_token(self) -> float:
        """About the memory that a training step needs for each padded token."""
        return 0.0

    def learning_rate_scale(self, name: str) -> float:
        """Factor on the learning rate of the parameter ``name`` of ``module``."""
        return 1.0

    @property
    def training(self) -> TrainingConfig:
        """How it is trained."""
        return self.config.training

    def fit(
        self,
        train: CellData,
        val: CellData,
        *,
        n_classes: int,
        seed: int = 0,
        device: str = "cpu",
        trainer: Trainer | None = None,
    ) -> None:
        """Build, then train; see :meth:`Strategy.fit`.

        A KeyboardInterrupt goes on to the caller; after it the strategy can be used as far as it got (its best epoch
        up to then, ``history`` says which) if one epoch was finished, and counts as not fitted otherwise.
        """
        if trainer is None:
            raise ValueError(
                f"Strategy {self.name!r} is trained by gradient descent: pass trainer=foundation.training.Trainer()."
            )
        self._check_training_cells(train, val, n_classes)
        needs = self.needs | self.needs_to_fit
        train, val = train.only(needs), val.only(needs)
        self.build(train, n_classes=n_classes, seed=seed)
        parameters = self.trained_module().parameters()
        self.n_trainable = sum(value.numel() for value in parameters if value.requires_grad)
        self.n_classes, self.history = 0, []
        try:
            self.history = trainer.train(self, train, val, n_classes=n_classes, seed=seed, device=device)
        except KeyboardInterrupt:
            self.n_classes = n_classes if self.history else 0
            raise
        self.n_classes = n_classes

    def predict_proba(self, cells: CellData) -> np.ndarray:
        """Class probabilities, float32 ``[n, n_classes]``."""
        self._check_fitted()
        self._check_cells(cells)
        return self.probabilities(cells.only(self.needs), self.n_classes)

    def probabilities(self, cells: CellData, n_classes: int) -> np.ndarray:
        """Class probabilities of the module as it is, in eval mode and without gradients."""
        import torch

        self.trained_module().eval()
        probabilities = np.empty((cells.n_cells, n_classes), dtype=np.float32)
        with torch.inference_mode():
            for start in range(0, cells.n_cells, _PREDICT_CELLS):
                rows = np.arange(start, min(start + _PREDICT_CELLS, cells.n_cells))
                probabilities[rows] = self.logits(cells.subset(rows)).float().softmax(-1).cpu().numpy()
        return probabilities

    def to(self, device: torch.device) -> None:
        """Move the module to a device."""
        self.trained_module().to(device)

    def trained_module(self) -> torch.nn.Module:
        """``module``, or a RuntimeError where there is none yet."""
        if self.module is None:
            raise RuntimeError(f"Strategy {self.name!r} has no module; call build, fit or load_state first.")
        return self.module


def check_tensors(
    strategy: str, state: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int | None, ...]]
) -> None:
    """Raise a ValueError unless ``state`` has exactly these tensors; None in a shape is any size."""
    problems = [f"{name} is missing" for name in shapes if name not in state]
    problems += [f"{name} is unknown" for name in state if name not in shapes]
    for name, shape in shapes.items():
        if name in state:
            found = tuple(state[name].shape)
            if len(found) != len(shape) or any(b is not None and a != b for a, b in zip(found, shape, strict=True)):
                problems.append(f"{name} has shape {found} instead of {shape}")
    if problems:
        raise ValueError(f"The saved state of strategy {strategy!r} does not fit: {'; '.join(problems)}.")
