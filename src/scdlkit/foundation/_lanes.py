"""Vectors of float32 as values of compiled loops, and tiles of matrix products that stay in registers.

Loops over numbers become vector instructions by themselves; a tile of a product does not, because its sums would have to
be 24 variables. So these few operations are written as LLVM instructions. Places in memory are addresses in bytes; ``like``
is any number of the type that memory holds: float32, or uint16 for bfloat16.
"""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.codegen import get_host_cpu_features
from numba.core.datamodel import models
from numba.extending import intrinsic, register_model

from ._vector_math import POWERS

_instructions: Any = intrinsic  # a decorator without a type: what it makes is called as a function of numbers


def _features() -> set[str]:
    """What numba compiles for."""
    given = vars(numba.config)["CPU_FEATURES"]  # of the environment
    named = get_host_cpu_features() if given is None else given
    return {name[1:] for name in named.split(",") if name.startswith("+")}


_HAS = _features()
LANES = 16 if "avx512f" in _HAS else 8
ROWS = 6  # of a tile
VECTORS = (
    4 if LANES == 16 else 2
)  # of a tile, side by side: with a row of the right side its sums nearly fill the registers
CAN_MULTIPLY = {  # whether there are instructions for numbers of so many bytes
    4: "avx512f" in _HAS or {"avx2", "fma"} <= _HAS,
    2: {"avx512f", "avx512bf16"} <= _HAS,
}

_FLOAT, _INT, _SHORT, _LONG = ir.FloatType(), ir.IntType(32), ir.IntType(16), ir.IntType(64)
_FLOATS, _INTS, _SHORTS = (ir.VectorType(kind, LANES) for kind in (_FLOAT, _INT, _SHORT))


class _Lanes(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"Lanes({LANES})")


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Any) -> None:
        super().__init__(dmm, fe_type, _FLOATS)


_lanes = _Lanes()
_address = types.int64


def _all(x: float) -> Any:
    """The same constant in every lane."""
    return ir.Constant(_FLOATS if isinstance(x, float) else _INTS, [x] * LANES)


def _read(b: Any, address: Any, kind: Any, offset: int = 0) -> Any:
    return b.load(b.inttoptr(b.add(address, _LONG(offset)), kind.as_pointer()), align=2)


def _write(b: Any, value: Any, address: Any, offset: int = 0) -> None:
    b.store(value, b.inttoptr(b.add(address, _LONG(offset)), value.type.as_pointer()), align=2)


def _spread(b: Any, x: Any) -> Any:
    """``x`` in every lane."""
    nothing = ir.Constant(ir.VectorType(x.type, LANES), ir.Undefined)
    return b.shuffle_vector(b.insert_element(nothing, x, _INT(0)), nothing, _all(0))


def _call(b: Any, name: str, result: Any, *given: Any) -> Any:
    kind = ir.FunctionType(result, [x.type for x in given])
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), given)


@_instructions
def load(context: Any, address: Any) -> Any:
    """float32 from memory."""
    return _lanes(_address), lambda _, b, __, given: _read(b, given[0], _FLOATS)


@_instructions
def splat(context: Any, x: Any) -> Any:
    """The same float32 in every lane."""
    return _lanes(types.float32), lambda _, b, __, given: _spread(b, given[0])


@_instructions
def add(context: Any, x: Any, y: Any) -> Any:
    """Sums, lane by lane."""
    return _lanes(_lanes, _lanes), lambda _, b, __, given: b.fadd(*given)


@_instructions
def subtract(context: Any, x: Any, y: Any) -> Any:
    """Differences, lane by lane."""
    return _lanes(_lanes, _lanes), lambda _, b, __, given: b.fsub(*given)


@_instructions
def multiply(context: Any, x: Any, y: Any) -> Any:
    """Products, lane by lane."""
    return _lanes(_lanes, _lanes), lambda _, b, __, given: b.fmul(*given)


def _larger(b: Any, x: Any, y: Any) -> Any:
    return b.select(b.fcmp_ordered(">", x, y), x, y)


@_instructions
def larger(context: Any, x: Any, y: Any) -> Any:
    """The larger ones, lane by lane."""
    return _lanes(_lanes, _lanes), lambda _, b, __, given: _larger(b, *given)


