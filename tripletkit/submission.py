"""From a command to where its work is done: this process, the background, or a Slurm job."""

from __future__ import annotations

import contextlib
import shlex
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tripletkit import config as configuration
from tripletkit import endings, fsio, inputs, log, notify, room, stages, worker
from tripletkit.cluster import launch, preempt, preflight, queue, resources
from tripletkit.cluster.launch import Job, Submission
from tripletkit.config import Config, Slurm
from tripletkit.errors import DONE, ClusterError, ConfigError, RunError, TripletkitError
from tripletkit.log import logger
from tripletkit.paths import LogPaths, RunPaths, StudyPaths, run_paths, study_paths

if TYPE_CHECKING:
    import optuna

    from tripletkit.tune.best import Best

Cluster = Literal["here", "local", "slurm"]

# These answer to a signal by saving their state; the others just end.
STOPPABLE = ("train", "tune", "best", "db", "embed")
# Of the small job behind the workers.
TIDY = {"cpus_per_task": 1, "gpus": 0, "gres": None, "mem": "2G", "time": "00:15:00"}
# Of the job of a database, unless the user says otherwise.
DATABASE = {"cpus_per_task": 2, "gpus": 0, "gres": None, "mem": "4G"}
WAIT_FOR_DATABASE = 3600.0  # seconds; it may have to queue


def start(
    stage: str,
    config: Config,
    options: Mapping[str, Any],
    cluster: Cluster,
    *,
    dry_run: bool,
    webhook: str | None = None,
) -> int:
    """Run a stage here, or send it to a cluster. `webhook`: of a training."""
    _check_dry_run(cluster, dry_run)
    run = run_paths(config.checkpoint_dir)
    if stage == "train" and not run.final.exists():
        room.warn(config)
    if stage == "train":
        inputs.check_files(config)
    if cluster == "here":
        with _told(run, webhook):
            return _here(stage, config, options)
    if stage == "bands":
        stages.check_bands(config, **options)
    elif stage == "evaluate":
        stages.check_evaluation(config, **options)
    job = _job(stage, config, options)
    if cluster == "slurm":
        preflight.check(job)
    if dry_run:
        log.out.print(launch.script(job), soft_wrap=True)
    else:
        with _told(run, webhook):
            sent = _submit(job, _keep(stage, config), options, cluster)
        _say_what_next(sent)
    return DONE


def tune(
    config: Config,
    cluster: Cluster | None,
    *,
    prepare: bool,
    dry_run: bool,
    webhook: str | None = None,
) -> int:
    """Prepare the study and start its workers; with `prepare`, others start them."""
    from tripletkit.tune import cost, study

    cluster = cluster or _default_cluster()
    _check_dry_run(cluster, dry_run)
    paths, tuning = study_paths(config), config.tuning
    slurm = cluster == "slurm"
    job = _job("tune", config, count=resources.workers(config, tuning.total))
    inputs.check_files(config)
    if slurm:
        study.check_reach(tuning, queue.node_hosts())
        place = tuning.storage_path
        folders = [] if tuning.storage_url else [place if place.is_dir() else place.parent]
        preflight.check(job, [config.output_dir, *folders])
    if dry_run:
        room.warn(config, trials=tuning.total)
        # For sbatch files: a configuration to read, and where the study would have its own.
        shown = f"{_keep('tune', config)}\n{paths.config}" if prepare else launch.script(job)
        log.out.print(shown, soft_wrap=True)
        for line in cost.quote(config, paths, _study_so_far(config), slurm=slurm):
            log.err.print(line, soft_wrap=True)  # the script alone can be piped
        return DONE
    shared = study.prepare(config, paths)
    left = stages.hand_back_lost(config, shared)
    if prepare:
        with _told(paths, webhook):
            log.out.print(str(paths.config), soft_wrap=True)
        return DONE
    log.out.print(
        f"study {tuning.study_name}: {left} of {tuning.total} trials to be done; {paths.root}",
        soft_wrap=True,
    )
    if left == 0:
        log.out.print("for more of them raise --n-trials, the total of the study")
        return DONE
    if reached := endings.budget_reached(config, shared, slurm=slurm):
        log.out.print(f"{reached}; a larger --budget-gpu-hours goes on", soft_wrap=True)
        return DONE
    room.warn(config, trials=left)
    for line in cost.quote(config, paths, shared.study, slurm=slurm):
        log.out.print(line, soft_wrap=True)
    job = replace(job, count=resources.workers(config, left))
    with _told(paths, webhook):
        return _start_workers(job, config, paths.config, cluster)


