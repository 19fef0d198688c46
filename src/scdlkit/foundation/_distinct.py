"""The distinct values of a cell: which they are, how often each occurs, and which of them each gene has.

They are few (counts, and their logarithms, repeat). A small count is its own code, any other value gets a number by a
small hash table, and where that is not enough, the values are sorted.
"""

from __future__ import annotations

import numba
import numpy as np

COUNTS = 1024  # counts below are their own code
MOST_HASHED = 1024  # other values; beyond, sorting is faster
CODES = COUNTS + MOST_HASHED
TABLE_BITS = 12
TABLE = 1 << TABLE_BITS
FREQUENT, LANES = 64, 8  # codes below are counted apart for neighbours: adding to one place again and again would stall
LAST = (LANES - 1) * FREQUENT  # where the last lane begins, which all other codes go on
_GENES_AT_A_TIME, _CODES_AT_A_TIME = 128, 16  # looked over together, to pass over them where there is nothing
u32 = np.uint32  # after each step: Numba widens to 64 bits, and half as many would fit a vector


@numba.njit(nogil=True, cache=True)
def find_distinct(values, keys, n, codes, tally, table, where, amount, what, order, swap, digits):  # type: ignore[no-untyped-def]
    """Distinct positive ``values[:n]``, in ascending order.

    Parameters
    ----------
    values, keys, n
        float32, the same memory as uint32, and how many.
    codes
        uint32, filled: a number for the value of each gene, equal where the values are.
    tally, table
        int32 ``[LAST + CODES]`` and uint64 ``[TABLE]``, all zero; left so.
    where, amount, what
        Filled for each distinct value: its code, how often it occurs, and itself.
    order, swap, digits
        Room to sort.

    Returns
    -------
    int
        Number of distinct values.
    """
    whole, highest = _encode_counts(values, n, codes)
    first, n_hashed = COUNTS if whole else 0, 0  # code of the first hashed one
    if not whole:
        n_hashed = _encode_all(keys, n, codes, table, swap)
    elif highest >= COUNTS:
        n_hashed = _encode_large(keys, n, codes, table, swap)
    if n_hashed > MOST_HASHED:
        _forget(n_hashed, table, swap)
        return _encode_sorted(values, keys, n, codes, where, amount, what, order, swap, digits)
    _count(codes, n, tally, order)
    total = tally[LAST:]
    found = _read_counts(min(highest, COUNTS - 1), total, where, amount, what) if whole else 0
    _read_hashed(n_hashed, first, total, table, where[found:], amount[found:], what[found:], order, swap, digits)
    return found + n_hashed


@numba.njit(nogil=True, cache=True)
def _encode_counts(values, n, codes):  # type: ignore[no-untyped-def]
    """Values as their own codes, ``COUNTS`` where they are larger; whether all below are whole, and the highest code."""
    other, highest = u32(0), u32(0)
    for j in range(n):
        value = values[j]
        code = np.int32(min(value, np.float32(COUNTS)))
        other = u32(other | u32(np.float32(code) != min(value, np.float32(COUNTS))))
        highest = max(highest, u32(code))
        codes[j] = code
    return other == 0, np.int64(highest)


@numba.njit(nogil=True, inline="always")
def _number(key, found, table, places):  # type: ignore[no-untyped-def]
    """The number of ``key`` in the hash table, which is ``found`` if it is new."""
    place = np.uint64(u32(key * u32(0x9E3779B9)) >> u32(32 - TABLE_BITS))  # Fibonacci hashing
    while True:
        entry = table[place]
        if u32(entry >> np.uint64(32)) == key:
            return np.int64(u32(entry))
        if entry == 0:
            table[place] = np.uint64(key) << np.uint64(32) | np.uint64(found)
            places[found] = place
            return found
        place = (place + np.uint64(1)) & np.uint64(TABLE - 1)


@numba.njit(nogil=True, cache=True)
def _encode_all(keys, n, codes, table, places):  # type: ignore[no-untyped-def]
    """Numbers as codes, in the order in which values are met; how many there are, which may be one too many."""
    found = 0
    for j in range(n):
        codes[j] = number = _number(keys[j], found, table, places)
        found += number == found
        if found > MOST_HASHED:
            break
    return found


