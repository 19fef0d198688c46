"""The kernel behind tokens: bin the values of each cell in linear time.

The bin of a value depends on the distinct values of its cell and their counts alone, and these are few (counts, and
their logarithms, repeat): a small hash table finds them, the quantile edges are walked once, and each gene then looks
its bin up. Cells with many distinct values are radix-sorted instead.
"""

from __future__ import annotations

import numba
import numpy as np

_TABLE_BITS = 10
_TABLE = 1 << _TABLE_BITS
_MOST_DISTINCT = _TABLE // 2  # beyond, the table fills up and sorting is faster
_RADIX_BITS = 11
_RADIX = 1 << _RADIX_BITS
_SALT_SUBSET = 0xD1B54A32D192ED03


@numba.njit(nogil=True, cache=True, inline="always")
def _mix(x):  # type: ignore[no-untyped-def]
    """Bijective 64-bit mixing (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@numba.njit(nogil=True, cache=True)
def _sort(keys, n, order, swap, counts):  # type: ignore[no-untyped-def]
    """Argsort ``keys[:n]`` (uint32, the bits of positive float32) into the array that is returned."""
    for i in range(n):
        order[i] = i
    if n <= 48:  # insertion sort
        for i in range(1, n):
            item, j = order[i], i
            while j > 0 and keys[order[j - 1]] > keys[item]:
                order[j] = order[j - 1]
                j -= 1
            order[j] = item
        return order
    counts[:] = 0
    for i in range(n):
        for digit in range(3):
            counts[digit, (keys[i] >> np.uint32(_RADIX_BITS * digit)) & np.uint32(_RADIX - 1)] += 1
    source, target = order, swap
    for digit in range(3):
        shift = np.uint32(_RADIX_BITS * digit)
        if counts[digit, (keys[0] >> shift) & np.uint32(_RADIX - 1)] == n:  # all the same
            continue
        total = 0
        for value in range(_RADIX):
            total, counts[digit, value] = total + counts[digit, value], total
        for i in range(n):
            item = source[i]
            value = (keys[item] >> shift) & np.uint32(_RADIX - 1)
            target[counts[digit, value]] = item
            counts[digit, value] += 1
        source, target = target, source
    return source


@numba.njit(nogil=True, cache=True, inline="always")
def _place(key):  # type: ignore[no-untyped-def]
    """Where a value belongs in the hash table (Fibonacci hashing)."""
    return (np.uint64(key) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - _TABLE_BITS)


@numba.njit(nogil=True, cache=True)
def _find_distinct(keys, hashes, n, table, slots, distinct, counts, sums):  # type: ignore[no-untyped-def]
    """Distinct ``keys[:n]``: how often each occurs, the sum of its genes' hashes, and the place of each key among them.

    Returns their number, or -1 if there are too many for the table.
    """
    n_distinct = 0
    for i in range(n):
        key = keys[i]
        at = _place(key)
        slot = table[at]
        while slot >= 0 and distinct[slot] != key:
            at = (at + np.uint64(1)) & np.uint64(_TABLE - 1)
            slot = table[at]
        if slot < 0:
            if n_distinct == _MOST_DISTINCT:
                n_distinct = -1
                break
            slot = n_distinct
            table[at] = slot
            distinct[slot] = key
            counts[slot] = 0
            sums[slot] = 0
            n_distinct += 1
        slots[i] = slot
        counts[slot] += 1
        sums[slot] += hashes[i]
    if n_distinct < 0 or n_distinct > 64:
        table[:] = -1
    else:  # forget them one by one; in reverse, so that the probing chains stay whole
        for i in range(n_distinct - 1, -1, -1):
            at = _place(distinct[i])
            while table[at] != i:
                at = (at + np.uint64(1)) & np.uint64(_TABLE - 1)
            table[at] = -1
    return n_distinct


@numba.njit(nogil=True, cache=True)
def _sort_distinct(keys, hashes, n, slots, distinct, counts, sums, order, swap, radix):  # type: ignore[no-untyped-def]
    """The same as :func:`_find_distinct` for any number of distinct keys, which come out in ascending order."""
    sorted_ = _sort(keys, n, order, swap, radix)
    last = -1
    for i in range(n):
        item = sorted_[i]
        if last < 0 or distinct[last] != keys[item]:
            last += 1
            distinct[last] = keys[item]
            counts[last] = 0
            sums[last] = 0
        slots[item] = last
        counts[last] += 1
        sums[last] += hashes[item]
    return last + 1


@numba.njit(nogil=True, cache=True)
def _bin_distinct(values, order, counts, n_distinct, n, quantiles, edges, left, width):  # type: ignore[no-untyped-def]
    """Of each distinct value, in ascending ``order``: the highest bin it may get, and how many it may get.

    Edges are quantiles by linear interpolation in float64, as NumPy computes them. A value lies right of the edges
    below it (digitize from the right) and, from the left, of those at it too.
    """
    low, high = 0, 0  # places in order of the values below and above a quantile
    low_end, high_end = counts[order[0]], counts[order[0]]
    for k in range(len(quantiles)):
        at = (n - 1) * quantiles[k]
        first = np.int64(at)
        second = min(first + 1, n - 1)
        part = at - first
        while first >= low_end:
            low += 1
            low_end += counts[order[low]]
        while second >= high_end:
            high += 1
            high_end += counts[order[high]]
        start, stop = np.float64(values[order[low]]), np.float64(values[order[high]])
        edges[k] = stop - (stop - start) * (1 - part) if part >= 0.5 else start + (stop - start) * part
    n_at_or_below, n_below = 0, 0
    for i in range(n_distinct):
        value = np.float64(values[order[i]])
        while n_at_or_below < len(edges) and edges[n_at_or_below] <= value:
            n_at_or_below += 1
        while n_below < len(edges) and edges[n_below] < value:
            n_below += 1
        left[order[i]] = n_at_or_below
        width[order[i]] = n_at_or_below - n_below


@numba.njit(nogil=True, cache=True)
def _threshold(draws, n, keep, counts):  # type: ignore[no-untyped-def]
    """The ``keep``-th smallest of ``draws[:n]`` (uint64): find its leading bits, then sort what shares them."""
    shift = np.uint64(64 - _RADIX_BITS)
    row = counts[0]
    row[:] = 0
    for i in range(n):
        row[draws[i] >> shift] += 1
    prefix, before = 0, 0
    while before + row[prefix] < keep:
        before += row[prefix]
        prefix += 1
    candidates = np.empty(row[prefix], np.uint64)
    at = 0
    for i in range(n):
        if draws[i] >> shift == np.uint64(prefix):
            candidates[at] = draws[i]
            at += 1
    return np.sort(candidates)[keep - before - 1]


@numba.njit(nogil=True, cache=True)
def _add_up(indices, data, start, stop, ids, home, log_values, row, used, columns, values):  # type: ignore[no-untyped-def]
    """Values of the known genes of one cell, genes that share a token added up (on the linear scale)."""
    n = 0
    for j in range(start, stop):
        column, value = indices[j], data[j]
        if ids[column] < 0 or value == 0:
            continue
        column = home[column]
        if not used[column]:
            used[column] = True
            row[column] = value
            columns[n] = column
            n += 1
        elif log_values:
            row[column] = np.log1p(np.expm1(np.float64(row[column])) + np.expm1(np.float64(value)))
        else:
            row[column] += value
    for i in range(n):
        values[i] = row[columns[i]]
        used[columns[i]] = False
    return n


@numba.njit(nogil=True, cache=True)
def bin_rows(  # type: ignore[no-untyped-def]
    indptr, indices, data, ids, hashes, home, shared, quantiles, max_genes, seed, random_ties, log_values,
    out_indptr, out_ids, out_bins, out_keys, out_expressed,
):  # fmt: skip
    """Tokenize CSR rows; ``data`` is float32.

    Parameters
    ----------
    indptr, indices, data
        The matrix.
    ids, hashes, home
        Of each column: token id (-1: unknown), hash of the token, and the first column with the same token.
    shared
        Whether any two columns share a token.
    quantiles
        float64, ascending from 0 to 1: where the edges lie.
    max_genes
        Most tokens of a cell.
    seed, random_ties, log_values
        See ``TokenizerConfig`` and ``tokenize``.
    out_indptr, out_ids, out_bins, out_keys, out_expressed
        Filled; ``out_ids`` and ``out_bins`` must hold ``min(non-zeros, max_genes)`` of every row, and one entry more.
    """
    most = 1
    for cell in range(len(indptr) - 1):
        most = max(most, indptr[cell + 1] - indptr[cell])
    columns, slots = np.empty(most, np.int32), np.empty(most, np.int32)
    genes, gene_hashes = np.empty(most, np.int32), np.empty(most, np.uint64)
    values, draws = np.empty(most, np.float32), np.empty(most, np.uint64)
    keys = values.view(np.uint32)
    room = max(most, _MOST_DISTINCT)
    distinct_values = np.empty(room, np.float32)
    distinct = distinct_values.view(np.uint32)
    counts, sums = np.empty(room, np.int32), np.empty(room, np.uint64)
    left, width = np.empty(room, np.int32), np.empty(room, np.int32)
    order, swap = np.empty(room, np.int32), np.empty(room, np.int32)
    edges = np.empty(len(quantiles), np.float64)
    radix_counts = np.empty((3, _RADIX), np.int32)
    table = np.full(_TABLE, -1, np.int32)
    row, used = np.empty(len(ids) if shared else 0, np.float32), np.zeros(len(ids) if shared else 0, np.bool_)
    seed_mixed = _mix(seed + np.uint64(0x9E3779B97F4A7C15))
    filled = 0
    for cell in range(len(indptr) - 1):
        if shared:
            n = _add_up(
                indices, data, indptr[cell], indptr[cell + 1], ids, home, log_values, row, used, columns, values
            )
            for i in range(n):
                genes[i], gene_hashes[i] = ids[columns[i]], hashes[columns[i]]
        else:
            n = 0
            for j in range(indptr[cell], indptr[cell + 1]):
                column, value = indices[j], data[j]
                gene = ids[column]
                genes[n], gene_hashes[n], values[n] = gene, hashes[column], value  # from here on all is read in order
                n += (gene >= 0) & (value != 0)
        out_expressed[cell] = n
        out_indptr[cell + 1] = filled
        out_keys[cell] = 0
        if n == 0:
            continue

        n_distinct = _find_distinct(keys, gene_hashes, n, table, slots, distinct, counts, sums)
        if n_distinct < 0:
            n_distinct = _sort_distinct(keys, gene_hashes, n, slots, distinct, counts, sums, order, swap, radix_counts)
        sorted_ = _sort(distinct, n_distinct, order, swap, radix_counts)
        _bin_distinct(distinct_values, sorted_, counts, n_distinct, n, quantiles, edges, left, width)
        cell_key = np.uint64(n)
        for i in range(n_distinct):
            cell_key += sums[sorted_[i]] * np.uint64(2 * i + 1)
        out_keys[cell] = cell_key
        state = _mix(seed_mixed ^ cell_key) | np.uint64(1)

        threshold = np.uint64(0xFFFFFFFFFFFFFFFF)
        if n > max_genes:
            subset_state = _mix(state ^ np.uint64(_SALT_SUBSET)) | np.uint64(1)
            for i in range(n):  # odd times odd is one to one: no two draws are equal
                draws[i] = gene_hashes[i] * subset_state
            threshold = _threshold(draws, n, max_genes, radix_counts)
        # no branches below: which genes stay and which bin a tie gets is random, and a wrong guess costs more
        if random_ties:
            for i in range(n):
                slot = slots[i]
                draw = (gene_hashes[i] * state) >> np.uint64(32)
                out_ids[filled] = genes[i]
                out_bins[filled] = left[slot] - np.int32((draw * np.uint64(width[slot])) >> np.uint64(32))
                filled += n <= max_genes or draws[i] <= threshold
        else:
            for i in range(n):
                slot = slots[i]
                out_ids[filled] = genes[i]
                out_bins[filled] = left[slot] - width[slot] // 2
                filled += n <= max_genes or draws[i] <= threshold
        out_indptr[cell + 1] = filled
