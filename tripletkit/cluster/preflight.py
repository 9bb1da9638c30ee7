"""Looks before a job is queued: what would make it fail, or wait for ever, is said now."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable
from pathlib import Path

from tripletkit import fsio
from tripletkit.cluster import launch, queue, resources
from tripletkit.cluster.launch import Job
from tripletkit.errors import ClusterError
from tripletkit.log import logger

# Most often on disks of this host alone.
LOCAL = ("/", "/tmp", "/var/tmp", "/dev/shm")  # noqa: S108 - looked at, not written to


def check(job: Job, folders: Iterable[Path] = ()) -> str:
    """When and where Slurm would start the job, in its own words. Submits and leaves nothing.

    `folders` are those that the job will write to, beside the one for logs. Raises ConfigError or
    ClusterError, which say what to change.
    """
    scripts = launch.scripts(job)
    written = [job.log_dir, *folders]
    for folder in written:
        fsio.check_writable(folder, "the job writes there: choose a folder of yours")
    limit = resources.seconds(job.slurm.time)
    if limit < resources.SHORT:
        logger.warning(
            "slurm.time = %s is short: a job is asked to save its state %d s before the end, or "
            "a minute earlier still",
            job.slurm.time, resources.signal_delay(limit),
        )  # fmt: skip
    try:
        verdict = queue.test_only(scripts[0], launch.environment())
    except ClusterError as error:
        raise resources.refused(error.message, job.slurm) from None
    _check_limit(job, limit)
    _warn_of_local(written)
    logger.info("Slurm accepts %s and expects it %s", job.name, verdict)
    return verdict


def _check_limit(job: Job, limit: int) -> None:
    """Without EnforcePartLimits, Slurm queues a job that is longer than the partition ever allows.

    A QOS may allow what its partition does not.
    """
    asked = resources.parameters(job.slurm)
    if "qos" in asked:
        return
    names = asked.get("partition", "").split(",")
    allowed = resources.longest(job.slurm)
    with contextlib.suppress(ValueError):  # UNLIMITED
        if allowed and limit > max(resources.seconds(time) for time in allowed):
            raise ClusterError(
                f"slurm.time = {job.slurm.time} is longer than partition "
                f"{', '.join(filter(None, names)) or '(default)'} allows ({', '.join(allowed)}): "
                "the job would wait for ever",
                hint="set slurm.time or --time; a job that runs into its limit goes on in the next",
            )


def _warn_of_local(folders: Iterable[Path]) -> None:
    devices = {Path(each).stat().st_dev for each in LOCAL if Path(each).exists()}
    local = [each for each in folders if _existing(each).stat().st_dev in devices]
    if local and queue.node_hosts() - {socket.gethostname().partition(".")[0]}:
        logger.warning(
            "%s: on a disk of this host, it seems; the job runs on another and needs folders that "
            "both see",
            ", ".join(map(str, local)),
        )


def _existing(folder: Path) -> Path:
    return next(each for each in (folder, *folder.parents) if each.exists())