def _start_workers(job: Job, config: Config, config_file: Path, cluster: Cluster) -> int:
    """Be the worker, or start some, on Slurm with a small job behind them."""
    if cluster == "here":
        return _here("tune", configuration.load(config_file, environ={}), {})
    sent = _submit(job, config_file, {}, cluster)
    if cluster == "slurm":
        arrays = sorted({each.partition("_")[0] for each in sent.jobs})
        slurm = config.slurm.model_copy(update=TIDY)
        tidy = _job("tidy", config, slurm=slurm, dependency="afterany:" + ":".join(arrays))
        try:
            _submit(tidy, config_file, {}, cluster)
        except ClusterError as error:  # the workers are queued already, and can do without
            logger.warning(
                "no tidy job, `tripletkit doctor --fix` does the same: %s", error.message
            )
    log.out.print("`tripletkit status` shows the trials, `tripletkit wait` waits for them")
    return DONE


def submit_best(
    config: Config,
    best: Best,
    cluster: Cluster | None,
    *,
    prepare: bool,
    dry_run: bool,
    webhook: str | None = None,
) -> int:
    """Train with the best trial's parameters, on all the data."""
    from tripletkit.tune.best import final_config

    cluster = cluster or _default_cluster()
    _check_dry_run(cluster, dry_run)
    final = final_config(config, best)
    inputs.check_files(final)
    run = run_paths(final.checkpoint_dir)
    if endings.is_busy(run):  # its files would be taken for ours
        raise RunError(
            f"another process is training in {run.root}",
            hint="it goes on by itself; `tripletkit status` shows how far it is",
        )
    if not run.final.exists():
        room.warn(final)
    logger.info("%s: %s %.4f with %s", best.source, best.metric, best.value, dict(best.params))
    job = _job("best", final)
    if cluster == "slurm":
        preflight.check(job, [final.checkpoint_dir])
    if dry_run:
        shown = str(_keep("best", final)) if prepare else launch.script(job)
        log.out.print(shown, soft_wrap=True)
        return DONE
    config_file = _keep("best", final)
    fsio.write_json(run.origin, best._asdict())
    with _told(run, webhook):
        if prepare:
            log.out.print(str(config_file), soft_wrap=True)
            return DONE
        if cluster == "here":
            return _here("best", final, {})
        sent = _submit(job, config_file, {}, cluster)
    log.out.print(f"checkpoints: {final.checkpoint_dir}", soft_wrap=True)
    _say_what_next(sent)
    return DONE


def embed(
    config: Config,
    options: Mapping[str, Any],
    cluster: Cluster,
    *,
    workers: int | None,
    dry_run: bool,
) -> int:
    """Put files through a head, here or as up to so many jobs that share them."""
    from tripletkit.apply import embed as embedding
    from tripletkit.apply import jobs

    _check_dry_run(cluster, dry_run)
    if workers and cluster == "here":
        raise ConfigError("--workers is about jobs", hint="--cluster slurm, or --cluster local")
    if (workers or 1) > 1 and options["per_building"]:
        raise ConfigError(
            "--per-building is one job, as all images of a building have to meet",
            hint="leave --workers out",
        )
    checkpoint = options["checkpoint"] or str(inputs.best_checkpoint(config).absolute())
    options = {**options, "checkpoint": checkpoint}
    request = stages.embed_request(**options)
    plan = embedding.check(config, request)
    if plan.left == 0:
        log.out.print(f"{request.destination} is there already: nothing to do", soft_wrap=True)
        return DONE
    options = {**options, "weights": plan.weights}  # a training may replace the checkpoint
    if cluster == "here":
        return _here("embed", config, options)
    logs = LogPaths(config.global_.log_dir)
    there = jobs.at_work(logs, options)
    count = min(plan.left, workers or 1) - len(there)
    if there:
        log.out.print(f"{jobs.named(there)} for {request.destination} already", soft_wrap=True)
    if count <= 0:
        log.out.print("no more are needed: `tripletkit wait JOB` waits for the end of one")
        return DONE
    job = _job("embed", config, options, count=count)
    if cluster == "slurm":
        one = request.destination.suffix == ".parquet"
        preflight.check(job, [request.destination.parent if one else request.destination])
    if dry_run:
        log.out.print(launch.script(job), soft_wrap=True)
    else:
        sent = _submit(job, _keep("embed", config), options, cluster)
        jobs.note(logs, options, [*there, *sent.jobs])
        _say_what_next(sent)
    return DONE


def find_best(config: Config, source: str, number: int | None) -> Best:
    """The best trial, of the study or of the W&B project."""
    from tripletkit.tune import best, storage

    if source == "wandb":
        return best.from_wandb(config)
    shared = storage.open_study(config.tuning, seed=0, workers=1, patience=60, read_only=True)
    return best.from_study(shared.study, config.tuning.objective, number)


