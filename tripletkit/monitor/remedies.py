"""What to do about each cause, in words that can be typed; and why Slurm lets a job wait."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from tripletkit.monitor.facts import JobFacts, TrialFacts, bytes_of, duration, seconds, size

GIB = 2**30

# Reasons of squeue (JOB REASON CODES in squeue(1)), what they mean, and what helps. First match.
_REASONS = {
    r"Priority": ("jobs of higher priority are before it", "wait, or ask for less: shorter jobs fit into gaps (--time)"),
    r"Resources": ("it is next, as soon as enough is free", "wait, or ask for less (--mem, --cpus-per-task, --gpus)"),
    r"JobArrayTaskLimit": ("as many of its siblings run as --max-concurrent allows", "wait, or raise it: `scontrol update ArrayTaskThrottle=N JobId={array}`"),
    r"BeginTime": ("it is held back for a while, as every job that was requeued", "wait: two minutes, on most clusters"),
    r"DependencyNeverSatisfied": ("what it waits for failed, so it will never start", "cancel it: `tripletkit cancel {job}`"),
    r"Dependency": ("it starts after another job", "wait"),
    r"launch failed requeued held|job requeued in held state|JobHeldAdmin": ("Slurm or an administrator holds it back; its node could not launch it, mostly", "`scontrol release {job}` lets it try again; if it fails again, ask the administrators"),
    r"JobHeldUser": ("it was held back by its user", "`scontrol release {job}`"),
    r"QOSMax\w*PerUser|QOSMaxJobs|QOSMaxSubmit|QOSMax\w*PU\b": ("you have as many jobs or resources as the quality of service allows one user", "wait for your other jobs, or choose another --qos"),
    r"QOS\w*(PerJob|WallDuration|MinCpu|MinGRES)": ("it asks for more than the quality of service allows one job", "cancel it and ask for less (--time, --gpus, --mem), or choose another --qos"),
    r"QOSGrp\w*": ("everybody together uses all that the quality of service allows", "wait, or choose another --qos"),
    r"QOS\w*|InvalidQOS": ("the quality of service does not let it run", "choose another --qos"),
    r"AssocGrp\w*Minutes": ("the account has used up its time", "choose another --account, or ask for a larger share"),
    r"AssocGrp\w*": ("the account's users together use all that it may have", "wait, or choose another --account"),
    r"AssocMax\w*PerJob|AssocMaxWall\w*": ("it asks for more than the account allows one job", "cancel it and ask for less (--time, --gpus, --mem)"),
    r"Assoc\w*|InvalidAccount": ("the account does not let it run", "choose another --account"),
    r"ReqNodeNotAvail|NodeDown|Nodes required for job are DOWN": ("nodes that it needs are down, drained or reserved, maybe for maintenance", "a shorter --time may end before the maintenance; `sinfo -R` says what is wrong with nodes"),
    r"PartitionTimeLimit": ("its time limit is above that of the partition, so it never starts", "cancel it; a shorter --time, or another --partition"),
    r"PartitionNodeLimit|PartitionConfig|BadConstraints|MaxMemPerLimit": ("no node of the partition has what it asks for", "cancel it and ask for less, or choose another --partition or --constraint"),
    r"PartitionDown|PartitionInactive": ("the partition is closed", "wait, or choose another --partition"),
    r"Reservation": ("its reservation has not begun", "wait"),
    r"Licenses": ("no licence is free", "wait"),
    r"Prolog|Cleaning|Configuring|NodeRebooting": ("its nodes are being made ready", "wait a minute"),
}  # fmt: skip


def waits(reason: str) -> tuple[str, str]:
    """A reason of squeue in words, and what helps. For ids, `{job}` and `{array}` stay open."""
    for pattern, words in _REASONS.items():
        if re.match(pattern, reason):
            return words
    return (f"Slurm says {reason}" if reason else "Slurm does not say why", "wait")


_NEVER = re.compile(
    r"DependencyNeverSatisfied|launch failed requeued held|job requeued in held state|JobHeld|PartitionTimeLimit|BadConstraints"
    r"|PartitionConfig|MaxMemPerLimit|InvalidAccount|InvalidQOS"
)


def never_starts(reason: str) -> bool:
    """Whether a job that waits for this reason waits in vain until somebody does something."""
    return _NEVER.match(reason) is not None


def remedy(kind: str, trial: TrialFacts | None, job: JobFacts | None) -> str:
    """What to do."""
    find = _REMEDIES.get(kind)
    if find is None:
        return _go_on(trial) if trial else "see the log"
    return find(trial, job)


def _go_on(trial: TrialFacts | None) -> str:
    if trial is None:
        return "the same command goes on where it stopped"
    if trial.workers:
        return f"wait: one of the {trial.workers} workers of its study goes on with it"
    return "`tripletkit tune` with the same flags goes on with it"


def _keeps(trial: TrialFacts | None) -> str:
    return f"nothing is lost but the time since the last checkpoint; {_go_on(trial)}"


def _memory(trial: TrialFacts | None, job: JobFacts | None) -> str:
    more = "twice as much as before"
    if job is not None and job.is_local:
        return "start fewer workers at once (--workers), or use a machine with more memory"
    if job is not None and job.newest is not None:
        asked = bytes_of(job.newest.req_mem) or 0
        # What it would have needed nobody knows: it was killed before.
        if need := max(2 * asked, 1.5 * (job.newest.max_rss or 0)):
            more = _round_up(need)
    return f"ask for more memory: --mem {more}; {_go_on(trial)}"


def _round_up(need: float) -> str:
    """A size that people ask for: powers of two, above 64G multiples of 32G."""
    if need <= 64 * GIB:
        return size(2 ** math.ceil(math.log2(need)))
    return f"{math.ceil(need / GIB / 32) * 32}G"


def _gpu_memory(trial: TrialFacts | None, _: JobFacts | None) -> str:
    flag = "--set training.batch_size=N, smaller"
    if trial is not None and trial.batch_size is not None:
        half = max(1, trial.batch_size // 2)
        tuned = "batch_size" in trial.params
        flag = f"--set {'tuning.space.batch_size.high' if tuned else 'training.batch_size'}={half}"
    if trial is not None and trial.per_gpu > 1:
        flag = f"--trials-per-gpu {trial.per_gpu - 1}, or {flag}"
    return f"{flag}, or --set training.placement=host, which keeps the embeddings off the GPU"


def _time(trial: TrialFacts | None, job: JobFacts | None) -> str:
    limit = seconds(job.newest.limit) if job is not None and job.newest else None
    longer = f"--time {duration(2 * limit)}" if limit else "a longer --time"
    return f"{_keeps(trial)}; {longer} saves restarts"


def _node(trial: TrialFacts | None, job: JobFacts | None) -> str:
    node = job.newest.node if job is not None and job.newest else "NODE"
    return (
        f"{_keeps(trial)}; if {node} fails again, keep waiting jobs off it: "
        f"`scontrol update JobId=JOB ExcNodeList={node}`"
    )


def _killed(trial: TrialFacts | None, job: JobFacts | None) -> str:
    if job is not None and job.is_local:
        host = job.record.host if job.record else "its host"
        return f"on {host}, `dmesg -T | grep -i oom` says whether memory ran out; {_go_on(trial)}"
    return (
        f"{_keeps(trial)}; if it happens again, memory is the first suspect: try more --mem, and "
        "ask the administrators what kills processes on that node"
    )


def _nan(trial: TrialFacts | None, _: JobFacts | None) -> str:
    if trial is None:
        return "lower training.learning_rate or --set training.precision=fp32"
    rate = trial.params.get("learning_rate")
    if rate is None:
        return f"lower training.learning_rate or --set training.precision=fp32; {_others(trial)}"
    return (
        f"its learning_rate was {rate:.3g}: --set tuning.space.learning_rate.high, below that, or "
        f"--set training.precision=fp32; {_others(trial)}"
    )


def _others(_: TrialFacts) -> str:
    return "a single such trial does no harm: it counts as failed, and the study goes on"


def _silent(_: TrialFacts | None, job: JobFacts | None) -> str:
    if job is None or job.is_local:
        return "see whether its process still works, else kill it: another worker goes on"
    return (
        f"look at its processes with `srun --overlap --jobid={job.id} top -bn1`; if it hangs, "
        f"`scontrol requeue {job.id}` starts it again from its checkpoint"
    )


def _pending(_: TrialFacts | None, job: JobFacts | None) -> str:
    if job is None or job.queued is None:
        return "wait"
    return waits(job.queued.reason)[1].format(job=job.id, array=job.id.partition("_")[0])


def _no_start(_: TrialFacts | None, job: JobFacts | None) -> str:
    if job is not None and job.newest is not None and job.newest.exit_code.endswith(":53"):
        return "global.log_dir must be a folder that exists on all nodes, and is writable there"
    return (
        "what the job needs must be on the nodes, too: put module loads and the activation of the "
        "environment into slurm.setup, and keep the environment on a shared disk"
    )


_REMEDIES: dict[str, Callable[[TrialFacts | None, JobFacts | None], str]] = {
    "host_oom": _memory,
    "cuda_oom": _gpu_memory,
    "timeout": _time,
    "node_failure": _node,
    "killed": _killed,
    "nan": _nan,
    "silent": _silent,
    "pending": _pending,
    "no_start": _no_start,
    "preempted": lambda trial, _: f"{_keeps(trial)}; a partition without preemption avoids it",
    "requeued": lambda trial, _: _keeps(trial),
    "cancelled": lambda trial, _: _go_on(trial),
    "bad_configuration": lambda *_: (
        "the message names the key: mend it in config.toml or in [tuning.space]"
    ),
    "data_error": lambda *_: "`tripletkit data check` names files and rows; then start again",
    "storage_lost": lambda *_: (
        "`tripletkit doctor` looks at the storage; `tripletkit db up` starts "
        "a database of yours again; then `tripletkit tune` goes on"
    ),
    "cluster_error": lambda *_: "`scontrol ping` asks whether Slurm answers; then start again",
    "bug": lambda *_: "report it with the traceback in the log",
    "complete": lambda *_: "nothing to do",
    "running": lambda *_: "nothing to do",
    "unknown": lambda *_: "ask on the host where it runs",
}