@_instructions
def first(context: Any, x: Any, n: Any) -> Any:
    """The first ``n`` lanes, zero in the others."""

    def write(_: Any, b: Any, __: Any, given: Any) -> Any:
        places = ir.Constant(_INTS, list(range(LANES)))
        inside = b.icmp_signed("<", places, _spread(b, b.trunc(given[1], _INT)))
        return b.select(inside, given[0], _all(0.0))

    return _lanes(_lanes, types.int64), write


def _folded(join: Any) -> Any:
    """All lanes to one number, half of them with the other half again and again."""

    def write(_: Any, b: Any, __: Any, given: Any) -> Any:
        x, step = given[0], LANES // 2
        while step:
            x = join(b, x, b.shuffle_vector(x, x, ir.Constant(_INTS, [lane ^ step for lane in range(LANES)])))
            step //= 2
        return b.extract_element(x, _INT(0))

    return write


@_instructions
def sum_of(context: Any, x: Any) -> Any:
    """Sum of the lanes."""
    return types.float32(_lanes), _folded(lambda b, x, y: b.fadd(x, y))


@_instructions
def largest_of(context: Any, x: Any) -> Any:
    """The largest lane."""
    return types.float32(_lanes), _folded(_larger)


@_instructions
def exp2(context: Any, x: Any) -> Any:
    """2^x of what is not positive."""

    def write(_: Any, b: Any, __: Any, given: Any) -> Any:
        x = _larger(b, given[0], _all(-126.0))
        whole = _call(b, f"llvm.roundeven.v{LANES}f32", _FLOATS, x)
        part, (power, *others) = b.fsub(x, whole), (_all(float(c)) for c in POWERS)
        for coefficient in others:
            power = _call(b, f"llvm.fma.v{LANES}f32", _FLOATS, power, part, coefficient)
        exponent = b.shl(b.fptosi(whole, _INTS), _all(23))
        return b.bitcast(b.add(b.bitcast(power, _INTS), exponent), _FLOATS)

    return _lanes(_lanes), write


def _is_half(like: Any) -> bool:
    return bool(like == types.uint16)


@_instructions
def in_halves(context: Any, like: Any) -> Any:
    """Whether numbers of this type are two in a word."""
    return types.boolean(like), lambda _, __, ___, ____: ir.IntType(1)(_is_half(like))


@_instructions
def size_of(context: Any, like: Any) -> Any:
    """Bytes of a number of this type."""
    return types.int64(like), lambda _, __, ___, ____: _LONG(2 if _is_half(like) else 4)


@_instructions
def in_type(context: Any, x: Any, like: Any) -> Any:
    """The nearest numbers of a type, as float32; of two that are as near the larger one in size."""

    def write(_: Any, b: Any, __: Any, given: Any) -> Any:
        if not _is_half(like):
            return given[0]
        bits = b.add(b.bitcast(given[0], _INTS), _all(0x8000))
        return b.bitcast(b.and_(bits, _all(-0x10000)), _FLOATS)

    return _lanes(_lanes, like), write


@_instructions
def store(context: Any, address: Any, x: Any, like: Any) -> Any:
    """Write numbers of a type, see :func:`in_type`, to memory."""

    def write(_: Any, b: Any, __: Any, given: Any) -> None:
        bits = b.bitcast(given[1], _INTS)
        _write(b, b.trunc(b.lshr(bits, _all(16)), _SHORTS) if _is_half(like) else bits, given[0])

    return types.void(_address, _lanes, like), write


@_instructions
def copy(context: Any, source: Any, target: Any) -> Any:
    """As many bytes as a vector has."""
    return types.void(_address, _address), lambda _, b, __, given: _write(b, _read(b, given[0], _INTS), given[1])


@_instructions
def interleave(context: Any, one: Any, other: Any, target: Any) -> Any:
    """``LANES`` numbers of 16 bits from each of two places: one, other, one, other."""

    def write(_: Any, b: Any, __: Any, given: Any) -> None:
        low, high = (b.zext(_read(b, place, _SHORTS), _INTS) for place in given[:2])
        _write(b, b.or_(low, b.shl(high, _all(16))), given[2])

    return types.void(_address, _address, _address), write


