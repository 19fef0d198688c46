from __future__ import annotations

import numpy as np
import pytest
import scanpy as sc
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from scdlkit.foundation.tokens import TokenizerConfig, Tokens, tokenize, tokenize_chunks


def cell(tokens: Tokens, i: int) -> dict[int, int]:
    part = slice(tokens.indptr[i], tokens.indptr[i + 1])
    return dict(zip(tokens.gene_ids[part].tolist(), tokens.bins[part].tolist(), strict=True))


def interval(values: np.ndarray, n_bins: int = 51) -> tuple[np.ndarray, np.ndarray]:
    """Lowest and highest bin upstream can give, by its definition."""
    edges = np.quantile(values, np.linspace(0, 1, n_bins - 1))
    left, right = np.digitize(values, edges), np.digitize(values, edges, right=True)
    return np.where(left > right, right + 1, left), left


def assert_same(first: Tokens, second: Tokens) -> None:
    for name in ("indptr", "gene_ids", "bins", "cell_keys", "n_expressed"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


@pytest.fixture(scope="module")
def pbmc():
    return sp.csr_matrix(sc.datasets.pbmc68k_reduced().raw.X)


@pytest.mark.parametrize("cells", ["real", "synthetic"])
def test_golden_bins(golden, cells):
    expression = golden.expected[f"{cells}_expression"]
    ids = np.array([golden.vocab.get(gene, -1) for gene in golden.expected[f"{cells}_genes"]])
    tokens = tokenize(sp.csr_matrix(expression), ids)
    for i in range(len(expression)):
        theirs_ids, theirs = golden.expected[f"{cells}_token_ids"][i], golden.expected[f"{cells}_token_values"][i]
        upstream = {g: b for g, b in zip(theirs_ids, theirs, strict=True) if g not in (golden.pad_id, golden.cls_id)}
        ours = cell(tokens, i)
        assert ours.keys() == upstream.keys()
        known = np.flatnonzero((ids >= 0) & (expression[i] != 0))
        low, high = interval(expression[i, known])
        for column, lowest, highest in zip(known, low, high, strict=True):
            assert lowest <= ours[ids[column]] <= highest
            if lowest == highest:
                assert ours[ids[column]] == upstream[ids[column]]
    if cells == "synthetic":
        assert all((interval(row[row > 0])[0] == interval(row[row > 0])[1]).mean() > 0.1 for row in expression)


@settings(max_examples=60, deadline=None)
@given(
    matrix=arrays(np.float32, (4, 12), elements=st.integers(0, 6).map(float) | st.floats(0, 1e6, width=32)),
    ids=st.permutations(range(20)),
    seed=st.integers(0, 2**40),
    n_bins=st.integers(3, 60),
)
def test_bins_lie_in_upstreams_interval(matrix, ids, seed, n_bins):
    ids = np.array(ids[:12])
    for ties in ("random", "mid"):
        tokens = tokenize(sp.csr_matrix(matrix), ids, TokenizerConfig(n_bins=n_bins, seed=seed, ties=ties))
        for i, row in enumerate(matrix):
            known = np.flatnonzero(row)
            assert set(cell(tokens, i)) == set(ids[known].tolist())
            if len(known):
                low, high = interval(row[known], n_bins)
                bins = np.array([cell(tokens, i)[g] for g in ids[known]])
                assert (low <= bins).all() and (bins <= high).all()
                if ties == "mid":
                    np.testing.assert_array_equal(bins, high - np.maximum(high - low + 1, 0) // 2 * (high > low))


@settings(max_examples=40, deadline=None)
@given(order=st.permutations(range(30)), gene_order=st.permutations(range(40)), cut=st.integers(1, 30))
def test_a_cell_is_the_same_wherever_it_is(order, gene_order, cut):
    rng = np.random.default_rng(0)
    dense = rng.poisson(1.0, (30, 40)).astype(np.float32)
    ids = np.where(rng.random(40) < 0.9, rng.permutation(100)[:40], -1)
    config = TokenizerConfig(max_length=15, seed=3)
    whole = tokenize(sp.csr_matrix(dense), ids, config)
    order, gene_order = np.array(order), np.array(gene_order)

    shuffled = tokenize(sp.csr_matrix(dense[order][:, gene_order]), ids[gene_order], config)
    np.testing.assert_array_equal(shuffled.cell_keys, whole.cell_keys[order])
    assert [cell(shuffled, i) for i in range(30)] == [cell(whole, i) for i in order]
    assert_same(tokenize(sp.csr_matrix(dense[order]), ids, config), whole[order])
    pieces = tokenize_chunks((sp.csr_matrix(dense[i : i + cut]) for i in range(0, 30, cut)), ids, config)
    assert_same(pieces, whole)
    for dtype in (np.float64, np.int64, np.int32, np.uint16):
        assert_same(tokenize(sp.csr_matrix(dense.astype(dtype)), ids, config), whole)


def test_counts_normalised_and_log1p_give_the_same_tokens():
    counts = np.random.default_rng(1).poisson(2.0, (50, 300)).astype(np.float64)
    normalised = counts / counts.sum(axis=1, keepdims=True) * 1e4
    reference = tokenize(sp.csr_matrix(counts), np.arange(300), TokenizerConfig(max_length=200))
    for values in (normalised, np.log1p(normalised)):
        assert_same(tokenize(sp.csr_matrix(values), np.arange(300), TokenizerConfig(max_length=200)), reference)


def test_seed_moves_ties_and_subsets_only(pbmc):
    ids = np.arange(pbmc.shape[1])
    first, second = (tokenize(pbmc, ids, TokenizerConfig(seed=s)) for s in (0, 1))
    np.testing.assert_array_equal(first.gene_ids, second.gene_ids)
    np.testing.assert_array_equal(first.cell_keys, second.cell_keys)
    assert 0.1 < (first.bins != second.bins).mean() < 1
    assert_same(tokenize(pbmc, ids, TokenizerConfig(seed=0)), first)
    mids = [tokenize(pbmc, ids, TokenizerConfig(seed=s, ties="mid")) for s in (0, 1)]
    assert_same(*mids)


def test_ties_spread_evenly_over_their_interval():
    """All values equal: upstream's rule is uniform over bins 1 to 50."""
    tokens = tokenize(
        sp.csr_matrix(np.ones((1, 50_000), np.float32)), np.arange(50_000), TokenizerConfig(max_length=60_000)
    )
    counts = np.bincount(tokens.bins, minlength=51)[1:]
    assert counts.sum() == 50_000
    assert counts.min() > 850 and counts.max() < 1150  # 1,000 expected, sd 31


def test_which_bin_a_tie_gets_does_not_depend_on_the_subset():
    """All values equal and two genes in five kept: still uniform over bins 1 to 50."""
    matrix = sp.csr_matrix(np.ones((1, 50_000), np.float32))
    tokens = tokenize(matrix, np.arange(50_000), TokenizerConfig(max_length=20_001))
    counts = np.bincount(tokens.bins, minlength=51)[1:]
    assert counts.sum() == 20_000
    assert ((counts - 400) ** 2 / 400).sum() < 85.4  # chi-square, 49 degrees of freedom, p = 0.001


def test_draws_of_genes_and_cells_are_independent():
    """The same genes in every cell: pairs of genes, near or far, stay together as often as chance has it."""
    rng = np.random.default_rng(1)
    matrix = sp.csr_matrix(rng.integers(1, 4, (4000, 64)).astype(np.float32))
    for ids in (np.arange(64), np.arange(64) * 1024, rng.permutation(60_000)[:64]):
        tokens = tokenize(matrix, ids, TokenizerConfig(max_length=33))
        kept = np.zeros((4000, 64))
        columns = np.argsort(ids)[np.searchsorted(np.sort(ids), tokens.gene_ids)]
        kept[np.repeat(np.arange(4000), 32), columns] = 1
        share = kept.mean(axis=0)
        assert np.abs(share - 0.5).max() < 4 * np.sqrt(0.25 / 4000)
        together = (kept.T @ kept / 4000)[np.triu_indices(64, 1)]
        expected = 0.5 * 31 / 63
        z = (together - expected) / np.sqrt(expected * (1 - expected) / 4000)
        assert np.abs(z).max() < 5 and 0.9 < z.std() < 1.1


def test_max_length_keeps_a_fair_subset():
    rng = np.random.default_rng(0)
    matrix = sp.csr_matrix(rng.poisson(5, (400, 60)).astype(np.float32))
    whole = tokenize(matrix, np.arange(60))
    short = tokenize(matrix, np.arange(60), TokenizerConfig(max_length=21))
    assert (short.lengths == 20).all()
    np.testing.assert_array_equal(short.n_expressed, whole.lengths)
    for i in range(50):
        assert cell(short, i).items() <= cell(whole, i).items()  # binned on all genes, then subset
    kept = np.bincount(short.gene_ids, minlength=60) / 400
    assert abs(kept.mean() - 20 / 60) < 1e-9 and kept.min() > 0.2 and kept.max() < 0.45


def test_duplicates():
    matrix = sp.csr_matrix(np.array([[1, 2, 4, 0], [0, 3, 1, 5]], dtype=np.float32))
    ids = np.array([7, 3, 7, -1])
    summed = sp.csr_matrix(np.array([[5, 2], [1, 3]], dtype=np.float32))
    reference = tokenize(summed, np.array([7, 3]))

    def cells(tokens):
        return [cell(tokens, i) for i in range(tokens.n_cells)], tokens.cell_keys.tolist()

    assert cells(tokenize(matrix, ids)) == cells(reference)
    logged = sp.csr_matrix(np.log1p(matrix.toarray()))
    assert cells(tokenize(logged, ids, log_values=True)) == cells(reference)
    first = sp.csr_matrix(np.array([[1, 2], [0, 3]], dtype=np.float32))
    assert cells(tokenize(matrix, ids, TokenizerConfig(duplicates="first"))) == cells(tokenize(first, np.array([7, 3])))


def test_many_distinct_values():
    """Beyond the hash table's size the kernel sorts; both ways must agree with upstream's rule and on the cell's hash."""
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.random((3, 400)), rng.integers(1, 4, (3, 2600))], axis=1).astype(np.float32)
    values = np.concatenate([values, rng.random((3, 3000)).astype(np.float32)])
    tokens = tokenize(sp.csr_matrix(values), np.arange(3000), TokenizerConfig(max_length=4000))
    for i, row in enumerate(values):
        low, high = interval(row)
        bins = np.array([cell(tokens, i)[g] for g in range(3000)])
        assert (low <= bins).all() and (bins <= high).all()
    # the same order of values with other distances between them: the same tokens
    stretched = np.exp(values.astype(np.float64) * 3)
    assert_same(tokenize(sp.csr_matrix(stretched), np.arange(3000), TokenizerConfig(max_length=4000)), tokens)


