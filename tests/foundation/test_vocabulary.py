import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scdlkit.foundation.vocabulary import Vocabulary

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "flash_keys" / "vocab.json"
SPECIAL = {"<pad>": 900, "<cls>": 901}


def small(*symbols):
    return Vocabulary({symbol: number for number, symbol in enumerate(symbols)} | SPECIAL)


@pytest.fixture(scope="module")
def golden_vocabulary():
    return Vocabulary.from_json(GOLDEN)


# --- the vocabulary itself ---------------------------------------------------------------------------------------------


def test_from_json(golden_vocabulary):
    tokens = json.loads(GOLDEN.read_text())
    assert dict(golden_vocabulary.tokens) == tokens
    assert len(golden_vocabulary) == max(tokens.values()) + 1 == len(tokens)
    assert golden_vocabulary.n_genes == len(tokens) - 3
    assert (golden_vocabulary.pad_id, golden_vocabulary.cls_id) == (tokens["<pad>"], tokens["<cls>"])
    assert all(golden_vocabulary.symbols[number] == token for token, number in tokens.items())
    assert "1,905 genes" in repr(golden_vocabulary)


def test_ids_may_have_gaps():
    vocabulary = Vocabulary({"A": 7, "<pad>": 0, "<cls>": 3})
    assert len(vocabulary) == 8
    assert vocabulary.symbols.tolist() == ["<pad>", "", "", "<cls>", "", "", "", "A"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"A": 0, "B": 0, "<pad>": 1, "<cls>": 2}', "'A' and 'B' share the id 0"),
        ('{"A": -1, "<pad>": 1, "<cls>": 2}', "from 0 to .*found -1"),
        ('{"A": 1000000000000, "<pad>": 1, "<cls>": 2}', "from 0 to .*found 1000000000000"),
        ('{"A": 0, "A": 3, "<pad>": 1, "<cls>": 2}', "vocab.json is not a vocabulary.*listed twice, first 'A'"),
        ('{"A": 0, "<pad>": 1}', r"special tokens \['<cls>'\] are missing among 2 tokens"),
        ("{}", "missing among 0 tokens"),
        ('["A", "B"]', "vocab.json is not a vocabulary.*found list"),
        ('{"A": ', "vocab.json is not a vocabulary"),
        ("\x80", "vocab.json is not a vocabulary"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, message):
    path = tmp_path / "vocab.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        Vocabulary.from_json(path)


@pytest.mark.parametrize("number", [1.0, "1", True, None])
def test_ids_must_be_integers(number):
    with pytest.raises(TypeError, match="id of 'A' must be an integer"):
        Vocabulary({"A": number} | SPECIAL)


def test_other_special_tokens(tmp_path):
    path = tmp_path / "vocab.json"
    path.write_text('{"A": 0, "[PAD]": 1, "[CLS]": 2}')
    vocabulary = Vocabulary.from_json(path, pad_token="[PAD]", cls_token="[CLS]")
    assert (vocabulary.pad_id, vocabulary.cls_id) == (1, 2)


# --- matching ----------------------------------------------------------------------------------------------------------


def test_order_of_matching():
    vocabulary = small("CD4", "CD8A", "C1orf21", "MS4A1")
    match = vocabulary.match(
        {
            "var_names": ["CD4", "x", "C1ORF21", "ENSG00000156738.20", "nothing"],
            "feature_name": ["CD8A", "CD8A", "", "", None],  # the first column wins where both hit
        }
    )
    assert match.token_ids.tolist() == [0, 1, 2, 3, -1]
    assert match.token_ids.dtype == np.int32
    assert match.how.tolist() == ["symbol", "symbol", "case", "ensembl", ""]
    assert match.names.tolist() == ["CD4", "CD8A", "C1orf21", "MS4A1", "nothing"]
    assert match.columns_used == {
        "var_names:symbol": 1,
        "feature_name:symbol": 1,
        "var_names:case": 1,
        "var_names:ensembl": 1,
    }
    assert (match.n_genes, match.n_matched, match.n_duplicates, match.overlap) == (5, 4, 0, 0.8)
    assert match.matched_how == {"symbol": 2, "case": 1, "ensembl": 1}


def test_an_exact_symbol_in_a_later_column_beats_a_case_match_in_an_earlier_one():
    assert small("CD4", "CD8A").match({"a": ["cd4"], "b": ["CD8A"]}).token_ids.tolist() == [1]


