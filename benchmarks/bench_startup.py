"""How long `import scdlkit` takes beyond `import scanpy`, in fresh interpreters, interleaved, with a null control.

    python benchmarks/bench_startup.py [--repeats 15] [--json startup.json]

Everything ran once before, so that bytecode is written and the files are in memory. Seconds are of a whole process, from
its start to its end: wall time, and CPU time, which other work on the machine changes less. Differences are between runs of the
same repeat. Imports are lazy, so the cost of what is put off stands beside it: the first use of ``AnnotationRunner`` loads
PyTorch, whose own import is timed too, and all else that it needs.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import numpy as np
from _report import add_json_option, installed_environment, write_report

TARGET = 1.0  # seconds beyond scanpy
HEAVY = ("torch", "peft", "accelerate", "transformers", "celltypist", "dask")
SCANPY = "import scanpy"
BEYOND = {
    "import scanpy again (null)": SCANPY,
    "import scanpy, scdlkit": f"{SCANPY}, scdlkit",
    "the same, all of pp, get, pl": f"{SCANPY}, scdlkit as sk; sk.pp, sk.get, sk.pl",
    "the same, AnnotationRunner": f"{SCANPY}, scdlkit as sk; sk.AnnotationRunner",
    "import scanpy, torch": f"{SCANPY}, torch",
}
ALONE = {
    "python": "",
    "import scdlkit": "import scdlkit",
    "scdlkit --help": "from scdlkit.cli import app; app(['--help'])",  # as the installed command does
}


def run(code: str) -> tuple[float, float]:
    """Wall and CPU seconds of a fresh interpreter."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-c", code]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=installed_environment())
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def loaded(code: str) -> list[str]:
    """The heavy modules that are there afterwards."""
    show = f"{code}\nimport sys; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", show], check=True, capture_output=True, text=True)
    return done.stdout.split()


def spread(values: np.ndarray) -> dict[str, float]:
    return {"median": float(np.median(values)), "lowest": float(values.min()), "highest": float(values.max())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    add_json_option(parser)
    arguments = parser.parse_args()
    codes = {SCANPY: SCANPY, **BEYOND, **ALONE}
    modules = {code: loaded(code) for code in (SCANPY, "import scdlkit", "import scdlkit; scdlkit.AnnotationRunner")}
    for code in codes.values():
        run(code)
    seconds = {name: np.empty((arguments.repeats, 2)) for name in codes}
    for repeat in range(arguments.repeats):
        for name, code in codes.items():
            seconds[name][repeat] = run(code)
    rows = []
    for name, taken in seconds.items():
        row = {"what": name, "wall": spread(taken[:, 0]), "cpu": spread(taken[:, 1])}
        shown = "{median:6.2f} s [{lowest:.2f} - {highest:.2f}]".format(**row["wall"])
        if name in BEYOND:
            beyond = taken - seconds[SCANPY]
            row |= {"wall_beyond_scanpy": spread(beyond[:, 0]), "cpu_beyond_scanpy": spread(beyond[:, 1])}
            for clock in ("wall", "cpu"):
                text = "{median:+.2f} s [{lowest:+.2f} - {highest:+.2f}]".format(**row[f"{clock}_beyond_scanpy"])
                shown += f"  beyond scanpy, {clock}: {text}"
        rows.append(row)
        print(f"{name:30} {shown}")
    for code, names in modules.items():
        print(f"loaded by {code!r}: {', '.join(names) or 'none'} of {', '.join(HEAVY)}")
    found = next(row for row in rows if row["what"] == "import scanpy, scdlkit")["wall_beyond_scanpy"]["median"]
    print(f"import scdlkit beyond scanpy: {found:.2f} s (target at most {TARGET:.1f} s)")
    results = {"repeats": arguments.repeats, "target_seconds": TARGET, "rows": rows, "loaded": modules}
    write_report(arguments.json, __file__, results)


if __name__ == "__main__":
    main()
