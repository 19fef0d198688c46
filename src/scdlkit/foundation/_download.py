"""Files of a checkpoint onto the disk: verified, whole or not at all, safe among processes.

A file is fetched to a temporary sibling, checked, and renamed. What was verified is remembered in ``hashes.json`` beside
the files, so that a later call neither asks the network nor reads 200 MB again. A file without a published hash is
trusted on first use: its hash is recorded then, with a warning, and checked from then on.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
import uuid
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scdlkit._settings import logger

from ._lock import exclusive

RECORDS = "hashes.json"
ROUNDS = 2  # each url is asked this often, in turn
PAUSE = 1.0  # seconds before it is asked again
TIMEOUT = (10.0, 60.0)  # seconds to connect, and between two pieces
_STALE = 24 * 3600  # a killed process leaves its unfinished file: removed after a day
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
_hashes: dict[tuple[int, int, int, int], str] = {}


@dataclass(frozen=True)
class CheckpointFile:
    """One file of a registered checkpoint; ``size`` (bytes) and ``sha256`` are None where none is published."""

    name: str
    urls: tuple[str, ...]
    size: int | None
    sha256: str | None


def ensure_files(title: str, files: Sequence[CheckpointFile], folder: Path, *, progress: bool) -> dict[str, str]:
    """Have every file in ``folder``, verified, downloading what is missing.

    Returns
    -------
    dict
        The sha256 of each file.

    Raises
    ------
    ConnectionError
        If a file could not be had from any url; says which files to put where.
    ValueError
        If a file trusted on first use has changed since.
    """
    try:
        known = _remembered(files, folder)
        if len(known) == len(files):
            return known  # no network, no lock, nothing written: also for a read-only shared cache
        folder.mkdir(parents=True, exist_ok=True)
        with exclusive(folder / ".lock", f"checkpoint {title!r} is being fetched"):
            _remove_stale(folder)
            known = _remembered(files, folder)  # another process may have fetched them meanwhile
            for file in files:
                if file.name not in known:
                    known[file.name] = _ensure(title, file, folder, progress=progress)
        return known
    except ConnectionError as error:
        missing = [file for file in files if file.name not in known]
        raise ConnectionError(f"{error}\n{_by_hand(missing, folder)}") from error
    except OSError as error:
        if error.errno not in _NO_ACCESS:
            raise
        raise PermissionError(
            f"Checkpoint {title!r} cannot be kept in {folder} ({error.strerror}). Choose another place with "
            "scdlkit.settings.cache_dir or the environment variable SCDLKIT_CACHE_DIR."
        ) from error


def file_sha256(path: Path) -> str:
    """The sha256 of a file; read once per process while its size and time of change stay."""
    stat = path.stat()
    key = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns)  # survives renaming
    if key not in _hashes:
        with path.open("rb") as handle:
            _hashes[key] = hashlib.file_digest(handle, "sha256").hexdigest()
    return _hashes[key]


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is what Git leaves in place of a large file that it has not fetched."""
    with path.open("rb") as handle:
        return handle.read(64).startswith(b"version https://git-lfs")


def _implausible(path: Path, name: str) -> str:
    """Why ``path`` cannot be the file ``name``, such as an error page; empty if it can."""
    if is_lfs_pointer(path):
        return "a Git LFS pointer, not the file itself"
    if name.endswith(".json"):
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return "not valid JSON"
        return "" if isinstance(found, dict) else "not a JSON object"
    # torch writes a zip archive, whose directory stands at the end; formerly a bare pickle
    with path.open("rb") as handle:
        pickled = handle.read(1) == b"\x80"
    return "" if pickled or zipfile.is_zipfile(path) else "truncated, or not PyTorch weights"


def _ensure(title: str, file: CheckpointFile, folder: Path, *, progress: bool) -> str:
    path = folder / file.name
    recorded = _read_records(folder).get(file.name, {}).get("sha256")
    expected = file.sha256 or recorded
    if path.is_file():
        problem = _problem(path, file, expected)
        if not problem:
            return _record(title, file, folder, source="found on disk", first=expected is None)
        if recorded and file.sha256 is None:
            raise ValueError(
                f"{path} is not the file that was trusted on first use ({problem}). If the change is meant, delete "
                f"it together with its entry in {folder / RECORDS}; if not, delete it alone to fetch it again."
            )
        logger.warning("%s is not the right file (%s): fetching it again.", path, problem)
    source = _download(title, file, path, expected, progress=progress)
    return _record(title, file, folder, source=source, first=expected is None)


