"""Command line: the main functions on .h5ad files, and a demo. Thin: all work is done in pp and tl."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from anndata import AnnData

app = typer.Typer(
    name="scdlkit",
    help="Adapt the single-cell foundation model scGPT to your own cell-type labels.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_INTERRUPTED = 130  # status of a program that Ctrl-C ended

Input = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Cells as .h5ad.")]
Cells = Annotated[Path, typer.Argument(exists=True, help="Cells as .h5ad or .zarr; they may be larger than memory.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted, if there is one.")]
CheckpointName = Annotated[str, typer.Option("--checkpoint", "-c", help="Registered name, or folder.")]
LabelKey = Annotated[str | None, typer.Option("--label-key", "-l", help="Column of .obs with cell types.")]
GroupKey = Annotated[str | None, typer.Option("--group-key", "-g", help="Column of .obs with donors or studies.")]
Folds = Annotated[int | None, typer.Option("--cv", help="Number of folds, instead of a single split.")]
Layer = Annotated[str | None, typer.Option("--layer", help="Layer to read; chosen and reported by default.")]
Precision = Annotated[str | None, typer.Option("--precision", help="fp32, bf16, int8 (CPU), fp16 (GPU) or auto.")]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:<n> or mps.")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for figures, tables and the model.")] = Path(
        "scdlkit_demo"
    ),
) -> None:
    """Run the main job on real blood cells, offline, in a minute or two."""
    from ._demo import run_demo

    with _clean_errors():
        run_demo(out, echo=typer.echo)


@app.command()
def inspect(
    path: Input,
    label_key: LabelKey = None,
    checkpoint: CheckpointName = "whole-human",
    group_key: GroupKey = None,
    cv: Folds = None,
    layer: Layer = None,
) -> None:
    """Report what would be used for annotation, and what may surprise."""
    from . import pp

    with _clean_errors():
        report = pp.inspect_annotation_data(
            _read(path), label_key, checkpoint=checkpoint, group_key=group_key, cv=cv, layer=layer
        )
        typer.echo(report)


@app.command()
def embed(
    path: Cells,
    out: Annotated[Path, typer.Option("--out", "-o", help=".npy or .parquet; or as the cells: a copy of them.")],
    checkpoint: CheckpointName = "whole-human",
    layer: Layer = None,
    key_added: Annotated[str, typer.Option(help="Key of .obsm.")] = "X_scgpt",
    resume: Resume = False,
    device: Device = None,
    precision: Precision = None,
) -> None:
    """Embed cells without any labels."""
    from . import tl

    with _clean_errors():
        tl.embed_file(
            path,
            out,
            checkpoint=checkpoint,
            layer=layer,
            key_added=key_added,
            resume=resume,
            device=device,
            precision=precision,  # type: ignore[arg-type]
        )
        typer.echo(f"Written: {out}")


@app.command()
def adapt(
    path: Input,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the model, tables and figures.")],
    label_key: LabelKey = None,
    checkpoint: CheckpointName = "whole-human",
    strategy: Annotated[list[str] | None, typer.Option("--strategy", "-s", help="May be given several times.")] = None,
    baseline: Annotated[
        list[str] | None, typer.Option("--baseline", "-b", help="May be given several times; all for all of them.")
    ] = None,
    group_key: GroupKey = None,
    repeats: Annotated[int, typer.Option("--repeats", help="Repeat the split, or the folds, so many times.")] = 1,
    cv: Folds = None,
    leakage_gap: Annotated[
        bool, typer.Option(help="With --group-key, fit also on splits by cell (twice the time).")
    ] = True,
    layer: Layer = None,
    drop_small_classes: Annotated[bool, typer.Option(help="Drop classes too small to be split.")] = False,
    annotated: Annotated[Path | None, typer.Option(help="Also write the annotated .h5ad here.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run in the same folder.")] = False,
    random_state: Annotated[int, typer.Option(help="Seed.")] = 42,
    device: Device = None,
) -> None:
    """Compare strategies on labelled cells, and save the model, a report and figures.

    Ctrl-C keeps what is finished, and ends with status 130.
    """
    from . import get, tl

    with _clean_errors():
        if annotated is not None:
            _check_h5ad("--annotated", annotated)
        adata = _read(path)
        runner = tl.adapt_annotation(
            adata,
            label_key,
            checkpoint=checkpoint,
            strategies=tuple(strategy or ("frozen_probe", "head")),
            baselines="all" if baseline == ["all"] else tuple(baseline or ("pca_logreg",)),
            group_key=group_key,
            n_repeats=repeats,
            cv=cv,
            leakage_gap=leakage_gap,
            layer=layer,
            small_classes="drop" if drop_small_classes else "error",
            random_state=random_state,
            device=device,
            output_dir=out,
            resume=resume,
        )
        if _writes():
            typer.echo(get.strategy_table(adata).to_string(index=False))
            typer.echo(runner.recommendation_)
            typer.echo(f"Model, report and figures: {out}")
        if annotated is not None:
            _write(adata, annotated)
    if runner.interrupted_:
        typer.echo(runner.interrupted_, err=True)
        raise typer.Exit(_INTERRUPTED)


@app.command()
def predict(
    path: Cells,
    model: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="Folder of a saved model.")],
    out: Annotated[Path, typer.Option("--out", "-o", help=".parquet or .csv; or as the cells: a copy of them.")],
    strategy: Annotated[str | None, typer.Option("--strategy", "-s", help="The best one by default.")] = None,
    arrays: Annotated[
        bool | None, typer.Option(help="Write embedding and probabilities too; by default not in tables.")
    ] = None,
    resume: Resume = False,
    precision: Precision = None,
) -> None:
    """Annotate cells with a saved model."""
    from . import tl

    with _clean_errors():
        counts = tl.predict_file(
            path,
            model,
            out,
            strategy=strategy,
            arrays=arrays,
            resume=resume,
            precision=precision,  # type: ignore[arg-type]
        )
        typer.echo(counts.to_string())
        typer.echo(f"Written: {out}")


@app.command()
def checkpoints() -> None:
    """List the registered checkpoints."""
    from .foundation.checkpoints import list_checkpoints

    typer.echo(list_checkpoints().to_string(index=False))


@contextmanager
def _clean_errors() -> Iterator[None]:
    """Errors of the interface are messages for the user, not tracebacks."""
    try:
        yield
    except (ValueError, TypeError, KeyError, ImportError, OSError, RuntimeError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        typer.echo(f"Error: {text}", err=True)
        raise typer.Exit(1) from error


def _read(path: Path) -> AnnData:
    from anndata import read_h5ad

    return read_h5ad(path)


def _check_h5ad(option: str, path: Path) -> None:
    """Raise before any work is done."""
    if path.suffix != ".h5ad":
        raise ValueError(f"{option} must end in .h5ad, found {path}.")


def _writes() -> bool:
    """Whether this process writes; of several that were launched together the first one does."""
    from .foundation._processes import is_main_process

    return is_main_process()


def _write(adata: AnnData, out: Path) -> None:
    """Write beside the target and rename, so that no half file is left."""
    if not _writes():
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.stem}-unfinished.h5ad")
    try:
        adata.write_h5ad(unfinished)
        unfinished.replace(out)
    finally:
        unfinished.unlink(missing_ok=True)
    typer.echo(f"Written: {out}")
