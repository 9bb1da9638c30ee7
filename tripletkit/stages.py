"""What commands and jobs do: plain functions from a configuration to an exit code."""

from __future__ import annotations

import contextlib
import glob
import json
import shlex
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tripletkit import endings, fsio, inputs, log, processes
from tripletkit.cluster import resources
from tripletkit.config import Config
from tripletkit.errors import DONE, ConfigError, DataError, Interrupted, RunError, StorageAway
from tripletkit.log import logger
from tripletkit.paths import SPLITS, LogPaths, StudyPaths, run_paths, study_paths

if TYPE_CHECKING:
    from tripletkit.apply.recipe import Request
    from tripletkit.train.loop import TrainResult
    from tripletkit.tune.storage import SharedStudy


def train(config: Config, should_stop: Callable[[], bool]) -> int:
    """Train, or go on with, the run in `checkpoint_dir`; prints raw versus trained."""
    _train(config, should_stop)
    return DONE


def best(config: Config, should_stop: Callable[[], bool]) -> int:
    """The final training: `train`, and its metric beside that of the trial it comes from."""
    from tripletkit.tune.best import Best, comparison

    result = _train(config, should_stop)
    if processes.follows():
        return DONE
    chosen = Best(**json.loads(run_paths(config.checkpoint_dir).origin.read_text()))
    log.out.print(comparison(chosen, result.best_metrics, result.best_epoch), soft_wrap=True)
    return DONE


def _train(config: Config, should_stop: Callable[[], bool]) -> TrainResult:
    """Train with every GPU of the job, one process each; a launcher may have started us as one."""
    gpus = resources.gpus(config.slurm)
    if gpus > 1 and not processes.launched():
        result = _train_on(gpus, config, should_stop)
    else:
        result = train_in_group(None, config, should_stop)
    paths = run_paths(config.checkpoint_dir)
    if result.status == "stopped":
        raise Interrupted(
            f"stopped in epoch {result.epochs + 1}; the state is in {paths.last}",
            hint="the same command goes on from there",
            progress=result.steps > 0,
        )
    if processes.follows():
        return result
    if result.best_epoch is not None:
        _print_metrics(
            f"validation, {config.checkpoint_dir}",
            {"raw": result.raw, f"head, epoch {result.best_epoch}": result.best_metrics},
        )
    log.out.print(f"checkpoints, metrics and log: {paths.root}", soft_wrap=True)
    return result


def _train_on(gpus: int, config: Config, should_stop: Callable[[], bool]) -> TrainResult:
    with tempfile.TemporaryDirectory() as folder:
        work = partial(train_in_group, f"file://{folder}/rendezvous", config)
        environments = [
            {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(gpus),
                "LOCAL_WORLD_SIZE": str(gpus),
                "GLOO_SOCKET_IFNAME": "lo",  # they are all on this machine
            }
            for rank in range(gpus)
        ]
        ended = processes.run([work] * gpus, environments, should_stop=should_stop, together=True)
    first: TrainResult = processes.results(ended)[0]
    return first


def train_in_group(
    rendezvous: str | None, config: Config, should_stop: Callable[[], bool]
) -> TrainResult:
    """Train as one process of a group, or alone; rank 0 keeps the log."""
    from tripletkit.train import group, loop

    with contextlib.ExitStack() as stack:
        us = stack.enter_context(group.member(config.training.device, rendezvous=rendezvous))
        if us.leads:
            fsio.check_writable(
                config.checkpoint_dir, "set paths.checkpoint_dir to a folder of yours"
            )
            log_file = run_paths(config.checkpoint_dir).log
            stack.enter_context(log.also_to(log_file, config.logging.log_file))
        return loop.train(
            config,
            inputs.training_data(config),
            run_paths(config.checkpoint_dir),
            should_stop=should_stop,
            group=us,
        )


