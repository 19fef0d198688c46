"""Label efficiency: which labels stay, and that the scores are those of a fit on these alone."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

import scdlkit as sk
from scdlkit.foundation.label_efficiency import hide_labels
from scdlkit.foundation.splits import make_split
from scdlkit.foundation.strategies import CellData, FrozenProbe

OPTIONS = {"strategies": ("frozen_probe",), "n_repeats": 2, "fractions": (1.0, 0.1, 0.3)}
NAMES = np.array([f"cell{i}" for i in range(200)])
CODES = np.random.default_rng(0).choice(4, 200, p=[0.5, 0.3, 0.15, 0.05])
SPLIT = make_split(CODES, NAMES, classes=list("abcd"), seed=1)


@given(st.floats(0.001, 1), st.floats(0.001, 1), st.integers(0, 5))
def test_shares_are_nested_and_have_every_class(one, two, seed):
    small, large = (hide_labels(SPLIT, CODES, NAMES, value, seed=seed) for value in sorted((one, two)))
    for part in ("train", "val"):
        kept = getattr(large, part)
        assert set(getattr(small, part)) <= set(kept) <= set(getattr(SPLIT, part))
        assert set(CODES[getattr(small, part)]) == set(CODES[getattr(SPLIT, part)])
        for code in range(4):
            n = (CODES[getattr(SPLIT, part)] == code).sum()
            assert (CODES[kept] == code).sum() == max(1, round(max(one, two) * n))
    np.testing.assert_array_equal(small.test, SPLIT.test)


def test_order_of_the_cells_does_not_matter():
    order = np.random.default_rng(1).permutation(200)
    kept = hide_labels(SPLIT, CODES, NAMES, 0.2, seed=3)
    again = hide_labels(SPLIT.subset(order), CODES[order], NAMES[order], 0.2, seed=3)
    np.testing.assert_array_equal(again.assignment, kept.assignment[order])


def test_all_labels_are_the_plain_comparison(blood, checkpoint):
    table = sk.tl.label_efficiency(blood, checkpoint=checkpoint, **OPTIONS)
    assert table["fraction"].tolist() == [0.1, 0.1, 0.3, 0.3, 1.0, 1.0]
    assert (table.groupby("fraction")["n_labelled"].first().diff().dropna() > 0).all()
    runner = sk.AnnotationRunner(checkpoint=checkpoint, strategies=("frozen_probe",), n_repeats=2)
    expected = runner.fit_compare(blood).set_index("strategy")
    whole = table[table["fraction"] == 1].set_index("strategy")
    for column in ("test_macro_f1", "test_macro_f1_low", "val_accuracy"):
        np.testing.assert_allclose(whole[column], expected.loc[whole.index, column])


def test_few_labels_are_a_fit_on_these_alone(blood, checkpoint):
    options = {**OPTIONS, "n_repeats": 1, "baselines": (), "fractions": (0.2,)}
    table = sk.tl.label_efficiency(blood, checkpoint=checkpoint, **options)
    runner = sk.AnnotationRunner(checkpoint=checkpoint, strategies=("frozen_probe",), baselines=())
    prepared, cells, fits = runner._cells_and_fits(blood)
    split = hide_labels(fits[0].split, prepared.codes, prepared.names, 0.2, seed=42)
    parts = [CellData(embedding=cells.embedding[rows], codes=prepared.codes[rows]) for rows in (split.train, split.val)]
    probe = FrozenProbe()
    probe.fit(*parts, n_classes=4, seed=42)
    predicted = probe.predict_proba(CellData(embedding=cells.embedding[split.test])).argmax(1)
    expected = f1_score(prepared.codes[split.test], predicted, average="macro")
    assert table["test_macro_f1"].item() == pytest.approx(expected)
    assert table["n_train"].item() == len(split.train) and table["n_val"].item() == len(split.val)


@pytest.mark.parametrize("form", ["h5ad", "zarr"])
def test_result_survives_files_and_is_drawn(blood, checkpoint, through_disk, tmp_path, form):
    before = blood.obs.copy()
    table = sk.tl.label_efficiency(blood, "cell_type", checkpoint=checkpoint, **OPTIONS)
    pd.testing.assert_frame_equal(blood.obs, before)
    back = through_disk(blood, tmp_path, form)
    found = sk.get.label_efficiency(back)
    pd.testing.assert_frame_equal(found, table, check_dtype=False)
    assert sk.pl.label_efficiency(back, show=False) is not None
    plt.close("all")


def test_a_failure_is_a_row(blood, checkpoint, monkeypatch):
    fit = FrozenProbe.fit

    def fails_with_few(self, train, *rest, **options):
        if train.n_cells < 60:
            raise ValueError("too few")
        return fit(self, train, *rest, **options)

    monkeypatch.setattr(FrozenProbe, "fit", fails_with_few)
    with pytest.warns(UserWarning, match="too few"):
        table = sk.tl.label_efficiency(blood, checkpoint=checkpoint, baselines=(), **OPTIONS)
    assert table["error"].str.contains("too few").tolist() == [True, True, False]
    assert table["test_macro_f1"].isna().tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fractions": ()}, "fractions is empty"),
        ({"fractions": (0, 0.5)}, "fractions must be above 0 and at most 1, found 0"),
        ({"fractions": (0.5, 0.5)}, "fractions must be different"),
        ({"key_added": "a/b"}, "key_added must be a name without '/'"),
    ],
)
def test_bad_settings(options, message, blood, checkpoint):
    with pytest.raises(ValueError, match=message):
        sk.tl.label_efficiency(blood, checkpoint=checkpoint, **{**OPTIONS, **options})
    assert not blood.uns
