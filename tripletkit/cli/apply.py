"""`tripletkit evaluate | embed | export`: what a trained head is for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from tripletkit.cli.options import (
    SLURM_FLAGS,
    AsJson,
    ConfigFile,
    DryRun,
    OnCluster,
    Overrides,
    flags,
    load,
    one_of,
)
from tripletkit.errors import ConfigError
from tripletkit.paths import SPLITS


@flags("slurm", SLURM_FLAGS)
def evaluate(
    config: ConfigFile = None,
    overrides: Overrides = None,
    split: Annotated[
        str, typer.Option(help="train, val or test.", autocompletion=one_of(*SPLITS))
    ] = "test",
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(
            help="Repeatable: a column of the tables each. Default: the best one in checkpoint_dir.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for evaluation.json and evaluation.md. Default: evaluation/SPLIT beside "
            "the first checkpoint.",
            show_default=False,
        ),
    ] = None,
    top: Annotated[
        int, typer.Option(min=0, help="Weakest buildings and confused pairs that are kept.")
    ] = 20,
    resamples: Annotated[
        int, typer.Option(min=100, help="Of the bootstrap behind the intervals.")
    ] = 1000,
    as_json: AsJson = False,
    cluster: OnCluster = "here",
    dry_run: DryRun = False,
) -> None:
    """Print retrieval metrics of a split with their intervals: raw embeddings beside heads."""
    from tripletkit import submission

    if split not in SPLITS:
        raise ConfigError(f"--split is {split!r}", hint="one of train, val, test")
    if output is not None and output.suffix in (".json", ".md"):
        raise ConfigError(f"--output {output} is to be a folder", hint="it will hold two files")
    options = {
        "split": split,
        "checkpoint": [str(path.absolute()) for path in checkpoint or ()],
        "output": str(output.absolute()) if output else None,
        "top": top,
        "resamples": resamples,
        "as_json": as_json,
    }
    loaded = load(config, overrides)
    raise typer.Exit(submission.start("evaluate", loaded, options, cluster, dry_run=dry_run))


@flags("slurm", SLURM_FLAGS)
def embed(
    source: Annotated[Path, typer.Argument(help="Parquet file, folder or glob.")],
    destination: Annotated[
        Path,
        typer.Argument(
            help="A .parquet file for one file; else a folder, for files of equal name."
        ),
    ],
    config: ConfigFile = None,
    overrides: Overrides = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Default: the best one in checkpoint_dir.")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            help="Columns to carry along beside ids and building_id: a,b or all.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        Literal["float32", "float16"], typer.Option(help="Of the embeddings.")
    ] = "float32",
    per_building: Annotated[
        bool,
        typer.Option("--per-building", help="One vector per building: the mean of its images'."),
    ] = False,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Replace what was made with something else, or before its source."
        ),
    ] = False,
    cluster: OnCluster = "here",
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Jobs that share the files; default: 1.", show_default=False),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Put embeddings through a trained head: parquet in, parquet out. Again, it goes on."""
    from tripletkit import submission

    options = {
        "source": str(source.absolute()),
        "destination": str(destination.absolute()),
        "checkpoint": str(checkpoint.absolute()) if checkpoint else None,
        "columns": [name for name in (columns or "").split(",") if name],
        "dtype": dtype,
        "per_building": per_building,
        "force": force,
    }
    raise typer.Exit(
        submission.embed(
            load(config, overrides), options, cluster, workers=workers, dry_run=dry_run
        )
    )


def export(
    folder: Annotated[Path, typer.Argument(help="Folder to write; it must not exist yet.")],
    config: ConfigFile = None,
    overrides: Overrides = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Default: the best one in checkpoint_dir.")
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="FORMAT",
            help="safetensors or onnx; repeatable. Default: both.",
            autocompletion=one_of("safetensors", "onnx"),
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
) -> None:
    """Write a trained head for other programs: safetensors, ONNX, and a model card."""
    from tripletkit import log
    from tripletkit.apply import export as exporter

    written = exporter.export(
        load(config, overrides),
        folder,
        checkpoint=checkpoint,
        formats=formats or exporter.FORMATS,
        force=force,
    )
    log.out.print(f"wrote {folder}: {', '.join(path.name for path in written)}", soft_wrap=True)


def add_to(app: typer.Typer) -> None:
    """Register the commands."""
    for command in (evaluate, embed, export):
        app.command(command.__name__)(command)