def _download(title: str, file: CheckpointFile, path: Path, expected: str | None, *, progress: bool) -> str:
    """Fetch ``path`` from the first url that gives the right file; returns that url."""
    from requests import HTTPError, RequestException
    from urllib3.exceptions import HTTPError as TransportError

    reasons: dict[str, str] = {}
    hopeless: set[str] = set()  # no use in asking again
    for attempt in range(ROUNDS):
        candidates = [url for url in file.urls if url not in hopeless]
        if attempt and candidates:
            time.sleep(PAUSE)
        for url in candidates:
            part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
            try:
                logger.info("Downloading %s of checkpoint %r from %s", file.name, title, url)
                _get(url, part, file, progress=progress)
                problem = _problem(part, file, expected)
                if not problem:
                    _flush(part)
                    part.replace(path)
                    return url
                reasons[url] = problem
                if expected is not None and part.stat().st_size >= (file.size or 0):  # whole, and another file
                    hopeless.add(url)
            except (RequestException, TransportError, ConnectionError, TimeoutError) as error:
                reasons[url] = _reason(error)
                status = error.response.status_code if isinstance(error, HTTPError) else 500
                if 400 <= status < 500 and status not in (408, 429):
                    hopeless.add(url)
            finally:  # also on Ctrl-C
                part.unlink(missing_ok=True)
            logger.info("That failed: %s", reasons[url])
    tried = "\n".join(f"  {url}\n    {reason}" for url, reason in reasons.items())
    raise ConnectionError(f"{file.name} of checkpoint {title!r} could not be downloaded:\n{tried}")


def _get(url: str, part: Path, file: CheckpointFile, *, progress: bool) -> None:
    from pooch import HTTPDownloader
    from tqdm.auto import tqdm

    # a tqdm without a total has no truth value, which pooch asks for; pooch sets the true total
    bar = tqdm(desc=file.name, total=file.size or 1, unit="B", unit_scale=True) if progress else None
    try:
        get = HTTPDownloader(
            progressbar=False if bar is None else bar,
            chunk_size=2**20,
            timeout=TIMEOUT,
            headers={"Accept-Encoding": "identity"},  # so that the announced length is the file's
        )
        get(url, str(part), None)
    finally:
        if bar is not None:
            bar.leave = False  # of a failed download; pooch has closed the bar of a whole one
            bar.close()


def _reason(error: Exception) -> str:
    """The error at the bottom of those that requests and urllib3 wrap around one another."""
    inner: object = error.args[0] if error.args else error
    inner = getattr(inner, "reason", inner)
    return f"{type(inner if isinstance(inner, Exception) else error).__name__}: {inner}"


def _problem(path: Path, file: CheckpointFile, expected: str | None) -> str:
    """What is wrong with a file; empty if nothing is."""
    size = path.stat().st_size
    if file.size is not None and size != file.size:
        return f"{size:,} bytes, expected {file.size:,}"
    if expected is None:
        return _implausible(path, file.name)
    found = file_sha256(path)
    return "" if found == expected else f"sha256 {found}, expected {expected}"


def _flush(path: Path) -> None:
    with path.open("rb+") as handle:
        os.fsync(handle.fileno())


def _read_records(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / RECORDS
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(records, dict) and all(isinstance(record, dict) for record in records.values()):
            return records
    except FileNotFoundError:
        return {}
    except ValueError:
        pass
    raise ValueError(f"{path} is damaged. Delete it: the files beside it are then verified again.")


def _remembered(files: Sequence[CheckpointFile], folder: Path) -> dict[str, str]:
    """The sha256 of the files that are there as they were when they were verified."""
    records, known = _read_records(folder), {}
    for file in files:
        record = records.get(file.name, {})
        try:
            stat = (folder / file.name).stat()
        except FileNotFoundError:
            continue
        same = record.get("size") == stat.st_size and record.get("mtime_ns") == stat.st_mtime_ns
        if same and isinstance(record.get("sha256"), str) and file.sha256 in (None, record["sha256"]):
            known[file.name] = record["sha256"]
    return known


def _record(title: str, file: CheckpointFile, folder: Path, *, source: str, first: bool) -> str:
    """Remember a file that was just verified, or trusted for the first time."""
    path = folder / file.name
    stat, sha256 = path.stat(), file_sha256(path)
    if first:
        logger.warning(
            "No hash is published for %s of checkpoint %r, so this first copy (%s) could not be verified. Its sha256 %s "
            "is kept in %s and checked from now on.",
            *(file.name, title, source, sha256, folder / RECORDS),
        )
    entry = {
        "sha256": sha256,
        "verified_against": "published hash" if file.sha256 else "hash of the first copy",
        "size": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "source": source,
    }
    part = folder / f".{RECORDS}.{uuid.uuid4().hex}.part"
    try:
        part.write_text(json.dumps({**_read_records(folder), file.name: entry}, indent=2) + "\n", encoding="utf-8")
        part.replace(folder / RECORDS)
    except OSError as error:
        logger.info("%s is verified again next time: nothing can be noted in %s (%s).", path, folder, error.strerror)
    finally:
        try:
            part.unlink(missing_ok=True)
        except OSError:
            logger.debug("%s could not be removed.", part)
    return sha256


def _by_hand(files: Sequence[CheckpointFile], folder: Path) -> str:
    lines = [f"Without a network, put the following into {folder} (scdlkit.settings.cache_dir moves it):"]
    for file in files:
        size = "size unknown" if file.size is None else f"{file.size:,} bytes"
        lines += [f"  {file.name}: {size}, sha256 {file.sha256 or 'not published'}"]
        lines += [f"    {url}" for url in file.urls]
    return "\n".join(lines)


def _remove_stale(folder: Path) -> None:
    for part in folder.glob(".*.part"):
        try:
            if time.time() - part.stat().st_mtime > _STALE:
                part.unlink()
        except OSError:
            logger.debug("%s could not be removed.", part)
