"""What frozen lower blocks make of the tokens of cells, computed once and kept in a file: no epoch computes it again.

A strategy that trains the last blocks alone starts every step from these. A token takes two bytes for each number of
the embedding's width (float16), 1 kB for whole-human, which for many cells is more than memory holds.
"""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch

from scdlkit._settings import logger

from . import disk_cache
from ._overlap import host_tensor
from ._processes import processes
from .batching import StateBatch, packed_cells
from .inference import lower_states
from .row_file import RowFile
from .stored_tokens import AnyTokens

if TYPE_CHECKING:
    from .model import ScGPTEncoder
    from .strategies._base import EncoderSource

_TYPE = np.float16
_SHARE_OF_DISK = 0.5  # of what is free, beyond which nothing is kept


class LowerStates:
    """States of all cells of a comparison after some of the lowest blocks, computed when they are first asked for.

    Parameters
    ----------
    tokens
        Of all cells.
    source
        Of the pretrained encoder.
    device
        Where to compute.
    place
        Folder for the files, which have no name and are gone with this object.
    checkpoint_sha256
        Of the pretrained encoder: with it, and while ``settings.cache_embeddings`` leaves room, the states are found
        again by the next comparison on the same cells.

    Example
    -------
    >>> rows = LowerStates(tokens, source, torch.device("cpu"), Path("/scratch")).rows
    >>> batch = rows[np.array([5, 2])].after(10)  # float16 [2, L, embsize] and mask; the first call computes all cells
    """

    def __init__(
        self,
        tokens: AnyTokens,
        source: EncoderSource,
        device: torch.device,
        place: Path,
        *,
        checkpoint_sha256: str | None = None,
    ) -> None:
        self._tokens, self._source, self._device, self._place = tokens, source, device, place
        self._checkpoint_sha256 = checkpoint_sha256
        self._kept: dict[int, RowFile | None] = {}
        self._lock = threading.Lock()
        self.lengths = tokens.lengths.astype(np.int64) + 1
        self.starts = np.cumsum(self.lengths) - self.lengths

    @property
    def rows(self) -> StateRows:
        """All cells."""
        return StateRows(self, np.arange(self._tokens.n_cells))

    def after(self, n_blocks: int) -> RowFile | None:
        """File of the states after so many blocks, cell by cell, ``<cls>`` first; None where they are not kept."""
        with self._lock:
            if n_blocks not in self._kept:
                self._kept[n_blocks] = self._found(n_blocks)
            return self._kept[n_blocks]

    def _found(self, n_blocks: int) -> RowFile | None:
        if processes(self._device)[1] > 1:
            logger.debug("Several processes share the work: the states of frozen blocks are not kept.")
            return None
        source = self._source
        encoder = source.encoder(np.union1d(self._tokens.genes(), [source.cls_id, source.pad_id]))
        n_bytes = 2 * encoder.config.embsize * int(self.lengths.sum())
        path = self._cache_path(n_blocks) if n_bytes <= disk_cache.limit() else None
        found = None if path is None else disk_cache.find(path)
        if found is not None:
            logger.info("What %d frozen blocks make of these cells is taken from %s.", n_blocks, path)
            return self._file(encoder, found)
        try:
            self._place.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self._place).free
            if n_bytes > _SHARE_OF_DISK * free:
                logger.info(
                    "What %d frozen blocks make of these cells takes %.1f GB, and %s has %.1f GB left: every epoch computes "
                    "it again. scdlkit.settings.temp_dir may name another place.",
                    n_blocks, n_bytes / 1e9, self._place, free / 1e9,
                )  # fmt: skip
                return None
            file = self._file(encoder)
            if not self._compute(encoder, n_blocks, file):
                return None
        except OSError as error:
            logger.warning("Every epoch computes what %d frozen blocks make of these cells: %s", n_blocks, error)
            return None
        if path is not None:
            disk_cache.keep(file.file, path)
        return file

    def _compute(self, encoder: ScGPTEncoder, n_blocks: int, file: RowFile) -> bool:
        """Fill the file; False if float16 cannot hold the states."""
        ids = {"cls_id": self._source.cls_id, "pad_id": self._source.pad_id}
        for cells, states in lower_states(encoder, self._tokens, n_blocks, **ids, device=self._device):
            if np.abs(states).max() > np.finfo(_TYPE).max:
                logger.warning("States of %d frozen blocks are beyond float16: every epoch computes them.", n_blocks)
                return False
            file.write(states.astype(_TYPE), self.starts[cells], self.lengths[cells])
        logger.info(
            "What %d frozen blocks make of %d cells is kept in a file in %s (%.0f MB) until the fits are done.",
            n_blocks, len(self.lengths), self._place, file.n_bytes / 1e6,
        )  # fmt: skip
        return True

    def _file(self, encoder: ScGPTEncoder, file: BinaryIO | None = None) -> RowFile:
        width = encoder.config.embsize
        needs = f"{2 * width:,} bytes a gene of each cell"
        return RowFile(self._place, _TYPE, width, content="states", needs=needs, file=file)

    def _cache_path(self, n_blocks: int) -> Path | None:
        if self._checkpoint_sha256 is None:
            return None
        what = [self._checkpoint_sha256, str(n_blocks), self._device.type, torch.__version__]
        return disk_cache.cache_path("states", [*what, self._tokens.fingerprint()])


