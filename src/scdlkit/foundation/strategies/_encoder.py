"""Strategies that train inside the encoder: what they share, so that each needs to say only what it adds.

A subclass writes :meth:`EncoderStrategy.adapt`, which receives the pretrained encoder with all parameters frozen, puts
its modules in and thaws what shall train. Everything else follows: the delta that is saved is whatever the encoder
then holds beyond the checkpoint, and whatever trains of the checkpoint itself.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from scdlkit._settings import logger
from scdlkit.foundation._device import embedding_precision
from scdlkit.foundation._overlap import on_host, prepared
from scdlkit.foundation._packed import can_attend
from scdlkit.foundation._processes import processes, put_together
from scdlkit.foundation._random import seeded
from scdlkit.foundation.batching import (
    MAX_BATCH_TOKENS,
    AnyBatch,
    Batch,
    PackedBatch,
    StateBatch,
    collate,
    collate_packed,
    length_batches,
)
from scdlkit.foundation.frozen import can_freeze
from scdlkit.foundation.inference import embed_tokens
from scdlkit.foundation.model import AnnotationHead, Block, ScGPTEncoder

from ._adapted import AdaptedEncoder, merged
from ._base import EncoderSource, GradientStrategy, check_tensors
from ._cells import CellData

if TYPE_CHECKING:
    from scdlkit.foundation.lower_states import StateRows
    from scdlkit.foundation.stored_tokens import AnyTokens

_CLASSIFY_CELLS = 8192  # at a time
_STRETCH = 50  # batches that are sorted by length together
_PLANNED_LENGTHS = 64  # of which padded ones are multiples: attention on a GPU makes a plan for each
PEFT_BASE = ".base_layer"  # peft moves a layer's own weights here when it wraps it


class EncoderStrategy(GradientStrategy):
    """Base class of strategies that change the encoder.

    ``config`` has ``training`` (a :class:`TrainingConfig`) and ``head_layers``. Before ``fit`` or ``load_state``,
    ``source`` must be set.
    """

    needs = frozenset({"tokens"})
    needs_to_fit = frozenset({"tokens", "embedding"})
    frozen = False
    _int8_refused = False
    _usual = 0  # genes of the longest training cells

    @abstractmethod
    def adapt(self, encoder: ScGPTEncoder) -> None:
        """Put in what this strategy adds and thaw what it trains; all parameters are frozen before.

        PyTorch's global generator is seeded around the call.
        """

    def prepare_loading(self) -> None:
        """Change a freshly built module to what is saved, where the two differ."""

    def fit(self, train: CellData, val: CellData, **options: Any) -> None:
        """Build, then train; see :meth:`Strategy.fit`."""
        # rows for the validation cells too: the optimizer must not lose a gene embedding that grows later
        self._rows = np.union1d(_tokens(train).genes(), _tokens(val).genes())
        super().fit(train, val, **options)

    def build(self, train: CellData, *, n_classes: int, seed: int) -> None:
        """A fresh encoder with this strategy's changes, and a fresh head."""
        embedding = np.asarray(train.embedding, dtype=np.float64)
        if not np.isfinite(embedding).all():
            raise ValueError("embedding has NaN or infinite values; check the checkpoint's weights.")
        mean, scale = embedding.mean(axis=0), embedding.std(axis=0)
        scale[scale < 1e-8] = 1.0
        self._usual = int(_tokens(train).lengths.max(initial=0))
        self._assemble(self._rows, embedding.shape[1], n_classes, seed)
        module = self.trained_module()
        with torch.no_grad():
            module.mean.copy_(torch.from_numpy(mean))  # type: ignore[operator]
            module.scale.copy_(torch.from_numpy(scale))  # type: ignore[operator]
        self._states(train)  # computes them now, not within the first step

    def logits(self, cells: CellData) -> Tensor:
        """Logits ``[n, n_classes]``."""
        return self.trained_module()(self.inputs(cells).to(self._device))

    def inputs(self, cells: CellData) -> AnyBatch:
        """Tokens of the cells, or what the frozen blocks made of them, on the host."""
        states, device = self._states(cells), self._device
        if states is None:
            return self._batch(cells)
        if self._packs(device):
            return states.packed(self._adapted.n_frozen, usual=self._usual + 1, device=device)
        return StateBatch(*states.after(self._adapted.n_frozen, multiple=self._lengths_are_multiples_of(device)))

    def batches(self, cells: CellData, batch_size: int, generator: torch.Generator) -> list[np.ndarray]:
        """Random batches of cells of about the same length: shuffle, sort within stretches, shuffle the batches."""
        order = torch.randperm(cells.n_cells, generator=generator).numpy()
        lengths = _tokens(cells).lengths
        found = []
        for start in range(0, len(order), batch_size * _STRETCH):
            stretch = order[start : start + batch_size * _STRETCH]
            stretch = stretch[np.argsort(lengths[stretch], kind="stable")]
            found += [stretch[i : i + batch_size] for i in range(0, len(stretch), batch_size)]
        return [found[i] for i in torch.randperm(len(found), generator=generator).tolist()]

    def read(self, cells: CellData, rows: np.ndarray) -> CellData:
        """Some cells, their tokens in memory, or what the frozen blocks made of them where that is kept."""
        part = cells.subset(rows)
        states = self._states(part)
        if states is None:
            return replace(part, tokens=_tokens(part).load())
        return replace(part, states=states.load(self._adapted.n_frozen))

    def token_lengths(self, cells: CellData) -> np.ndarray:
        """Tokens of each cell, ``<cls>`` included."""
        return _tokens(cells).lengths + 1

    def bytes_per_token(self) -> float:
        """About what the blocks keep for the way back, per token, in float32."""
        config = self.encoder.config
        kept = 10 * config.embsize + 3 * config.d_hid
        return 4.0 * kept * (2 if self.training.gradient_checkpointing else config.nlayers - self._adapted.n_frozen)

    def predict_proba(self, cells: CellData) -> np.ndarray:
        """Class probabilities, float32 ``[n, n_classes]``, from the tokens: states that are kept are rounded."""
        return self.outputs(cells)[0]

    def outputs(self, cells: CellData) -> tuple[np.ndarray, np.ndarray]:
        """Class probabilities and embedding, for which the encoder runs once."""
        self._check_fitted()
        latent = self.latent(cells)
        module, device = self._adapted.eval(), self._device
        probabilities = np.empty((cells.n_cells, self.n_classes), dtype=np.float32)
        with torch.inference_mode():
            for start in range(0, cells.n_cells, _CLASSIFY_CELLS):
                part = slice(start, start + _CLASSIFY_CELLS)
                logits = module.classify(torch.from_numpy(latent[part]).to(device))
                probabilities[part] = logits.softmax(-1).cpu().numpy()
        return probabilities, latent

    def probabilities(self, cells: CellData, n_classes: int) -> np.ndarray:
        """Class probabilities of the module as it is, in eval mode and without gradients."""
        return self._run(cells, lambda part: self.logits(part).float().softmax(-1), n_classes)

    def latent(self, cells: CellData) -> np.ndarray:
        """Adapted embedding float32 ``[n, embsize]``, the output at ``<cls>``, not normalised."""
        self._check_cells(cells)
        tokens, source, device = _tokens(cells), self._require_source(), self._device
        self.cover(tokens.genes())
        how = embedding_precision(self.precision, device)
        plain = merged(self.encoder)
        if plain is not None and (device.type != "cpu" or can_freeze(plain)):
            ids = {"cls_id": source.cls_id, "pad_id": source.pad_id}
            return embed_tokens(plain, tokens, **ids, device=device, precision=how, progress=False)
        if how == "int8":  # which is for plain encoders
            how = "bf16"
            if not self._int8_refused:
                self._int8_refused = True
                logger.warning("Strategy %r cannot be folded into int8 layers; its encoder runs in bf16.", self.name)
        dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[how]

        def embed(part: CellData) -> Tensor:
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                return self._adapted.embed(self._batch(part).to(device)).float()

        return self._run(replace(cells, states=None), embed, self.encoder.config.embsize)

    @property
    def encoder(self) -> ScGPTEncoder:
        """The adapted encoder."""
        return self._adapted.encoder

    @property
    def _adapted(self) -> AdaptedEncoder:
        module: Any = self.trained_module()
        return getattr(module, "module", module)  # wrapped where several processes train it

    @property
    def _device(self) -> torch.device:
        return next(self.trained_module().parameters()).device

    def state_dict(self) -> dict[str, Tensor]:
        """The delta: what was added to the encoder, what trained of it, the head, and its standardisation."""
        self._check_fitted()
        module = self.trained_module()
        return {
            name: value.detach().cpu().clone() for name, value in module.state_dict().items() if self._is_delta(name)
        }

    def metadata(self) -> dict[str, Any]:
        """Also ``embsize``, the width of the embedding."""
        return {**super().metadata(), "embsize": self.encoder.config.embsize}

    def load_state(self, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
        """See :meth:`Strategy.load_state`."""
        self._load_metadata(metadata, "embsize")
        self._assemble(np.empty(0, np.int64), int(metadata["embsize"]), self.n_classes, seed=0)
        self.prepare_loading()
        module = self.trained_module()
        expected = {name: value for name, value in module.state_dict().items() if self._is_delta(name)}
        check_tensors(self.name, state, {name: tuple(value.shape) for name, value in expected.items()})
        module.load_state_dict(dict(state), strict=False)
        module.eval()

    # ---- internals ----

    def _batch(self, cells: CellData) -> Batch | PackedBatch:
        tokens, source = _tokens(cells).load(), self._require_source()
        self.cover(tokens.gene_ids)
        pad_value, device = self.encoder.config.pad_value, self._device
        if self._packs(device):
            return collate_packed(tokens, cls_id=source.cls_id, pad_value=pad_value, usual=self._usual, device=device)
        return collate(
            tokens,
            cls_id=source.cls_id,
            pad_id=source.pad_id,
            pad_value=pad_value,
            multiple=self._lengths_are_multiples_of(device),
            device=device,
        )

    @staticmethod
    def _lengths_are_multiples_of(device: torch.device) -> int:
        """Of which number padded batches have to be as long."""
        return _PLANNED_LENGTHS if device.type == "cuda" and torch.is_autocast_enabled("cuda") else 1

    def _packs(self, device: torch.device) -> bool:
        """Whether batches need no padding, for which attention makes no plan for each of their shapes on a GPU."""
        config = self.encoder.config
        if not torch.is_autocast_enabled(device.type) or not can_attend(device, config.embsize // config.nheads):
            return False
        plain = all(block.prefix is None and block.compiled is None for block in self.encoder.blocks)
        return plain and not (self.training.attention_dropout and self._adapted.training)

    def _states(self, cells: CellData) -> StateRows | None:
        """What the frozen blocks make of these cells, where it can be kept; the first call computes it for all cells."""
        n_frozen, states = self._adapted.n_frozen, cells.states
        return states if states is not None and n_frozen and states.kept(n_frozen) else None

    def _run(self, cells: CellData, function: Callable[[CellData], Tensor], width: int) -> np.ndarray:
        """``function`` over batches under a token budget, float32 ``[n, width]`` in the order of the cells.

        Where several processes were launched together, all must call this: each takes a share, all get the whole.
        """
        self.trained_module().eval()
        result = np.zeros((cells.n_cells, width), dtype=np.float32)
        device = self._device
        cells = cells.only({"tokens"})
        rank, count = processes(device)
        self.cover(_tokens(cells).genes())
        with torch.inference_mode():
            batches = length_batches(_tokens(cells).lengths, max_tokens=MAX_BATCH_TOKENS[device.type])
            with prepared(((rows, self.read(cells, rows)) for rows in batches[rank::count]), device) as ready:
                for rows, values in on_host((rows, function(part)) for rows, part in ready):
                    result[rows] = values
        return put_together(result, device)

    def _assemble(self, token_ids: np.ndarray, embsize: int, n_classes: int, seed: int) -> None:
        encoder = self._require_source().encoder(token_ids)
        if encoder.config.embsize != embsize:
            raise ValueError(
                f"Strategy {self.name!r} expects embsize {embsize}, the checkpoint has {encoder.config.embsize}."
            )
        base = set(encoder.state_dict())
        encoder.requires_grad_(False)
        with seeded(seed, 1):
            self.adapt(encoder)
        with seeded(seed, 2):
            head = AnnotationHead(embsize, n_classes, self.config.head_layers)
        encoder.gradient_checkpointing = self.training.gradient_checkpointing
        if not self.training.attention_dropout:
            for module in encoder.modules():
                if isinstance(module, Block):
                    module.attention_dropout = 0.0
        self.module = AdaptedEncoder(encoder, head, torch.zeros(embsize), torch.ones(embsize))
        trained = {name for name, value in encoder.named_parameters() if value.requires_grad}
        self._frozen = {
            f"encoder.{name}"
            for name in encoder.state_dict()
            if name.replace(PEFT_BASE, "") in base and name not in trained
        }

    def _is_delta(self, name: str) -> bool:
        return name not in self._frozen

    def cover(self, gene_ids: np.ndarray) -> None:
        """Rows of the gene embedding for tokens of a query that the training cells did not have."""
        source, encoder = self._require_source(), self.encoder
        held = np.zeros(encoder.config.n_tokens, dtype=bool)
        held[encoder.token_ids] = True
        missing = np.unique(gene_ids[~held[gene_ids]])  # sorting all of them would take longer than a step on a GPU
        if len(missing):
            encoder.add_tokens(missing, source.gene_rows(missing))

    def _require_source(self) -> EncoderSource:
        if self.source is None:
            raise RuntimeError(f"Strategy {self.name!r} changes the encoder: set its source before fit or load_state.")
        return self.source


def _tokens(cells: CellData) -> AnyTokens:
    if cells.tokens is None:
        raise ValueError("The strategy needs tokens of the cells, which were not given.")
    return cells.tokens


def block_numbers(layers: str | None, n_blocks: int) -> list[int]:
    """Blocks that ``layers`` names: all for None, the last k for ``"last:k"``.

    Raises
    ------
    ValueError
        If there are fewer blocks than asked for.
    """
    if layers is None:
        return list(range(n_blocks))
    wanted = int(layers.removeprefix("last:"))
    if wanted > n_blocks:
        raise ValueError(f"layers={layers!r}, but the encoder has {n_blocks} blocks.")
    return list(range(n_blocks - wanted, n_blocks))
