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
    home = bench.folder / "large-study"
    fill = storage_module().fill
    config = configuration.with_values(
        Config(),
        global_={"scratch_dir": home, "log_dir": home / "logs"},
        paths={"val_parquet_path": home / "val.parquet"},
        tuning={"storage_path": home / "study.db", "output_dir": home, "n_trials": FINISHED},
    )
    home.mkdir()
    fsio.write_text(home / "config.toml", configuration.dump(config))
    study.prepare(config, StudyPaths(home / config.tuning.study_name))
    fill(config, FINISHED)
    of = f"a study of {FINISHED:,} trials"
    for command in (["status"], ["study", "show"]):
        yield _memory(home, command, of)
    page = home / "report.html"
    yield _memory(home, ["report", config.tuning.study_name, f"--output={page}"], of)
    yield _bytes(page, of)

    home = bench.folder / "large-run"
    home.mkdir()
    train = synthetic.write_parquet(home / "train.parquet", 5_000, DIM)
    val = synthetic.write_parquet(home / "val.parquet", IMAGES, DIM, prefix="v", seed=1)
    config = configuration.with_values(
        Config(),
        global_={"scratch_dir": home, "log_dir": home / "logs"},
        paths={"train_parquet_path": train, "val_parquet_path": val},
        training={"num_epochs": 1, "retrieval_metric_max_queries": 1_000},
    )
    fsio.write_text(home / "config.toml", configuration.dump(config))
    run(home, ["train"])
    of = f"a run with {IMAGES:,} images to look at"
    page = home / "report.html"
    yield _memory(home, ["report", f"--output={page}"], of)
    yield _bytes(page, of)


def _memory(home: Path, command: Sequence[str], of: str) -> Row:
    peak = run(home, command)
    words = " ".join(word for word in command if not word.startswith("-"))
    what = f"peak RSS of `{words}`, {of} ({peak.seconds:.0f} s)"
    return measure.absolute(what, [peak.resident], unit="GB")


def _bytes(page: Path, of: str) -> Row:
    what = f"the page of `report`, {of}"
    return measure.absolute(what, [page.stat().st_size / 1e6], unit="MB")
