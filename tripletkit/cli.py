"""The command line: parsing, and the one boundary where errors become messages and exit codes.

Nothing heavy is imported until a command runs: `tripletkit --help` answers at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from tripletkit import __version__, log
from tripletkit.errors import ConfigError, Interrupted, TripletkitError

if TYPE_CHECKING:
    from tripletkit.config import Config

# Typer may carry its own copy of click: its errors are reached through Typer.
UsageError: Any = typer.BadParameter.__base__

OUT_OF_MEMORY = (
    'lower training.batch_size, set training.placement = "host", or evaluate on less with the '
    "val_sample_* keys"
)

app = typer.Typer(
    name="tripletkit",
    help="Train, tune and apply triplet-loss projection heads on precomputed embeddings.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer()
app.add_typer(data_app, name="data")

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="Configuration file; default: ./config.toml if it exists."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="SECTION.KEY=VALUE", help="Override a key; repeatable."),
]


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show debug messages.")] = False,
) -> None:
    """Set up logging."""
    if version:
        typer.echo(f"tripletkit {__version__}")
        raise typer.Exit
    log.setup(verbose=verbose)
    _help_if_alone(context)


@data_app.callback(invoke_without_command=True)
def data(context: typer.Context) -> None:
    """Check, split and prepare the embeddings."""
    _help_if_alone(context)


def _help_if_alone(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("config.toml"),
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented config.toml with every key and its default."""
    from tripletkit import config, fsio

    if path.exists() and not force:
        raise ConfigError(f"{path} exists", hint="--force replaces it")
    fsio.write_text(path, config.template())
    log.out.print(f"wrote {path}: set paths.train_parquet_path in it next", soft_wrap=True)


@app.command()
def train(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Train a projection head, or go on where an earlier run stopped."""
    from tripletkit import stages

    raise typer.Exit(stages.train(_load(config, overrides)))


@app.command()
def evaluate(
    config: ConfigFile = None,
    overrides: Overrides = None,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Default: the best one in checkpoint_dir.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print retrieval metrics of a split: the raw embeddings beside the trained head."""
    from tripletkit import stages

    if split not in stages.SPLITS:
        raise ConfigError(f"--split is {split!r}", hint="one of train, val, test")
    loaded = _load(config, overrides)
    raise typer.Exit(stages.evaluate(loaded, split=split, checkpoint=checkpoint, as_json=as_json))


@data_app.command("check")
def data_check(config: ConfigFile = None, overrides: Overrides = None) -> None:
    """Validate the parquet files and print what is in them."""
    from tripletkit import stages

    raise typer.Exit(stages.check_data(_load(config, overrides)))


@data_app.command("bands")
def data_bands(
    config: ConfigFile = None,
    overrides: Overrides = None,
    neighbors: Annotated[int, typer.Option(min=1, help="Neighbour buildings per image.")] = 150,
    k0: Annotated[int, typer.Option(min=1, help="The neighbour that distances scale by.")] = 50,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Build the difficulty bands of the training images by exact nearest neighbours."""
    from tripletkit import stages

    loaded = _load(config, overrides)
    raise typer.Exit(stages.build_bands(loaded, neighbors=neighbors, k0=k0, force=force))


@data_app.command("split")
def data_split(
    source: Annotated[Path, typer.Argument(help="Parquet file, folder or glob.")],
    out: Annotated[Path, typer.Argument(help="Folder for train, val and test.parquet.")],
    val: Annotated[float, typer.Option(min=0, max=1, help="Share of the buildings.")] = 0.1,
    test: Annotated[float, typer.Option(min=0, max=1, help="Share of the buildings.")] = 0.1,
    seed: Annotated[int, typer.Option(min=0)] = 42,
) -> None:
    """Split by building; rows added later never move a building to another split."""
    from tripletkit import stages

    if val + test >= 1:
        raise ConfigError(f"--val {val} and --test {test} leave nothing to train on")
    fractions = {"train": 1 - val - test, "val": val, "test": test}
    fractions = {name: share for name, share in fractions.items() if share > 0}
    raise typer.Exit(stages.split_data(source, out, fractions=fractions, seed=seed))


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Folder for everything it writes.")] = Path("demo"),
) -> None:
    """Run the whole job on real data made from fonts: about a minute on two cores."""
    from tripletkit import demo

    raise typer.Exit(demo.run(folder))


def _load(path: Path | None, overrides: Sequence[str] | None) -> Config:
    from tripletkit import config

    return config.load(path, overrides or ())


def run(command: Callable[[], int | None]) -> int:
    """Call `command`; errors become a message on stderr and an exit code."""
    try:
        return command() or 0
    except TripletkitError as error:
        _say(error.message, error.hint)
        return error.exit_code
    except UsageError as error:
        context = getattr(error, "ctx", None)
        _say(
            error.format_message(),
            f"see {context.command_path} --help" if context is not None else None,
        )
        return ConfigError.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _say("interrupted", None)
        return Interrupted.exit_code
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _say(f"{where}{error.strerror or error}", None)
        return TripletkitError.exit_code
    except Exception as error:  # noqa: BLE001 - the boundary: a bug shows its traceback, and says so
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(error, torch.OutOfMemoryError):
            _say(f"the GPU ran out of memory: {str(error).splitlines()[0]}", OUT_OF_MEMORY)
            return TripletkitError.exit_code
        traceback.print_exc()
        _say(
            f"this is a bug in tripletkit {__version__}",
            "please report it with the lines above",
        )
        return TripletkitError.exit_code


def _say(message: str, hint: str | None) -> None:
    log.err.print("error: ", style="bold red", end="")
    log.err.print(message, markup=False, soft_wrap=True)
    if hint:
        log.err.print(f"hint: {hint}", markup=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of `tripletkit`; ends the process with a stable exit code."""
    # Torch's threads spin while they wait for each other, by default so long that another program
    # on one of the cores slows training by an order of magnitude. A short spin costs little.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    sys.exit(run(lambda: app(arguments, prog_name="tripletkit", standalone_mode=False)))
