"""Asking the processor for memory before it is needed."""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_instructions: Any = intrinsic  # a decorator without a type: what it makes is called as a function
_LINE = 16  # numbers of 32 bits in a cache line, of which 64 bytes is the usual size
_READ, _STAY, _DATA = 0, 2, 1  # what LLVM wants to know: for reading, into the second-level cache, no code


@_instructions
def _ask_for(context: Any, array: Any, position: Any) -> Any:
    def ask(context: Any, b: Any, signature: Any, given: Any) -> Any:
        start = context.make_array(signature.args[0])(context, b, given[0]).data
        place = b.bitcast(b.gep(start, [given[1]]), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, number, number, number])
        prefetch = b.module.declare_intrinsic("llvm.prefetch", [place.type], kind)
        b.call(prefetch, [place, number(_READ), number(_STAY), number(_DATA)])
        return context.get_dummy_value()

    return types.void(array, types.int64), ask


@numba.njit(nogil=True, inline="always")
def prefetch(one, other, start, stop):  # type: ignore[no-untyped-def]
    """Begin to load ``[start:stop]`` of two contiguous arrays of 32-bit numbers; past their ends nothing happens."""
    for j in range(start, stop, _LINE):
        _ask_for(one, j)
        _ask_for(other, j)
