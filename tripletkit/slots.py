"""A worker of the study: one trial after another, or several at once, each in a slot.

A slot is a process, and to the study a worker of its own. The job around the slots keeps the record
and the lock, hands on the request to stop, and loads once what the slots of a GPU have in common.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from tripletkit import inputs, log, processes
from tripletkit.cluster import jobs, resources
from tripletkit.config import Config
from tripletkit.device import choose_device, choose_precision
from tripletkit.errors import RunError, StorageAway
from tripletkit.log import logger
from tripletkit.paths import LogPaths, StudyPaths
from tripletkit.train import resident
from tripletkit.train.assembly import Data
from tripletkit.train.placement import choose_placement
from tripletkit.train.resident import Parcel
from tripletkit.tune import storage, worker
from tripletkit.tune.claims import Worker
from tripletkit.tune.worker import Summary

# A slot that is killed comes back, so that a trial that kills it can fail, but not for ever.
RESTARTS = worker.KILLS_IN_A_ROW * worker.FAILURES_IN_A_ROW
# What CUDA itself takes of a GPU in each process, for its context and kernels.
CONTEXT_BYTES = 0.6e9


@dataclass(frozen=True)
class _Job:
    """What every slot is told of the job."""

    config: Config
    paths: StudyPaths
    id: str
    deadline: float | None
    slots: int


@dataclass(frozen=True)
class _Place:
    """Where a slot computes: on a CPU, or on a GPU and in a share of its memory."""

    device: torch.device | None = None
    memory: float = 1.0
    resident: Parcel | None = None


def run(config: Config, paths: StudyPaths, should_stop: Callable[[], bool]) -> Summary:
    """Work until the study has its total or time is up; returns what all slots did.

    When one fails the others go on. Then its error is raised, as of `worker.run`; unless they were
    asked to stop and trials are left, with which the job goes on later.
    """
    id_, slots = jobs.current_job(), resources.slots(config)
    job = _Job(config, paths, id_, jobs.deadline(id_), slots)
    if slots == 1:
        return _work(job, 0, _Place(), should_stop)
    works = [partial(_slot, job, slot, place) for slot, place in enumerate(_places(config, slots))]
    environments = [{log.SLOT: str(slot)} for slot in range(slots)]
    outcomes = processes.run(
        works, environments, should_stop=should_stop, together=False, restarts=RESTARTS
    )
    summaries: list[Summary] = [each.result for each in outcomes if each.error is None]
    summary = Summary(
        ended=[ended for each in summaries for ended in each.ended],
        progress=any(each.progress for each in summaries),
        open=any(each.open for each in summaries),
        outdated=next((each.outdated for each in summaries if each.outdated), ""),
    )
    if not (summary.open and should_stop()):  # else the job is to come back for what is left
        processes.results(outcomes)
    return summary


def _work(job: _Job, slot: int, place: _Place, should_stop: Callable[[], bool]) -> Summary:
    """Be one worker of the study."""
    config, tuning = job.config, job.config.tuning
    logs = LogPaths(config.global_.log_dir)
    me = Worker(job.id, jobs.restart_count(), socket.gethostname(), os.getpid(), slot)
    shared = storage.open_study(
        tuning,
        seed=config.global_.seed,
        workers=tuning.workers * job.slots,
        should_stop=should_stop,
    )
    surroundings = worker.Surroundings(
        load_data=_loader(place),
        job_states=lambda ids: jobs.states(logs, ids),
        should_stop=should_stop,
        seconds_left=lambda: math.inf if job.deadline is None else job.deadline - time.time(),
    )
    try:
        return worker.run(shared, config, job.paths, me, surroundings)
    except StorageAway as error:
        error.progress = True  # it was there when we came
        raise


def _slot(job: _Job, slot: int, place: _Place, should_stop: Callable[[], bool]) -> Summary:
    """Be one of several workers, in a process of its own and with a share of the machine."""
    log.setup(plain=True)  # bars of several processes would run into each other
    torch.set_num_threads(max(1, torch.get_num_threads() // job.slots))
    if place.device is not None:
        torch.cuda.set_device(place.device)
        torch.cuda.set_per_process_memory_fraction(place.memory, place.device)
    return _work(job, slot, place, should_stop)


def _loader(place: _Place) -> Callable[[Config], Data]:
    """What opens the data of a trial."""
    load = inputs.remembering(inputs.training_data)
    if place.resident is None:
        return load
    there = place.resident.open()
    return lambda config: replace(load(config), resident=there)


def _places(config: Config, slots: int) -> list[_Place]:
    """The place of each slot, GPU by GPU.

    All see all GPUs of the job and make one the current device: memory shared by CUDA IPC carries
    the number that its device has for the sender, so it must be the same one for the receiver.
    """
    device = choose_device(config.training.device)
    if device.type == "cpu":
        return [_Place()] * slots  # the page cache has the table once for all
    devices = [device] * slots
    if config.training.device in ("auto", "cuda"):
        each, there = config.tuning.trials_per_gpu, torch.cuda.device_count()
        devices = [torch.device("cuda", slot // each % there) for slot in range(slots)]
    places = {
        gpu: _Place(gpu) if count == 1 else _shared(config, gpu, count)
        for gpu, count in Counter(devices).items()
    }
    return [places[gpu] for gpu in devices]


def _shared(config: Config, device: torch.device, count: int) -> _Place:
    """An equal share of a GPU for each of `count` slots, beside one table for all of them."""
    data, parcel = inputs.training_data(config), None
    section = config.training
    precision = choose_precision(section.precision, device)
    if choose_placement(section.placement, data.train, device, precision) == "device":
        parcel = Parcel(resident.load(data.train, data.bands, device, precision))
    free, total = torch.cuda.mem_get_info(device)
    share = free / count - CONTEXT_BYTES
    if share <= 0:
        raise RunError(
            f"{free / 1e9:.1f} GB of {device} are free: too few for {count} trials at once",
            hint="lower tuning.trials_per_gpu (--trials-per-gpu)",
        )
    logger.info("%d trials at once on %s, with %.1f GB each", count, device, share / 1e9)
    return _Place(device, share / total, parcel)
