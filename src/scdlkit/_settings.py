"""Package-wide settings, their environment variables, and the package logger."""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path
from typing import TextIO

from platformdirs import user_cache_path

logger = logging.getLogger("scdlkit")


class _Handler(logging.StreamHandler[TextIO]):
    """Shows messages on what is standard error at that moment, unless the program has set up logging itself."""

    def emit(self, record: logging.LogRecord) -> None:
        environment = os.environ.get
        if (
            int(environment("WORLD_SIZE", "1")) > 1
            and environment("RANK", "0") != "0"
            and record.levelno < logging.ERROR
        ):
            return  # of several processes that were launched together, the first one tells
        if not logging.getLogger().handlers:  # otherwise the message would be shown twice
            self.stream = sys.stderr  # notebooks and tests replace it
            super().emit(record)


if not any(type(handler).__name__ == _Handler.__name__ for handler in logger.handlers):  # a module may be reloaded
    logger.addHandler(_Handler())

_PRECISIONS = ("auto", "fp32", "bf16", "fp16", "int8")
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


class Settings:
    """What every function of scdlkit reads when it is not told otherwise.

    Each setting starts from its environment variable: ``SCDLKIT_CACHE_DIR``, ``SCDLKIT_CACHE_EMBEDDINGS``,
    ``SCDLKIT_DEVICE``, ``SCDLKIT_PRECISION``, ``SCDLKIT_PROGRESS``, ``SCDLKIT_TEMP_DIR``, ``SCDLKIT_VERBOSITY``. An invalid value is a :class:`ValueError`.

    Example
    -------
    >>> import scdlkit as sk
    >>> sk.settings.device = "cpu"
    >>> sk.settings.progress = False
    """

    __slots__ = (
        "_cache_dir",
        "_cache_embeddings",
        "_device",
        "_precision",
        "_progress",
        "_temp_dir",
    )  # a misspelt setting is an AttributeError

    def __init__(self) -> None:
        self.cache_dir = user_cache_path("scdlkit")
        self.cache_embeddings = 0
        self.device = "auto"
        self.precision = "auto"
        self.progress = True
        self.temp_dir = None
        self.verbosity = "INFO"
        for name in ("cache_dir", "cache_embeddings", "device", "precision", "progress", "temp_dir", "verbosity"):
            variable = f"SCDLKIT_{name.upper()}"
            if os.environ.get(variable):
                try:
                    setattr(self, name, os.environ[variable])
                except ValueError as error:
                    raise ValueError(f"Environment variable {variable}: {error}") from None

    @property
    def cache_dir(self) -> Path:
        """Folder for downloaded checkpoints; kept as an absolute path."""
        return self._cache_dir

    @cache_dir.setter
    def cache_dir(self, value: str | os.PathLike[str]) -> None:
        self._cache_dir = _folder("cache_dir", value)

    @property
    def cache_embeddings(self) -> float:
        """Gigabytes of embeddings (and states of frozen blocks) kept in ``cache_dir`` for the same cells; 0: none."""
        return self._cache_embeddings

    @cache_embeddings.setter
    def cache_embeddings(self, value: float | str) -> None:
        try:
            size = float(value)
        except (TypeError, ValueError):
            size = -1.0
        if isinstance(value, bool) or not 0 <= size < float("inf"):
            raise ValueError(f"cache_embeddings must be a number of gigabytes, 0 for no cache, found {value!r}.")
        self._cache_embeddings = size

    @property
    def device(self) -> str:
        """Where the encoder runs: ``"auto"`` (CUDA, then CPU), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``."""
        return self._device

    @device.setter
    def device(self, value: str) -> None:
        if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
            raise ValueError(f"device must be 'auto', 'cpu', 'cuda', 'cuda:<n>' or 'mps', found {value!r}.")
        self._device = value

    @property
    def precision(self) -> str:
        """Of an encoder that predicts: ``"fp32"``, ``"bf16"``, ``"fp16"`` (GPU), ``"int8"`` (CPU); ``"auto"``: fp16 on a GPU, else fp32."""
        return self._precision

    @precision.setter
    def precision(self, value: str) -> None:
        if value not in _PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(_PRECISIONS)}, found {value!r}.")
        self._precision = value

    @property
    def progress(self) -> bool:
        """Whether long work shows a progress bar."""
        return self._progress

    @progress.setter
    def progress(self, value: bool | str) -> None:
        text = str(value).lower()
        if text not in _TRUE | _FALSE:
            raise ValueError(f"progress must be true or false, found {value!r}.")
        self._progress = text in _TRUE

    @property
    def temp_dir(self) -> Path | None:
        """Folder for what may not fit into memory; None: the ``output_dir`` of the call, else the system's own."""
        return self._temp_dir

    @temp_dir.setter
    def temp_dir(self, value: str | os.PathLike[str] | None) -> None:
        self._temp_dir = None if value is None else _folder("temp_dir", value)

    @property
    def verbosity(self) -> str:
        """Level of the ``scdlkit`` logger: ``"DEBUG"``, ``"INFO"``, ``"WARNING"``, ``"ERROR"``, ``"CRITICAL"``."""
        return logging.getLevelName(logger.level)

    @verbosity.setter
    def verbosity(self, value: str | int) -> None:
        # integers are the levels of the standard library, such as logging.INFO (20)
        name = logging.getLevelName(value) if type(value) is int else str(value).upper()
        if name not in _LEVELS:
            raise ValueError(f"verbosity must be one of {', '.join(_LEVELS)}, found {value!r}.")
        logger.setLevel(name)

    def __repr__(self) -> str:
        return (
            f"Settings(cache_dir={str(self.cache_dir)!r}, cache_embeddings={self.cache_embeddings:g}, "
            f"device={self.device!r}, "
            f"precision={self.precision!r}, progress={self.progress}, temp_dir={self.temp_dir and str(self.temp_dir)!r}, verbosity={self.verbosity!r})"
        )


def _folder(name: str, value: str | os.PathLike[str]) -> Path:
    if not isinstance(value, str | os.PathLike) or not str(value).strip():
        raise ValueError(f"{name} must be the path of a folder, found {value!r}.")
    return Path(os.path.expanduser(value)).absolute()


settings = Settings()
