import errno
import threading

import pytest

from scdlkit.foundation import _lock
from scdlkit.foundation._lock import exclusive


def test_one_at_a_time(tmp_path, caplog):
    caplog.set_level("INFO", logger="scdlkit")
    order = []
    inside = threading.Event()

    def second():
        inside.wait(10)
        with exclusive(tmp_path / "lock", "counting"):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with exclusive(tmp_path / "lock", "counting") as held:
        assert held
        inside.set()
        while "Waiting for another process: counting." not in caplog.text:
            thread.join(0.01)
        order.append("first")
    thread.join(10)
    assert order == ["first", "second"]


def test_released_after_an_error(tmp_path):
    with pytest.raises(KeyError), exclusive(tmp_path / "lock", "failing"):
        raise KeyError("x")
    with exclusive(tmp_path / "lock", "going on") as held:
        assert held


def test_read_only_disk(tmp_path):
    with exclusive(tmp_path / "absent" / "lock", "reading") as held:
        assert not held


def test_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(_lock, "_lockers", lambda: (refuse, refuse))
    with exclusive(tmp_path / "lock", "writing") as held:
        assert not held