@_instructions
def transpose(context: Any, source: Any, row: Any, last: Any, target: Any, target_row: Any) -> Any:
    """A square of ``LANES`` x ``LANES`` words of 32 bits; rows after ``last`` are that one again."""

    def write(_: Any, b: Any, __: Any, given: Any) -> None:
        source, row, last, target, target_row = given
        lines = []
        for i in range(LANES):
            line = b.select(b.icmp_signed("<", _LONG(i), last), _LONG(i), last)
            lines.append(_read(b, b.add(source, b.mul(row, line)), _INTS))
        step = 1
        while step < LANES:  # of every two rows that are a step apart, every other step of numbers change places
            for i in (i for i in range(LANES) if not i & step):
                upper, lower = lines[i], lines[i | step]
                lines[i] = _picked(b, upper, lower, [(LANES + (j ^ step)) if j & step else j for j in range(LANES)])
                lines[i | step] = _picked(
                    b, upper, lower, [(LANES + j) if j & step else j ^ step for j in range(LANES)]
                )
            step *= 2
        for i, line in enumerate(lines):
            _write(b, line, b.add(target, b.mul(target_row, _LONG(i))))

    return types.void(*[_address] * 5), write


def _picked(b: Any, x: Any, y: Any, lanes: list[int]) -> Any:
    return b.shuffle_vector(x, y, ir.Constant(_INTS, lanes))


def _tile(vectors: int) -> Any:
    """A product of :data:`ROWS` rows with ``vectors`` vectors of columns."""

    @_instructions
    def tile(
        context: Any, left: Any, left_row: Any, right: Any, right_row: Any, n: Any, out: Any, out_row: Any, like: Any
    ) -> Any:
        kind, word = (_INTS, _INT) if _is_half(like) else (_FLOATS, _FLOAT)

        def write(_: Any, b: Any, __: Any, given: Any) -> None:
            left, left_row, right, right_row, n, out, out_row = given[:7]
            rows = [b.add(left, b.mul(left_row, _LONG(i))) for i in range(ROWS)]
            before, loop, after = b.block, b.append_basic_block(), b.append_basic_block()
            b.branch(loop)
            b.position_at_end(loop)
            k, line = b.phi(_LONG), b.phi(_LONG)
            sums = [[b.phi(_FLOATS) for _ in range(vectors)] for _ in range(ROWS)]
            columns = [_read(b, line, kind, 4 * LANES * j) for j in range(vectors)]
            new = []
            for row, old in zip(rows, sums, strict=True):
                x = _spread(b, _read(b, b.add(row, b.shl(k, _LONG(2))), word))
                new.append([_accumulate(b, *both, x, _is_half(like)) for both in zip(old, columns, strict=True)])
            following = b.add(k, _LONG(1))
            changes = [(k, _LONG(0), following), (line, right, b.add(line, right_row))]
            for olds, news in zip(sums, new, strict=True):
                changes += [(old, _all(0.0), now) for old, now in zip(olds, news, strict=True)]
            for variable, start, now in changes:
                variable.add_incoming(start, before)
                variable.add_incoming(now, loop)
            b.cbranch(b.icmp_signed("<", following, n), loop, after)
            b.position_at_end(after)
            for i, news in enumerate(new):
                for j, total in enumerate(news):
                    _write(b, total, b.add(out, b.mul(out_row, _LONG(i))), 4 * LANES * j)

        return types.void(*[_address] * 7, like), write

    return tile


def _accumulate(b: Any, total: Any, column: Any, x: Any, half: bool) -> Any:
    if half:  # two bfloat16 in each word
        return _call(b, f"llvm.x86.avx512bf16.dpbf16ps.{32 * LANES}", _FLOATS, total, x, column)
    return _call(b, f"llvm.fma.v{LANES}f32", _FLOATS, x, column, total)


_tile1, _tile2, _tile3, _tile4 = (_tile(vectors) for vectors in (1, 2, 3, 4))


@numba.njit(nogil=True, inline="always")
def product(vectors, left, left_row, right, right_row, n, out, out_row, like):  # type: ignore[no-untyped-def]
    """Tile of a matrix product: float32 ``[ROWS, vectors x LANES]`` at ``out``.

    ``left`` is ``[ROWS, n]`` and ``right`` ``[n, vectors x LANES]``, of words of 32 bits: a float32, or two neighbours in
    a sum as bfloat16. ``..._row`` is how many bytes a row takes.
    """
    if vectors == 4:
        _tile4(left, left_row, right, right_row, n, out, out_row, like)
    elif vectors == 3:
        _tile3(left, left_row, right, right_row, n, out, out_row, like)
    elif vectors == 2:
        _tile2(left, left_row, right, right_row, n, out, out_row, like)
    else:
        _tile1(left, left_row, right, right_row, n, out, out_row, like)
