import re
import warnings
from contextlib import closing, contextmanager
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from scdlkit.foundation import matrices
from scdlkit.foundation.expression import choose_expression
from scdlkit.foundation.vocabulary import Vocabulary

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "flash_keys" / "vocab.json"


@pytest.fixture(scope="module")
def vocabulary():
    return Vocabulary.from_json(GOLDEN)


@pytest.fixture(scope="module")
def symbols(vocabulary):
    return [token for token in vocabulary.tokens if not token.startswith("<") and "ENSG" not in token][:120]


@pytest.fixture
def cells(symbols):
    """40 cells of counts over 120 known genes."""
    rng = np.random.default_rng(1)
    counts = rng.poisson(rng.gamma(0.4, 4, size=len(symbols)), size=(40, len(symbols))).astype(np.float32)
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(40)])
    return ad.AnnData(sp.csr_matrix(counts), obs=obs, var=pd.DataFrame(index=symbols))


@pytest.fixture(scope="module")
def pbmc():
    import scanpy as sc

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of reading an old file
        return sc.datasets.pbmc68k_reduced()


def lognormalised(counts):
    dense = counts.toarray() if sp.issparse(counts) else counts
    return np.log1p(dense / dense.sum(axis=1, keepdims=True) * 1e4)


def scaled(values):
    return (values - values.mean(axis=0)) / (values.std(axis=0) + 1)


def read(expression, size=7):
    return np.vstack([chunk.toarray() for _, chunk in expression.chunks(size)])


@contextmanager
def unchanged(adata):
    """The AnnData is the same after as before."""
    before = adata.copy()
    yield
    for name in ("X", *adata.layers):
        old, new = (some.X if name == "X" else some.layers[name] for some in (before, adata))
        if old is None:
            assert new is None
            continue
        assert type(old) is type(new) and old.dtype == new.dtype
        old, new = (value.toarray() if sp.issparse(value) else value for value in (old, new))
        np.testing.assert_array_equal(old, new)
    pd.testing.assert_frame_equal(before.var, adata.var)
    pd.testing.assert_frame_equal(before.obs, adata.obs)
    assert list(before.uns) == list(adata.uns)


# --- what is chosen ----------------------------------------------------------------------------------------------------


def test_counts_in_x(cells, vocabulary):
    with unchanged(cells):
        expression = choose_expression(cells, vocabulary)
        assert (expression.source, expression.kind, expression.warnings) == ("X", "counts", ())
        assert (expression.n_cells, expression.n_genes, expression.largest) == (40, 120, cells.X.max())
        assert expression.genes.n_matched == 120
        assert expression.cell_names.tolist() == cells.obs_names.tolist()
        assert not expression.log_values
        assert expression.matrix is cells.X
        np.testing.assert_array_equal(read(expression), cells.X.toarray())


def test_pbmc68k_scaled_x_gives_way_to_raw(pbmc, vocabulary):
    with unchanged(pbmc), pytest.warns(UserWarning, match=r"\.raw\.X is used, since \.X has negative values"):
        expression = choose_expression(pbmc, vocabulary)
    assert (expression.source, expression.kind) == ("raw.X", "log1p")
    assert expression.log_values
    assert "use_raw=True" in expression.warnings[0]
    assert expression.genes.n_matched > 650
    np.testing.assert_array_equal(read(expression, 300), pbmc.raw.X.toarray())
    again = choose_expression(pbmc, vocabulary, use_raw=True)
    assert (again.source, again.warnings) == ("raw.X", ())


def test_pbmc68k_scaled_x_is_refused_when_asked_for(pbmc, vocabulary):
    row, column = np.argwhere(pbmc.X < 0)[0]
    message = (
        rf"adata\.X .*\({(pbmc.X < 0).sum():,} negative\), the first {pbmc.X[row, column]:g} in cell "
        rf"'{pbmc.obs_names[row]}', gene '{pbmc.var_names[column]}'.*perhaps use_raw=True"
    )
    with pytest.raises(ValueError, match=message):
        choose_expression(pbmc, vocabulary, use_raw=False)


