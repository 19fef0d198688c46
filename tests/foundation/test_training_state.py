"""Training that was interrupted goes on exactly."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from scdlkit.foundation._training_state import file_stem
from scdlkit.foundation.strategies import CellData, Head, HeadConfig, TrainingConfig
from scdlkit.foundation.training import Trainer


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kill")
    seed = np.random.SeedSequence().entropy % 2**32  # other moments in every run of the tests
    script = Path(__file__).with_name("fits.py")
    result = subprocess.run(
        [sys.executable, str(script), "kill", str(folder), str(seed)], capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="kills forked processes")
def test_killed_at_random_moments_and_resumed_is_the_same(killed):
    epochs = json.loads((killed / "kill.json").read_text())
    assert len(epochs) >= 3 and epochs[-1] > 0
    assert json.loads((killed / "whole.json").read_text()) == json.loads((killed / "killed.json").read_text())
    whole, again = (torch.load(killed / f"{name}.pt", weights_only=True) for name in ("whole", "killed"))
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    assert [path.name for path in (killed / "killed").iterdir() if not path.name.startswith(".")] == [
        "adapter.training.pt"
    ]


class Interrupting(Trainer):
    """Ctrl-C in the middle of an epoch."""

    def __init__(self, epoch: int, **settings) -> None:
        super().__init__(progress=False, **settings)
        self.epoch = epoch

    def train(self, strategy, *args, **settings):
        logits = strategy.logits

        def interrupted(cells):
            if len(strategy.history) == self.epoch - 1 and strategy.trained_module().training:
                raise KeyboardInterrupt
            return logits(cells)

        strategy.logits = interrupted
        try:
            return super().train(strategy, *args, **settings)
        finally:
            strategy.logits = logits


@pytest.fixture(scope="module")
def data(fits):
    source = fits.Source(dropout=0.1)
    return fits.cells(64, source), fits.cells(32, source, seed=1), source


def test_interrupted_leaves_the_best_so_far_and_resumes(fits, data, tmp_path):
    train, val, source = data
    whole = fits.fit(*data, max_epochs=6)
    strategy = fits.build(source, max_epochs=6)
    with pytest.raises(KeyboardInterrupt):
        strategy.fit(train, val, n_classes=3, seed=1, device="cpu", trainer=Interrupting(4, state_dir=tmp_path))
    assert strategy.history == whole.history[:3]
    probabilities = strategy.predict_proba(val)
    best = max(strategy.history, key=lambda row: (row["val_macro_f1"], -row["val_loss"]))
    assert -np.log(probabilities[np.arange(32), val.codes]).mean() == pytest.approx(best["val_loss"], rel=1e-5)
    resumed = fits.fit(*data, Trainer(progress=False, state_dir=tmp_path, resume=True), max_epochs=6)
    assert resumed.history == whole.history
    np.testing.assert_array_equal(resumed.predict_proba(val), whole.predict_proba(val))


def test_what_began_without_scaled_gradients_may_go_on_with_them(fits, data, tmp_path, monkeypatch):
    """Begun on a GPU in bfloat16, resumed on an older one in float16."""
    train, val, source = data
    strategy = fits.build(source, max_epochs=4)
    with pytest.raises(KeyboardInterrupt):
        strategy.fit(train, val, n_classes=3, seed=1, device="cpu", trainer=Interrupting(3, state_dir=tmp_path))
    scaled = []
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda device, enabled: scaled.append(scaler(device, enabled=True)) or scaled[-1]
    )
    resumed = fits.fit(*data, Trainer(progress=False, state_dir=tmp_path, resume=True), max_epochs=4)
    assert scaled[-1].is_enabled() and resumed.history[:2] == strategy.history and len(resumed.history) == 4


def test_interrupted_in_the_first_epoch_is_not_fitted(fits, data):
    train, val, source = data
    strategy = fits.build(source)
    with pytest.raises(KeyboardInterrupt):
        strategy.fit(train, val, n_classes=3, device="cpu", trainer=Interrupting(1))
    with pytest.raises(RuntimeError, match="not fitted"):
        strategy.predict_proba(val)


def head_cells(seed: int, n: int = 60) -> CellData:
    rng = np.random.default_rng(seed)
    codes = np.arange(n) % 3
    return CellData(embedding=(np.eye(3, 6)[codes] + rng.normal(size=(n, 6))).astype(np.float32), codes=codes)


def head_fit(trainer: Trainer, *, train=None, seed: int = 0, n_classes: int = 3, name: str | None = None, **settings):
    head = Head(HeadConfig(training=TrainingConfig(**{"max_epochs": 4, **settings})), name=name)
    head.fit(train or head_cells(0), head_cells(1), n_classes=n_classes, seed=seed, device="cpu", trainer=trainer)
    return head


def test_a_finished_training_is_not_repeated(tmp_path, monkeypatch):
    first = head_fit(Trainer(progress=False, state_dir=tmp_path / "new", resume=True), name="a/b")
    (path,) = (tmp_path / "new").iterdir()
    assert path.name == "a%2Fb.training.pt"
    from scdlkit.foundation._fit import Fit

    monkeypatch.setattr(Fit, "gradients", lambda *_: pytest.fail("trained again"))
    second = head_fit(Trainer(progress=False, state_dir=tmp_path / "new", resume=True), name="a/b")
    assert second.history == first.history
    np.testing.assert_array_equal(second.predict_proba(head_cells(1)), first.predict_proba(head_cells(1)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "different seed"),
        ({"max_epochs": 5}, "different config"),
        ({"n_classes": 4}, "different number of classes"),
        ({"train": head_cells(0, 63)}, "different training cells, embedding"),
    ],
)
def test_the_state_of_another_run_is_refused(tmp_path, changes, message):
    head_fit(Trainer(progress=False, state_dir=tmp_path))
    with pytest.raises(ValueError, match=f"head.training.pt is from another run of 'head': {message}"):
        head_fit(Trainer(progress=False, state_dir=tmp_path, resume=True), **changes)
    head_fit(Trainer(progress=False, state_dir=tmp_path), **changes)  # starts over


def test_names_of_files():
    """Different names, also where the file system does not tell case or composed letters apart."""
    names = [
        "lora",
        "Lora",
        "LORA",
        "a/b",
        "a%2Fb",
        "..",
        "",
        "\u00e9",
        "e\u0301",
        "γδ T",
        "x" * 300,
        "x" * 299 + "y",
        "con\n",
    ]
    stems = [file_stem(name) for name in names]
    assert len({stem.lower() for stem in stems}) == len(names)
    assert all(stem.isascii() and "/" not in stem and len(stem) < 150 for stem in stems)
    assert stems[0] == "lora"


def test_a_file_that_cannot_be_read_says_so(tmp_path):
    head_fit(Trainer(progress=False, state_dir=tmp_path))
    path = tmp_path / "head.training.pt"
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match="head.training.pt cannot be read .*: remove it"):
        head_fit(Trainer(progress=False, state_dir=tmp_path, resume=True))


def test_time_before_the_interrupt_counts(tmp_path):
    trainer = Trainer(progress=False, state_dir=tmp_path)
    head_fit(trainer)
    assert trainer.seconds_before == 0
    again = Trainer(progress=False, state_dir=tmp_path, resume=True)
    head_fit(again)
    assert again.seconds_before > 0


def test_resume_needs_a_folder():
    with pytest.raises(ValueError, match="resume=True needs state_dir"):
        Trainer(resume=True)
