"""The settings of the cluster that matter to us, and a word on what each means."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from tripletkit.cluster import queue

CRED_EXPIRE = 120  # seconds, Slurm's default


class Setting(NamedTuple):
    """A setting, by Slurm's name, and what it means for our jobs."""

    name: str
    value: str
    meaning: str


def settings() -> list[Setting]:
    """What matters of the configuration of the cluster. Raises ClusterError."""
    return explain(queue.settings())


def explain(found: Mapping[str, str]) -> list[Setting]:
    """What matters of a slurm.conf."""

    def setting(name: str, meaning: str, value: str | None = None) -> Setting:
        return Setting(name, found.get(name, "") if value is None else value, meaning)

    hold = _requeue_delay(found)
    announced = "preempt_send_user_signal" in found.get("SlurmctldParameters", "")
    return [
        setting("SLURM_VERSION", "written for 21.08 and later"),
        setting("PreemptType", _preempt_type(found)),
        setting("PreemptMode", _MODES.get(_mode(found), "of the whole cluster; partitions differ")),
        setting(
            "SlurmctldParameters",
            "a job that has to make room is told by our signal, saves its state and asks to go on"
            if announced
            else "a job that has to make room gets SIGTERM, maybe only at the end: keep "
            "training.checkpoint_every_minutes small there",
            f"{'with' if announced else 'without'} preempt_send_user_signal",
        ),
        setting("KillWait", "from SIGTERM to SIGKILL: the time to write a last checkpoint"),
        setting("JobRequeue", "our jobs ask to be requeued (--requeue), whatever it says"),
        setting(
            "AuthInfo",
            "for so long a requeued job is held back (reason BeginTime)",
            f"cred_expire={hold}",
        ),
        setting("SlurmdTimeout", "after so long a lost node is noticed, and its jobs requeued"),
        setting("MaxArraySize", "`tripletkit tune` splits its workers into arrays below it"),
        setting("MaxJobCount", "jobs of all users that the controller keeps at once"),
        setting("MinJobAge", "for so long Slurm itself remembers a job that ended"),
        setting("AccountingStorageType", _accounting(found)),
        setting("AccountingStorageEnforce", _enforce(found)),
    ]


def partitions() -> list[Setting]:
    """The partitions: their time limits, and what preemption does there. Raises ClusterError."""
    preempting = queue.settings().get("PreemptType", "") == "preempt/partition_prio"
    rows = queue.partitions()
    highest = max((int(row.get("PriorityTier", "0")) for row in rows), default=0)
    found = []
    for row in rows:
        name = row["PartitionName"] + (" (default)" if row.get("Default") == "YES" else "")
        value = f"MaxTime={row.get('MaxTime')}, DefaultTime={row.get('DefaultTime')}"
        if row.get("State", "UP") != "UP":
            value += f", State={row['State']}"
        mode, tier = row.get("PreemptMode", "OFF"), int(row.get("PriorityTier", "0"))
        if not preempting or mode == "OFF" or tier == highest:
            meaning = "its jobs run to their end" if preempting else "see PreemptType"
        else:
            value += f", PreemptMode={mode}, GraceTime={row.get('GraceTime', '0')}"
            meaning = _MODES.get(mode, "its jobs may have to make room")
        found.append(Setting(name, value, meaning))
    return found


_MODES = {
    "OFF": "jobs run to their end",
    "REQUEUE": "a job that has to make room starts again later and goes on from its checkpoint",
    "CANCEL": "a job that has to make room does not come back: another worker goes on with its "
    "trial, or `tripletkit tune` does",
    "SUSPEND": "a job that has to make room stops and goes on later, in place",
}


def _mode(found: Mapping[str, str]) -> str:
    return found.get("PreemptMode", "OFF").removeprefix("GANG,")


def _preempt_type(found: Mapping[str, str]) -> str:
    kind = found.get("PreemptType", "preempt/none")
    return {
        "preempt/none": "no job has to make room for another",
        "preempt/partition_prio": "jobs of partitions with a higher PriorityTier go first",
        "preempt/qos": "the quality of service decides: `sacctmgr show qos format=name,preempt%40`",
    }.get(kind, "a plugin of this site")


def _requeue_delay(found: Mapping[str, str]) -> str:
    match = re.search(r"cred_expire=(\d+)", found.get("AuthInfo", ""))
    return f"{match[1] if match else CRED_EXPIRE} s"


def _accounting(found: Mapping[str, str]) -> str:
    if found.get("AccountingStorageType", "").endswith("/slurmdbd"):
        return "sacct is on: `tripletkit why` can tell how jobs ended"
    return "sacct is off: `tripletkit why` has only logs and what jobs say about themselves"


def _enforce(found: Mapping[str, str]) -> str:
    enforced = found.get("AccountingStorageEnforce", "").lower()
    if "associations" not in enforced and enforced not in ("all", "1"):
        return "jobs run without an account, too"
    limits = any(word in enforced for word in ("limits", "qos", "safe", "all"))
    more = (
        ", and its limits hold: see the reasons Assoc... and QOS... in the queue" if limits else ""
    )
    return f"jobs need an account that you may charge (--account){more}"
