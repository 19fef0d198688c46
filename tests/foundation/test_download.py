import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from scdlkit import settings
from scdlkit.foundation import _download, checkpoints
from scdlkit.foundation._download import CheckpointFile
from scdlkit.foundation.checkpoints import FILES, Checkpoint, CheckpointInfo, ensure_checkpoint, list_checkpoints


def weights_file(seed: int) -> bytes:
    """A zip archive, which is what PyTorch writes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("best_model/data.pkl", hashlib.sha256(bytes([seed])).digest() * 5000)
    return buffer.getvalue()


BODIES = {
    "args.json": json.dumps({"embsize": 8}).encode(),
    "vocab.json": json.dumps({"<pad>": 0, "<cls>": 1, "CD3D": 2}).encode(),
    "best_model.pt": weights_file(0),
}


def sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves ``bodies`` and counts requests; what is in ``faults`` goes wrong in the given way."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies = {f"/{host}/{name}": body for host in ("a", "b") for name, body in BODIES.items()}
        self.faults: dict[str, str] = {}
        self.requests: Counter[str] = Counter()
        self.halfway, self.go_on = threading.Event(), threading.Event()

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}{path}"

    def handle_error(self, request, client_address):
        """A client that hung up is part of the test."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self):
        self.server.requests[self.path] += 1
        body, fault = self.server.bodies.get(self.path), self.server.faults.get(self.path, "")
        if body is None or fault.isdigit():
            self.send_error(int(fault or 404))
            return
        if fault == "once" and self.server.requests[self.path] == 1:
            fault = "truncated"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "truncated":
            self.wfile.write(body[: len(body) // 2])
        elif fault == "stalls":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.server.halfway.set()
            self.server.go_on.wait(20)
            self.wfile.write(body[len(body) // 2 :])
        else:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(_download, "PAUSE", 0.0)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.go_on.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def info(server):
    """A checkpoint with published hashes at two addresses."""
    return make_info(server, published=True)


@pytest.fixture
def unpublished(server):
    """A checkpoint without any published hash or size."""
    return make_info(server, published=False)


def make_info(server: Server, *, published: bool, hosts: str = "ab") -> CheckpointInfo:
    files = tuple(
        CheckpointFile(
            name,
            tuple(server.url(f"/{host}/{name}") for host in hosts),
            len(body) if published else None,
            sha256(body) if published else None,
        )
        for name, body in BODIES.items()
    )
    return CheckpointInfo("toy", "a toy", "human", "none", False, files, "for tests")


def ensure(info: CheckpointInfo, folder: Path, *, progress: bool = False) -> Checkpoint:
    return checkpoints._ensure_registered(info, folder, progress=progress)


def visible(folder: Path) -> set[str]:
    """What is in a folder, the lock aside."""
    return {path.name for path in folder.iterdir()} - {".lock"}


def restart(monkeypatch):
    """Forget what this process knows, as a new one would."""
    monkeypatch.setattr(_download, "_hashes", {})


# --- downloads -------------------------------------------------------------------------------------------------------


def test_download(info, server, tmp_path):
    found = ensure(info, tmp_path / "toy")
    assert found == Checkpoint("toy", tmp_path / "toy", sha256(BODIES["best_model.pt"]))
    assert visible(found.folder) == {*FILES, "hashes.json"}
    for name, body in BODIES.items():
        assert (found.folder / name).read_bytes() == body
    assert found.args() == {"embsize": 8}
    assert [found.args_path, found.vocab_path, found.weights_path] == [found.folder / name for name in FILES]
    assert server.requests == {f"/a/{name}": 1 for name in FILES}


def test_without_the_weights_the_large_file_stays_where_it_is(info, server, tmp_path):
    found = checkpoints._ensure_registered(info, tmp_path, False, progress=False)
    assert found.sha256 == "" and visible(tmp_path) == {"args.json", "vocab.json", "hashes.json"}
    assert server.requests == {"/a/args.json": 1, "/a/vocab.json": 1}
    assert ensure(info, tmp_path).sha256 == sha256(BODIES["best_model.pt"])
    assert server.requests == {f"/a/{name}": 1 for name in FILES}


def test_download_under_the_usual_permissions(info, tmp_path):
    (tmp_path / "usual").touch()
    found = ensure(info, tmp_path / "toy")
    assert found.weights_path.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_second_call_touches_no_network_and_reads_nothing(info, server, tmp_path, monkeypatch):
    first = ensure(info, tmp_path)
    before = dict(server.requests)
    restart(monkeypatch)
    monkeypatch.setattr(_download, "file_sha256", lambda path: pytest.fail("read again"))
    monkeypatch.setattr(Path, "mkdir", lambda *args, **kwargs: pytest.fail("written to"))
    assert ensure(info, tmp_path) == first
    assert server.requests == before


def test_files_put_there_by_hand_are_verified_without_a_network(info, server, tmp_path):
    for name, body in BODIES.items():
        (tmp_path / name).write_bytes(body)
    assert ensure(info, tmp_path).sha256 == sha256(BODIES["best_model.pt"])
    assert not server.requests
    records = json.loads((tmp_path / "hashes.json").read_text())
    assert records["vocab.json"]["verified_against"] == "published hash"
    assert records["vocab.json"]["source"] == "found on disk"


def test_only_what_is_missing_is_fetched(info, server, tmp_path):
    ensure(info, tmp_path)
    (tmp_path / "vocab.json").unlink()
    ensure(info, tmp_path)
    assert server.requests == {"/a/args.json": 1, "/a/vocab.json": 2, "/a/best_model.pt": 1}


def test_wrong_file_in_the_cache_is_replaced(info, tmp_path, caplog):
    ensure(info, tmp_path)
    wrong = b"\0" * len(BODIES["best_model.pt"])
    (tmp_path / "best_model.pt").write_bytes(wrong)
    assert ensure(info, tmp_path).weights_path.read_bytes() == BODIES["best_model.pt"]
    assert "not the right file" in caplog.text and sha256(wrong) in caplog.text


def test_wrong_hash(info, server, tmp_path):
    wrong = BODIES["best_model.pt"][:-1] + b"?"
    server.bodies["/a/best_model.pt"] = server.bodies["/b/best_model.pt"] = wrong
    with pytest.raises(ConnectionError) as error:
        ensure(info, tmp_path)
    assert f"sha256 {sha256(wrong)}, expected {sha256(BODIES['best_model.pt'])}" in str(error.value)
    assert visible(tmp_path) == {"args.json", "vocab.json", "hashes.json"}
    assert server.requests["/a/best_model.pt"] == server.requests["/b/best_model.pt"] == 1  # no use in asking again


@pytest.mark.parametrize("fault", ["connection cut", "short file"])
def test_truncated(fault, info, server, tmp_path):
    for path in ("/a/best_model.pt", "/b/best_model.pt"):
        if fault == "short file":
            server.bodies[path] = BODIES["best_model.pt"][:100]
        else:
            server.faults[path] = "truncated"
    with pytest.raises(ConnectionError, match="could not be downloaded"):
        ensure(info, tmp_path)
    assert visible(tmp_path) == {"args.json", "vocab.json", "hashes.json"}
    assert server.requests["/a/best_model.pt"] == _download.ROUNDS


def test_a_cut_connection_is_tried_again(server, tmp_path):
    server.faults["/a/best_model.pt"] = "once"
    ensure(make_info(server, published=True, hosts="a"), tmp_path)
    assert server.requests["/a/best_model.pt"] == 2


@pytest.mark.parametrize("fault", ["dead", "404", "503", "wrong"])
def test_falls_back_to_the_next_url(fault, info, server, tmp_path):
    if fault == "dead":
        dead = "http://127.0.0.1:9/best_model.pt"  # the discard port: nobody listens
        weights = info.files[2]
        weights = CheckpointFile(weights.name, (dead, weights.urls[1]), weights.size, weights.sha256)
        info = CheckpointInfo("toy", "a toy", "human", "none", False, (*info.files[:2], weights), "")
    elif fault == "wrong":
        server.bodies["/a/best_model.pt"] = b"<html>Virus scan warning</html>"
    else:
        server.faults["/a/best_model.pt"] = fault
    assert ensure(info, tmp_path).weights_path.read_bytes() == BODIES["best_model.pt"]
    assert server.requests["/b/best_model.pt"] == 1
    assert json.loads((tmp_path / "hashes.json").read_text())["best_model.pt"]["source"].endswith("/b/best_model.pt")


def test_offline_says_which_files_to_put_where(info, server, tmp_path):
    for host in "ab":
        server.faults |= {f"/{host}/vocab.json": "503", f"/{host}/best_model.pt": "503"}
    folder = tmp_path / "toy"
    with pytest.raises(ConnectionError) as error:
        ensure(info, folder)
    text = str(error.value)
    assert f"into {folder}" in text and "cache_dir" in text
    for name in ("vocab.json", "best_model.pt"):
        assert f"{name}: {len(BODIES[name]):,} bytes, sha256 {sha256(BODIES[name])}" in text
        assert server.url(f"/b/{name}") in text
    assert "args.json" not in text  # that one was had


def test_progress_bar(info, tmp_path, capsys):
    ensure(info, tmp_path, progress=True)
    assert "best_model.pt: 100%" in capsys.readouterr().err


def test_no_progress_bar(info, tmp_path, capsys):
    ensure(info, tmp_path, progress=False)
    assert "%" not in capsys.readouterr().err


def test_cache_that_cannot_be_written(info, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PermissionError, match="SCDLKIT_CACHE_DIR"):
        ensure(info, tmp_path / "file" / "toy")


def test_read_only_cache_is_verified_each_time(info, server, tmp_path, monkeypatch):
    for name, body in BODIES.items():
        (tmp_path / name).write_bytes(body)

    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", refuse)
    assert ensure(info, tmp_path).sha256 == sha256(BODIES["best_model.pt"])
    assert visible(tmp_path) == set(FILES)
    assert not server.requests


def test_full_disk_leaves_nothing(info, tmp_path, monkeypatch):
    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_download, "_flush", full)
    with pytest.raises(OSError, match="No space left"):
        ensure(info, tmp_path)
    assert visible(tmp_path) == set()


@pytest.mark.parametrize("text", ["{", "[]", '{"args.json": 1}'])
def test_damaged_records(text, info, tmp_path):
    (tmp_path / "hashes.json").write_text(text)
    with pytest.raises(ValueError, match="damaged"):
        ensure(info, tmp_path)


# --- trust on first use ----------------------------------------------------------------------------------------------


def test_first_use_is_recorded_with_a_warning(unpublished, server, tmp_path, caplog):
    ensure(unpublished, tmp_path)
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 3
    for name, message in zip(FILES, warned, strict=True):
        assert f"No hash is published for {name}" in message and sha256(BODIES[name]) in message
    records = json.loads((tmp_path / "hashes.json").read_text())
    assert {name: record["sha256"] for name, record in records.items()} == {n: sha256(b) for n, b in BODIES.items()}
    assert {record["verified_against"] for record in records.values()} == {"hash of the first copy"}

    caplog.clear()
    before = dict(server.requests)
    ensure(unpublished, tmp_path)
    assert server.requests == before
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_file_changed_since_first_use_is_refused(unpublished, tmp_path):
    ensure(unpublished, tmp_path)
    (tmp_path / "best_model.pt").write_bytes(weights_file(1))
    with pytest.raises(ValueError, match="not the file that was trusted on first use"):
        ensure(unpublished, tmp_path)
    assert (tmp_path / "best_model.pt").read_bytes() == weights_file(1)  # the user decides


def test_a_server_that_changed_since_first_use_is_refused(unpublished, server, tmp_path):
    ensure(unpublished, tmp_path)
    (tmp_path / "best_model.pt").unlink()
    server.bodies["/a/best_model.pt"] = server.bodies["/b/best_model.pt"] = weights_file(1)
    with pytest.raises(ConnectionError, match=f"expected {sha256(BODIES['best_model.pt'])}"):
        ensure(unpublished, tmp_path)
    assert not (tmp_path / "best_model.pt").exists()

    (tmp_path / "hashes.json").unlink()  # how a change is accepted
    assert ensure(unpublished, tmp_path).sha256 == sha256(weights_file(1))


@pytest.mark.parametrize(
    ("name", "body", "reason"),
    [
        ("best_model.pt", b"<html>Virus scan warning</html>", "not PyTorch weights"),
        ("best_model.pt", BODIES["best_model.pt"][:-200], "truncated"),
        ("best_model.pt", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 205385258\n", "Git LFS"),
        ("vocab.json", b"<html></html>", "not valid JSON"),
        ("args.json", b"[1]", "not a JSON object"),
    ],
)
def test_what_cannot_be_a_checkpoint_is_not_trusted(name, body, reason, unpublished, server, tmp_path):
    server.bodies[f"/a/{name}"] = server.bodies[f"/b/{name}"] = body
    with pytest.raises(ConnectionError, match=reason):
        ensure(unpublished, tmp_path)
    assert not (tmp_path / name).exists()


def test_an_implausible_file_on_the_disk_is_replaced(unpublished, tmp_path, caplog):
    (tmp_path / "vocab.json").write_text("<html></html>")
    assert ensure(unpublished, tmp_path).vocab_path.read_bytes() == BODIES["vocab.json"]
    assert "not valid JSON" in caplog.text


def test_a_hash_published_later_is_enforced(unpublished, info, server, tmp_path):
    server.bodies["/a/best_model.pt"] = weights_file(1)
    ensure(unpublished, tmp_path)
    server.bodies["/a/best_model.pt"] = BODIES["best_model.pt"]
    assert ensure(info, tmp_path).sha256 == sha256(BODIES["best_model.pt"])


# --- several processes -----------------------------------------------------------------------------------------------

CHILD = """
import json, sys
from pathlib import Path
from scdlkit.foundation._download import CheckpointFile
from scdlkit.foundation.checkpoints import CheckpointInfo, _ensure_registered
files = tuple(CheckpointFile(n, tuple(u), s, h) for n, u, s, h in json.loads(sys.argv[1]))
info = CheckpointInfo("toy", "a toy", "human", "none", False, files, "")
print(_ensure_registered(info, Path(sys.argv[2]), progress=False).sha256)
"""


def start(info: CheckpointInfo, folder: Path) -> subprocess.Popen:
    files = json.dumps([(file.name, file.urls, file.size, file.sha256) for file in info.files])
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, files, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "SCDLKIT_VERBOSITY": "INFO", "PYTHONUNBUFFERED": "1"},
        # a test run in the background of a script ignores interrupts, and children would inherit that
        preexec_fn=(lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) if sys.platform != "win32" else None,
    )


def test_two_processes_fetch_once(info, server, tmp_path):
    server.faults["/a/best_model.pt"] = "stalls"
    with start(info, tmp_path) as first:
        assert server.halfway.wait(30)
        with start(info, tmp_path) as second:
            assert "Waiting for another process" in second.stderr.readline()
            server.go_on.set()
            outputs = [process.communicate(timeout=30)[0].strip() for process in (first, second)]
    assert outputs == [sha256(BODIES["best_model.pt"])] * 2
    assert server.requests == {f"/a/{name}": 1 for name in FILES}
    assert visible(tmp_path) == {*FILES, "hashes.json"}


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_interrupt_leaves_nothing(info, server, tmp_path):
    server.faults["/a/best_model.pt"] = "stalls"
    with start(info, tmp_path) as process:
        assert server.halfway.wait(30)
        process.send_signal(signal.SIGINT)
        assert "KeyboardInterrupt" in process.communicate(timeout=30)[1]
    assert visible(tmp_path) == {"args.json", "vocab.json", "hashes.json"}


def test_killed_process_blocks_nobody(info, server, tmp_path):
    server.faults["/a/best_model.pt"] = "stalls"
    with start(info, tmp_path) as process:
        assert server.halfway.wait(30)
        process.kill()
    server.faults.clear()
    [part] = tmp_path.glob(".*.part")
    yesterday = time.time() - 2 * 24 * 3600
    os.utime(part, (yesterday, yesterday))
    assert ensure(info, tmp_path).weights_path.read_bytes() == BODIES["best_model.pt"]
    assert visible(tmp_path) == {*FILES, "hashes.json"}


def test_threads_fetch_once(info, server, tmp_path):
    found: list[Checkpoint] = []
    threads = [threading.Thread(target=lambda: found.append(ensure(info, tmp_path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1
    assert server.requests == {f"/a/{name}": 1 for name in FILES}


# --- through the public function --------------------------------------------------------------------------------------


def test_cache_dir(info, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_registry", lambda: {"toy": info})
    monkeypatch.setattr(settings, "cache_dir", tmp_path / "setting")
    monkeypatch.setattr(settings, "progress", False)
    assert not list_checkpoints()["available"].item()
    assert ensure_checkpoint("toy").folder == tmp_path / "setting" / "checkpoints" / "toy"
    assert ensure_checkpoint("toy", cache_dir=tmp_path / "given").folder == tmp_path / "given" / "checkpoints" / "toy"
    assert list_checkpoints()["available"].item()