class StateRows:
    """Some cells of :class:`LowerStates`; reads nothing until :meth:`after` is called."""

    def __init__(self, states: LowerStates, cells: np.ndarray) -> None:
        self._states, self._cells = states, cells
        self._read: dict[int, list[torch.Tensor]] = {}

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return len(self._cells)

    def __getitem__(self, index: Any) -> StateRows:
        """The cells at ``index``, in that order."""
        positions = np.atleast_1d(np.arange(self.n_cells)[index])
        part = StateRows(self._states, self._cells[positions])
        part._read = {n_blocks: [parts[i] for i in positions] for n_blocks, parts in self._read.items()}
        return part

    def load(self, n_blocks: int) -> StateRows:
        """The same cells, for which no file is read again."""
        loaded = StateRows(self._states, self._cells)
        loaded._read[n_blocks] = self._parts(n_blocks)
        return loaded

    def kept(self, n_blocks: int) -> bool:
        """Whether the states after so many blocks are there; the first call computes them for all cells."""
        return self._states.after(n_blocks) is not None

    def after(self, n_blocks: int, *, multiple: int = 1) -> tuple[torch.Tensor, torch.Tensor | None]:
        """States as a batch; what is padded is as long as a ``multiple``.

        Returns
        -------
        Tensor
            float16 ``[n, L, embsize]``, ``<cls>`` first, zero at padding.
        Tensor or None
            bool ``[n, L]``, True at padding; None where nothing is padded.

        Raises
        ------
        RuntimeError
            If they are not kept.
        """
        parts = self._parts(n_blocks)
        lengths = self._lengths
        padded = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
        if (lengths == lengths.max()).all():
            return padded, None
        padded = torch.nn.functional.pad(padded, (0, 0, 0, -padded.shape[1] % multiple))
        return padded, torch.arange(padded.shape[1]) >= torch.from_numpy(lengths)[:, None]

    def packed(self, n_blocks: int, *, usual: int, device: torch.device) -> StateBatch:
        """The same without padding, in pinned memory if they are for a CUDA ``device``.

        ``usual`` is how many tokens the cells of many batches have.
        """
        parts = self._parts(n_blocks)
        starts = np.concatenate([[0], np.cumsum(self._lengths)])
        states = host_tensor((int(starts[-1]), parts[0].shape[1]), parts[0].dtype, device)
        return StateBatch(torch.cat(parts, out=states), packed_cells(starts, usual=usual, device=device))

    @property
    def _lengths(self) -> np.ndarray:
        return self._states.lengths[self._cells]

    def _parts(self, n_blocks: int) -> list[torch.Tensor]:
        """``[tokens, embsize]`` of each cell."""
        if n_blocks in self._read:
            return self._read[n_blocks]
        file = self._states.after(n_blocks)
        if file is None:
            raise RuntimeError(f"The states after {n_blocks} blocks are not kept; ask kept() first.")
        order = np.argsort(self._cells, kind="stable")  # the file is read forwards
        lengths = self._lengths[order]
        read = torch.from_numpy(file.read(self._states.starts[self._cells[order]], lengths))
        parts: list[torch.Tensor] = [read] * len(order)
        for position, part in zip(order.tolist(), read.split(lengths.tolist()), strict=True):
            parts[position] = part
        return parts
