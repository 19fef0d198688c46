import pandas as pd
import pytest

from scdlkit.foundation.gene_names import (
    clean_names,
    ensembl_id,
    gene_columns,
    guess_naming,
    human_genes,
    human_symbols,
    looks_like_mouse,
)

MOUSE = [
    "Cd3e",
    "B2m",
    "C1qa",
    "Gm1234",
    "H2-K1",
    "H2-Ab1",
    "mt-Nd1",
    "1700001C02Rik",
    "Hba-a1",
    "Trp53",
    "Il2",
    "Actb",
]
HUMAN = ["CD3E", "B2M", "C1QA", "HLA-A", "MT-ND1", "C1orf21", "CXorf38", "C20orf27", "H2AC1", "RP11-34P13.7", "Y_RNA"]


@pytest.mark.parametrize("name", MOUSE)
def test_mouse_symbols_look_like_mouse(name):
    assert looks_like_mouse(name)


@pytest.mark.parametrize("name", [*HUMAN, "LA16c-431H6.7", "XXbac-BPG16N22.5", "hsa-mir-21", "cd3e", ""])
def test_human_symbols_do_not(name):
    assert not looks_like_mouse(name)


def test_hardly_any_human_symbol_of_the_table_looks_like_mouse():
    alike = [symbol for symbol in human_symbols() if looks_like_mouse(symbol)]
    assert len(human_symbols()) > 60_000
    assert set(alike) == {"Vault", "Telomerase-vert"}


@pytest.mark.parametrize(
    ("gene", "symbol"),
    [
        ("ENSG00000010610", "CD4"),
        ("ENSG00000153563", "CD8A"),
        ("ENSG00000156738", "MS4A1"),
        ("ENSG00000198851", "CD3E"),
        ("ENSG00000188536", "HBA2"),
    ],
)
def test_the_table_knows_well_known_genes(gene, symbol):
    assert human_genes()[gene] == (symbol,)
    assert human_symbols()[symbol] == gene


def test_the_table_has_old_and_new_symbols_of_a_renamed_gene():
    assert human_genes()["ENSG00000177628"] == ("GBA", "GBA1")
    assert human_symbols()["GBA"] == human_symbols()["GBA1"] == "ENSG00000177628"


def test_a_symbol_of_several_genes_stands_for_none():
    assert human_symbols()["Y_RNA"] == ""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ENSG00000010610", "ENSG00000010610"),
        ("ENSG00000010610.10", "ENSG00000010610"),
        ("ENSG00000182378.15_PAR_Y", "ENSG00000182378"),
        ("PLCXD1_ENSG00000182378", "ENSG00000182378"),
        ("ENSMUSG00000032093", ""),
        ("ENSG123", ""),
        ("CD4", ""),
        ("", ""),
    ],
)
def test_ensembl_id(name, expected):
    assert ensembl_id(name) == expected


def test_clean_names():
    assert clean_names([" CD4 ", None, float("nan"), 7, pd.NA, "x"]) == ["CD4", "", "", "", "", "x"]


@pytest.mark.parametrize(
    ("columns", "guess"),
    [
        ([["ENSMUSG00000032093", "ENSMUSG00000032094.2"]], "mouse Ensembl ids"),
        ([["ENSMUSG00000032093"], ["Cd3e"]], "mouse Ensembl ids"),
        ([["ENSDARG00000032093", "FBgn0000008", "WBGene00000001"]], "other-species Ensembl ids"),
        ([MOUSE], "mouse symbols"),
        ([["0", "1", "2"], ["Cd3e", "Cd4", ""]], "mouse symbols"),
        ([["ENSG00000010610.1", "ENSG00000153563"]], "Ensembl ids"),
        ([["CD4", "CD8A", "strange"]], "human symbols"),
        ([["AT1G01010", "AT1G01020"]], "unknown"),
        ([["", ""]], "unknown"),
        ([[]], "unknown"),
    ],
)
def test_guess_naming(columns, guess):
    assert guess_naming(columns) == guess


def test_gene_columns_are_found_in_order_whatever_their_case_and_type():
    var = pd.DataFrame(
        {
            "n_cells": [1, 2],
            "gene_ids": ["ENSG1", "ENSG2"],
            "Feature_Name": pd.Categorical(["A", "B"]),
            "gene_id": [1, 2],
            "symbol": [None, "B"],
        },
        index=["a", "b"],
    )
    columns = gene_columns(var)
    assert list(columns) == ["var_names", "Feature_Name", "symbol", "gene_ids"]
    assert list(columns["Feature_Name"]) == ["A", "B"]


def test_gene_columns_of_raw_come_from_var_where_it_lacks_them():
    var = pd.DataFrame({"feature_name": pd.Categorical(["B", "A"])}, index=["g2", "g1"])
    columns = gene_columns(pd.DataFrame(index=["g1", "g2", "g3"]), var)
    assert list(columns["feature_name"]) == ["A", "B", ""]
    own = gene_columns(pd.DataFrame({"feature_name": ["x", "y", "z"]}, index=["g1", "g2", "g3"]), var)
    assert list(own["feature_name"]) == ["x", "y", "z"]
    doubtful = gene_columns(pd.DataFrame(index=["g1"]), pd.DataFrame({"feature_name": ["A", "B"]}, index=["g1", "g1"]))
    assert list(doubtful) == ["var_names"]
