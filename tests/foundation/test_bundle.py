from __future__ import annotations

import json

import pytest
import torch

from scdlkit.foundation.bundle import MANIFEST, STATE, read_bundle, write_bundle

TENSORS = {"head/weight": torch.arange(6.0).reshape(2, 3), "cells/split": torch.tensor([0, 1, -1], dtype=torch.int8)}


@pytest.fixture
def folder(tmp_path):
    return write_bundle(tmp_path / "model", {"classes": ["B", "NK/T", "", "γδ"], "value": 0.25}, TENSORS)


def edit(folder, **changes):
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest.update(changes)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_round_trip(folder):
    manifest, tensors = read_bundle(folder)
    assert manifest["classes"] == ["B", "NK/T", "", "γδ"] and manifest["value"] == 0.25
    assert tensors.keys() == TENSORS.keys()
    assert all(
        torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype for name, tensor in TENSORS.items()
    )
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, STATE]


def test_an_earlier_model_is_replaced_whole(folder):
    write_bundle(folder, {"classes": []}, {})
    manifest, tensors = read_bundle(folder)
    assert manifest["classes"] == [] and tensors == {}
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_failed_write_leaves_the_old_model(folder, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        write_bundle(folder, {"classes": []}, {})
    assert read_bundle(folder)[0]["value"] == 0.25
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_an_interrupt_while_replacing_brings_the_old_model_back(folder, monkeypatch):
    from pathlib import Path

    replace, calls = Path.replace, []

    def interrupted(self, target):
        calls.append(target)
        if len(calls) == 2:  # the old model is out of the way, the new one not yet in
            raise KeyboardInterrupt
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_bundle(folder, {"classes": []}, {})
    assert read_bundle(folder)[0]["value"] == 0.25
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_manifest_is_utf8_in_every_locale(tmp_path):
    import subprocess
    import sys

    code = (
        "import sys; from scdlkit.foundation.bundle import write_bundle\n"
        "write_bundle(sys.argv[1], {'classes': ['\\u03b3\\u03b4 T']}, {})"
    )
    environment = {"PATH": "/usr/bin", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, tmp_path / "m"], check=True, env=environment, timeout=60)
    assert read_bundle(tmp_path / "m")[0]["classes"] == ["γδ T"]


def test_foreign_files_are_not_overwritten(folder):
    (folder / "thesis.docx").write_text("years of work")
    with pytest.raises(ValueError, match="holds thesis.docx, not only a saved model"):
        write_bundle(folder, {}, {})
    assert (folder / "thesis.docx").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": ["B", "NK/T", "", "T"]}, "was changed after it was written"),
        ({"format_version": 99}, "format version 99; this version of scdlkit reads 2"),
        ({"format_version": 1}, "format version 1; this version of scdlkit reads 2. Fit again"),
        ({"format_version": None}, "format version None"),
    ],
)
def test_edited_manifest(folder, changes, message):
    edit(folder, **changes)
    with pytest.raises(ValueError, match=message):
        read_bundle(folder)


def test_incomplete_manifest(folder):
    (folder / MANIFEST).write_text('{"format_version": 2}')
    with pytest.raises(ValueError, match="is incomplete: it lacks state_sha256, tensors, manifest_digest"):
        read_bundle(folder)
    (folder / MANIFEST).write_text('{"format_version": 2')
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_bundle(folder)
    (folder / MANIFEST).write_text("[1]")
    with pytest.raises(ValueError, match="holds list, not an object"):
        read_bundle(folder)


def test_missing_or_corrupt_state(folder, tmp_path):
    content = (folder / STATE).read_bytes()
    (folder / STATE).write_bytes(content[:-20])
    with pytest.raises(ValueError, match="sha256 differs"):
        read_bundle(folder)
    (folder / STATE).unlink()
    with pytest.raises(FileNotFoundError, match="holds no model_state.pt"):
        read_bundle(folder)
    with pytest.raises(FileNotFoundError, match="holds no manifest.json"):
        read_bundle(tmp_path / "nowhere")


def test_missing_tensor(folder, tmp_path):
    """A manifest that agrees with itself and with the file, but names a tensor that the file lacks."""
    from scdlkit.foundation.bundle import _digest

    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["tensors"]["head/bias"] = ["float32", [3]]
    manifest["manifest_digest"] = _digest(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="tensor head/bias should have shape \\[3\\], found no such tensor"):
        read_bundle(folder)
