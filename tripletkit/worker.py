"""The entry point of every job: `python -m tripletkit.worker STAGE --config FILE`.

Around the stage it keeps the job's record, turns signals into a request to stop, and decides how
the job ends: exit code 0 is done, 85 asks to be run again, all others are failures (errors.py).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tripletkit import boundary, config, endings, fsio, processes, stages
from tripletkit.cluster import jobs, preempt, queue
from tripletkit.cluster.preempt import Stop
from tripletkit.config import Config
from tripletkit.errors import REQUEUE, ClusterError, Interrupted, StorageAway
from tripletkit.log import logger
from tripletkit.paths import LogPaths, run_paths

# Started so often in a row without getting anywhere, the job will not get anywhere.
FRUITLESS_STARTS = 3
LOGS_ELSEWHERE = "set global.log_dir to a folder of yours: jobs keep their logs and records there"
KILL_SECONDS = 600  # Slurm kills a requeued job within KillWait, half a minute by default


class Call:
    """The call that submitit packages: a stage's name and a file, never data or secrets."""

    def __init__(self, stage: str, config_file: str, options: Mapping[str, Any]) -> None:
        self.stage = stage
        self.config_file = config_file
        self.options = options

    def __call__(self) -> int:
        """Run the job; does not return if Slurm is to run it again."""
        code = run(self.stage, Path(self.config_file), self.options, requeue=True)
        if code:
            sys.exit(code)
        return code

    def checkpoint(self, *_: object) -> object:
        """For a signal that comes before ours are watched: the same call again."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def run(stage: str, config_file: Path, options: Mapping[str, Any], *, requeue: bool = False) -> int:
    """Run a stage as this job; returns the exit code. `requeue` asks Slurm itself on 85."""
    boundary.prepare_process(plain=True)
    with preempt.watch() as stop:
        # The file is the whole truth of a job: the environment has had its say in it.
        ending = boundary.run(
            lambda: attend(
                stage, config.load(config_file, environ={}), options, stop, str(config_file)
            )
        )
        if ending.exit_code == REQUEUE and requeue:
            boundary.run(lambda: _requeue(jobs.current_job()))
        return ending.exit_code


def attend(
    stage: str, loaded: Config, options: Mapping[str, Any], stop: Stop, config_file: str = ""
) -> int:
    """Run a stage and keep its record; without a file it is no job, and does not run again."""
    if processes.follows():  # the one that leads keeps the record
        return boundary.run(lambda: stages.JOBS[stage](loaded, stop, **options)).exit_code
    logs, job = LogPaths(loaded.global_.log_dir), jobs.current_job()
    fsio.check_writable(logs.root, LOGS_ELSEWHERE)
    name = stages.job_name(stage, loaded, options)
    record = jobs.new_record(job, stage, name, config_file, before=jobs.read(logs.record(job)))
    try:
        with jobs.recorded(logs, record, stop) as ended:
            if config_file:
                logger.info("job %s on %s: %s, %s", job, record.host, name, config_file)
            ending = boundary.run(lambda: stages.JOBS[stage](loaded, stop, **options))
            code, message, progress = ending.exit_code, ending.message, True
            is_over = not isinstance(ending.error, Interrupted)  # else somebody goes on with it
            if isinstance(ending.error, Interrupted | StorageAway) and config_file:
                progress = ending.error.progress
                fruitless = record.fruitless_after(progress=progress)
                if _runs_again(job, stop):
                    is_over = fruitless >= FRUITLESS_STARTS
                    if is_over:
                        message = f"{fruitless} starts without progress: {message}"
                        logger.error("not asking for another start: %s", message)
                    else:
                        code = REQUEUE
            ended(code, message, progress=progress)
            if stage in ("train", "best") and is_over:
                run = run_paths(loaded.checkpoint_dir)
                endings.tell_of_training(stage, loaded, run, message)
    except Interrupted as error:  # before we could begin
        if not config_file or not _runs_again(job, stop):
            raise
        boundary.say(error.message, error.hint)
        return REQUEUE
    return code


def _runs_again(job: str, stop: Stop) -> bool:
    """Whether to ask for another start: time limit or preemption, not a cancelled job."""
    if job.startswith(jobs.LOCAL):
        return False
    if not stop() or (stop.wants_requeue and not stop.terminated):
        return True
    try:
        facts = queue.job_facts(job)
    except ClusterError:
        return False
    # In the grace time of a preemption the job still runs. Leaving now would lose the requeue that
    # Slurm has in mind for the end of it, so we ask for ours. A cancelled job is COMPLETING, and so
    # is one at its time limit, which says so.
    preempted = facts.get("PreemptTime", "None") not in ("None", "")
    runs = facts.get("JobState") == "RUNNING"
    return (runs and (preempted or stop.wants_requeue)) or facts.get("Reason") == "TimeLimit"


def _requeue(job: str) -> None:
    """Have Slurm run the job again, and wait for the end of this start of it."""
    deadline = time.monotonic() + KILL_SECONDS
    while True:
        try:
            if not queue.requeue(job):
                logger.info("Slurm has requeued the job already")
            break
        except ClusterError as error:
            if error.hint != queue.SILENCE or time.monotonic() > deadline:
                raise
            logger.warning("cannot ask for another start, trying again: %s", error.message)
    while time.monotonic() < deadline:
        time.sleep(1)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a job from the shell, or from an sbatch file."""
    parser = argparse.ArgumentParser(prog="python -m tripletkit.worker", description=__doc__)
    parser.add_argument("stage", choices=sorted(stages.JOBS))
    parser.add_argument("--config", type=Path, required=True, help="effective configuration")
    parser.add_argument("--options", type=json.loads, default={}, help="of the stage, as JSON")
    given = parser.parse_args(arguments)
    sys.exit(run(given.stage, given.config, given.options))


if __name__ == "__main__":
    main()
