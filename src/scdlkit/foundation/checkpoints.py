"""Pretrained checkpoints: a registered name, or a folder in the official layout, to a verified folder.

The registry is ``checkpoints.yaml``. Nothing else in scdlkit knows the network.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scdlkit._settings import settings

from ._download import CheckpointFile, ensure_files, file_sha256, is_lfs_pointer

if TYPE_CHECKING:
    import pandas as pd

ARGS, VOCAB, WEIGHTS = FILES = ("args.json", "vocab.json", "best_model.pt")
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class CheckpointInfo:
    """What the registry says about a checkpoint; ``files`` is empty for an embedded one."""

    name: str
    description: str
    species: str
    licence: str
    embedded: bool
    files: tuple[CheckpointFile, ...]
    note: str

    @property
    def verified(self) -> bool:
        """Whether every file is known beforehand: all hashes are published, or it is part of the package."""
        return self.embedded or all(file.sha256 for file in self.files)


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on the disk.

    Parameters
    ----------
    name
        Registered name, or the name of the local folder.
    folder
        Holds ``args.json``, ``vocab.json`` and ``best_model.pt``.
    sha256
        Of ``best_model.pt``; empty where the weights were not asked for.
    """

    name: str
    folder: Path
    sha256: str

    @property
    def args_path(self) -> Path:
        """The shape of the model."""
        return self.folder / ARGS

    @property
    def vocab_path(self) -> Path:
        """Gene symbol to token id."""
        return self.folder / VOCAB

    @property
    def weights_path(self) -> Path:
        """The tensors."""
        return self.folder / WEIGHTS

    def args(self) -> dict[str, Any]:
        """What ``args.json`` says.

        Raises
        ------
        ValueError
            If it is not a JSON object.
        """
        try:
            args = json.loads(self.args_path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.args_path} is not valid JSON: {error}") from error
        if not isinstance(args, dict):
            raise ValueError(f"{self.args_path} must hold a JSON object, found {type(args).__name__}.")
        return args


def list_checkpoints() -> pd.DataFrame:
    """The registered checkpoints.

    Returns
    -------
    pandas.DataFrame
        One row each: ``name``, ``description``, ``species``, ``licence``, ``size_mb`` (NaN where it is not known),
        ``verified`` (every file is known beforehand, by a published hash or as part of the package; otherwise files
        are trusted on first use) and ``available`` (on this disk already).

    Example
    -------
    >>> from scdlkit.foundation.checkpoints import list_checkpoints
    >>> list_checkpoints().set_index("name").loc["whole-human", "size_mb"]  # doctest: +SKIP
    """
    import pandas as pd

    rows = []
    for info in _registry().values():
        folder = _folder(info)
        available = all((folder / name).is_file() for name in FILES)
        sizes = [file.size for file in info.files]
        if info.embedded and available:
            sizes = [(folder / name).stat().st_size for name in FILES]
        known = [size for size in sizes if size is not None]
        size_mb = sum(known) / 1e6 if len(known) == len(FILES) else float("nan")
        rows.append(
            {
                "name": info.name,
                "description": info.description,
                "species": info.species,
                "licence": info.licence,
                "size_mb": size_mb,
                "verified": info.verified,
                "available": available,
            }
        )
    return pd.DataFrame(rows)


def checkpoint_info(name: str) -> CheckpointInfo:
    """What the registry says about one checkpoint: files, urls, sizes, hashes, licence.

    Raises
    ------
    ValueError
        If the name is not registered; lists those that are.

    Example
    -------
    >>> from scdlkit.foundation.checkpoints import checkpoint_info
    >>> checkpoint_info("whole-human").species
    'human'
    """
    known = _registry()
    if not isinstance(name, str) or name not in known:
        raise ValueError(_unknown(name, known))
    return known[name]