def tune(config: Config, should_stop: Callable[[], bool]) -> int:
    """Work on the study's trials until there is nothing left to do, or its budget is used up."""
    from tripletkit import slots

    try:
        summary = slots.run(config, study_paths(config), should_stop)
    except (Interrupted, StorageAway):
        raise
    except Exception:
        endings.tell_of_study(config, leaving=True)
        raise
    counts = Counter(summary.ended)
    did = ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "none"
    log.out.print(f"study {config.tuning.study_name}; trials of this worker: {did}")
    if summary.outdated:
        path = shlex.quote(str(study_paths(config).config))
        raise Interrupted(
            f"study {config.tuning.study_name}: {summary.outdated}",
            hint=f"`tripletkit tune --config {path}` goes on with it as it is now",
            progress=summary.progress,
        )
    if summary.open:
        raise Interrupted(
            f"study {config.tuning.study_name} has trials left",
            hint="the same command goes on with them",
            progress=summary.progress,
        )
    endings.tell_of_study(config, leaving=False)
    return DONE


def tidy(config: Config, _should_stop: Callable[[], bool]) -> int:
    """After the last worker: trials whose worker died wait for the next, none stays RUNNING."""
    from tripletkit.cluster import jobs
    from tripletkit.tune import storage

    shared = storage.open_study(config.tuning, seed=0, workers=1)
    left = hand_back_lost(config, shared)
    slurm = not jobs.current_job().startswith(jobs.LOCAL)
    if reached := endings.budget_reached(config, shared, slurm=slurm):
        log.out.print(f"{reached}: `tripletkit tune` with a larger --budget-gpu-hours goes on")
    elif left:
        log.out.print(
            f"{left} trials are left: `tripletkit tune` with the same flags goes on with them"
        )
    endings.tell_of_study(config, leaving=True)
    return DONE


def hand_back_lost(config: Config, shared: SharedStudy) -> int:
    """Trials of workers that are gone wait for the next one; returns how many are to be done."""
    from tripletkit.cluster import jobs
    from tripletkit.tune import claims

    logs = LogPaths(config.global_.log_dir)
    lost = claims.lost(shared, lambda ids: jobs.states(logs, ids))
    for number in claims.hand_back(shared, lost):
        logger.warning("trial %d: its worker is gone; it waits for the next one", number)
    return claims.open_trials(shared, config.tuning.total)


def serve_database(
    _config: Config, should_stop: Callable[[], bool], *, folder: str, max_connections: int
) -> int:
    """Run the PostgreSQL of `folder` until asked to stop."""
    from tripletkit.tune import database

    stopped_by = database.serve(
        Path(folder), max_connections=max_connections, should_stop=should_stop
    )
    if stopped_by == database.BY_SIGNAL:
        raise Interrupted(
            f"the database in {folder} was stopped", hint="`tripletkit db up` starts it"
        )
    return DONE


def evaluate(
    config: Config,
    *,
    split: str,
    checkpoint: str | Sequence[str] | None = None,
    as_json: bool = False,
    output: str | None = None,
    top: int = 20,
    resamples: int = 1000,
) -> int:
    """Retrieval metrics of one split with their intervals, raw and through checkpoints' heads."""
    from tripletkit.apply.evaluate import evaluate

    evaluate(
        config,
        split,
        _paths(checkpoint),
        output=Path(output) if output else None,
        top=top,
        resamples=resamples,
        as_json=as_json,
    )
    return DONE


def check_evaluation(
    config: Config,
    *,
    split: str,
    checkpoint: str | Sequence[str] | None = None,
    output: str | None = None,
    **_others: Any,
) -> None:
    """That `evaluate` with these options finds its files, before a job waits in a queue for them."""
    from tripletkit.apply.evaluate import check

    check(config, split, _paths(checkpoint), Path(output) if output else None)


def _paths(given: str | Sequence[str] | None) -> list[Path]:
    return [Path(path) for path in ([given] if isinstance(given, str) else given or ())]


