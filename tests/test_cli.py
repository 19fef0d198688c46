from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from scdlkit.cli import app


@pytest.fixture
def run():
    return lambda *args: CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def path(blood, tmp_path):
    blood.write_h5ad(tmp_path / "blood.h5ad")
    return tmp_path / "blood.h5ad"


def test_inspect(run, path, checkpoint):
    done = run("inspect", path, "--checkpoint", checkpoint)
    assert done.exit_code == 0 and "705 of 765 matched" in done.output


def test_embed(run, path, checkpoint, tmp_path):
    out = tmp_path / "new" / "out.h5ad"
    done = run("embed", path, "--checkpoint", checkpoint, "--out", out)
    assert done.exit_code == 0, done.output
    assert ad.read_h5ad(out).obsm["X_scgpt"].shape == (240, 32)
    assert [p.name for p in out.parent.iterdir()] == ["out.h5ad"]
    assert run("embed", path, "-c", checkpoint, "-o", tmp_path / "out.npy", "--resume").exit_code == 0
    assert np.load(tmp_path / "out.npy").shape == (240, 32)


def test_adapt_then_predict(run, path, checkpoint, tmp_path):
    done = run(
        "adapt", path, "-c", checkpoint, "-o", tmp_path / "r", "-s", "frozen_probe", "--annotated", tmp_path / "a.h5ad"
    )
    assert done.exit_code == 0, done.output
    assert "pca_logreg" in done.output and (tmp_path / "r" / "report.md").exists()
    assert "scgpt_label" in ad.read_h5ad(tmp_path / "a.h5ad").obs
    done = run("predict", path, tmp_path / "r" / "model", "-o", tmp_path / "p.h5ad")
    assert done.exit_code == 0, done.output
    assert ad.read_h5ad(tmp_path / "p.h5ad").obs["scgpt_label"].notna().all()
    done = run("predict", path, tmp_path / "r" / "model", "-o", tmp_path / "p.parquet", "--arrays")
    assert done.exit_code == 0, done.output
    assert "CD19+ B" in done.output and "Written: " in done.output
    assert pd.read_parquet(tmp_path / "p.parquet")["X_scgpt_best"].str.len().eq(32).all()


def test_adapt_on_repeated_folds_by_group(run, path, checkpoint, tmp_path):
    args = ["-s", "frozen_probe", "-g", "donor", "--cv", 3, "--repeats", 2]
    done = run("adapt", path, "-c", checkpoint, "-o", tmp_path / "r", *args)
    assert done.exit_code == 0, done.output
    folds = pd.read_csv(tmp_path / "r" / "folds.csv")
    assert folds.groupby("split_by").size().to_dict() == {"cell": 12, "group": 12}
    done = run("adapt", path, "-c", checkpoint, "-o", tmp_path / "r", *args, "--no-leakage-gap")
    assert done.exit_code == 0 and set(pd.read_csv(tmp_path / "r" / "folds.csv")["split_by"]) == {"group"}
    done = run("inspect", path, "-c", checkpoint, "-g", "donor", "--cv", 6)
    assert done.exit_code == 0 and "6 folds by groups need at least 6 groups" in done.output


def test_checkpoints(run):
    done = run("checkpoints")
    assert done.exit_code == 0 and "whole-human" in done.output and "mini" in done.output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["inspect", "{path}", "-c", "{ck}", "-l", "nope"], "label_key='nope' is not a column"),
        (["inspect", "{path}", "-c", "atlantis"], "atlantis"),
        (["embed", "{path}", "-c", "{ck}", "-o", "out.txt"], "out must end in .npy, .parquet, .h5ad, .zarr"),
        (["adapt", "{path}", "-c", "{ck}", "-o", "{out}", "--annotated", "a.txt"], "--annotated must end in .h5ad"),
        (["adapt", "{path}", "-c", "{ck}", "-o", "{out}", "-s", "magic"], "Unknown strategy 'magic'"),
        (["adapt", "{path}", "-c", "{ck}", "-o", "{out}", "--cv", "1"], "cv must be an integer of at least 2"),
    ],
)
def test_errors_are_messages(run, path, checkpoint, tmp_path, args, message):
    done = run(*(arg.format(path=path, ck=checkpoint, out=tmp_path / "r") for arg in args))
    assert done.exit_code == 1
    assert "Error: " in done.output and message in done.output and "Traceback" not in done.output
    assert not (tmp_path / "r").exists()  # found before any work


def test_adapt_goes_on_and_says_that_it_was_interrupted(run, path, checkpoint, tmp_path, monkeypatch):
    from scdlkit.foundation.training import Trainer

    train, trained = Trainer.train, []

    def interrupted(self, strategy, *args, **settings):
        raise KeyboardInterrupt

    def counted(self, strategy, *args, **settings):
        trained.append(strategy.name)
        return train(self, strategy, *args, **settings)

    options = ("adapt", path, "-c", checkpoint, "-o", tmp_path / "r", "-s", "frozen_probe", "-s", "head", "--resume")
    monkeypatch.setattr(Trainer, "train", interrupted)
    with pytest.warns(UserWarning, match="Interrupted: head, pca_logreg not finished"):
        done = run(*options)
    assert done.exit_code == 130 and "Interrupted: head, pca_logreg not finished" in done.output
    assert (tmp_path / "r" / "model" / "manifest.json").exists()
    monkeypatch.setattr(Trainer, "train", counted)
    for expected in (["head"], []):  # the second call finds all of it done
        trained.clear()
        done = run(*options)
        assert done.exit_code == 0, done.output
        assert trained == expected and "KeyboardInterrupt" not in done.output
    done = run(*options, "--random-state", 1)
    assert done.exit_code == 1 and "is from another run: different random_state" in done.output