def test_ensembl_ids_reach_tokens_that_carry_them():
    vocabulary = small("PLCXD1", "PLCXD1_ENSG00000182378", "ENSG00000283886", "ENSG00000283886.3", "ENSG00000275493.2")
    names = ["ENSG00000182378.5", "PLCXD1", "ENSG00000283886.9", "ENSG00000283886.3", "ENSG00000275493"]
    assert vocabulary.match({"var_names": names}).token_ids.tolist() == [1, 0, 2, 3, 4]


def test_renamed_genes_are_reached_both_ways():
    assert small("GBA").match({"var_names": ["GBA1"]}).token_ids.tolist() == [0]
    assert small("GBA1").match({"var_names": ["GBA"]}).token_ids.tolist() == [0]
    # ... but not where the token's own gene is there too.
    assert small("GBA").match({"var_names": ["GBA1", "GBA"]}).token_ids.tolist() == [-1, 0]


def test_special_tokens_are_no_genes(golden_vocabulary):
    match = golden_vocabulary.match({"var_names": ["<pad>", "<cls>", "<eoc>", "<CLS>", "MS4A1"]})
    assert match.token_ids.tolist() == [-1, -1, -1, -1, golden_vocabulary.tokens["MS4A1"]]


def test_duplicates_share_a_token_and_are_counted():
    match = small("CD4", "CD8A").match({"var_names": ["CD4", "CD8A", "CD4", "ENSG00000010610", "x"]})
    assert match.token_ids.tolist() == [0, 1, 0, 0, -1]
    assert (match.n_matched, match.n_tokens, match.n_duplicates) == (4, 2, 2)


def test_mouse_genes_never_match_by_case():
    vocabulary = small("CD3E", "ACTB", "CD4", "C1orf21")
    match = vocabulary.match({"var_names": ["Cd3e", "Actb", "cd4", "C1ORF21"]})
    assert match.token_ids.tolist() == [-1, -1, 2, 3]


def test_a_case_match_never_claims_the_token_of_an_exact_match():
    assert small("CD4").match({"var_names": ["cd4", "CD4"]}).token_ids.tolist() == [-1, 0]


def test_tokens_that_differ_only_in_case_match_exactly_or_not_at_all():
    assert small("abc", "ABC").match({"var_names": ["abc", "ABC", "aBC"]}).token_ids.tolist() == [0, 1, -1]


def test_columns_of_different_length_are_refused(golden_vocabulary):
    with pytest.raises(ValueError, match="lengths {'a': 1, 'b': 2}"):
        golden_vocabulary.match({"a": ["x"], "b": ["x", "y"]})
    with pytest.raises(ValueError, match="lengths {}"):
        golden_vocabulary.match({})


def test_no_genes(golden_vocabulary):
    match = golden_vocabulary.match({"var_names": []})
    assert (match.n_genes, match.n_matched, match.overlap) == (0, 0, 0.0)


def test_every_token_of_the_golden_vocabulary_is_found_by_symbol_lower_case_and_id(golden_vocabulary):
    genes = [token for token in golden_vocabulary.tokens if not token.startswith("<")]
    ids = [golden_vocabulary.tokens[token] for token in genes]
    assert golden_vocabulary.match({"var_names": genes}).token_ids.tolist() == ids
    assert golden_vocabulary.match({"var_names": [gene.lower() for gene in genes]}).token_ids.tolist() == ids


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_order_of_genes_changes_nothing(golden_vocabulary, data):
    genes = sorted(token for token in golden_vocabulary.tokens if not token.startswith("<") and token.upper() == token)
    names = data.draw(st.lists(st.sampled_from(genes) | st.text(max_size=8), max_size=30))
    match = golden_vocabulary.match({"var_names": names})
    for name, token, way in zip(names, match.token_ids, match.how, strict=True):
        if name.strip() in golden_vocabulary.tokens and not name.strip().startswith("<"):
            assert (token, way) == (golden_vocabulary.tokens[name.strip()], "symbol")
        elif token >= 0:
            assert way == "case" and golden_vocabulary.symbols[token].upper() == name.strip().upper()
    order = data.draw(st.permutations(range(len(names))))
    again = golden_vocabulary.match({"var_names": [names[i] for i in order]})
    assert again.token_ids.tolist() == match.token_ids[order].tolist()
