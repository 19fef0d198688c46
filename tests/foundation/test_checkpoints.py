import hashlib
import math
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scdlkit import settings
from scdlkit.foundation import checkpoints
from scdlkit.foundation.checkpoints import (
    FILES,
    Checkpoint,
    CheckpointInfo,
    checkpoint_info,
    ensure_checkpoint,
    list_checkpoints,
)

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "flash_keys"
BODIES = {"args.json": b'{"embsize": 8}', "vocab.json": b'{"<pad>": 0}', "best_model.pt": b"weights"}


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


# --- names and folders -----------------------------------------------------------------------------------------------


def test_cache_dir_of_the_environment(tmp_path):
    code = "from scdlkit.foundation.checkpoints import _folder, checkpoint_info as i; print(_folder(i('heart')))"
    environment = {**os.environ, "SCDLKIT_CACHE_DIR": str(tmp_path)}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(tmp_path / "checkpoints" / "heart")


def copy_layout(folder: Path) -> Path:
    folder.mkdir()
    for name, body in BODIES.items():
        (folder / name).write_bytes(body)
    return folder


@pytest.mark.parametrize("kind", [str, Path])
def test_folder(kind, tmp_path):
    folder = copy_layout(tmp_path / "mine")
    found = ensure_checkpoint(kind(folder))
    assert found == Checkpoint("mine", folder, sha256(BODIES["best_model.pt"]))
    assert {path.name for path in folder.iterdir()} == set(FILES)  # nothing is written into a user's folder


def test_golden_folder():
    found = ensure_checkpoint(GOLDEN)
    assert found.args()["embsize"] == 32
    assert found.sha256 == sha256((GOLDEN / "best_model.pt").read_bytes())


def test_registered_name_wins_over_a_folder(tmp_path, monkeypatch):
    copy_layout(tmp_path / "toy")
    monkeypatch.chdir(tmp_path)
    embedded = CheckpointInfo("toy", "a toy", "human", "none", True, (), "")
    monkeypatch.setattr(checkpoints, "_registry", lambda: {"toy": embedded})
    assert ensure_checkpoint("./toy").name == "toy"
    with pytest.raises(FileNotFoundError, match="embedded"):
        ensure_checkpoint("toy")


@pytest.mark.parametrize("missing", [FILES[:1], FILES[1:], FILES])
def test_folder_lacking_files(missing, tmp_path):
    folder = copy_layout(tmp_path / "mine")
    for name in missing:
        (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks {', '.join(missing)}"):
        ensure_checkpoint(folder)


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ensure_checkpoint(tmp_path / "absent")


def test_folder_that_is_a_file(tmp_path):
    folder = copy_layout(tmp_path / "mine")
    with pytest.raises(ValueError, match="is a file; give the folder"):
        ensure_checkpoint(str(folder / "best_model.pt"))


def test_folder_with_a_git_lfs_pointer(tmp_path):
    folder = copy_layout(tmp_path / "mine")
    (folder / "best_model.pt").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="git lfs pull"):
        ensure_checkpoint(folder)


@pytest.mark.parametrize(("text", "message"), [("{", "not valid JSON"), ("[1]", "must hold a JSON object")])
def test_args_that_are_damaged(text, message, tmp_path):
    folder = copy_layout(tmp_path / "mine")
    (folder / "args.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        ensure_checkpoint(folder).args()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("scGPT_human", "Did you mean 'whole-human'"),
        ("whole_human", "Did you mean 'whole-human'"),
        ("Heart", "Did you mean 'heart'"),
        ("pancancer", "Did you mean 'pan-cancer'"),
        ("models/mine", "looks like a path, but there is nothing at"),
        ("../mini", "looks like a path, but there is nothing at"),
        ("~nobody/mine", "looks like a path"),
        ("", "Registered: whole-human"),
        ("esm2", "Registered: whole-human"),
    ],
)
def test_unknown_name(name, hint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="Registered: whole-human, .*mini") as error:
        ensure_checkpoint(name)
    assert hint in str(error.value)


@hypothesis.settings(deadline=None)
@given(st.text())
@hypothesis.example("~\0")
def test_any_other_text_is_refused_and_never_looked_up(name):
    if name in checkpoints._registry():
        return
    with pytest.raises((ValueError, FileNotFoundError)):
        ensure_checkpoint(name)
    with pytest.raises(ValueError, match="Registered"):
        checkpoint_info(name)


@pytest.mark.parametrize("wrong", [None, 3, b"mini", ["mini"]])
def test_checkpoint_of_the_wrong_type(wrong):
    with pytest.raises(TypeError, match="checkpoint must be a name or a path"):
        ensure_checkpoint(wrong)
    with pytest.raises(ValueError, match="Registered"):
        checkpoint_info(wrong)


# --- registry --------------------------------------------------------------------------------------------------------

