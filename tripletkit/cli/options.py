"""Options that several commands share, and how they become a configuration."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from tripletkit.config import Config


def one_of(*values: str) -> Callable[[str], list[str]]:
    """What Tab offers for an option that takes one of these."""

    def complete(incomplete: str) -> list[str]:
        return [value for value in values if value.startswith(incomplete)]

    return complete


def _keys(incomplete: str) -> list[str]:
    from tripletkit.config import sections

    keys = (f"{name}.{key}=" for name, model in sections().items() for key in model.model_fields)
    return [key for key in keys if key.startswith(incomplete)]


ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Configuration file; default: ./config.toml if it exists."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="SECTION.KEY=VALUE",
        help="Override a key; repeatable.",
        autocompletion=_keys,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check everything and print the script; submit nothing.")
]

Webhook = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Post a JSON message there at the end; or a file that holds the address, or "
        "$TRIPLETKIT_WEBHOOK: it is a secret.",
        show_default=False,
    ),
]

# Where a command's work is done.
Cluster = Literal["here", "local", "slurm"]

OnCluster = Annotated[
    Cluster,
    typer.Option(
        help="here: in this process; local: in the background of this machine; slurm: as a job."
    ),
]

# Flags that set a key of the configuration, and their help: without loading the configuration.
SLURM_FLAGS = {
    "account": "Account that is charged.",
    "partition": "Partition.",
    "qos": "Quality of service.",
    "time": "Time limit of a job, as sbatch reads it.",
    "mem": "Memory of a job.",
    "cpus_per_task": "Cores of a job.",
    "gpus": "GPUs of a job.",
    "gres": "A gres string instead of --gpus.",
    "constraint": "Node features.",
    "mail": "Address for mail from Slurm at the end of a job.",
}
STUDY_FLAG = {"study_name": "The study; default: the one of the configuration."}
STUDY_FLAGS = {
    **STUDY_FLAG,
    "storage_path": "SQLite file, *.journal file, or folder of `tripletkit db up`.",
    "storage_url": "A PostgreSQL of yours; its password belongs in PGPASSFILE.",
}
PATIENCE = 10.0  # seconds to wait for a storage that is away: that it is away is an answer, too
ALIASES = {"workers": ["--workers", "--num-workers"]}


def load(path: Path | None, overrides: Sequence[str] | None) -> Config:
    """The effective configuration."""
    from tripletkit import config

    return config.load(path, overrides or ())


def load_study(path: Path | None, overrides: Sequence[str] | None) -> Config:
    """The same, with the study's own [tuning] where its workers have one: no need to repeat flags.

    What is set on the command line still counts.
    """
    from tripletkit import config
    from tripletkit.paths import study_paths

    loaded = load(path, overrides)
    own = study_paths(loaded).config
    if not own.exists():
        return loaded
    flags = [text for text in overrides or () if text.startswith("tuning.")]
    tuning = config.load(own, flags, environ={}).tuning
    # This is where we found it: it may have been moved here.
    return config.with_values(loaded, tuning=tuning.model_dump(exclude={"output_dir"}))


def help_if_alone(context: typer.Context) -> None:
    """Print the help of a group that was called without a command."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def flags(
    section: str, keys: Mapping[str, str]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command a flag for each of these keys (key: help); they arrive in its `overrides`."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = typing.get_type_hints(command, include_extras=True)
        parameters = [
            parameter.replace(annotation=hints[name], kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in inspect.signature(command).parameters.items()
        ]
        for key, text in keys.items():
            option = typer.Option(
                *ALIASES.get(key, ["--" + key.replace("_", "-")]),
                help=text,
                metavar="VALUE",
                show_default=False,
            )
            hints[key] = Annotated[str | None, option]
            parameters.append(
                inspect.Parameter(
                    key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hints[key]
                )
            )

        @functools.wraps(command)
        def wrapped(**given: Any) -> None:
            named = [(key, given.pop(key)) for key in keys]
            overrides = list(given.pop("overrides") or [])
            overrides += [f"{section}.{key}={value}" for key, value in named if value is not None]
            command(**given, overrides=overrides)

        wrapped.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapped.__annotations__ = hints
        return wrapped

    return decorate
