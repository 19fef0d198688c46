"""The distinct values of a cell: which they are, how often each occurs, and which of them each gene has.

They are few (counts, and their logarithms, repeat). A small count is its own code, any other value gets its place in a
small hash table, and where that is not enough, the values are sorted.
"""

from __future__ import annotations

import numba
import numpy as np

COUNTS = 1024  # counts below are their own code
TABLE_BITS = 12
TABLE = 1 << TABLE_BITS
MOST_IN_TABLE = TABLE // 4  # beyond, sorting is faster
CODES = COUNTS + TABLE
LANES = 8  # neighbours are counted apart: adding to the same place again and again would stall


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
        int32 ``[LANES, CODES or more]`` and uint32 ``[TABLE]``, all zero; left so.
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
    n_large = 0
    if not whole or highest >= COUNTS:
        n_large = _encode_hashed(keys, n, codes, whole, table, swap)
        if n_large < 0:
            return _encode_sorted(values, keys, n, codes, where, amount, what, order, swap, digits)
    _count(codes, n, tally)
    found = _read_counts(min(highest, COUNTS - 1), tally, where, amount, what) if whole else 0
    return found + _read_table(n_large, tally, table, where[found:], amount[found:], what[found:], order, swap, digits)


@numba.njit(nogil=True, cache=True)
def _encode_counts(values, n, codes):  # type: ignore[no-untyped-def]
    """Values as their own codes, ``COUNTS`` where they are larger; whether all below are whole, and the highest code."""
    other, highest = np.uint32(0), np.uint32(0)
    for j in range(n):
        value = values[j]
        code = np.int32(min(value, np.float32(COUNTS)))
        other = np.uint32(other | np.uint32(np.float32(code) != min(value, np.float32(COUNTS))))
        highest = max(highest, np.uint32(code))
        codes[j] = code
    return other == 0, np.int64(highest)


@numba.njit(nogil=True, cache=True)
def _count(codes, n, tally):  # type: ignore[no-untyped-def]
    even = n - n % LANES
    for j in range(0, even, LANES):
        for lane in range(LANES):
            tally[lane, codes[j + lane]] += 1
    for j in range(even, n):
        tally[0, codes[j]] += 1


@numba.njit(nogil=True, cache=True)
def _read_counts(highest, tally, where, amount, what):  # type: ignore[no-untyped-def]
    for lane in range(1, LANES):
        for code in range(highest + 1):
            tally[0, code] += tally[lane, code]
            tally[lane, code] = 0
    found = 0
    for code in range(1, highest + 1):
        where[found], amount[found], what[found] = code, tally[0, code], code
        found += tally[0, code] > 0
    tally[0, : highest + 1] = 0
    return found


@numba.njit(nogil=True, cache=True)
def _encode_hashed(keys, n, codes, large_only, table, places):  # type: ignore[no-untyped-def]
    """Places in the hash table as codes; returns the number of distinct keys, or -1 if there are too many."""
    found = 0
    for j in range(n):
        if large_only and codes[j] < COUNTS:
            continue
        key = keys[j]
        # Fibonacci hashing
        place = np.uint64(np.uint32(key * np.uint32(0x9E3779B9)) >> np.uint32(32 - TABLE_BITS))
        while table[place] != key:
            if table[place] == 0:
                if found == MOST_IN_TABLE:
                    table[:] = 0
                    return -1
                table[place] = key
                places[found] = place
                found += 1
                break
            place = (place + np.uint64(1)) & np.uint64(TABLE - 1)
        codes[j] = np.uint64(COUNTS) + place
    return found


@numba.njit(nogil=True, cache=True)
def _read_table(n, tally, table, where, amount, what, order, places, digits):  # type: ignore[no-untyped-def]
    keys = what.view(np.uint32)
    for i in range(n):
        keys[i] = table[places[i]]
        table[places[i]] = 0
    sorted_ = _sort(keys, n, order, amount, digits)
    for i in range(n):
        where[i] = COUNTS + places[sorted_[i]]
    for i in range(n):
        places[i] = keys[sorted_[i]]
    for i in range(n):
        keys[i] = places[i]
        amount[i] = 0
        for lane in range(LANES):
            amount[i] += tally[lane, where[i]]
            tally[lane, where[i]] = 0
    return n


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
