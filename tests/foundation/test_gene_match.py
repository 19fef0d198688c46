from pathlib import Path

import pytest

from scdlkit.foundation.gene_match import check_overlap, minimum_overlap
from scdlkit.foundation.vocabulary import Vocabulary

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "flash_keys" / "vocab.json"


@pytest.fixture(scope="module")
def golden_vocabulary():
    return Vocabulary.from_json(GOLDEN)


def some_genes(golden_vocabulary, number):
    return [token for token in golden_vocabulary.tokens if not token.startswith(("<", "ENSG"))][:number]


@pytest.mark.parametrize(
    ("n_genes", "n_vocabulary", "needed"),
    [(30_000, 60_000, 3_000), (30_000, 1_905, 191), (765, 60_000, 77), (20, 60_000, 10)],
)
def test_minimum_overlap(n_genes, n_vocabulary, needed):
    assert minimum_overlap(n_genes, n_vocabulary) == needed


def test_enough_genes_pass(golden_vocabulary):
    match = golden_vocabulary.match({"var_names": some_genes(golden_vocabulary, 300)})
    assert match.guess == "human symbols"
    check_overlap(match)


def test_few_genes_are_warned_about(golden_vocabulary):
    with pytest.warns(UserWarning, match="Only 50 genes are known"):
        check_overlap(golden_vocabulary.match({"var_names": some_genes(golden_vocabulary, 50)}))


def test_too_few_genes_say_matched_and_needed(golden_vocabulary):
    names = some_genes(golden_vocabulary, 5) + [f"AT1G{i:05d}" for i in range(995)]
    with pytest.raises(ValueError, match=r"5 matched of 1,000, 100 needed \(unmatched: 'AT1G00000', .*'feature_name'"):
        check_overlap(golden_vocabulary.match({"var_names": names}))
    with pytest.raises(ValueError, match="5 matched of 1,000, 6 needed"):
        check_overlap(golden_vocabulary.match({"var_names": names}), minimum=6)
    with pytest.warns(UserWarning, match="Only 5 genes"):
        check_overlap(golden_vocabulary.match({"var_names": names}), minimum=5)
    with pytest.raises(ValueError, match="0 matched of 995, 1 needed"):
        check_overlap(golden_vocabulary.match({"var_names": names[5:]}), minimum=0)


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["Cd3e", "Cd4", "Actb", "Gm1234", "Ms4a1"], "mouse .*orthologs"),
        ([f"ENSMUSG000000{i:05d}" for i in range(300)], "mouse Ensembl ids .*orthologs"),
        ([f"ENSRNOG000000{i:05d}" for i in range(300)], "another species"),
        ([f"ENSG000009{i:05d}" for i in range(300)], "human Ensembl ids of genes"),
        (["TP53", "BRCA1", "BRCA2"], "human symbols of genes"),
    ],
)
def test_the_reason_is_guessed(golden_vocabulary, names, reason):
    with pytest.raises(ValueError, match=reason):
        check_overlap(golden_vocabulary.match({"var_names": names}))


def test_mouse_symbols_are_refused_whatever_the_minimum(golden_vocabulary):
    titles = [symbol.capitalize() for symbol in some_genes(golden_vocabulary, 500) if symbol.isalnum()] + [
        "H19",
        "MS4A1",
    ]
    match = golden_vocabulary.match({"var_names": titles})
    assert match.guess == "mouse symbols"
    with pytest.raises(ValueError, match="mouse"):
        check_overlap(match, minimum=1)


def test_human_orthologs_in_another_column_make_mouse_names_acceptable(golden_vocabulary):
    symbols = some_genes(golden_vocabulary, 300)
    match = golden_vocabulary.match({"var_names": [symbol.capitalize() for symbol in symbols], "gene_symbols": symbols})
    assert match.n_matched == 300
    check_overlap(match)