WANGLAB = "https://huggingface.co/wanglab/scGPT-human/resolve/a24c237737a40f3720f75abb555489e9fe753be6"
PERTURBLAB = "https://huggingface.co/perturblab/scgpt-human/resolve/571a0445d68fa48381f863ff75dd4f6d0eae3dfc"
U_CELLM = "https://huggingface.co/u-cellm/scGPT-whole-human/resolve/main"
WHOLE_HUMAN = {
    "best_model.pt": (
        205_385_258,
        "6cb5d451ab5c4b33eb673adbe4fddc61d2389df1b89b7651a9fe2e557572b922",
        [WANGLAB, PERTURBLAB, U_CELLM],
    ),
    "vocab.json": (
        1_317_639,
        "acca93d114ca62c3f0f50debbd23e8c87f0714f4737764454f6b2b13f2e8580f",
        [WANGLAB, PERTURBLAB, U_CELLM],
    ),
    "args.json": (
        1_300,
        "c18e075e018140cb8b2d9029387b9de26607a5ce6a8ccabd6ead70cd76b95d60",
        [WANGLAB, U_CELLM],
    ),
}
ORGANS = ("blood", "brain", "heart", "kidney", "lung", "pan-cancer", "continual-pretrained")


def test_whole_human_is_the_published_one():
    info = checkpoint_info("whole-human")
    found = {file.name: (file.size, file.sha256, list(file.urls)) for file in info.files}
    assert found == {
        name: (size, digest, [f"{base}/{name}" for base in bases])
        for name, (size, digest, bases) in WHOLE_HUMAN.items()
    }
    assert info.verified
    for mislabelled in ("MohamedMabrouk/scGPT", "tdc/scGPT"):
        assert mislabelled in info.note
        assert not any(
            mislabelled in url for entry in checkpoints._registry().values() for f in entry.files for url in f.urls
        )


@pytest.mark.parametrize("organ", ORGANS)
def test_organ_models_do_not_pretend_to_be_verified(organ):
    info = checkpoint_info(organ)
    revision = "f494d85028a4adb01487d9b53f2a6ee9da7765da" if organ == "heart" else "main"
    base = f"https://huggingface.co/perturblab/scgpt-{organ}/resolve/{revision}"
    assert {file.name: list(file.urls) for file in info.files} == {name: [f"{base}/{name}"] for name in FILES}
    heart = "23b4c43f403a4069e3acaa2a11c9a7be971b14e3c363739a6c4d24651c3feee7"
    assert [file.sha256 for file in info.files] == [None, None, heart if organ == "heart" else None]
    assert not info.verified
    assert "trusted on first use" in info.note


def test_licences():
    for info in checkpoints._registry().values():
        if not info.embedded:
            assert "never redistributed" in info.licence
            assert "no separate statement on the weights was found" in info.licence


def test_list_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "cache_dir", tmp_path)
    table = list_checkpoints().set_index("name")
    assert list(table) == ["description", "species", "licence", "size_mb", "verified", "available"]
    assert set(table.index) == {"whole-human", *ORGANS, "mini"}
    assert table.loc["whole-human", "size_mb"] == pytest.approx(206.704197)
    assert math.isnan(table.loc["blood", "size_mb"])
    assert set(table.index[table["verified"]]) == {"whole-human", "mini"}
    assert not table.drop(index="mini")["available"].any()
    assert set(table["species"]) == {"human"}


def test_embedded(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_HERE", tmp_path)
    info = CheckpointInfo("mini", "small", "human", "BSD-3-Clause", True, (), "")
    monkeypatch.setattr(checkpoints, "_registry", lambda: {"mini": info})
    with pytest.raises(
        FileNotFoundError, match="lacks args.json, vocab.json, best_model.pt .*Install the package again"
    ):
        ensure_checkpoint("mini")
    (tmp_path / "data").mkdir()
    copy_layout(tmp_path / "data" / "mini")
    assert ensure_checkpoint("mini").sha256 == sha256(BODIES["best_model.pt"])
    row = list_checkpoints().iloc[0]
    assert row["available"] and row["size_mb"] == pytest.approx(sum(map(len, BODIES.values())) / 1e6)


GOOD = {
    "description": "d",
    "species": "human",
    "licence": "l",
    "note": "n",
    "files": {name: {"size": 1, "sha256": "0" * 64, "urls": ["https://example.org/x"]} for name in FILES},
}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("../x", {}, "lower-case words"),
        ("a/b", {}, "lower-case words"),
        (".x", {}, "lower-case words"),
        ("x", {"files": {"../best_model.pt": {}}}, "files must be"),
        ("x", {"files": {}}, "files must be"),
        ("x", {"embedded": True}, "files must be none"),
        ("x", {"licence": None}, "licence is missing"),
        ("x", {"files": GOOD["files"] | {"args.json": GOOD["files"]["args.json"] | {"size": -1}}}, "size must be"),
        (
            "x",
            {"files": GOOD["files"] | {"args.json": GOOD["files"]["args.json"] | {"sha256": "00"}}},
            "sha256 must be",
        ),
        (
            "x",
            {"files": GOOD["files"] | {"args.json": GOOD["files"]["args.json"] | {"sha256": None}}},
            "sha256 must be",
        ),
        (
            "x",
            {"files": GOOD["files"] | {"args.json": GOOD["files"]["args.json"] | {"urls": ["http://example.org"]}}},
            "https",
        ),
    ],
)
def test_entries_of_the_registry_are_checked(name, change, message):
    assert checkpoints._parse("x", GOOD).verified
    with pytest.raises(ValueError, match=message):
        checkpoints._parse(name, GOOD | change)
