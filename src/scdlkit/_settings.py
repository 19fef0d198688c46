"""Package-wide settings, their environment variables, and the package logger."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from platformdirs import user_cache_path

logger = logging.getLogger("scdlkit")
_handler = logging.StreamHandler()
_handler.setFormatter(logging.Formatter("%(message)s"))
logger.addHandler(_handler)

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_TRUE, _FALSE = {"1", "true", "yes", "on"}, {"0", "false", "no", "off"}


class Settings:
    """What every function of scdlkit reads when it is not told otherwise.

    Each setting starts from its environment variable: ``SCDLKIT_CACHE_DIR``, ``SCDLKIT_DEVICE``,
    ``SCDLKIT_PROGRESS``, ``SCDLKIT_VERBOSITY``.

    Example
    -------
    >>> import scdlkit as sk
    >>> sk.settings.device = "cpu"
    >>> sk.settings.progress = False
    """

    def __init__(self) -> None:
        environment = os.environ
        self.cache_dir = Path(environment.get("SCDLKIT_CACHE_DIR") or user_cache_path("scdlkit"))
        self.device = environment.get("SCDLKIT_DEVICE") or "auto"
        self.progress = environment.get("SCDLKIT_PROGRESS") or True
        self.verbosity = environment.get("SCDLKIT_VERBOSITY") or "INFO"

    @property
    def cache_dir(self) -> Path:
        """Folder for downloaded checkpoints."""
        return self._cache_dir

    @cache_dir.setter
    def cache_dir(self, value: str | os.PathLike[str]) -> None:
        self._cache_dir = Path(value).expanduser()

    @property
    def device(self) -> str:
        """Where the encoder runs: ``"auto"`` (CUDA, then CPU), ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"``."""
        return self._device

    @device.setter
    def device(self, value: str) -> None:
        if not isinstance(value, str) or value.split(":")[0] not in {"auto", "cpu", "cuda", "mps"}:
            raise ValueError(f"device must be 'auto', 'cpu', 'cuda', 'cuda:<n>' or 'mps', found {value!r}.")
        self._device = value

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
    def verbosity(self) -> str:
        """Level of the ``scdlkit`` logger: ``"DEBUG"``, ``"INFO"``, ``"WARNING"``, ``"ERROR"``, ``"CRITICAL"``."""
        return logging.getLevelName(logger.level)

    @verbosity.setter
    def verbosity(self, value: str) -> None:
        if str(value).upper() not in _LEVELS:
            raise ValueError(f"verbosity must be one of {', '.join(_LEVELS)}, found {value!r}.")
        logger.setLevel(str(value).upper())

    def __repr__(self) -> str:
        return (
            f"Settings(cache_dir={str(self.cache_dir)!r}, device={self.device!r}, "
            f"progress={self.progress}, verbosity={self.verbosity!r})"
        )


settings = Settings()
