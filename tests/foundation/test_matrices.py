import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from scdlkit.foundation import matrices

LAYOUTS = {
    "C": np.ascontiguousarray,
    "F": np.asfortranarray,
    "csr_matrix": sp.csr_matrix,
    "csr_array": sp.csr_array,
    "csc_matrix": sp.csc_matrix,
    "csc_array": sp.csc_array,
}
DTYPES = ["bool", "uint8", "int32", "int64", "float16", "float32", "float64"]


def untidy(dense):
    """The same values as CSR with unsorted indices, values split over duplicates, and stored zeros."""
    rows, columns = dense.nonzero()
    values = dense[rows, columns].astype(np.float64)
    data = np.concatenate([values / 2, values / 2, np.zeros(len(values))])
    rows, columns = np.tile(rows, 3), np.concatenate([columns, columns, (columns + 1) % dense.shape[1]])
    order = np.argsort(rows, kind="stable")
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(dense)))])
    return sp.csr_matrix((data[order], columns[order], indptr), shape=dense.shape)


def assert_tidy(csr):
    assert isinstance(csr, sp.csr_matrix)
    assert csr.dtype == np.float32
    assert csr.indices.dtype == csr.indptr.dtype == np.int32
    fresh = sp.csr_matrix((csr.data, csr.indices, csr.indptr), shape=csr.shape)
    assert fresh.has_canonical_format
    assert (csr.data != 0).all()


def snapshot(matrix):
    if sp.issparse(matrix):
        return [array.copy() for array in (matrix.data, matrix.indices, matrix.indptr)]
    return [matrix.copy()]


counts = hnp.arrays(
    np.int64, st.tuples(st.integers(1, 12), st.integers(1, 9)), elements=st.sampled_from([0, 0, 0, 1, 2, 7])
)


@settings(deadline=None, max_examples=150)
@given(dense=counts, layout=st.sampled_from([*LAYOUTS, "untidy"]), dtype=st.sampled_from(DTYPES), data=st.data())
def test_rows_of_every_layout_and_type(dense, layout, dtype, data):
    dense = dense.astype(dtype)
    if layout == "untidy":
        dtype, matrix = "float64", untidy(dense.astype(np.float64))
        expected = dense.astype(np.float32)
    else:
        # scipy cannot build float16 itself, yet such arrays come from files
        matrix = LAYOUTS[layout](dense.astype(np.float32) if dtype == "float16" else dense)
        if dtype == "float16":
            if sp.issparse(matrix):
                matrix.data = matrix.data.astype(np.float16)
            else:
                matrix = matrix.astype(np.float16)
        expected = dense.astype(np.float32)
    before = snapshot(matrix)
    rows = matrices.with_rows(matrix)

    size = data.draw(st.integers(1, 13))
    chunks = list(matrices.iterate_rows(rows, size))
    assert [i for cells, _ in chunks for i in range(cells.start, cells.stop)] == list(range(len(dense)))
    assert all(chunk.shape[0] == cells.stop - cells.start <= size for cells, chunk in chunks)
    for _, chunk in chunks:
        assert_tidy(chunk)
    np.testing.assert_array_equal(np.vstack([chunk.toarray() for _, chunk in chunks]), expected)

    index = np.array(data.draw(st.lists(st.integers(0, len(dense) - 1), max_size=15)), dtype=np.intp)
    picked = matrices.read_index(rows, index)
    assert_tidy(picked) if len(index) else None
    np.testing.assert_array_equal(picked.toarray(), expected[index])

    for chunk in [picked, *(chunk for _, chunk in chunks)]:
        chunk.data[:] = -1  # the caller's own
    assert all((old == new).all() for old, new in zip(before, snapshot(matrix), strict=True))


def test_dense_blocks_are_read_in_steps(monkeypatch):
    monkeypatch.setattr(matrices, "_DENSE_ELEMENTS", 30)
    dense = np.arange(200.0).reshape(20, 10)
    ((cells, chunk),) = matrices.iterate_rows(dense, 100)
    assert cells == slice(0, 20)
    np.testing.assert_array_equal(chunk.toarray(), dense)
    dense[17, 3] = -1
    assert matrices.scan(dense).first_bad == (17, 3, -1.0)
    np.testing.assert_array_equal(matrices.read_index(dense, np.arange(20)[::-1]).toarray(), dense[::-1])


