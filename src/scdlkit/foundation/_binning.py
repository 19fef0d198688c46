"""The kernel behind tokens: bin the values of each cell in linear time.

The bin of a value depends on the distinct values of its cell and their counts alone: they are found, the quantile
edges are walked once, and each gene then looks its bin up. Every step is a loop of its own over arrays that stay in the
processor's cache, because such loops compile to vector instructions. Between the steps the next cell is asked for, a
quarter at a time, so that it comes from memory meanwhile: a tenth of all time.
"""

from __future__ import annotations

import numba
import numpy as np

from ._distinct import CODES, LAST, TABLE, find_distinct
from ._prefetch import prefetch

MAX_TOKEN_ID = (1 << 24) - 1  # an id and its bin pass through 32 bits
_UNKNOWN = 0xFFFFFFFF
u32 = np.uint32  # after each step: Numba widens to 64 bits, and half as many would fit a vector


@numba.njit(nogil=True, cache=True, inline="always")
def _mix(x):  # type: ignore[no-untyped-def]
    """Bijective 64-bit mixing (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@numba.njit(nogil=True, cache=True)
def _look_up(columns, ids, genes):  # type: ignore[no-untyped-def]
    for j in range(len(columns)):
        genes[j] = ids[u32(columns[j])]


@numba.njit(nogil=True, cache=True)
def _has_zero(data):  # type: ignore[no-untyped-def]
    found = u32(0)
    for j in range(len(data)):
        found = u32(found | u32(data[j] == np.float32(0)))
    return found > 0


@numba.njit(nogil=True, cache=True)
def _drop(data, n, genes, values):  # type: ignore[no-untyped-def]
    """Leave unknown genes and zeros out; without branches, which would be guessed wrongly half the time."""
    kept = np.uint64(0)
    for j in range(n):
        gene, value = genes[j], data[j]
        genes[kept], values[kept] = gene, value
        kept += np.uint64((gene != u32(_UNKNOWN)) & (value != 0))
    return np.int64(kept)


@numba.njit(nogil=True, cache=True)
def _add_up(columns, data, ids, home, log_values, row, used, touched, genes, values):  # type: ignore[no-untyped-def]
    """Values of the known genes of one cell, genes that share a token added up (on the linear scale)."""
    n = 0
    for j in range(len(columns)):
        column, value = columns[j], data[j]
        if ids[column] == u32(_UNKNOWN) or value == 0:
            continue
        column = home[column]
        if not used[column]:
            used[column] = True
            row[column] = value
            touched[n] = column
            n += 1
        elif log_values:
            row[column] = np.log1p(np.expm1(np.float64(row[column])) + np.expm1(np.float64(value)))
        else:
            row[column] += value
    for i in range(n):
        values[i], genes[i] = row[touched[i]], ids[touched[i]]
        used[touched[i]] = False
    return n


@numba.njit(nogil=True, cache=True)
def _bin_distinct(what, amount, where, n_distinct, n, quantiles, at_or_below, below, places):  # type: ignore[no-untyped-def]
    """Put into ``places`` of each distinct value: the highest bin it may get, how many it may get, and its rank.

    Edges are quantiles by linear interpolation in float64, as NumPy computes them. A value lies right of the edges
    below it (digitize from the right) and, from the left, of those at it too. ``at_or_below`` and ``below`` are room for
    the number of edges that pass from one value to the next.
    """
    at_or_below[:n_distinct] = 0
    below[: n_distinct + 1] = 0
    low, low_end = (
        0,
        np.int64(amount[0]),
    )  # of the value below the edge: its rank, and how many values there are up to it
    for k in range(len(quantiles)):
        at = (n - 1) * quantiles[k]
        first = np.int64(at)
        part = at - first
        while first >= low_end:
            low += 1
            low_end += amount[low]
        high = low + np.int64(min(first + 1, n - 1) >= low_end)
        start, stop = np.float64(what[low]), np.float64(what[high])
        edge = stop - (stop - start) * (1 - part) if part >= 0.5 else start + (stop - start) * part
        at_or_below[high if edge > start else low] += 1
        below[high if edge < stop else high + 1] += 1
    n_at_or_below, n_below = 0, 0
    for i in range(n_distinct):
        n_at_or_below += at_or_below[i]
        n_below += below[i]
        places[where[i]] = u32(n_at_or_below | (n_at_or_below - n_below) << 8 | i << 16)


@numba.njit(nogil=True, cache=True)
def _place(codes, n, places):  # type: ignore[no-untyped-def]
    for j in range(n):
        codes[j] = places[codes[j]]


@numba.njit(nogil=True, cache=True)
def _cell_key(genes, placed, n):  # type: ignore[no-untyped-def]
    """Hash of the genes and the ranks of their values, in any order."""
    total = np.uint64(n)
    for j in range(n):
        x = (np.uint64(genes[j]) << np.uint64(16) | np.uint64(placed[j] >> u32(16))) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(32))) * np.uint64(0xBF58476D1CE4E5B9)
        total += x ^ (x >> np.uint64(29))
    return _mix(total)


@numba.njit(nogil=True, cache=True)
def _draw(genes, n, state, draws):  # type: ignore[no-untyped-def]
    """A random 32-bit number a gene, from ``state``; every step is one to one, so no two genes draw the same."""
    offset, factor = u32(state), u32(u32(state >> np.uint64(32)) | u32(1))
    for j in range(n):
        x = u32(genes[j] ^ offset)
        x = u32(u32(x ^ u32(x >> u32(16))) * u32(0x7FEB352D))
        x = u32(u32(x ^ u32(x >> u32(15))) * factor)
        x = u32(u32(x ^ u32(x >> u32(15))) * u32(0x846CA68B))
        draws[j] = u32(x ^ u32(x >> u32(16)))


@numba.njit(nogil=True, cache=True)
def _count_up_to(draws, n, limit):  # type: ignore[no-untyped-def]
    found = u32(0)
    for j in range(n):
        found = u32(found + u32(draws[j] <= limit))
    return np.int64(found)


@numba.njit(nogil=True, cache=True)
def _threshold(draws, n, keep):  # type: ignore[no-untyped-def]
    """A limit that exactly ``keep`` of ``draws[:n]`` do not exceed, guessed ever better: they are spread evenly."""
    low, n_low, high, n_high = np.int64(-1), 0, np.int64(_UNKNOWN), n
    step = 0
    while high - low > 1:
        share = (keep - n_low) / (n_high - n_low) if step % 8 < 7 else 0.5  # halve now and then, whatever comes
        limit = min(max(low + np.int64((high - low) * share), low + 1), high - 1)
        found = _count_up_to(draws, n, u32(limit))
        if found == keep:
            return u32(limit)
        if found < keep:
            low, n_low = limit, found
        else:
            high, n_high = limit, found
        step += 1
    return u32(low) if low > 0 else u32(0)  # only where a row of the matrix names a gene twice: keep fewer


@numba.njit(nogil=True, cache=True)
def _give_bins(genes, draws, n, placed):  # type: ignore[no-untyped-def]
    """Put the bin of each gene above its id; the low half of a draw says which bin, the whole draw which genes stay."""
    for j in range(n):
        width = u32((placed[j] >> u32(8)) & u32(0xFF))
        down = u32(u32(draws[j] & u32(0xFFFF)) * width) >> u32(16)
        placed[j] = u32(u32(placed[j] - down) << u32(24)) | genes[j]


@numba.njit(nogil=True, cache=True)
def _give_middle_bins(genes, n, placed):  # type: ignore[no-untyped-def]
    for j in range(n):
        width = u32((placed[j] >> u32(8)) & u32(0xFF))
        placed[j] = u32(u32(placed[j] - (width >> u32(1))) << u32(24)) | genes[j]


@numba.njit(nogil=True, cache=True)
def _choose(draws, n, limit, tokens):  # type: ignore[no-untyped-def]
    kept = np.uint64(0)
    for j in range(n):  # no branches: which genes stay is random
        tokens[kept] = tokens[j]
        kept += np.uint64(draws[j] <= limit)
    return np.int64(kept)


@numba.njit(nogil=True, cache=True)
def _write(tokens, n, out_ids, out_bins):  # type: ignore[no-untyped-def]
    for j in range(n):
        out_ids[j] = tokens[j] & u32(MAX_TOKEN_ID)
    for j in range(n):
        out_bins[j] = tokens[j] >> u32(24)


@numba.njit(nogil=True, cache=True)
def bin_rows(  # type: ignore[no-untyped-def]
    indptr, indices, data, ids, home, all_known, shared, quantiles, max_genes, seed, random_ties, log_values,
    out_indptr, out_ids, out_bins, out_keys, out_expressed,
):  # fmt: skip
    """Tokenize CSR rows; ``data`` is float32.

    Parameters
    ----------
    indptr, indices, data
        The matrix.
    ids, home
        Of each column: token id (uint32, all bits set: unknown), and the first column with the same token.
    all_known, shared
        Whether every column has a token, and whether any two columns share one.
    quantiles
        float64, ascending from 0 to 1: where the edges lie.
    max_genes
        Most tokens of a cell.
    seed, random_ties, log_values
        See ``TokenizerConfig`` and ``tokenize``.
    out_indptr, out_ids, out_bins, out_keys, out_expressed
        Filled; ``out_ids`` and ``out_bins`` must hold ``min(non-zeros, max_genes)`` of every row.
    """
    most = 1
    for cell in range(len(indptr) - 1):
        most = max(most, indptr[cell + 1] - indptr[cell])
    genes, codes, draws = np.empty(most, np.uint32), np.empty(most, np.uint32), np.empty(most, np.uint32)
    room = max(most, CODES) + 1
    own_values = np.empty(most, np.float32)
    what, where, amount = np.empty(room, np.float32), np.empty(room, np.int32), np.empty(room, np.int32)
    order, swap, digits = np.empty(room, np.int32), np.empty(room, np.int32), np.empty((4, 256), np.int32)
    tally, table = np.zeros(LAST + CODES, np.int32), np.zeros(TABLE, np.uint64)
    places = np.empty(room, np.uint32)
    row, used = np.empty(len(ids) if shared else 0, np.float32), np.zeros(len(ids) if shared else 0, np.bool_)
    touched = np.empty(most if shared else 0, np.int32)
    seed_mixed = _mix(seed + np.uint64(0x9E3779B97F4A7C15))
    filled = 0
    for cell in range(len(indptr) - 1):
        columns, values = indices[indptr[cell] : indptr[cell + 1]], data[indptr[cell] : indptr[cell + 1]]
        n = len(columns)
        if shared:
            n = _add_up(columns, values, ids, home, log_values, row, used, touched, genes, own_values)
            values = own_values
        else:
            _look_up(columns, ids, genes)
            if not all_known or _has_zero(values):
                n = _drop(values, n, genes, own_values)
                values = own_values
        out_expressed[cell] = n
        out_indptr[cell + 1] = filled
        out_keys[cell] = 0
        if n == 0:
            continue

        after = indptr[cell + 1]
        quarter = (indptr[min(cell + 2, len(indptr) - 1)] - after) // 4 + 1
        prefetch(indices, data, after, after + quarter)
        n_distinct = find_distinct(
            values, values.view(np.uint32), n, codes, tally, table, where, amount, what, order, swap, digits
        )
        prefetch(indices, data, after + quarter, after + 2 * quarter)
        _bin_distinct(what, amount, where, n_distinct, n, quantiles, order, swap, places)
        prefetch(indices, data, after + 2 * quarter, after + 3 * quarter)
        _place(codes, n, places)
        out_keys[cell] = key = _cell_key(genes, codes, n)
        if random_ties or n > max_genes:
            _draw(genes, n, _mix(seed_mixed ^ key), draws)
        if random_ties:
            _give_bins(genes, draws, n, codes)
        else:
            _give_middle_bins(genes, n, codes)
        prefetch(indices, data, after + 3 * quarter, after + 4 * quarter)
        if n > max_genes:
            n = min(_choose(draws, n, _threshold(draws, n, max_genes), codes), max_genes)
        _write(codes, n, out_ids[filled:], out_bins[filled:])
        filled += n
        out_indptr[cell + 1] = filled
