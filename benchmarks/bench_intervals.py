"""How often do the 95 % intervals of the comparison hold the true macro-F1, by the kind of fits?

A classifier of three classes with known confusions is measured on data sets drawn anew: once on 15 % of the cells, on
several overlapping parts of 15 %, and on folds. Nothing is trained, so what training adds to the spread is not in here.
"""

from __future__ import annotations

import argparse

import numpy as np
from _report import add_json_option, write_report

from scdlkit.foundation.intervals import resample_macro_f1

JOINT = np.array([[0.45, 0.05, 0.0], [0.03, 0.2, 0.07], [0.02, 0.03, 0.15]])  # true x predicted class
KINDS = {"one split": 1, "5 folds": 0, "3 repeats": 3, "5 repeats": 5, "20 repeats": 20}
SHARE = 0.15


def draw(n: int, rng: np.random.Generator) -> np.ndarray:
    return rng.choice(JOINT.size, size=n, p=JOINT.ravel())


def macro_f1(pairs: np.ndarray) -> float:
    counts = np.bincount(pairs, minlength=JOINT.size).reshape(JOINT.shape)
    return float(np.mean(2 * np.diagonal(counts) / (counts.sum(0) + counts.sum(1))))


def parts(n_repeats: int, n: int, rng: np.random.Generator) -> list[np.ndarray]:
    if n_repeats == 0:
        return np.array_split(rng.permutation(n), 5)
    return [rng.permutation(n)[: int(SHARE * n)] for _ in range(n_repeats)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, nargs="+", default=[300, 1000])
    parser.add_argument("--data-sets", type=int, default=300)
    add_json_option(parser)
    options = parser.parse_args()
    rows = []
    rng = np.random.default_rng(0)
    print(f"{'cells':>6} {'fits':>10} {'held':>6} {'claimed error':>14} {'true error':>11}")
    for n in options.cells:
        for kind, n_repeats in KINDS.items():
            size = len(parts(n_repeats, n, rng)[0])
            truth = np.mean([macro_f1(draw(size, rng)) for _ in range(5000)])  # of a test set of this size
            found = []
            for seed in range(options.data_sets):
                true, predicted = np.divmod(draw(n, rng), len(JOINT))
                index = parts(n_repeats, n, rng)
                resampled = resample_macro_f1(
                    [true[i] for i in index], {"a": [predicted[i] for i in index]}, len(JOINT), seed=seed
                )
                found.append(resampled.score("a"))
            held = np.mean([score.low <= truth <= score.high for score in found])
            claimed, actual = np.mean([score.error for score in found]), np.std([score.value for score in found])
            rows.append({"cells": n, "fits": kind, "held": held, "claimed": claimed, "true": actual})
            print(f"{n:6d} {kind:>10} {held:6.0%} {claimed:14.4f} {actual:11.4f}")
    write_report(options.json, __file__, rows)


if __name__ == "__main__":
    main()
