"""Check a built wheel: every file of the source tree is in it, nothing else is, and it is small enough for PyPI.

Usage: python scripts/check_wheel.py dist/scdlkit-*.whl
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"
MAX_MB = 30


def check_wheel(wheel: Path) -> list[str]:
    """Problems of a wheel, none when it is good."""
    expected = {
        path.relative_to(SOURCE).as_posix()
        for path in SOURCE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc"
    }
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    problems = [f"missing from the wheel: {name}" for name in sorted(expected - packed)]
    problems += [f"not in the source tree: {name}" for name in sorted(packed - expected)]
    size = wheel.stat().st_size / 1e6
    if size > MAX_MB:
        problems.append(f"{size:.1f} MB, more than {MAX_MB} MB")
    return problems


def main(paths: list[str]) -> int:
    """Check every wheel named on the command line; the exit status is 1 when one has a problem."""
    if not paths:
        print("usage: python scripts/check_wheel.py WHEEL...", file=sys.stderr)
        return 2
    status = 0
    for path in map(Path, paths):
        problems = check_wheel(path)
        print(f"{path.name}: {path.stat().st_size / 1e6:.2f} MB", *(problems or ["complete"]), sep="\n  ")
        status |= bool(problems)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
