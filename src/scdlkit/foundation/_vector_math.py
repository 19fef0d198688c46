"""Arithmetic on 32-bit numbers that numba's own types would widen to 64 bits, which keeps loops from being vectorised.

bfloat16 is passed as uint16, its bits.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_instructions: Any = intrinsic  # a decorator without a type: what it makes is called as a function of numbers

FAST = {"reassoc", "contract", "nnan", "ninf", "nsz"}  # NaN and infinities are looked for in the results
_FLAGS = ("nnan", "ninf", "nsz")
_FLOAT, _INT, _SHORT, _BYTE = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(8)
# 2^x on [-0.5, 0.5], highest power first: the fit of least relative error that is 1 at 0; off by 1.6e-7 at most
POWERS = tuple(np.float32(c) for c in (1.32647e-3, 9.67151e-3, 5.550734e-2, 0.24022242, 0.69314698, 1.0))


@_instructions
def _truncate(context: Any, x: Any) -> Any:
    """Whole part of a float32, as float32."""
    return types.float32(types.float32), lambda _, b, __, given: b.sitofp(b.fptosi(given[0], _INT), _FLOAT)


@_instructions
def _two_to(context: Any, x: Any) -> Any:
    """2^x of a whole float32 from -126 to 127, by writing the exponent."""

    def write(_: Any, b: Any, __: Any, given: Any) -> Any:
        return b.bitcast(b.shl(b.add(b.fptosi(given[0], _INT), _INT(127)), _INT(23)), _FLOAT)

    return types.float32(types.float32), write


@_instructions
def larger(context: Any, x: Any, y: Any) -> Any:
    """The larger float32."""

    def write(_: Any, b: Any, __: Any, given: Any) -> Any:
        return b.select(b.fcmp_ordered(">", *given, flags=_FLAGS), *given, flags=_FLAGS)

    return types.float32(types.float32, types.float32), write


@_instructions
def widen(context: Any, x: Any) -> Any:
    """The float32 of a bfloat16, or of a float32."""
    if x == types.float32:
        return types.float32(types.float32), lambda _, __, ___, given: given[0]
    return types.float32(types.uint16), lambda _, b, __, given: b.bitcast(
        b.shl(b.zext(given[0], _INT), _INT(16)), _FLOAT
    )


def _to_bf16(_: Any, b: Any, __: Any, given: Any) -> Any:
    bits = b.bitcast(given[0], _INT)
    last = b.and_(b.lshr(bits, _INT(16)), _INT(1))
    return b.trunc(b.lshr(b.add(bits, b.add(_INT(0x7FFF), last)), _INT(16)), _SHORT)


@_instructions
def to_bf16(context: Any, x: Any) -> Any:
    """The nearest bfloat16 of a float32, ties to even."""
    return types.uint16(types.float32), _to_bf16


@_instructions
def narrow(context: Any, x: Any, like: Any) -> Any:
    """A float32 in the type of ``like``: as it is, or the nearest bfloat16."""
    if like == types.float32:
        return types.float32(types.float32, types.float32), lambda _, __, ___, given: given[0]
    return types.uint16(types.float32, types.uint16), _to_bf16


@_instructions
def to_int8(context: Any, x: Any) -> Any:
    """Whole part of a float32 from -128 to 127, as int8."""
    return types.int8(types.float32), lambda _, b, __, given: b.trunc(b.fptosi(given[0], _INT), _BYTE)


@_instructions
def from_int32(context: Any, x: Any) -> Any:
    """The float32 of an int32."""
    return types.float32(types.int32), lambda _, b, __, given: b.sitofp(given[0], _FLOAT)


@numba.njit(nogil=True, fastmath=FAST, inline="always")
def exp2(x):  # type: ignore[no-untyped-def]
    """2^x of a float32 that is not positive."""
    x = larger(x, np.float32(-126))
    whole = _truncate(x - np.float32(0.5))
    part = x - whole
    power = POWERS[0]
    for coefficient in POWERS[1:]:
        power = power * part + coefficient
    return power * _two_to(whole)
