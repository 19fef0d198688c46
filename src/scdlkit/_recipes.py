"""Predict and embed all cells of a matrix, here or on a dask cluster whose workers set up the same by themselves."""

from __future__ import annotations

import tempfile
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ._cluster import check_client, chosen_client, spread_out
from ._prediction import Embedder
from ._reader import CellReader
from ._saved import fingerprint
from ._settings import settings
from ._stream import Result, Work, work_through
from .foundation.checkpoints import ensure_checkpoint
from .foundation.expression import Expression
from .foundation.tokens import TokenizerConfig

if TYPE_CHECKING:
    from distributed import Client

    from ._fitted import FittedModel


@dataclass(frozen=True)
class PredictRecipe:
    """One strategy of a saved model."""

    runner_class: type[FittedModel]
    folder: str
    checkpoint: str
    strategy: str
    device: str | None
    precision: str
    arrays: bool
    fingerprint: str

    def build(self) -> Work:
        """Load the model, which has to be the one that was asked for."""
        runner = self.runner_class.load(self.folder, checkpoint=self.checkpoint, device=self.device, progress=False)
        if fingerprint(runner, self.strategy) != self.fingerprint:
            raise ValueError(f"{self.folder} holds another model than the one in use; save that one to a new folder.")
        return runner._predictor(self.strategy, precision=self.precision, arrays=self.arrays)


@dataclass(frozen=True)
class EmbedRecipe:
    """A checkpoint and how cells are read."""

    checkpoint: str
    tokenizer: TokenizerConfig
    n_draws: int
    batch_size: int | None
    device: str | None
    precision: str | None

    def build(self) -> Work:
        """Find the checkpoint."""
        reader = CellReader(
            ensure_checkpoint(self.checkpoint, progress=False),
            self.tokenizer,
            n_draws=self.n_draws,
            device=self.device,
            precision=self.precision,
            progress=False,
        )
        return Embedder(reader, self.batch_size)


def predicted(
    runner: FittedModel,
    expression: Expression,
    strategy: str,
    *,
    arrays: bool = True,
    precision: str | None = None,
    client: Client | Literal[False] | None = None,
    path: Path | None = None,
    skip: Container[int] = frozenset(),
) -> Iterator[tuple[slice, Result]]:
    """What :class:`scdlkit._prediction.Predictor` makes of each piece of a matrix.

    Parameters
    ----------
    runner, strategy
        Fitted.
    expression
        The matrix, chosen by the runner.
    arrays
        Whether embedding and probabilities are wanted.
    precision
        Of the encoder; the setting by default.
    client
        Of a cluster, whose workers load the model from the folder it was saved to or loaded from, else from a temporary
        one. By default the one in force if the matrix is a dask array; False for none.
    path, skip
        See :func:`scdlkit._cluster.spread_out`.
    """
    client = chosen_client(client, expression)
    if client is None:
        work = runner._predictor(strategy, precision=precision, arrays=arrays)
        yield from work_through(expression, work, skip=skip, progress=runner.progress)
        return
    check_client(client)
    with tempfile.TemporaryDirectory(prefix="scdlkit-") as temporary:
        recipe = PredictRecipe(
            type(runner),
            str(runner._saved_in(Path(temporary) / "model")),
            str(runner._reader.checkpoint.folder.absolute()),
            strategy,
            runner.device,
            precision or runner._reader.precision or settings.precision,
            arrays,
            fingerprint(runner, strategy),
        )
        yield from spread_out(expression, recipe, client, path=path, skip=skip, progress=runner.progress)


def embedded(
    expression: Expression,
    embedder: Embedder,
    *,
    client: Client | Literal[False] | None = None,
    path: Path | None = None,
    skip: Container[int] = frozenset(),
) -> Iterator[tuple[slice, Result]]:
    """What :class:`scdlkit._prediction.Embedder` makes of each piece of a matrix; see :func:`predicted`."""
    reader = embedder.reader
    client = chosen_client(client, expression)
    if client is None:
        yield from work_through(expression, embedder, skip=skip, progress=reader.progress)
        return
    recipe = EmbedRecipe(
        str(reader.checkpoint.folder.absolute()),
        reader.tokenizer,
        reader.n_draws,
        embedder.batch_size,
        reader.device,
        reader.precision or settings.precision,
    )
    yield from spread_out(expression, recipe, client, path=path, skip=skip, progress=reader.progress)