def embed_request(
    *, source: str, destination: str, checkpoint: str, columns: Sequence[str] = (), **more: Any
) -> Request:
    """The options of a job as what they ask for."""
    from tripletkit.apply.recipe import Request

    return Request(
        Path(source), Path(destination), Path(checkpoint), columns=tuple(columns), **more
    )


def embed(config: Config, should_stop: Callable[[], bool], **options: Any) -> int:
    """Put parquet files through the head of a checkpoint."""
    from tripletkit.apply import embed as embedding

    request = embed_request(**options)
    result = embedding.run(config, request, should_stop)
    if result.made:
        where = result.made[0] if len(result.made) == 1 else request.destination
        log.out.print(
            f"{where}: {result.rows:,} rows of {result.dim} numbers, {request.dtype}"
            + (f", in {len(result.made)} files" if len(result.made) > 1 else ""),
            soft_wrap=True,
        )
    for count, what in ((result.skipped, "there already"), (result.elsewhere, "with others")):
        if count:
            log.out.print(f"{count} file{'s' if count > 1 else ''} {what}")
    return DONE


def report(config: Config, *, of: str, split: str, output: str, figures: str | None) -> int:
    """Write the page about the run in `checkpoint_dir`, or about the study, and its figures."""
    from tripletkit.report import page, static

    if of == "study":
        from tripletkit.monitor.inventory import Inventory
        from tripletkit.report import study

        made = study.report(Inventory(config))
    else:
        from tripletkit.report import run

        made = run.run_report(config, run_paths(config.checkpoint_dir), split=split)
    page.write(made, Path(output))
    log.out.print(output, soft_wrap=True)
    if figures:
        files = static.write(made, Path(figures))
        log.out.print(f"{len({file.stem for file in files})} figures in {figures}", soft_wrap=True)
    return DONE


def report_path(config: Config, of: str) -> Path:
    """Where the page is written unless the user says otherwise."""
    paths = study_paths(config) if of == "study" else run_paths(config.checkpoint_dir)
    return paths.report


def check_data(config: Config) -> int:
    """Validate every configured file and print what is in it."""
    from rich.table import Table

    from tripletkit.data.bands import open_bands
    from tripletkit.data.store import check_leakage, describe, open_store

    configured = [s for s in SPLITS if getattr(config.paths, f"{s}_parquet_path")]
    if not configured:
        raise inputs.missing("train")
    stores = {
        split: open_store(
            inputs.parquet_path(config, split),
            config.cache_dir,
            dim=config.training_model.input_dim,
        )
        for split in configured
    }
    described = {split: describe(store) for split, store in stores.items()}
    table = Table("")
    for split in described:
        table.add_column(split, justify="right")
    for key in next(iter(described.values())):
        values = (facts[key] for facts in described.values())
        table.add_row(key, *(f"{v:,}" if isinstance(v, int) else v for v in values))
    log.out.print(table)
    widths = {store.embeddings.shape[1] for store in stores.values()}
    if len(widths) > 1:
        raise DataError(
            "the splits have embeddings of different widths: "
            + ", ".join(f"{k} {s.embeddings.shape[1]}" for k, s in stores.items())
        )
    check_leakage(stores)
    log.out.print("no building is in two splits")
    metadata = config.paths.difficulty_metadata_path
    if metadata is not None and not metadata.exists():
        log.out.print(f"no {metadata} yet: `tripletkit data bands` builds it", soft_wrap=True)
    elif metadata is not None and "train" in stores:
        bands = open_bands(metadata, stores["train"], config.cache_dir)
        cells = bands.offsets[1:] > bands.offsets[:-1]
        per_band = cells.reshape(-1, bands.count).mean(0)
        shares = " ".join(f"{share:.0%}" for share in per_band)
        log.out.print(
            f"{bands.count} difficulty bands; anchors with neighbours in them, hardest band first:"
            f"\n{shares}"
        )
    return DONE


