"""What every benchmark writes with ``--json``: its name and command, the machine, versions, and the results."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

_PACKAGES = ("scdlkit", "torch", "numpy", "scipy", "scikit-learn", "anndata", "scanpy")


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the machine and the results")


def write_report(path: Path | None, script: str, results: Any, *, threads: int | None = None) -> None:
    """Write the results (plain values, or a table) of ``script``; nothing without a path.

    ``threads`` that were asked for; by default those of ``OMP_NUM_THREADS``.
    """
    if path is None:
        return
    report = {
        "benchmark": Path(script).stem,
        "command": shlex.join(["python", f"benchmarks/{Path(script).name}", *sys.argv[1:]]),
        "machine": machine(threads),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "results": _plain(results),
    }
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def installed_environment() -> dict[str, str]:
    """Of a process that starts as after an installation: its modules are compiled before."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def machine(threads: int | None) -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if threads is None:  # PyTorch's own number is no answer: parallel kernels of numba change it
        asked = os.environ.get("OMP_NUM_THREADS", "")
        threads = int(asked) if asked.isdigit() else cores
    torch = sys.modules.get("torch")  # a benchmark that needs none shall not load it
    return {
        "system": platform.system(),
        "cpu": _cpu_model(),
        "cores": cores,
        "threads": threads,
        "gpu": torch.cuda.get_device_name() if torch and torch.cuda.is_available() else None,
    }


def _plain(value: Any) -> Any:
    """As JSON knows it, which has no numbers for what is missing or infinite."""
    if isinstance(value, pd.DataFrame):
        value = value.to_dict("records")
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(inner) for inner in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