def test_counts_of_any_size():
    """Small counts, large ones, and what is neither go different ways, which must agree."""
    rng = np.random.default_rng(0)
    counts = np.floor(np.exp(rng.normal(2, 3, (40, 1500)))).astype(np.float32)
    assert (counts.max(axis=1) > 5000).all() and (np.median(counts, axis=1) < 50).all()
    ids = rng.permutation(60_000)[:1500]
    tokens = tokenize(sp.csr_matrix(counts), ids)
    for i, row in enumerate(counts):
        known = np.flatnonzero(row)
        low, high = interval(row[known])
        of_gene = dict(zip(ids[known].tolist(), zip(low, high, strict=True), strict=True))
        assert all(of_gene[gene][0] <= b <= of_gene[gene][1] for gene, b in cell(tokens, i).items())
    assert_same(tokenize(sp.csr_matrix(np.log1p(counts.astype(np.float64))), ids), tokens)
    assert_same(
        tokenize(sp.csr_matrix(np.minimum(counts, 900) / 4), ids), tokenize(sp.csr_matrix(np.minimum(counts, 900)), ids)
    )


def test_empty_cells_explicit_zeros_and_unknown_genes():
    matrix = sp.csr_matrix((np.array([0, 2, 3], np.float32), np.array([0, 1, 2]), np.array([0, 1, 3, 3])), (3, 3))
    tokens = tokenize(matrix, np.array([4, 5, -1]))
    assert tokens.lengths.tolist() == [0, 1, 0]
    assert cell(tokens, 1).keys() == {5}
    assert tokenize(sp.csr_matrix((0, 3)), np.array([1, 2, 3])).n_cells == 0
    assert tokenize(matrix, np.array([-1, -1, -1])).lengths.sum() == 0


