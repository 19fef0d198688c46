"""Small fits inside a tiny encoder, for tests in this process and as scripts in others.

``python fits.py kill FOLDER SEED``: fits once undisturbed; then again and again with SIGKILL at random moments until one
comes to its end; writes ``kill.json``. ``torchrun fits.py launch FOLDER``: fits, predicts and embeds, and writes
``launch-<rank>.npz``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch

from scdlkit.foundation import _training_state
from scdlkit.foundation.inference import embed_tokens
from scdlkit.foundation.model import ScGPTConfig, ScGPTEncoder
from scdlkit.foundation.strategies import Adapter, AdapterConfig, CellData, TrainingConfig
from scdlkit.foundation.tokens import Tokens
from scdlkit.foundation.training import Trainer

N_GENES = 40
EPOCHS = 25


class Source:
    """A tiny random encoder, the same in every process."""

    cls_id, pad_id = N_GENES, N_GENES + 1

    def __init__(self, dropout: float) -> None:
        self.dropout = dropout

    def encoder(self, token_ids: np.ndarray | None = None) -> ScGPTEncoder:
        config = ScGPTConfig(N_GENES + 2, embsize=16, nheads=2, d_hid=16, nlayers=2, dropout=self.dropout)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            whole = ScGPTEncoder(config)
        if token_ids is None:
            return whole
        ids = np.union1d(token_ids, [self.cls_id, self.pad_id])
        part = ScGPTEncoder(config, ids)
        state = whole.state_dict()
        state["gene_embedding.weight"] = state["gene_embedding.weight"][torch.from_numpy(ids)]
        part.load_state_dict(state)
        return part

    def gene_rows(self, token_ids: np.ndarray) -> torch.Tensor:
        return self.encoder().gene_embedding.weight.detach()[torch.from_numpy(np.asarray(token_ids, dtype=np.int64))]


def attend_by_cell(q, k, v, query_starts, key_starts, most_queries, most_keys):
    """Attention of one cell after another, for CPUs, which lack the kernel for packed cells."""
    assert query_starts.dtype == key_starts.dtype == torch.int32
    assert most_queries >= query_starts.diff().max() and most_keys >= key_starts.diff().max()
    parts = []
    for i in range(len(key_starts) - 1):
        queries, keys = slice(*query_starts[i : i + 2].tolist()), slice(*key_starts[i : i + 2].tolist())
        heads = (part.transpose(0, 1)[None] for part in (q[queries], k[keys], v[keys]))
        parts.append(torch.nn.functional.scaled_dot_product_attention(*heads)[0].transpose(0, 1))
    return torch.cat(parts)


def cells(n: int, source: Source, seed: int = 0) -> CellData:
    """Cells of 3 classes of different length, each class with genes of its own."""
    rng = np.random.default_rng(seed)
    codes = rng.permutation(np.arange(n) % 3)
    lengths = rng.integers(10, 30, n)
    odds = np.where(np.arange(N_GENES) % 3 == np.arange(3)[:, None], 6.0, 1.0)
    odds /= odds.sum(1, keepdims=True)
    drawn = [
        rng.choice(N_GENES, length, replace=False, p=odds[code]) for length, code in zip(lengths, codes, strict=True)
    ]
    genes = np.concatenate([np.sort(part) for part in drawn])
    bins = rng.integers(1, 51, len(genes))
    tokens = Tokens(
        np.append(0, np.cumsum(lengths)),
        genes.astype(np.int32),
        bins.astype(np.uint8),
        np.arange(n, dtype=np.uint64),
        lengths.astype(np.int32),
    )
    return CellData(embedding=embedding_of(tokens, source), tokens=tokens, codes=codes)


def embedding_of(tokens: Tokens, source: Source) -> np.ndarray:
    encoder = source.encoder()
    return embed_tokens(encoder, tokens, cls_id=source.cls_id, pad_id=source.pad_id, device="cpu", progress=False)


def build(source: Source, **training) -> Adapter:
    settings = {"learning_rate": 0.01, "batch_size": 16, "max_epochs": 10, **training}
    strategy = Adapter(AdapterConfig(bottleneck=4, training=TrainingConfig(**settings)))
    strategy.source = source
    return strategy


def fit(train: CellData, val: CellData, source: Source, trainer: Trainer | None = None, **training) -> Adapter:
    strategy = build(source, **training)
    strategy.fit(train, val, n_classes=3, seed=1, device="cpu", trainer=trainer or Trainer(progress=False))
    return strategy


def kill(folder: Path, seed: int) -> None:
    torch.set_num_threads(1)
    source = Source(dropout=0.2)
    train, val = cells(150, source), cells(60, source, seed=1)

    def one(name: str, *, resume: bool) -> int:
        """A fit in a process of its own."""
        process = os.fork()
        if process == 0:
            trainer = Trainer(progress=False, state_dir=folder / name, resume=resume)
            strategy = fit(train, val, source, trainer, max_epochs=EPOCHS, patience=EPOCHS)
            torch.save(strategy.state_dict(), folder / f"{name}.pt")
            (folder / f"{name}.json").write_text(json.dumps(strategy.history))
            os._exit(0)
        return process

    def kills(duration: float) -> list[int]:
        """Begun again after each kill, until one comes to its end; epochs that were finished then."""
        epochs: list[int] = []
        state = folder / "killed" / "adapter.training.pt"
        while True:
            process = one("killed", resume=True)
            if len(epochs) < 4:
                time.sleep(rng.uniform(0.1, 0.4) * duration)
                os.kill(process, signal.SIGKILL)
            if os.waitpid(process, 0)[1] == 0:
                return epochs
            known = json.loads(torch.load(state, weights_only=True)["progress"])["progress"] if state.exists() else {}
            epochs.append(known.get("epoch", 0))

    Trainer().warm_up()
    rng = np.random.default_rng(seed)
    for _ in range(3):  # a machine that paused while the duration was measured gets another chance
        started = time.perf_counter()
        os.waitpid(one("whole", resume=False), 0)
        epochs = kills(time.perf_counter() - started)
        if len(epochs) >= 3 and epochs[-1] > 0:
            break
        shutil.rmtree(folder / "killed", ignore_errors=True)
    (folder / "kill.json").write_text(json.dumps(epochs))


def launch(folder: Path) -> None:
    rank = os.environ["RANK"]
    source = Source(dropout=0.0)
    train, val = cells(65, source), cells(31, source, seed=1)  # 65 = 4 x 16 + 1: the last batch has one cell
    write = _training_state.StateFile.write

    def logged(self, saved) -> None:
        write(self, saved)
        (folder / f"wrote-{rank}").touch()

    _training_state.StateFile.write = logged
    strategy = fit(train, val, source, Trainer(progress=True, state_dir=folder / "state"))
    again = fit(train, val, source, Trainer(progress=False, state_dir=folder / "state", resume=True))
    np.savez(
        folder / f"launch-{rank}.npz",
        proba=strategy.predict_proba(val),
        again=again.predict_proba(val),
        latent=strategy.latent(val),
        embedding=embedding_of(val.tokens, source),
        history=[[row["train_loss"], row["val_loss"], row["val_macro_f1"]] for row in strategy.history],
    )


if __name__ == "__main__":
    if sys.argv[1] == "kill":
        kill(Path(sys.argv[2]), int(sys.argv[3]))
    else:
        launch(Path(sys.argv[2]))