def test_raw_is_used_where_it_knows_clearly_more_genes(cells, vocabulary):
    cells.raw = cells
    variable = cells[:, :30].copy()
    variable.X = lognormalised(variable.X)
    with pytest.warns(UserWarning, match=r"\.raw\.X is used, not \.X: .* 120 of its genes, and 30 of those in \.X"):
        expression = choose_expression(variable, vocabulary)
    assert (expression.source, expression.kind, expression.n_genes) == ("raw.X", "counts", 120)
    assert choose_expression(variable, vocabulary, use_raw=False).source == "X"


def test_x_is_kept_where_raw_knows_hardly_more_or_is_unusable(cells, vocabulary):
    cells.raw = cells
    assert choose_expression(cells[:, :110].copy(), vocabulary).source == "X"
    spoilt = cells.copy()
    spoilt.X.data[0] = np.nan
    variable = cells[:, :30].copy()
    variable.raw = spoilt
    assert choose_expression(variable, vocabulary).source == "X"
    with pytest.raises(ValueError, match=r"adata\.raw\.X has .*1 NaN.*cell 'cell0'"):
        choose_expression(variable, vocabulary, use_raw=True)


def test_counts_layer_is_used_where_x_is_scaled_and_there_is_no_raw(cells, vocabulary):
    cells.layers["counts"] = cells.X.copy()
    cells.X = scaled(lognormalised(cells.X))
    with unchanged(cells), pytest.warns(UserWarning, match=r"layers\['counts'\] is used, since \.X has negative"):
        expression = choose_expression(cells, vocabulary)
    assert (expression.source, expression.kind) == ("layers['counts']", "counts")


def test_scaled_x_alone_is_refused(cells, vocabulary):
    cells.X = scaled(lognormalised(cells.X))
    cells.layers["mine"] = cells.X
    with pytest.raises(ValueError, match=r"negative.*Scaled, regressed.*perhaps layer='mine'\."):
        choose_expression(cells, vocabulary)
    with pytest.raises(ValueError, match=r"layers\['mine'\].*log1p values\.$"):
        choose_expression(cells, vocabulary, layer="mine")