def test_rows_that_name_a_gene_twice():
    """Not canonical CSR, which is the caller's business; no more genes than fit, all the same."""
    matrix = sp.csr_matrix((np.ones(60, np.float32), np.repeat([0, 1, 2], 20), [0, 60]), shape=(1, 3))
    tokens = tokenize(matrix, np.array([4, 5, 6]), TokenizerConfig(max_length=31))
    assert 0 < tokens.lengths[0] <= 30 and set(tokens.gene_ids) <= {4, 5, 6}


def test_a_cell_with_20000_genes():
    values = np.random.default_rng(0).permutation(20_000).astype(np.float32) + 1
    tokens = tokenize(sp.csr_matrix(values[None]), np.arange(20_000))
    assert tokens.lengths.tolist() == [1199] and tokens.n_expressed.tolist() == [20_000]
    low, high = interval(values)
    assert all(low[g] <= b <= high[g] for g, b in cell(tokens, 0).items())


def test_select_and_concatenate(pbmc):
    tokens = tokenize(pbmc, np.arange(pbmc.shape[1]))
    assert_same(Tokens.concatenate([tokens[:100], tokens[100:]]), tokens)
    assert_same(tokens[np.array([5, 2])], Tokens.concatenate([tokens[5], tokens[2:3]]))
    assert tokens.fingerprint() == tokens[:].fingerprint() != tokens[::-1].fingerprint()
    assert len(np.unique(tokens.cell_keys)) == len(np.unique(pbmc.toarray(), axis=0))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_bins": 2}, "n_bins must be between 3 and 256, found 2"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"seed": -1}, "seed must be"),
        ({"n_bins": "51"}, "n_bins must be an integer, found '51'"),
        ({"max_length": 2.5}, "max_length must be an integer, found 2.5"),
        ({"ties": "first"}, "ties must be 'random' or 'mid', found 'first'"),
        ({"duplicates": "mean"}, "duplicates must be 'sum' or 'first'"),
    ],
)
def test_bad_config(kwargs, message):
    with pytest.raises(ValueError, match=message):
        TokenizerConfig(**kwargs)


def test_bad_input():
    with pytest.raises(TypeError, match="must be a CSR matrix, found csc_matrix"):
        tokenize(sp.csc_matrix((2, 3)), np.zeros(3, int))
    with pytest.raises(ValueError, match="3 genes"):
        tokenize(sp.csr_matrix((2, 3)), np.zeros(2, int))
    with pytest.raises(ValueError, match="token_ids must be at most 16777215, found 16777216"):
        tokenize(sp.csr_matrix((2, 1)), np.array([1 << 24]))