def ensure_checkpoint(
    checkpoint: str | os.PathLike[str],
    *,
    weights: bool = True,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Checkpoint:
    """Have a checkpoint on the disk, downloading it the first time.

    Parameters
    ----------
    checkpoint
        A registered name (see :func:`list_checkpoints`), or the path of a folder with ``args.json``, ``vocab.json``
        and ``best_model.pt``. A registered name wins over a folder that is called the same: write ``"./heart"``.
    weights
        Whether the weights are needed; without them genes can be matched and cells tokenized after a small download.
    cache_dir
        Where downloads are kept, each in ``<cache_dir>/checkpoints/<name>``; ``settings.cache_dir`` by default.
    progress
        Whether to show a progress bar; ``settings.progress`` by default.

    Returns
    -------
    Checkpoint
        Its ``sha256`` is empty without weights. Downloaded files have the published size and sha256; where none is published, they are those of the first
        download. A second call asks no server, and reads the files again only if their size or time has changed.

    Raises
    ------
    ValueError
        If the name is unknown, or a file is not what it should be.
    FileNotFoundError
        If a folder lacks a file, or is not there.
    ConnectionError
        If a download failed; says which files to put where.

    Example
    -------
    >>> from scdlkit.foundation import ensure_checkpoint
    >>> ensure_checkpoint("mini").folder.name
    'mini'
    """
    if not isinstance(checkpoint, str | os.PathLike):
        raise TypeError(f"checkpoint must be a name or a path, found {type(checkpoint).__name__}.")
    known = _registry()
    if isinstance(checkpoint, str) and checkpoint in known:
        show = settings.progress if progress is None else progress
        return _ensure_registered(known[checkpoint], _folder(known[checkpoint], cache_dir), weights, progress=show)
    if isinstance(checkpoint, str) and (not checkpoint.strip() or not os.path.exists(_expand(checkpoint))):
        raise ValueError(_unknown(checkpoint, known))
    return _ensure_local(_expand(checkpoint), weights)


def _ensure_registered(info: CheckpointInfo, folder: Path, weights: bool = True, *, progress: bool) -> Checkpoint:
    if info.embedded:
        missing = [name for name in FILES if not (folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"The embedded checkpoint {info.name!r} lacks {', '.join(missing)} in {folder}: this installation of "
                "scdlkit is incomplete. Install the package again."
            )
        return Checkpoint(info.name, folder, file_sha256(folder / WEIGHTS) if weights else "")
    needed = [file for file in info.files if weights or file.name != WEIGHTS]
    hashes = ensure_files(info.name, needed, folder, progress=progress)
    return Checkpoint(info.name, folder, hashes.get(WEIGHTS, ""))


def _ensure_local(folder: Path, weights: bool) -> Checkpoint:
    if folder.is_file():
        raise ValueError(f"checkpoint={str(folder)!r} is a file; give the folder with {', '.join(FILES)}.")
    if not folder.is_dir():
        raise FileNotFoundError(f"checkpoint={str(folder)!r}: there is no such folder.")
    missing = [name for name in FILES if not (folder / name).is_file() and (weights or name != WEIGHTS)]
    if missing:
        found = sorted(path.name for path in folder.iterdir())
        raise FileNotFoundError(
            f"checkpoint={str(folder)!r} lacks {', '.join(missing)}; it has {', '.join(found[:10]) or 'no files'}"
            f"{' …' if len(found) > 10 else ''}. The official layout is {', '.join(FILES)}."
        )
    if not weights:
        return Checkpoint(folder.resolve().name, folder, "")
    if is_lfs_pointer(folder / WEIGHTS):
        raise ValueError(f"{folder / WEIGHTS} is a Git LFS pointer, not the file itself; run: git lfs pull")
    return Checkpoint(folder.resolve().name, folder, file_sha256(folder / WEIGHTS))


def _folder(info: CheckpointInfo, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    if info.embedded:
        return _HERE / "data" / info.name
    root = settings.cache_dir if cache_dir is None else _expand(cache_dir)
    return root / "checkpoints" / info.name


def _expand(path: str | os.PathLike[str]) -> Path:
    if "\0" in os.fspath(path):  # no path, and expanduser fails on it
        return Path(path)
    return Path(os.path.expanduser(path))  # unlike Path.expanduser, leaves the home of an unknown user as it is


def _unknown(name: object, known: Mapping[str, CheckpointInfo]) -> str:
    text = str(name)
    message = f"checkpoint {name!r} is neither registered nor a folder. Registered: {', '.join(known)}."
    if any(character in text for character in "/\\~") or text.startswith("."):
        return f"{message} It looks like a path, but there is nothing at {_expand(text).absolute()}."
    plain = re.sub(r"^scgpt[-_]?|[-_ ]", "", text.lower())
    spellings = {candidate.replace("-", ""): candidate for candidate in known} | {"human": "whole-human"}
    close = difflib.get_close_matches(plain, spellings, n=1)
    return f"{message} Did you mean {spellings[close[0]]!r}?" if close else message


@cache
def _registry() -> Mapping[str, CheckpointInfo]:
    import yaml

    with (_HERE / "checkpoints.yaml").open(encoding="utf-8") as file:
        return {str(name): _parse(str(name), entry) for name, entry in yaml.safe_load(file).items()}


def _parse(name: str, entry: Mapping[str, Any]) -> CheckpointInfo:
    """One entry of the registry; names become parts of paths, so they are checked."""
    problems = (
        [] if re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) else ["the name must be lower-case words and hyphens"]
    )
    embedded, files = bool(entry.get("embedded", False)), []
    given = entry.get("files") or {}
    if set(given) != (set() if embedded else set(FILES)):
        problems.append(f"files must be {'none' if embedded else ', '.join(FILES)}, found {', '.join(given) or 'none'}")
    for file, facts in given.items():
        size, sha256, urls = (facts.get(key) for key in ("size", "sha256", "urls"))
        if size != "unknown" and not (isinstance(size, int) and size > 0):
            problems.append(f"{file}: size must be a number of bytes or 'unknown', found {size!r}")
        if sha256 != "unknown" and not re.fullmatch(r"[0-9a-f]{64}", str(sha256)):
            problems.append(f"{file}: sha256 must be 64 hexadecimal digits or 'unknown', found {sha256!r}")
        if not urls or not all(str(url).startswith("https://") for url in urls):
            problems.append(f"{file}: urls must be a list of https addresses, found {urls!r}")
        files.append(
            CheckpointFile(
                name=file,
                urls=tuple(urls or ()),
                size=None if size == "unknown" else size,
                sha256=None if sha256 == "unknown" else sha256,
            )
        )
    words = {key: entry.get(key) for key in ("description", "species", "licence", "note")}
    problems += [f"{key} is missing" for key, value in words.items() if not isinstance(value, str) or not value]
    if problems:
        raise ValueError(f"checkpoints.yaml, entry {name!r}: {'; '.join(problems)}.")
    return CheckpointInfo(name=name, embedded=embedded, files=tuple(files), **{k: str(v) for k, v in words.items()})