def start_database(
    config: Config, folder: Path, cluster: Cluster, *, workers: int | None, asked: Collection[str]
) -> int:
    """Start a PostgreSQL in `folder` and wait until it answers; for so many processes of workers.

    `asked`: the keys of [slurm] that the user gave for it; the others are about the workers.
    """
    from tripletkit.tune import database

    most = database.max_connections_for(workers or config.tuning.workers * resources.slots(config))
    options = {"folder": str(folder), "max_connections": most}
    if (now := database.status(folder)).state == "up":
        log.out.print(f"PostgreSQL is {now}", soft_wrap=True)
        return DONE
    if cluster == "here":
        return _here("db", config, options)
    own: dict[str, Any] = {key: DATABASE[key] for key in DATABASE.keys() - set(asked)}
    if cluster == "slurm" and "time" not in asked:
        own["time"] = _database_time(config.slurm)
    job = _job("db", config, options, slurm=config.slurm.model_copy(update=own))
    if cluster == "slurm":
        preflight.check(job, [folder])
    (started,) = _submit(job, _keep("db", config), options, cluster).jobs
    deadline = time.monotonic() + WAIT_FOR_DATABASE
    database.wait_until_up(folder, deadline, started, job.logs.err("db", started))
    log.out.print(
        f"PostgreSQL is up; use it with --storage-path {shlex.quote(str(folder))}", soft_wrap=True
    )
    return DONE


def _database_time(slurm: Slurm) -> str:
    """A day, or what the partition allows; no less than the workers have."""
    minutes = [24 * 60]
    for limit in resources.longest(slurm):
        with contextlib.suppress(ValueError):  # UNLIMITED
            minutes.append(resources.seconds(limit) // 60)
    return str(max(resources.parameters(slurm)["time"], min(minutes)))


def _job(stage: str, config: Config, options: Mapping[str, Any] | None = None, **more: Any) -> Job:
    values = {"slurm": config.slurm, "log_dir": config.global_.log_dir, **more}
    return Job(stage=stage, name=stages.job_name(stage, config, options or {}), **values)


def _submit(
    job: Job, config_file: Path, options: Mapping[str, Any], cluster: Cluster
) -> Submission:
    assert cluster != "here"
    call = worker.Call(job.stage, str(config_file), options)
    sent = launch.submit(job, call, cluster=cluster)
    ids = sorted({each.partition("_")[0] for each in sent.jobs})
    elements = f", {len(sent.jobs)} elements" if len(sent.jobs) > len(ids) else ""
    log.out.print(f"{job.name}: {cluster} job {' '.join(ids)}{elements}", soft_wrap=True)
    log.out.print(f"log: {sent.out[0]}", soft_wrap=True)
    return sent


def _say_what_next(sent: Submission) -> None:
    log.out.print(
        "`tripletkit status` shows it, "
        f"`tripletkit logs {sent.jobs[0].partition('_')[0]} -f` follows its log"
    )


@contextlib.contextmanager
def _told(paths: RunPaths | StudyPaths, webhook: str | None) -> Iterator[None]:
    """What the block starts tells the webhook how it ended; unless it does not start.

    While a process trains in the folder of a run, the address there is its own.
    """
    if webhook is not None and isinstance(paths, RunPaths) and endings.is_busy(paths):
        logger.warning("another process is training in %s: no webhook for this one", paths.root)
        webhook = None
    before = None if webhook is None else notify.keep(paths.webhook, webhook)
    try:
        yield
    except BaseException:
        if webhook is not None and notify.forget(paths.webhook) and before is not None:
            notify.keep(paths.webhook, before)
        raise


def _study_so_far(config: Config) -> optuna.Study | None:
    """The study, if there is one and it answers."""
    from tripletkit.tune import storage

    try:
        return storage.open_study(
            config.tuning, seed=0, workers=1, patience=10, read_only=True
        ).study
    except TripletkitError as error:
        logger.debug("no study to measure: %s", error.message)
        return None


def _here(stage: str, config: Config, options: Mapping[str, Any]) -> int:
    if stage not in STOPPABLE:
        return stages.JOBS[stage](config, lambda: False, **options)
    with preempt.watch() as stop:
        return worker.attend(stage, config, options, stop)


def _keep(stage: str, config: Config) -> Path:
    """Write the effective configuration of a job, under a name that its content decides."""
    text = configuration.dump(config)
    folder = LogPaths(config.global_.log_dir).configs
    fsio.check_writable(config.global_.log_dir, worker.LOGS_ELSEWHERE)
    path = folder / f"{stage}_{fsio.digest([text])[:12]}.toml"
    fsio.write_text(path, text)
    return path


def _default_cluster() -> Cluster:
    found = queue.available()
    logger.info(
        "--cluster %s, as there is %s sbatch here", *(("slurm", "an") if found else ("local", "no"))
    )
    return "slurm" if found else "local"


def _check_dry_run(cluster: Cluster, dry_run: bool) -> None:
    if dry_run and cluster != "slurm":
        raise ConfigError("--dry-run shows the script of a Slurm job", hint="--cluster slurm")
