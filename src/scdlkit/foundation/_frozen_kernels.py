"""Loops between the matrix products of a frozen encoder on the CPU: residual and layer norm, quantisation.

PyTorch's own take about as long as the products they stand between. ``scale`` and ``shift`` of a layer norm are its
weight and bias. bfloat16 arrays are passed as uint16.
"""

from __future__ import annotations

import numba
import numpy as np

from ._vector_math import FAST, from_int32, larger, to_bf16, to_int8, widen

_compile = numba.njit(nogil=True, cache=True, fastmath=FAST)
_EPS = np.float32(1e-5)


@_compile
def add_rows(table, rows, other_table, other_rows, out):  # type: ignore[no-untyped-def]
    """``out[i] = table[rows[i]] + other_table[other_rows[i]]``, float32."""
    for i in range(len(rows)):
        one, other, target = table[rows[i]], other_table[other_rows[i]], out[i]
        for j in range(len(target)):
            target[j] = one[j] + other[j]


@_compile
def _normalise(row, scale, shift):  # type: ignore[no-untyped-def]
    n = np.float32(len(row))
    total = np.float32(0)
    for j in range(len(row)):
        total += row[j]
    mean = total / n
    total = np.float32(0)
    for j in range(len(row)):
        apart = row[j] - mean
        total += apart * apart
    factor = np.float32(1) / np.sqrt(total / n + _EPS)
    for j in range(len(row)):
        row[j] = (row[j] - mean) * factor * scale[j] + shift[j]


@_compile
def add_and_norm(x, delta, scale, shift):  # type: ignore[no-untyped-def]
    """``x = layer_norm(x + delta)``, float32."""
    for i in range(len(x)):
        row, other = x[i], delta[i]
        for j in range(len(row)):
            row[j] += other[j]
        _normalise(row, scale, shift)


@_compile
def add_and_norm_bf16(x, delta, scale, shift, rounded):  # type: ignore[no-untyped-def]
    """``x = layer_norm(x + delta)`` with float32 ``x`` and bfloat16 ``delta``; ``rounded`` is ``x`` as bfloat16."""
    for i in range(len(x)):
        row, other, short = x[i], delta[i], rounded[i]
        for j in range(len(row)):
            row[j] += widen(other[j])
        _normalise(row, scale, shift)
        for j in range(len(row)):
            short[j] = to_bf16(row[j])


@_compile
def round_bf16(x, rounded):  # type: ignore[no-untyped-def]
    """float32 to bfloat16."""
    for i in range(len(x)):
        row, short = x[i], rounded[i]
        for j in range(len(row)):
            short[j] = to_bf16(row[j])


@_compile
def quantise_rows(x, whole, unit):  # type: ignore[no-untyped-def]
    """Rows of bfloat16 ``x`` as int8 times ``unit[i]``."""
    for i in range(len(x)):
        row, target = x[i], whole[i]
        highest = np.float32(1e-30)
        for j in range(len(row)):
            highest = larger(highest, abs(widen(row[j])))
        factor = np.float32(127) / highest
        unit[i] = highest / np.float32(127)
        for j in range(len(row)):
            value = widen(row[j]) * factor
            target[j] = to_int8(value + np.copysign(np.float32(0.5), value))


@_compile
def scale_products(products, unit, scale, shift, lowest, out):  # type: ignore[no-untyped-def]
    """bfloat16 ``out`` = larger of ``lowest`` and int32 ``products`` times ``unit`` of the row times ``scale``, plus ``shift``."""
    for i in range(len(products)):
        row, target, factor = products[i], out[i], unit[i]
        for j in range(len(row)):
            target[j] = to_bf16(larger(from_int32(row[j]) * factor * scale[j] + shift[j], lowest))
