"""The embedded checkpoint: small, in the official layout, and better than an encoder that was never trained."""

from __future__ import annotations

import numpy as np
import pytest
import scanpy as sc
import torch
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier

from scdlkit.foundation.checkpoints import ensure_checkpoint
from scdlkit.foundation.inference import embed_tokens, normalise
from scdlkit.foundation.model import ScGPTEncoder
from scdlkit.foundation.tokens import tokenize
from scdlkit.foundation.vocabulary import Vocabulary
from scdlkit.foundation.weights import load_encoder, read_weights, to_engine


@pytest.fixture(scope="module")
def mini():
    return ensure_checkpoint("mini")


def test_size_layout_and_precision(mini):
    files = sorted(path for path in mini.folder.iterdir() if not path.name.startswith("__"))
    assert [path.name for path in files] == ["args.json", "best_model.pt", "vocab.json"]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    state = read_weights(mini.weights_path)
    assert all(tensor.dtype == torch.float16 for tensor in state.values())
    encoder = load_encoder(mini)
    ours, heads = to_engine(state, encoder.config)
    assert {name.split(".")[0] for name in heads} >= {"decoder", "mvc_decoder"}  # what it was pretrained with
    for name, tensor in encoder.state_dict().items():  # half precision is cast without loss
        assert torch.equal(tensor, ours[name].float())


def test_better_than_random_weights(mini):
    """kNN on the zero-shot embedding of 700 blood cells that were not in the pretraining."""
    cells = sc.datasets.pbmc68k_reduced()
    vocabulary = Vocabulary.from_json(mini.vocab_path)
    match = vocabulary.match({"var_names": cells.raw.var_names})
    assert match.n_matched > 0.95 * match.n_genes
    tokens = tokenize(cells.raw.X, match.token_ids)
    labels = cells.obs["bulk_labels"].astype(str)
    scores = {}
    trained = load_encoder(mini)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        untrained = ScGPTEncoder(trained.config)
    for name, encoder in (("mini", trained), ("random", untrained)):
        embedding = embed_tokens(
            encoder, tokens, cls_id=vocabulary.cls_id, pad_id=vocabulary.pad_id, device="cpu", progress=False
        )
        scores[name] = cross_val_score(KNeighborsClassifier(15), normalise(embedding), labels, cv=3).mean()
    assert np.isfinite(list(scores.values())).all()
    assert scores["mini"] > scores["random"] + 0.15, scores
