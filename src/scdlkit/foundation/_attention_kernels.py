"""Loops between the matrix products of attention in training on a CPU; bfloat16 arrays are passed as uint16.

Rows are those of scores ``[heads, queries, keys]``. Dropout decides about a weight by a hash of its place, so that the way
back finds the same ones without having kept them.
"""

from __future__ import annotations

import numba
import numpy as np

from ._vector_math import FAST, exp2, from_bf16, larger, to_bf16

_compile = numba.njit(nogil=True, cache=True, fastmath=FAST)
u32 = np.uint32  # after each step: numba widens to 64 bits
STEPS = 256


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
def softmax(scores, factor, logsum, rest, dropped, seed):  # type: ignore[no-untyped-def]
    """float32 ``scores`` to 2^(factor x (score - highest)), zero where dropped, in place.

    ``rest`` is what a row is still to be multiplied by, ``logsum`` the binary logarithm of the sum of 2^(factor x score).
    """
    for k in range(scores.shape[0]):
        for i in range(scores.shape[1]):
            row = scores[k, i]
            highest = row[0]
            for j in range(len(row)):
                highest = larger(highest, row[j])
            highest *= factor
            total = np.float32(0)
            for j in range(len(row)):
                power = exp2(row[j] * factor - highest)
                row[j] = power
                total += power
            logsum[k, i] = highest + np.log2(total)
            rest[k, i] = np.float32(STEPS) / (np.float32(STEPS - dropped) * total)
            if dropped > 0:
                key = _mix(u32(seed[k] + u32(i)))
                for j in range(len(row)):
                    row[j] *= _stays(key, j, dropped)


@_compile
def softmax_bf16(scores, factor, logsum, rest, dropped, seed):  # type: ignore[no-untyped-def]
    """:func:`softmax` on bfloat16."""
    for k in range(scores.shape[0]):
        for i in range(scores.shape[1]):
            row = scores[k, i]
            highest = from_bf16(row[0])
            for j in range(len(row)):
                highest = larger(highest, from_bf16(row[j]))
            highest *= factor
            total = np.float32(0)
            for j in range(len(row)):
                bits = to_bf16(exp2(from_bf16(row[j]) * factor - highest))
                row[j] = bits
                total += from_bf16(bits)
            logsum[k, i] = highest + np.log2(total)
            rest[k, i] = np.float32(STEPS) / (np.float32(STEPS - dropped) * total)
            if dropped > 0:
                key = _mix(u32(seed[k] + u32(i)))
                for j in range(len(row)):
                    row[j] = to_bf16(from_bf16(row[j]) * _stays(key, j, dropped))


@_compile
def go_back(scores, slopes, factor, scale, logsum, delta, dropped, seed):  # type: ignore[no-untyped-def]
    """float32 ``scores`` to attention weights, and ``slopes``, what is asked of the weights, to what is asked of the scores."""
    louder = np.float32(STEPS) / np.float32(STEPS - dropped)
    for k in range(scores.shape[0]):
        for i in range(scores.shape[1]):
            row, slope, level, mean = scores[k, i], slopes[k, i], logsum[k, i], delta[k, i]
            if dropped > 0:
                key = _mix(u32(seed[k] + u32(i)))
                for j in range(len(row)):
                    weight = exp2(row[j] * factor - level)
                    here = _stays(key, j, dropped) * louder
                    row[j] = weight * here
                    slope[j] = weight * (here * slope[j] - mean) * scale
            else:
                for j in range(len(row)):
                    weight = exp2(row[j] * factor - level)
                    row[j] = weight
                    slope[j] = weight * (slope[j] - mean) * scale


@_compile
def go_back_bf16(scores, slopes, factor, scale, logsum, delta, dropped, seed):  # type: ignore[no-untyped-def]
    """:func:`go_back` on bfloat16."""
    louder = np.float32(STEPS) / np.float32(STEPS - dropped)
    for k in range(scores.shape[0]):
        for i in range(scores.shape[1]):
            row, slope, level, mean = scores[k, i], slopes[k, i], logsum[k, i], delta[k, i]
            if dropped > 0:
                key = _mix(u32(seed[k] + u32(i)))
                for j in range(len(row)):
                    weight = exp2(from_bf16(row[j]) * factor - level)
                    here = _stays(key, j, dropped) * louder
                    row[j] = to_bf16(weight * here)
                    slope[j] = to_bf16(weight * (here * from_bf16(slope[j]) - mean) * scale)
            else:
                for j in range(len(row)):
                    weight = exp2(from_bf16(row[j]) * factor - level)
                    row[j] = to_bf16(weight)
                    slope[j] = to_bf16(weight * (from_bf16(slope[j]) - mean) * scale)
