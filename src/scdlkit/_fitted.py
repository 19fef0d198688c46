"""A model that learnt a data set's labels: annotate other cells with it, write it to a folder, read it again."""

from __future__ import annotations

import os
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np

from ._annotation import check_target, describe_result, write_annotation
from ._keys import TABLES, UNASSIGNED, ResultKeys
from ._prediction import Predictor, annotate_parts
from ._reader import CellReader
from ._recipes import predicted
from ._saved import read_runner, write_runner
from .foundation.checkpoints import Checkpoint
from .foundation.export import export_checkpoint
from .foundation.known_cells import KnownCells
from .foundation.strategies import Strategy
from .foundation.tokens import TokenizerConfig

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from distributed import Client

    from ._run_config import RunnerConfig
    from .inspection import ScGPTAnnotationDataReport


class FittedModel:
    """What :class:`scdlkit.AnnotationRunner` has learnt, and what can be done with it; attributes are described there."""

    report_: ScGPTAnnotationDataReport
    results_: pd.DataFrame
    folds_: pd.DataFrame
    differences_: pd.DataFrame
    leakage_: pd.DataFrame
    history_: pd.DataFrame
    per_class_: pd.DataFrame
    classes_: np.ndarray
    label_key_: str
    best_strategy_: str
    recommendation_: str
    interrupted_: str
    _reader: CellReader
    _genes: np.ndarray
    _folder: Path | None = None  # which holds this very model

    def predict(
        self,
        adata: AnnData,
        *,
        strategy: str | None = None,
        precision: str | None = None,
        client: Client | Literal[False] | None = None,
    ) -> dict[str, np.ndarray]:
        """Annotate cells; ``adata`` is read only. It may have other genes, in another order, than the training data.

        Parameters
        ----------
        adata
            Cells to annotate.
        strategy
            Name of a fitted strategy or baseline; the best strategy by default.
        precision
            Of an encoder, as for :func:`scdlkit.tl.embed`; the setting by default. In another one than fp32, cells whose
            label is a close call are computed again in fp32.
        client
            Of a dask cluster that shares the work, see :func:`scdlkit.tl.predict`.

        Returns
        -------
        dict
            ``label_codes`` int64 ``[cells]`` (-1: unassigned), ``labels`` str ``[cells]``, ``probabilities`` float32
            ``[cells, classes]`` and ``latent`` float32 ``[cells, embsize]``, L2-normalised. Cells without any known
            gene are "unassigned", with NaN probabilities and an all-zero latent.

        Raises
        ------
        RuntimeError
            Before ``fit_compare`` or ``load``.
        """
        result = self._annotate(adata, strategy, precision, client)
        labels = np.append(self.classes_, UNASSIGNED)[result["label_codes"]]
        return {"labels": labels, **{name: result[name] for name in ("label_codes", "probabilities", "latent")}}

    def annotate_adata(
        self,
        adata: AnnData,
        *,
        obs_key: str = "scgpt_label",
        embedding_key: str = "X_scgpt_best",
        key_added: str = "scgpt",
        strategy: str | None = None,
        precision: str | None = None,
        client: Client | Literal[False] | None = None,
    ) -> None:
        """Annotate cells and write the result into ``adata``.

        Parameters
        ----------
        adata
            Cells to annotate; a view is turned into an actual AnnData, as scanpy does.
        obs_key, embedding_key, key_added
            Where to write, see below.
        strategy
            Name of a fitted strategy or baseline; the best strategy by default.
        precision
            Of an encoder, as for :func:`scdlkit.tl.embed`; the setting by default. In another one than fp32, cells whose
            label is a close call are computed again in fp32.
        client
            Of a dask cluster that shares the work, see :func:`scdlkit.tl.predict`.

        Returns
        -------
        None
            Sets the following fields, all of which survive ``write_h5ad`` and ``write_zarr``:

            ``adata.obs[obs_key]``
                Predicted label, categorical; "unassigned" for cells without any known gene.
            ``adata.obs[f"{obs_key}_code"]``, ``adata.obs[f"{obs_key}_confidence"]``
                Position in ``classes`` (-1: unassigned), and probability of the label (NaN: unassigned).
            ``adata.obs[f"{key_added}_split"]``
                train, val or test for the cells of the (first) fit, recognised by their content; else unlabelled.
            ``adata.obsm[embedding_key]``, ``adata.obsm[f"{key_added}_proba"]``
                L2-normalised embedding, and class probabilities in the order of ``classes``.
            ``adata.uns[key_added]``
                params, classes, strategies, folds, differences, leakage (with a ``group_key``), per_class and history;
                read them with :mod:`scdlkit.get`.
        """
        self._check_fitted("annotate")
        keys = ResultKeys(key_added, label=obs_key, embedding=embedding_key)
        check_target(adata, keys, inputs=(self.label_key_, self.config.group_key))
        result = self._annotate(adata, strategy, precision, client)
        write_annotation(adata, result, keys=keys, classes=self.classes_, uns=self._describe(keys, strategy))

    def save(self, path: str | os.PathLike[str], *, standalone: bool = False, strategy: str | None = None) -> Path:
        """Write the fitted model as a folder: ``manifest.json`` and ``model_state.pt``.

        Holds what was learnt, not the checkpoint, and nothing executable. The folder appears complete or not at all;
        an earlier model in it is replaced.

        Parameters
        ----------
        path
            The folder.
        standalone
            Write instead a checkpoint in the official layout that needs nothing else: the encoder with the adaptation
            merged in, and the annotation head as upstream names it, see :func:`scdlkit.foundation.export_checkpoint`.
        strategy
            The strategy of a standalone checkpoint; the best one by default. A model folder holds all of them.

        Raises
        ------
        RuntimeError
            Before ``fit_compare`` or ``load``.
        ValueError
            If the folder holds anything but an earlier model, or the strategy cannot stand alone.
        """
        self._check_fitted("save")
        if standalone:
            return export_checkpoint(
                self._find_fitted(strategy), self._reader.checkpoint, path, classes=list(self.classes_)
            )
        if strategy is not None:
            raise ValueError("strategy= is for standalone=True; a model folder holds all fitted strategies.")
        folder = write_runner(self, path)
        self._folder = folder.absolute()
        return folder

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        checkpoint: str | os.PathLike[str] | None = None,
        device: str | None = None,
        progress: bool | None = None,
    ) -> Self:
        """Read a model that :meth:`save` wrote; nothing in it is executed.

        Parameters
        ----------
        path
            The folder.
        checkpoint
            Where the base checkpoint is now, if it is not where it was; its sha256 must be the recorded one.
        device, progress
            As in the constructor.

        Raises
        ------
        FileNotFoundError
            If a file is missing.
        ValueError
            If the model is corrupt, edited, incomplete or of another format version, or the checkpoint is another.
        """
        runner = read_runner(cls, path, checkpoint=checkpoint, device=device, progress=progress)
        runner._folder = Path(path).absolute()
        return runner

    def _restore(
        self,
        config: RunnerConfig,
        checkpoint: str | os.PathLike[str],
        strategies: list[Strategy],
        device: str | None,
        progress: bool | None,
    ) -> None:
        """State of a runner that is not fitted yet."""
        self.config = config
        self.checkpoint = checkpoint
        self.device = device
        self.progress = progress
        self._strategies = strategies
        self._fitted: dict[str, Strategy] = {}
        self._known = KnownCells.none()
        self._folder = None

    def _use_checkpoint(self, reference: Checkpoint) -> CellReader:
        config = self.config
        self._reader = CellReader(
            reference,
            TokenizerConfig.from_args(
                reference.args(),
                max_length=config.max_length,
                seed=config.random_state,
                ties=config.ties,
                duplicates=config.duplicates,
            ),
            n_draws=config.n_draws,
            layer=config.layer,
            use_raw=config.use_raw,
            device=self.device,
            progress=self.progress,
        )
        return self._reader

    def _annotate(
        self,
        adata: AnnData,
        strategy: str | None,
        precision: str | None,
        client: Client | Literal[False] | None,
    ) -> dict[str, np.ndarray]:
        self._check_fitted("predict")
        name = self._find_fitted(strategy).name
        expression = self._reader.choose(adata)
        parts = predicted(self, expression, name, precision=precision, client=client)
        return annotate_parts(parts, expression.n_cells)

    def _predictor(self, strategy: str, *, precision: str | None = None, arrays: bool) -> Predictor:
        reader = self._reader if precision is None else self._reader.at(precision)
        return Predictor(self._find_fitted(strategy), reader, self.classes_, self._known, self.device, arrays=arrays)

    def _saved_in(self, folder: Path) -> Path:
        """Where this model is saved; ``folder`` if it was nowhere."""
        if self._folder is not None and self._folder.is_dir():
            return self._folder
        return write_runner(self, folder)

    def _describe(self, keys: ResultKeys, strategy: str | None) -> dict[str, Any]:
        """What stands in ``.uns`` beside the labels that a strategy gave."""
        return describe_result(
            keys,
            classes=self.classes_,
            params=self._params(strategy or self.best_strategy_, keys.key),
            tables={
                name: getattr(self, attribute)
                for name, attribute in TABLES.items()
                if name != "leakage" or len(self.leakage_)
            },
        )

    def _params(self, strategy: str, key_added: str) -> dict[str, Any]:
        """Plain values for ``.uns``; AnnData stores no None."""
        settings = {name: "" if value is None else value for name, value in asdict(self.config).items()}
        return {
            **settings,
            "label_key": self.label_key_,
            "checkpoint": self._reader.checkpoint.name,
            "checkpoint_sha256": self._reader.checkpoint.sha256,
            "strategy": strategy,
            "best_strategy": self.best_strategy_,
            "recommendation": self.recommendation_,
            "interrupted": self.interrupted_,
            "key_added": key_added,
            "matrix": self.report_.matrix,
            "values": self.report_.values,
            "version": version("scdlkit"),
        }

    def _find_fitted(self, name: str | None) -> Strategy:
        name = name or self.best_strategy_
        if name not in self._fitted:
            raise ValueError(f"strategy={name!r} is not fitted; fitted are {', '.join(self._fitted)}.")
        return self._fitted[name]

    def _check_fitted(self, action: str) -> None:
        if not self._fitted:
            raise RuntimeError(f"Nothing to {action} with: call fit_compare first, or AnnotationRunner.load.")