@numba.njit(nogil=True, cache=True)
def _encode_large(keys, n, codes, table, places):  # type: ignore[no-untyped-def]
    """The same where the code is ``COUNTS``, as codes from there on; most genes have others."""
    found = 0
    for start in range(0, n, _GENES_AT_A_TIME):
        block, seen = codes[start : min(start + _GENES_AT_A_TIME, n)], u32(0)
        for j in range(len(block)):
            seen = u32(seen | block[j])
        if seen < u32(COUNTS):
            continue
        for j in range(len(block)):
            if block[j] < u32(COUNTS):
                continue
            number = _number(keys[start + j], found, table, places)
            block[j] = COUNTS + number
            found += number == found
            if found > MOST_HASHED:
                return found
    return found


@numba.njit(nogil=True, cache=True)
def _forget(n, table, places):  # type: ignore[no-untyped-def]
    for i in range(n):
        table[places[i]] = 0


@numba.njit(nogil=True, cache=True)
def _count(codes, n, tally, slots):  # type: ignore[no-untyped-def]
    """Count in lanes, and put the sums into the last one."""
    for j in range(n):
        code = codes[j]
        slots[j] = (
            u32(code + u32(LAST)) if code >= u32(FREQUENT) else u32(code + u32(u32(j & (LANES - 1)) * u32(FREQUENT)))
        )
    for j in range(n):
        tally[u32(slots[j])] += 1
    for lane in range(LANES - 1):
        for code in range(FREQUENT):
            tally[LAST + code] += tally[lane * FREQUENT + code]
            tally[lane * FREQUENT + code] = 0


@numba.njit(nogil=True, cache=True)
def _read_counts(highest, total, where, amount, what):  # type: ignore[no-untyped-def]
    found = 0
    for start in range(0, highest + 1, _CODES_AT_A_TIME):
        block, seen = total[start : start + _CODES_AT_A_TIME], np.int32(0)
        for j in range(_CODES_AT_A_TIME):
            seen = np.int32(seen | block[j])
        if seen == 0:
            continue
        for j in range(_CODES_AT_A_TIME):
            where[found] = start + j
            found += block[j] > 0
    for i in range(found):
        code = where[i]
        amount[i], what[i], total[code] = total[code], code, 0
    return found


@numba.njit(nogil=True, cache=True)
def _read_hashed(n, first, total, table, where, amount, what, order, places, digits):  # type: ignore[no-untyped-def]
    keys = what.view(np.uint32)
    for i in range(n):
        keys[i] = table[places[i]] >> np.uint64(32)
    _forget(n, table, places)
    sorted_ = _sort(keys, n, order, amount, digits)
    for i in range(n):
        where[i], places[i] = first + sorted_[i], keys[sorted_[i]]
    for i in range(n):
        keys[i], amount[i] = places[i], total[where[i]]
        total[where[i]] = 0


@numba.njit(nogil=True, cache=True)
def _encode_sorted(values, keys, n, codes, where, amount, what, order, swap, digits):  # type: ignore[no-untyped-def]
    """Ranks as codes."""
    sorted_ = _sort(keys, n, order, swap, digits)
    last = -1
    for i in range(n):
        item = sorted_[i]
        if last < 0 or what[last] != values[item]:
            last += 1
            what[last], where[last], amount[last] = values[item], last, 0
        codes[item] = last
        amount[last] += 1
    return last + 1


@numba.njit(nogil=True, cache=True)
def _sort(keys, n, order, swap, digits):  # type: ignore[no-untyped-def]
    """Argsort ``keys[:n]`` (uint32, the bits of positive float32) into ``order`` or ``swap``, whichever is returned."""
    for i in range(n):
        order[i] = i
    if n <= 40:  # insertion sort
        for i in range(1, n):
            item, j = order[i], i
            while j > 0 and keys[order[j - 1]] > keys[item]:
                order[j] = order[j - 1]
                j -= 1
            order[j] = item
        return order
    digits[:] = 0
    for i in range(n):
        for digit in range(4):
            digits[digit, (keys[i] >> np.uint32(8 * digit)) & np.uint32(255)] += 1
    source, target = order, swap
    for digit in range(4):
        shift = np.uint32(8 * digit)
        if digits[digit, (keys[0] >> shift) & np.uint32(255)] == n:  # all the same
            continue
        total = 0
        for value in range(256):
            total, digits[digit, value] = total + digits[digit, value], total
        for i in range(n):
            item = source[i]
            value = (keys[item] >> shift) & np.uint32(255)
            target[digits[digit, value]] = item
            digits[digit, value] += 1
        source, target = target, source
    return source