def build_bands(config: Config, *, neighbors: int, k0: int, force: bool) -> int:
    """Write `difficulty_metadata_path` from the training embeddings."""
    from tripletkit.data import bands
    from tripletkit.data.store import open_store, writing_to
    from tripletkit.device import choose_device

    path = config.paths.difficulty_metadata_path
    if path is None:
        raise ConfigError(
            "paths.difficulty_metadata_path is not set", hint="it says where the bands are written"
        )
    with contextlib.ExitStack() as stack:
        with writing_to(path.parent, 0):
            lock = stack.enter_context(fsio.passing_lock(path.with_name(f".{path.name}.lock")))
        if not lock.ours:
            raise RunError(
                f"another process is building {path}",
                hint="wait for it, or set paths.difficulty_metadata_path to another file",
            )
        if path.exists() and not force:
            raise ConfigError(f"{path} exists", hint="--force replaces it")
        if lock.sure:
            fsio.remove_leftovers(path.parent, f".{glob.escape(path.name)}.*.tmp")
        device = choose_device(config.training.device)
        store = open_store(
            inputs.parquet_path(config, "train"),
            config.cache_dir,
            dim=config.training_model.input_dim,
        )
        bands.build_bands(store, path, neighbors=neighbors, k0=k0, device=device)
    log.out.print(f"wrote {path}", soft_wrap=True)
    return DONE


def check_bands(config: Config, *, force: bool, **_others: Any) -> None:
    """That `build_bands` with these options finds its files, before a job waits for them."""
    from tripletkit.data import parquet

    path = config.paths.difficulty_metadata_path
    if path is not None and path.exists() and not force:
        raise ConfigError(f"{path} exists", hint="--force replaces it")
    files = parquet.find_files(inputs.parquet_path(config, "train"))
    parquet.open_table(files, [parquet.BUILDING, parquet.EMBEDDING])


def split_data(source: Path, out: Path, *, fractions: Mapping[str, float], seed: int) -> int:
    """Split a parquet file by building into train, val and test files."""
    from tripletkit.data.split import split_parquet

    rows = split_parquet(source, out, fractions=fractions, seed=seed)
    for name, count in rows.items():
        log.out.print(f"{out / name}.parquet: {count:,} rows", soft_wrap=True)
    return DONE


def _print_metrics(title: str, results: Mapping[str, Mapping[str, float]]) -> None:
    """A table of metrics, one column per result."""
    from rich.table import Table

    from tripletkit.train.evaluation import metric_names

    columns = list(results.values())
    log.out.print(title, soft_wrap=True)
    table = Table("metric", *results)
    for name in metric_names(columns[-1]):
        if all(name in column for column in columns):  # top_k may have changed since
            table.add_row(name, *(f"{column[name]:.4f}" for column in columns))
    table.add_row("queries", *(f"{int(column['queries']):,}" for column in columns))
    log.out.print(table)


def job_name(stage: str, config: Config, options: Mapping[str, Any]) -> str:
    """What the queue shows of a job: its stage, and the study, run or database it belongs to."""
    if stage == "db":
        return f"db:{Path(options['folder']).name}"
    if stage in ("tune", "best", "tidy") or options.get("of") == "study":
        return f"{stage}:{config.tuning.study_name}"
    given = _paths(options.get("checkpoint"))
    return f"{stage}:{_run_name(given[0].parent if given else config.checkpoint_dir)}"


def _run_name(folder: Path) -> str:
    """The name of a run's folder; of a trial, with that of the study."""
    of_study = StudyPaths(folder.parent).identity.exists()
    return f"{folder.parent.name}/{folder.name}" if of_study else folder.name


# What `python -m tripletkit.worker` runs: (configuration, should_stop, options of the stage).
JOBS: dict[str, Callable[..., int]] = {
    "train": train,
    "tune": tune,
    "tidy": tidy,
    "best": best,
    "evaluate": lambda config, _stop, **options: evaluate(config, **options),
    "report": lambda config, _stop, **options: report(config, **options),
    "embed": embed,
    "bands": lambda config, _stop, **options: build_bands(config, **options),
    "db": serve_database,
}
