"""What one looks at when all is done, at the sizes of the largest users: a study, and a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.benchmarks import measure, synthetic
from tests.benchmarks.measure import Bench, Row
from tests.benchmarks.processes import run, storage_module
from tripletkit import config as configuration
from tripletkit import fsio
from tripletkit.config import Config
from tripletkit.paths import StudyPaths
from tripletkit.tune import study

IMAGES, DIM = 600_000, 64
FINISHED = 5_000


def large(bench: Bench) -> Iterator[Row]:
    """Memory of `status`, `study show` and `report`, and the size of their pages."""
    yield from _of_a_study(bench.folder / "large-study")
    yield from _of_a_run(bench.folder / "large-run")


def _of_a_study(home: Path) -> Iterator[Row]:
    fill = storage_module().fill
    home.mkdir()
    config = _configured(
        home,
        paths={"val_parquet_path": home / "val.parquet"},
        tuning={"storage_path": home / "study.db", "output_dir": home, "n_trials": FINISHED},
    )
    study.prepare(config, StudyPaths(home / config.tuning.study_name))
    fill(config, FINISHED)
    of = f"a study of {FINISHED:,} trials"
    for command in (["status"], ["study", "show"]):
        yield _memory(home, command, of)
    yield from _page(home, ["report", config.tuning.study_name], of)


def _of_a_run(home: Path) -> Iterator[Row]:
    home.mkdir()
    train = synthetic.write_parquet(home / "train.parquet", 5_000, DIM)
    val = synthetic.write_parquet(home / "val.parquet", IMAGES, DIM, prefix="v", seed=1)
    _configured(
        home,
        paths={"train_parquet_path": train, "val_parquet_path": val},
        training={"num_epochs": 1, "retrieval_metric_max_queries": 1_000},
    )
    run(home, ["train"])
    yield from _page(home, ["report"], f"a run with {IMAGES:,} images to look at")


def _configured(home: Path, **sections: dict[str, object]) -> Config:
    """A config.toml in the folder, which all else goes into."""
    places = {"scratch_dir": home, "log_dir": home / "logs"}
    config = configuration.with_values(Config(), global_=places, **sections)
    fsio.write_text(home / "config.toml", configuration.dump(config))
    return config


def _page(home: Path, command: Sequence[str], of: str) -> Iterator[Row]:
    page = home / "report.html"
    yield _memory(home, [*command, f"--output={page}"], of)
    what = f"the page of `report`, {of}"
    yield measure.absolute(what, [page.stat().st_size / 1e6], unit="MB")


def _memory(home: Path, command: Sequence[str], of: str) -> Row:
    peak = run(home, command)
    words = " ".join(word for word in command if not word.startswith("-"))
    what = f"peak RSS of `{words}`, {of} ({peak.seconds:.0f} s)"
    return measure.absolute(what, [peak.resident], unit="GB")
