import importlib
import logging
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

import scdlkit
from scdlkit import _settings
from scdlkit._settings import Settings, logger

VARIABLES = tuple(
    f"SCDLKIT_{name}"
    for name in ("CACHE_DIR", "CACHE_EMBEDDINGS", "DEVICE", "PRECISION", "PROGRESS", "TEMP_DIR", "VERBOSITY")
)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    level = logger.level
    yield
    logger.setLevel(level)


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )


def test_defaults():
    found = Settings()
    assert found.cache_dir.is_absolute() and "scdlkit" in str(found.cache_dir)
    assert (found.device, found.progress, found.verbosity) == ("auto", True, "INFO")
    assert found.temp_dir is None and (found.precision, found.cache_embeddings) == ("auto", 0)
    assert repr(found).startswith("Settings(cache_dir=")


def test_package_has_one():
    assert scdlkit.settings is _settings.settings
    assert isinstance(scdlkit.settings, Settings)


def test_environment(monkeypatch, tmp_path):
    for variable, value in zip(
        VARIABLES, (str(tmp_path), "2.5", "cuda:1", "bf16", "off", str(tmp_path / "t"), "warning"), strict=True
    ):
        monkeypatch.setenv(variable, value)
    found = Settings()
    assert (found.cache_dir, found.device, found.progress, found.verbosity) == (tmp_path, "cuda:1", False, "WARNING")
    assert found.temp_dir == tmp_path / "t" and (found.precision, found.cache_embeddings) == ("bf16", 2.5)
    assert logger.level == logging.WARNING


def test_empty_environment_means_default(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.setenv(variable, "")
    found = Settings()
    assert (found.device, found.progress, found.verbosity) == ("auto", True, "INFO")


@pytest.mark.parametrize("variable", VARIABLES)
def test_bad_environment_names_the_variable(variable, monkeypatch):
    monkeypatch.setenv(variable, " " if variable.endswith("_DIR") else "nonsense")
    with pytest.raises(ValueError, match=f"Environment variable {variable}: .* found"):
        Settings()


def test_cache_dir(tmp_path, monkeypatch):
    found = Settings()
    monkeypatch.chdir(tmp_path)
    found.cache_dir = "here"
    assert found.cache_dir == tmp_path / "here"  # stays where it was when the working directory changes
    found.cache_dir = Path("~/there")
    assert found.cache_dir == Path.home() / "there"


@pytest.mark.parametrize("wrong", ["", "  ", None, 3])
def test_bad_cache_dir(wrong):
    with pytest.raises(ValueError, match="cache_dir must be"):
        Settings().cache_dir = wrong


@pytest.mark.parametrize("wrong", ["", "  ", 3])
def test_temp_dir(wrong, tmp_path):
    found = Settings()
    found.temp_dir = tmp_path
    with pytest.raises(ValueError, match="temp_dir must be"):
        found.temp_dir = wrong
    assert found.temp_dir == tmp_path
    found.temp_dir = None
    assert found.temp_dir is None


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:0", "cuda:12", "mps"])
def test_device(device):
    found = Settings()
    found.device = device
    assert found.device == device


@pytest.mark.parametrize("wrong", ["gpu", "cuda:", "cuda:x", "cuda:1:2", "CPU", "", None, 0])
def test_bad_device(wrong):
    with pytest.raises(ValueError, match="device must be"):
        Settings().device = wrong


@pytest.mark.parametrize("wrong", [-1, "much", None, True, float("nan"), float("inf")])
def test_bad_cache_size(wrong):
    with pytest.raises(ValueError, match="cache_embeddings must be a number of gigabytes"):
        Settings().cache_embeddings = wrong


@pytest.mark.parametrize("wrong", ["fp64", "BF16", "", None, 16])
def test_bad_precision(wrong):
    with pytest.raises(ValueError, match="precision must be one of auto, fp32"):
        Settings().precision = wrong


@pytest.mark.parametrize(
    ("value", "expected"), [(True, True), (False, False), ("on", True), ("NO", False), ("1", True), (0, False)]
)
def test_progress(value, expected):
    found = Settings()
    found.progress = value
    assert found.progress is expected


@hypothesis.settings(deadline=None)
@given(st.text() | st.integers() | st.none())
def test_progress_takes_nothing_else(value):
    found = Settings()
    try:
        found.progress = value
    except ValueError as error:
        assert "progress must be" in str(error)
    else:
        assert str(value).lower() in {"1", "true", "yes", "on", "0", "false", "no", "off"}


@pytest.mark.parametrize(("value", "name"), [("debug", "DEBUG"), ("ERROR", "ERROR"), (logging.WARNING, "WARNING")])
def test_verbosity(value, name):
    found = Settings()
    found.verbosity = value
    assert found.verbosity == name == logging.getLevelName(logger.level)


@pytest.mark.parametrize("wrong", ["loud", 3, None, True, 1.5])
def test_bad_verbosity(wrong):
    before = logger.level
    with pytest.raises(ValueError, match="verbosity must be one of"):
        Settings().verbosity = wrong
    assert logger.level in (before, logging.INFO)


def test_misspelt_setting():
    with pytest.raises(AttributeError):
        Settings().cachedir = "x"


def test_messages_reach_standard_error_once():
    log = "from scdlkit._settings import logger; logger.info('hello'); logger.debug('hidden')"
    assert python(log).stderr == "hello\n"
    assert (
        python(f"import logging; logging.basicConfig(format='%(name)s %(message)s'); {log}").stderr == "scdlkit hello\n"
    )


def test_messages_follow_a_replaced_standard_error():
    code = """
import contextlib, io, sys
from scdlkit._settings import logger
with contextlib.redirect_stderr(io.StringIO()) as text:
    logger.warning("inside")
print(text.getvalue().strip())
"""
    found = python(code)
    assert (found.stdout, found.stderr) == ("inside\n", "")


def test_one_handler_after_a_reload():
    before = list(logger.handlers)
    try:
        importlib.reload(_settings)
        assert list(logger.handlers) == before
    finally:
        _settings.settings = scdlkit.settings


def test_of_several_processes_the_first_one_tells(monkeypatch, capsys):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        logger.warning("warned by %s", rank)
        logger.error("failed in %s", rank)
    assert capsys.readouterr().err.split("\n") == ["warned by 0", "failed in 0", "failed in 1", ""]
