"""The `[slurm]` section as parameters of a Slurm job, and what to change if Slurm refuses them."""

from __future__ import annotations

import contextlib
import math
import os
import pwd
import re
from collections.abc import Callable
from typing import Any

from tripletkit.cluster import queue
from tripletkit.config import Config, Slurm
from tripletkit.errors import ClusterError, ConfigError

SHORT = 600  # seconds; below, a job hardly starts before it has to save its state
# sbatch lets its variables win over what a script says. So we clear them and put those that people
# do set in their profile into the script, as long as the section does not speak of the same thing.
VARIABLES = {
    "account": "SBATCH_ACCOUNT",
    "partition": "SBATCH_PARTITION",
    "qos": "SBATCH_QOS",
    "constraint": "SBATCH_CONSTRAINT",
    "reservation": "SBATCH_RESERVATION",
    "wckey": "SBATCH_WCKEY",
}
MOST_KINDS = 8  # of nodes, in a hint
TIME_FORMATS = "minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]]"


def seconds(time: str) -> int:
    """A time limit as sbatch reads it (`90`, `30:00`, `3:00:00`, `1-12`, `1-12:30`), in seconds.

    Source: `--time` in sbatch(1). Raises ValueError for anything else, also for no limit.
    """
    if not re.fullmatch(r"([0-9]{1,9}-)?[0-9]{1,9}(:[0-9]{1,9}){0,2}", time.strip()):
        raise ValueError(f"{time!r} is not a time limit: {TIME_FORMATS}")
    days, _, clock = time.strip().rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    units = (3600, 60, 1) if days or len(parts) == 3 else (60, 1)
    total = int(days or 0) * 86400 + sum(n * unit for n, unit in zip(parts, units, strict=False))
    if total == 0:
        raise ValueError(
            f"{time!r} means no limit to Slurm; a job that is to be requeued needs one"
        )
    return total