@settings(deadline=None, max_examples=100)
@given(
    dense=counts,
    bad=st.lists(st.tuples(st.integers(0, 99), st.sampled_from([-1.0, -np.inf, np.inf, np.nan, 1e39])), max_size=4),
    layout=st.sampled_from(list(LAYOUTS)),
    piece=st.sampled_from([1, 3, 1 << 20]),
)
def test_scan_finds_what_a_loop_finds(dense, bad, layout, piece):
    dense = dense.astype(np.float64)
    for position, value in bad:
        dense.flat[position % dense.size] = value
    first, counted = None, [0, 0, 0]
    for row, column in np.ndindex(dense.shape):
        value = dense[row, column]
        kind = 1 if np.isnan(value) else 2 if abs(value) > 3e38 else 0 if value < 0 else None
        if kind is not None:
            counted[kind] += 1
            first = first or (row, column)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrices, "_PIECE", piece)
        found = matrices.scan(matrices.with_rows(LAYOUTS[layout](dense)))
    assert [found.negative, found.missing, found.infinite] == counted
    assert (found.first_bad[:2] if found.first_bad else None) == first
    assert found.usable == (first is None)
    if found.usable:
        assert found.integers
        assert found.largest == dense.max()


def test_scan_of_nothing():
    found = matrices.scan(sp.csr_matrix((5, 3), dtype=np.float32))
    assert (found.usable, found.integers, found.largest) == (True, True, 0.0)


# --- kinds of values ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cells():
    rng = np.random.default_rng(0)
    return rng.poisson(rng.gamma(0.3, 4, size=200) * rng.lognormal(0, 0.4, size=(300, 1))).astype(np.float64)


def kind_of(dense, **kwargs):
    for layout in (np.asarray, sp.csr_matrix)[: 1 if dense.dtype == np.float16 else 2]:
        matrix = layout(dense)
        answer = matrices.classify(matrix, matrices.scan(matrix), **kwargs)
    return answer


def normalised(cells, total=1e4):
    return cells / cells.sum(axis=1, keepdims=True) * total


def test_counts(cells):
    assert kind_of(cells) == ("counts", ())
    assert kind_of(np.zeros((3, 4))) == ("counts", ())


def test_binarised(cells):
    kind, (note,) = kind_of((cells > 0).astype(np.float32))
    assert kind == "counts" and "binarised" in note


@pytest.mark.parametrize("total", [1, 100, 1e4, 1e6])
def test_normalised(cells, total):
    assert kind_of(normalised(cells, total)) == ("normalised", ())


def test_linear_values_whose_sums_differ(cells):
    assert kind_of(cells * 0.9 + 30.25) == ("normalised", ())


@pytest.mark.parametrize("total", [100, 1e4, 1e6])
def test_log1p(cells, total):
    assert kind_of(np.log1p(normalised(cells, total))) == ("log1p", ())
    assert kind_of(np.log1p(normalised(cells, total)).astype(np.float16)) == ("log1p", ())
    assert kind_of(np.log1p(normalised(cells, total))[:, :50]) == ("log1p", ())


def test_log1p_of_counts_and_of_a_single_cell(cells):
    assert kind_of(np.log1p(cells)) == ("log1p", ())
    assert kind_of(np.log1p(normalised(cells[:1]))) == ("log1p", ())


def test_the_data_set_says_it_is_logarithmic(cells):
    values = np.log2(1 + normalised(cells, 1e6))
    assert values.max() > 15
    assert kind_of(values)[0] == "normalised"
    assert kind_of(values, logged=True)[0] == "log1p"


def test_double_log(cells):
    for values in (np.log1p(np.log1p(normalised(cells))), np.log1p(np.log1p(cells))):
        kind, (note,) = kind_of(values)
        assert kind == "log1p" and "twice" in note


# --- what is no matrix -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (np.zeros((2, 2), dtype=complex), "X must hold integers or real numbers, found dtype complex128"),
        (np.array([["a", "b"]], dtype=object), "found dtype object"),
        (np.zeros(3), "must be a dense, CSR, CSC, backed or dask matrix, found ndarray"),
        ([[1, 2]], "found list"),
    ],
)
def test_unsupported(matrix, message):
    with pytest.raises(TypeError, match=message):
        matrices.check_supported(matrix, "adata.X")
