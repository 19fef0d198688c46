"""Loops between the matrix products of attention on a CPU, on float32 or on bfloat16, which is passed as uint16.

Rows are those of scores ``[heads, queries, keys]``. Dropout decides about a weight by a hash of its place, so that the way
back finds the same ones without having kept them.
"""

from __future__ import annotations

import numba
import numpy as np

from ._dropout import STEPS
from ._vector_math import FAST, exp2, larger, narrow, widen

_compile = numba.njit(nogil=True, cache=True, fastmath=FAST)
u32 = np.uint32  # after each step: numba widens to 64 bits


@numba.njit(nogil=True, inline="always")
def _mix(x):  # type: ignore[no-untyped-def]
    """Bijective 32-bit mixing."""
    x = u32(u32(x ^ u32(x >> u32(16))) * u32(0x7FEB352D))
    x = u32(u32(x ^ u32(x >> u32(15))) * u32(0x846CA68B))
    return u32(x ^ u32(x >> u32(16)))


@numba.njit(nogil=True, inline="always")
def _stays(key, j, dropped):  # type: ignore[no-untyped-def]
    return np.float32(u32(_mix(u32(key ^ u32(j))) >> u32(24)) >= u32(dropped))


@_compile
def softmax(scores, factor, logsum, rest, dropped, first_rows):  # type: ignore[no-untyped-def]
    """``scores`` to 2^(factor x (score - highest)), zero where dropped, in place.

    ``rest`` is what a row is still to be multiplied by, ``logsum`` the binary logarithm of the sum of 2^(factor x score),
    where it is not empty.
    """
    for k in range(scores.shape[0]):
        for i in range(scores.shape[1]):
            row = scores[k, i]
            highest = widen(row[0])
            for j in range(len(row)):
                highest = larger(highest, widen(row[j]))
            highest *= factor
            total = np.float32(0)
            for j in range(len(row)):
                power = narrow(exp2(widen(row[j]) * factor - highest), row[j])
                row[j] = power
                total += widen(power)
            if logsum.size > 0:
                logsum[k, i] = highest + np.log2(total)
            rest[k, i] = np.float32(STEPS) / (np.float32(STEPS - dropped) * total)
            if dropped > 0:
                key = _mix(u32(first_rows[k] + u32(i)))
                for j in range(len(row)):
                    row[j] = narrow(widen(row[j]) * _stays(key, j, dropped), row[j])


@_compile
def put_heads(attended, rest, row, head, out):  # type: ignore[no-untyped-def]
    """``attended [heads, n, width]`` times ``rest [heads, n]`` into ``out [tokens, embsize]``, from ``row`` and ``head`` on."""
    heads, n, width = attended.shape
    for i in range(n):
        for k in range(heads):
            factor, place = rest[k, i], (head + k) * width
            for j in range(width):
                value = attended[k, i, j]
                out[row + i, place + j] = narrow(widen(value) * factor, value)


@_compile
def go_back(scores, slopes, factor, scale, logsum, delta, dropped, first_rows):  # type: ignore[no-untyped-def]
    """``scores`` to attention weights, and ``slopes``, what is asked of the weights, to what is asked of the scores."""
    louder = np.float32(STEPS) / np.float32(STEPS - dropped)
    for k in range(scores.shape[0]):
        for i in range(scores.shape[1]):
            row, slope, level, mean = scores[k, i], slopes[k, i], logsum[k, i], delta[k, i]
            if dropped > 0:
                key = _mix(u32(first_rows[k] + u32(i)))
                for j in range(len(row)):
                    weight = exp2(widen(row[j]) * factor - level)
                    here = _stays(key, j, dropped) * louder
                    slope[j] = narrow(weight * (here * widen(slope[j]) - mean) * scale, row[j])
                    row[j] = narrow(weight * here, row[j])
            else:  # without the hash
                for j in range(len(row)):
                    weight = exp2(widen(row[j]) * factor - level)
                    slope[j] = narrow(weight * (widen(slope[j]) - mean) * scale, row[j])
                    row[j] = narrow(weight, row[j])
