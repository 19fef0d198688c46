"""What a strategy saves stays small, also for an encoder as large as whole-human."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch

from scdlkit import AnnotationRunner
from scdlkit.foundation import TrainingConfig, ensure_checkpoint, save_checkpoint
from scdlkit.foundation.bundle import read_bundle
from scdlkit.foundation.model import ScGPTConfig, ScGPTEncoder
from scdlkit.foundation.strategies import AdapterConfig, CellData, Head, get_strategy
from scdlkit.foundation.tokens import Tokens

MB = 1024**2
WHOLE_HUMAN = {"embsize": 512, "nheads": 8, "d_hid": 512, "nlayers": 12}
N_CLASSES = 20


class Source:
    """Random weights in the shape of whole-human."""

    cls_id, pad_id = 60_694, 60_695

    def encoder(self, token_ids: np.ndarray) -> ScGPTEncoder:
        config = ScGPTConfig(n_tokens=60_697, **WHOLE_HUMAN)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return ScGPTEncoder(config, np.union1d(token_ids, [self.cls_id, self.pad_id]))


@pytest.fixture(scope="module")
def cells() -> CellData:
    n = 2 * N_CLASSES
    tokens = Tokens(
        np.arange(n + 1),
        np.arange(n, dtype=np.int32),
        np.ones(n, np.uint8),
        np.arange(n, dtype=np.uint64),
        np.ones(n, np.int32),
    )
    embedding = np.random.default_rng(0).normal(size=(n, 512)).astype(np.float32)
    return CellData(embedding=embedding, tokens=tokens, codes=np.arange(n) % N_CLASSES)


@pytest.mark.parametrize("name", ["lora", "adapter", "prefix_tuning", "ia3", "bitfit", "head"])
def test_deltas_of_whole_human_are_under_6_mb(name, cells):
    strategy = get_strategy(name)()
    strategy.source, strategy._rows = Source(), np.arange(cells.n_cells)
    strategy.build(cells, n_classes=N_CLASSES, seed=0)
    strategy.n_classes = N_CLASSES  # counts as fitted; training changes no size
    file = io.BytesIO()
    torch.save(strategy.state_dict(), file)
    # at least the two hidden layers of the head, so that the bound is not kept by saving nothing
    assert 2 * 4 * 512 * 512 < len(file.getvalue()) < 6 * MB
    if not isinstance(strategy, Head):
        assert any(key.startswith("encoder.") for key in strategy.state_dict())


def test_a_saved_model_is_under_6_mb(blood, checkpoint, tmp_path):
    """The largest of them, as a folder on disk, with all that belongs to it."""
    small = ensure_checkpoint(checkpoint)
    args = {**small.args(), **WHOLE_HUMAN, "n_layers_cls": 3}
    vocab = json.loads(small.vocab_path.read_text())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = ScGPTEncoder(ScGPTConfig.from_args(args, n_tokens=max(vocab.values()) + 1))
    folder = save_checkpoint(tmp_path / "shape", encoder.state_dict(), args=args, vocab=vocab)
    blood.obs["cell_type"] = np.char.add("type ", (np.arange(240) % N_CLASSES).astype(str))
    runner = AnnotationRunner(
        checkpoint=folder,
        strategies=("adapter",),
        baselines=(),
        strategy_configs={"adapter": AdapterConfig(training=TrainingConfig(max_epochs=1))},
        max_length=5,
    )
    runner.fit_compare(blood)
    path = runner.save(tmp_path / "model")
    manifest, tensors = read_bundle(path)
    assert len(manifest["classes"]) == N_CLASSES and any(".up." in name for name in tensors)
    assert sum(file.stat().st_size for file in path.iterdir()) < 6 * MB