@pytest.mark.parametrize(("value", "name"), [(np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite")])
def test_missing_and_infinite_values_are_never_worked_around(cells, vocabulary, symbols, value, name):
    cells.raw = cells
    cells.layers["counts"] = cells.X.copy()
    dense = cells.X.toarray()
    dense[[5, 9], [3, 1]] = value
    for layout in (np.asarray, sp.csr_matrix, sp.csc_matrix):
        cells.X = layout(dense)
        with pytest.raises(ValueError, match=rf"2 {name}.*cell 'cell5', gene '{symbols[3]}'"):
            choose_expression(cells, vocabulary)


def test_layer(cells, vocabulary):
    cells.layers["log"] = lognormalised(cells.X)
    expression = choose_expression(cells, vocabulary, layer="log")
    assert (expression.source, expression.kind) == ("layers['log']", "log1p")
    assert choose_expression(cells, vocabulary, layer="log", use_raw=False).source == "layers['log']"


def test_normalised(cells, vocabulary):
    cells.X = np.expm1(lognormalised(cells.X))
    assert choose_expression(cells, vocabulary).kind == "normalised"


def test_odd_values_are_warned_about(cells, vocabulary):
    cells.X = np.log1p(lognormalised(cells.X))
    with pytest.warns(UserWarning, match="X: the values were log-transformed twice"):
        expression = choose_expression(cells, vocabulary)
    assert expression.warnings == ("X: the values were log-transformed twice.",)


def test_no_x(cells, vocabulary):
    bare = ad.AnnData(obs=cells.obs, var=cells.var, layers={"counts": cells.X, "other": cells.X})
    with pytest.warns(UserWarning, match=r"layers\['counts'\] is used, since there is no \.X"):
        assert choose_expression(bare, vocabulary).source == "layers['counts']"
    assert choose_expression(bare[3:9], vocabulary, layer="other").n_cells == 6
    del bare.layers["counts"]
    for view in (bare, bare[:3]):
        with pytest.raises(ValueError, match=r"adata\.X is None; name a layer \(\['other'\]\)"):
            choose_expression(view, vocabulary)


# --- wrong requests ----------------------------------------------------------------------------------------------------


def test_wrong_requests(cells, vocabulary):
    with pytest.raises(ValueError, match="use_raw=True, but adata.raw is None"):
        choose_expression(cells, vocabulary, use_raw=True)
    cells.layers["a"] = cells.X
    with pytest.raises(ValueError, match=r"layer 'b' is not in adata.layers; available: \['a'\]"):
        choose_expression(cells, vocabulary, layer="b")
    with pytest.raises(ValueError, match="layer='a' and use_raw=True exclude each other"):
        choose_expression(cells, vocabulary, layer="a", use_raw=True)
    with pytest.raises(TypeError, match="adata must be an AnnData, found DataFrame"):
        choose_expression(cells.to_df(), vocabulary)
    with pytest.raises(ValueError, match="size must be at least 1"):
        list(choose_expression(cells, vocabulary).chunks(0))


def test_empty(cells, vocabulary):
    with pytest.raises(ValueError, match=r"no cells \(shape 0 × 120\)"):
        choose_expression(cells[:0], vocabulary)
    with pytest.raises(ValueError, match=r"X has no genes \(adata has shape 40 × 0\)"):
        choose_expression(cells[:, :0].copy(), vocabulary)


def test_empty_cells_are_fine(cells, vocabulary):
    cells.X = sp.csr_matrix(cells.shape, dtype=np.float32)
    expression = choose_expression(cells, vocabulary)
    assert (expression.kind, expression.largest, read(expression).sum()) == ("counts", 0, 0)


def test_text_is_refused(cells, vocabulary):
    cells.layers["text"] = np.full(cells.shape, "a", dtype=object)
    with pytest.raises(TypeError, match=r"adata\.layers\['text'\] must hold integers or real numbers"):
        choose_expression(cells, vocabulary, layer="text")


# --- gene names --------------------------------------------------------------------------------------------------------


def cellxgene(cells, *, feature_name_in_raw):
    """CELLxGENE schema: Ensembl var_names, categorical feature_name, counts in .raw, log-normalised .X."""
    symbols = cells.var_names
    ids = [f"ENSG{90_000_000_000 + i}" for i in range(cells.n_vars)]  # unknown: only feature_name can help
    var = pd.DataFrame({"feature_name": pd.Categorical(symbols), "feature_is_filtered": False}, index=ids)
    result = ad.AnnData(sp.csr_matrix(lognormalised(cells.X)), obs=cells.obs, var=var)
    raw = ad.AnnData(cells.X, obs=cells.obs, var=var if feature_name_in_raw else var[[]])
    result.raw = raw
    return result


@pytest.mark.parametrize("feature_name_in_raw", [True, False])
def test_cellxgene_files_need_no_option(cells, vocabulary, feature_name_in_raw):
    adata = cellxgene(cells, feature_name_in_raw=feature_name_in_raw)
    expression = choose_expression(adata, vocabulary)
    assert (expression.source, expression.kind, expression.genes.n_matched) == ("X", "log1p", 120)
    raw = choose_expression(adata, vocabulary, use_raw=True)
    assert (raw.source, raw.kind, raw.genes.n_matched) == ("raw.X", "counts", 120)
    assert raw.genes.columns_used == {"feature_name:symbol": 120}
    assert raw.genes.token_ids.tolist() == expression.genes.token_ids.tolist()


def test_cellxgene_genes_filtered_from_x_count_as_absent_there(cells, vocabulary):
    adata = cellxgene(cells, feature_name_in_raw=False)
    adata.var["feature_is_filtered"] = np.arange(120) >= 40
    with pytest.warns(UserWarning, match=r"knows 120 of its genes, and 40 of those in \.X"):
        assert choose_expression(adata, vocabulary).source == "raw.X"


# --- layouts -----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    layout=st.sampled_from([np.asarray, np.asfortranarray, sp.csr_matrix, sp.csc_matrix, sp.csr_array, sp.csc_array]),
    dtype=st.sampled_from(["uint8", "int64", "float32", "float64"]),
    rows=st.none() | st.lists(st.integers(0, 39), min_size=1, max_size=50) | st.just(slice(5, 30, 2)),
    columns=st.none()
    | st.lists(st.integers(0, 119), min_size=1, unique=True)
    | st.sampled_from([slice(10, 60), slice(3, 90, 2), slice(None, None, -1)]),
    size=st.integers(1, 50),
    data=st.data(),
)
def test_views_and_layouts(vocabulary, symbols, layout, dtype, rows, columns, size, data):
    counts = np.random.default_rng(2).poisson(1.5, size=(40, 120)).astype(dtype) * 2
    adata = ad.AnnData(layout(counts), var=pd.DataFrame(index=symbols), layers={"same": layout(counts)})
    adata.obs_names = [f"cell{i}" for i in range(40)]
    rows, columns = (slice(None) if part is None else part for part in (rows, columns))
    repeats = isinstance(rows, list) and len(set(rows)) < len(rows)
    view = adata if rows == columns == slice(None) else adata[rows, columns]
    truth = counts[rows][:, columns].astype(np.float32)
    for layer in (None, "same"):
        with warnings.catch_warnings():
            if repeats:
                warnings.filterwarnings("ignore", "Observation names are not unique")
            expression = choose_expression(view, vocabulary, layer=layer)
            assert expression.kind == "counts"
            np.testing.assert_array_equal(read(expression, size), truth)
            index = data.draw(st.lists(st.integers(-len(truth), len(truth) - 1), max_size=8))
            np.testing.assert_array_equal(expression.rows(index).toarray(), truth[np.array(index, dtype=int)])
            mask = np.arange(len(truth)) % 3 == 1
            np.testing.assert_array_equal(expression.rows(mask).toarray(), truth[mask])
    assert expression.cell_names.tolist() == view.obs_names.tolist()
    assert view.is_view or view is adata


def test_rows_out_of_range(cells, vocabulary):
    with pytest.raises(IndexError):
        choose_expression(cells, vocabulary).rows([40])


@pytest.mark.parametrize("layout", [np.asarray, sp.csr_matrix, sp.csc_matrix])
@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("use_raw", [False, True])
def test_backed(cells, vocabulary, tmp_path, layout, view, use_raw):
    counts = cells.X.toarray()
    cells.X = layout(counts)
    cells.raw = cells
    cells.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    with closing(backed.file):
        order = [30, 2, 17, 5, 8]
        adata, truth = (backed[order], counts[order]) if view else (backed, counts)
        expression = choose_expression(adata, vocabulary, use_raw=use_raw)
        assert (expression.kind, expression.source) == ("counts", "raw.X" if use_raw else "X")
        np.testing.assert_array_equal(read(expression, 2), truth)
        np.testing.assert_array_equal(expression.rows([3, 0, 3]).toarray(), truth[[3, 0, 3]])
        assert adata.isbacked and adata.is_view == view


@pytest.mark.parametrize("layout", [np.asarray, sp.csr_matrix])
def test_backed_view_of_every_second_gene(cells, vocabulary, tmp_path, layout):
    counts = cells.X.toarray()
    cells.X = layout(counts)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    with closing(backed.file):
        np.testing.assert_array_equal(read(choose_expression(backed[4:9, ::2], vocabulary)), counts[4:9, ::2])


def test_backed_complaint_names_the_cell(cells, vocabulary, symbols, tmp_path):
    dense = cells.X.toarray()
    dense[31, 4] = -2
    cells.X = sp.csr_matrix(dense)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    with closing(backed.file), pytest.raises(ValueError, match=rf"first -2 in cell 'cell31', gene '{symbols[4]}'"):
        choose_expression(backed, vocabulary)


@pytest.mark.parametrize("layout", [np.asarray, sp.csr_matrix])
@pytest.mark.parametrize("view", [False, True])
def test_dask(cells, vocabulary, layout, view):
    da = pytest.importorskip("dask.array")
    counts = cells.X.toarray()
    lazy = da.from_array(counts, chunks=(11, 120)).map_blocks(layout, dtype=counts.dtype, meta=layout(counts[:0]))
    adata = ad.AnnData(lazy, obs=cells.obs, var=cells.var)
    adata, truth = (adata[5:33], counts[5:33]) if view else (adata, counts)
    expression = choose_expression(adata, vocabulary)
    assert expression.kind == "counts"
    np.testing.assert_array_equal(read(expression, 4), truth)
    np.testing.assert_array_equal(expression.rows([3, 0, 3]).toarray(), truth[[3, 0, 3]])


def test_duplicate_names_of_cells_and_genes(cells, vocabulary, symbols):
    names = [symbols[0], *symbols[:119]]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(Observation|Variable) names are not unique")
        cells.var_names, cells.obs_names = names, ["cell"] * 40
        expression = choose_expression(cells[3:20], vocabulary)
        assert (expression.genes.n_matched, expression.genes.n_duplicates) == (120, 1)
        np.testing.assert_array_equal(read(expression), cells.X[3:20].toarray())


# --- on disk and lazy: a sample decides, every value is checked when it is read -------------------------------------------


@pytest.fixture
def many(symbols):
    """200 cells of counts."""
    counts = np.random.default_rng(4).poisson(1.5, size=(200, 120)).astype(np.float32)
    obs = pd.DataFrame({"cell_type": ["B", "T"] * 100}, index=[f"cell{i}" for i in range(200)])
    var = pd.DataFrame({"feature_name": symbols}, index=[f"ENSG{90_000_000_000 + i}" for i in range(120)])
    return ad.AnnData(sp.csr_matrix(counts), obs=obs, var=var)


@pytest.fixture
def small_sample(monkeypatch):
    """16 cells decide."""
    monkeypatch.setattr(matrices, "SAMPLE_ROWS", 16)


def test_stored_cells_are_read_as_they_are(many, stored, small_sample, vocabulary, caplog):
    caplog.set_level("INFO", logger="scdlkit")
    expression = choose_expression(stored(many), vocabulary)
    assert (expression.source, expression.kind, expression.n_cells) == ("X", "counts", 200)
    assert expression.genes.n_matched == 120
    assert "X holds counts, judged by 16 of 200 cells" in caplog.text
    truth = many.X.toarray()
    np.testing.assert_array_equal(read(expression, 30), truth)
    np.testing.assert_array_equal(expression.rows([150, 3, 3]).toarray(), truth[[150, 3, 3]])
    assert expression.cell_names.tolist() == many.obs_names.tolist()

    starts = [cells.start for cells, _ in expression.chunks(30)]
    left = list(expression.pieces(30, skip=set(starts[1:-1])))
    assert [cells.start for cells, _ in left] == [starts[0], starts[-1]]
    for cells, piece in left:
        assert piece.cell_names.tolist() == many.obs_names[cells].tolist()
        assert (piece.kind, piece.genes, piece.n_cells) == ("counts", expression.genes, cells.stop - cells.start)
        np.testing.assert_array_equal(read(piece), truth[cells])


def test_bad_values_the_sample_missed_are_found_on_reading(many, stored, small_sample, vocabulary, symbols):
    many.X[101, 7] = -3
    many.X[102, 7] = np.nan
    adata = stored(many)
    expression = choose_expression(adata, vocabulary)
    message = r"1 negative, 1 NaN.*first -3 in cell 'cell101', gene 'ENSG90000000007'"
    with pytest.raises(ValueError, match=message):
        list(expression.chunks(50))
    with pytest.raises(ValueError, match=r"1 NaN.*cell 'cell102'"):
        expression.rows([102, 4])
    assert expression.rows([4, 100]).shape == (2, 120)


def test_values_of_another_kind_are_warned_about_once(many, stored, small_sample, vocabulary, caplog):
    many.X[101:104] = many.X[101:104] * 0.5
    expression = choose_expression(stored(many), vocabulary)
    assert expression.kind == "counts"
    assert len(read(expression, 10)) == 200
    assert caplog.text.count("are values of two kinds mixed?") == 1
    assert re.search(r"but from cell 'cell(9\d|10[01])' on there are fractions", caplog.text)  # the chunk of cell 101


def test_a_matrix_stored_by_genes_is_said_to_be_read_whole(many, vocabulary, tmp_path, caplog):
    many.X = sp.csc_matrix(many.X)
    many.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    with closing(backed.file):
        np.testing.assert_array_equal(read(choose_expression(backed, vocabulary)), many.X.toarray())
    assert "(200 cells × 120 genes) is stored by genes (CSC), so all of it is read into memory" in caplog.text