def signal_delay(limit: int) -> int:
    """How long before a time limit of `limit` seconds to ask for the signal that says so, in seconds.

    Slurm may send it a minute earlier than asked (`--signal` in sbatch(1)).
    """
    return min(120, max(20, limit // 5))


def gpus(slurm: Slurm) -> int:
    """GPUs of a job. A gres string may name a type and a count: `gpu`, `gpu:2`, `gpu:a100:4`."""
    if slurm.gres is None:
        return slurm.gpus
    found = re.match(r"gpu(?::[^:,()]*[^:,()\d][^:,()]*)?(?::([0-9]{1,6}))?(?=$|[,(])", slurm.gres)
    return int(found[1] or 1) if found else 0


def slots(config: Config) -> int:
    """Trials that one worker of the study trains at once."""
    return max(1, gpus(config.slurm)) * config.tuning.trials_per_gpu


def workers(config: Config, trials: int) -> int:
    """How many workers to start for so many trials: no more than they keep busy."""
    return min(config.tuning.workers, -(-trials // slots(config)))


def parameters(slurm: Slurm, stage: str = "") -> dict[str, Any]:
    """Parameters for `submitit.SlurmExecutor.update_parameters`.

    A study's end is that of the job behind its workers: these send mail only when they fail. Of an
    array Slurm sends one mail, not one for each element.

    Raises ConfigError that names the key of a value that Slurm cannot read.
    """
    chosen = {
        key: getattr(slurm, key, None) or os.environ.get(name) for key, name in VARIABLES.items()
    }
    for key, value in {**chosen, "gres": slurm.gres, "mail": slurm.mail}.items():
        if value and not value.isprintable():
            raise ConfigError(f"slurm.{key} = {value!r} holds a character that cannot be printed")
        if value and "\\" in value:
            raise ConfigError(f"slurm.{key} = {value!r} holds a \\, which Slurm reads as a quote")
    try:
        limit = seconds(slurm.time)
    except ValueError as error:
        raise ConfigError(
            f"slurm.time = {error}", hint="for example 03:00:00, or 1-12 for 36 hours"
        ) from None
    if not re.fullmatch(r"[0-9]{1,15}([KMGT]B?)?", slurm.mem, re.IGNORECASE | re.ASCII):
        raise ConfigError(
            f"slurm.mem = {slurm.mem!r} is not a size of memory",
            hint="a whole number and K, M, G or T, for example 32G; 0 is all of the node",
        )
    reservation = chosen.pop("reservation")
    for one in slurm.mail.split(",") if slurm.mail else ():
        if not re.fullmatch(r"[^\s@]+@[^\s@]+", one) and not _is_user(one):
            raise ConfigError(
                f"slurm.mail = {slurm.mail!r}: {one!r} is neither an address nor a user here",
                hint="for example me@example.org; --mail sets it, too",
            )
    found: dict[str, Any] = {
        **chosen,
        "time": math.ceil(limit / 60),
        "mem": slurm.mem,
        "cpus_per_task": slurm.cpus_per_task,
        "gpus_per_node": None if slurm.gres else slurm.gpus or None,
        "gres": slurm.gres,
        "setup": slurm.setup or None,
        "mail_user": slurm.mail,
        "mail_type": ("FAIL" if stage == "tune" else "END,FAIL") if slurm.mail else None,
        "additional_parameters": {
            "requeue": True,
            "signal": f"USR2@{signal_delay(limit)}",
            **({"reservation": reservation} if reservation else {}),
        },
        # Since 22.05 a step no longer inherits the cores of its job.
        "srun_args": [f"--cpus-per-task={slurm.cpus_per_task}"],
    }
    return {key: value for key, value in found.items() if value is not None}


def _is_user(name: str) -> bool:
    """Slurm hands mail for a mere name to the mail system of the cluster."""
    try:
        pwd.getpwnam(name)
    except (KeyError, ValueError):
        return False
    return True


def longest(slurm: Slurm) -> list[str]:
    """The time limits (MaxTime) of the partitions that a job may run in. Raises ClusterError."""
    names = parameters(slurm).get("partition", "").split(",")
    return [
        each["MaxTime"]
        for each in queue.partitions()
        if each["PartitionName"] in names or (names == [""] and each["Default"] == "YES")
    ]


def refused(words: str, slurm: Slurm) -> ClusterError:
    """An error with sbatch's words, and what to do about them."""
    for pattern, advice in ADVICE:
        if re.search(pattern, words, re.IGNORECASE):
            with contextlib.suppress(ClusterError):  # the advice may have to ask Slurm
                return ClusterError(words, hint=advice(slurm))
    return ClusterError(words, hint="--dry-run shows the script that Slurm refuses")


def _asked(slurm: Slurm, *keys: str) -> str:
    given = {key: getattr(slurm, key) for key in keys}
    values = ", ".join(f"{key} = {value!r}" for key, value in given.items() if value is not None)
    flags = ", ".join(f"--{key.replace('_', '-')}" for key in keys)
    return f"[slurm] says {values or f'no {keys[0]}'}; change it there or with {flags}"


def _about_account(slurm: Slurm) -> str:
    mine = ", ".join(queue.accounts())
    return _asked(slurm, "account") + (f"; you may charge: {mine}" if mine else "")


def _about_partition(slurm: Slurm) -> str:
    names = ", ".join(each["PartitionName"] for each in queue.partitions())
    return f"{_asked(slurm, 'partition')}; there are: {names}"


def _about_time(slurm: Slurm) -> str:
    limits = ", ".join(f"{each['PartitionName']} {each['MaxTime']}" for each in queue.partitions())
    return f"{_asked(slurm, 'time')}; the partitions allow: {limits}"


def _about_nodes(slurm: Slurm) -> str:
    asked = _asked(slurm, "mem", "cpus_per_task", "gpus", "gres", "partition")
    kinds = queue.nodes(parameters(slurm).get("partition"))
    more = "; ..." if len(kinds) > MOST_KINDS else ""
    return f"{asked}. Nodes have: {'; '.join(kinds[:MOST_KINDS])}{more}"


def _about_features(slurm: Slurm) -> str:
    return f"{_asked(slurm, 'constraint')}; `sinfo -o '%R %f'` shows the features of the nodes"


def _about_limits(slurm: Slurm) -> str:
    asked = _asked(slurm, "time", "mem", "cpus_per_task", "gpus", "account", "qos")
    return f"a limit of your account or QOS (`sacctmgr show assoc`, `sacctmgr show qos`): {asked}"


def _about_submit_limit(_slurm: Slurm) -> str:
    return (
        "you may not have so many jobs in the queue: wait for some to end (`squeue --me`), or ask "
        "for fewer workers with more trials each (--workers)"
    )


def _about_lost_reply(_slurm: Slurm) -> str:
    return (
        "Slurm may have taken the job all the same; if so, it ends by itself after a minute: look "
        "with `squeue --me` before you try again"
    )


# The first that matches; the words are those of Slurm 22.05.
ADVICE: tuple[tuple[str, Callable[[Slurm], str]], ...] = (
    (r"timed out|Zero Bytes", _about_lost_reply),
    (r"Unable to contact", lambda _: queue.SILENCE),
    (r"MaxSubmitJob", _about_submit_limit),
    (r"job array", lambda _: "`scontrol show config` shows MaxArraySize: ask for fewer workers"),
    (r"limit is invalid|--time|WallDuration", _about_time),
    (r"invalid account", _about_account),
    (r"partition", _about_partition),
    (r"invalid qos", lambda slurm: _asked(slurm, "qos")),
    (r"feature", _about_features),
    (r"node configuration|memory|--mem|CPU count|processors|gres", _about_nodes),
    (r"wckey", lambda _: "export SBATCH_WCKEY with a key that your site knows"),
    (r"policy", _about_limits),
)
