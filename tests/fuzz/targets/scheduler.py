"""What Slurm's commands print, or something in their place."""

from __future__ import annotations

import subprocess
from unittest import mock

from tests.fuzz.draw import Draw
from tests.fuzz.judge import Target
from tripletkit.cluster import jobs, queue, resources
from tripletkit.config import Slurm
from tripletkit.monitor import facts
from tripletkit.paths import LogPaths

QUEUED = b"12_3|RUNNING|1:02|3:00:00|2026-01-02T03:04:05|node1|None|tune-x|y\n13|PENDING|0:00|UNLIMITED|N/A||Priority|n\n"
PAST = (
    b"|12_[0-2,5%2]|PENDING|0:0|None assigned|00:00:00|03:00:00|2026-01-02T03:04:05|Unknown|Unknown|32G|None|tune\n"
    b"|12_3|CANCELLED by 0|0:15|n1|00:01:00|03:00:00|2026-01-02T03:04:05|2026-01-02T03:04:06|2026-01-02T03:05:05|2Gn|None|a|b\n"
    b"1.5M|12_3.batch|COMPLETED|0:0|n1|00:01:00||2026-01-02T03:04:06||||None|batch\n"
)
JOB = b"JobId=12 ArrayJobId=12 JobName=a b c=d JobState=RUNNING EndTime=2026-01-02T03:04:05 Command=(null)\n"
CONFIG = b"Configuration data as of 2026\nMaxArraySize            = 1001\nSLURM_VERSION = 22.05\n"
PARTITION = b"PartitionName=debug AllowGroups=ALL Default=YES MaxTime=UNLIMITED State=UP\n"
NODES = b"4 CPUs, 7000 MB, gres (null)\nnode1.example.org\n"


def _slurm(data: bytes) -> None:
    draw = Draw(data)
    code = draw.of((0, 0, 0, 1))
    said = draw.rest().decode(errors="replace")

    def answer(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, code, said, said if code else "")

    with mock.patch.object(subprocess, "run", answer), mock.patch.object(queue, "PAUSES", ()):
        for ask in (
            queue.queued,
            lambda: queue.queued(["12", "13_0"]),
            lambda: queue.past(["12", "13"]),
            lambda: queue.job_facts("12"),
            queue.settings,
            queue.partitions,
            queue.nodes,
            queue.node_hosts,
            lambda: queue.requeue("12"),
            lambda: queue.cancel(["12"]),
            lambda: queue.test_only("#!/bin/sh", {}),
            lambda: resources.longest(Slurm(partition="debug")),
            lambda: resources.longest(Slurm()),
            lambda: jobs.deadline("12"),
            lambda: jobs.states(LogPaths(HERE), ["12", "13_0"]),
        ):
            try:
                found = ask()
            except queue.ClusterError:
                continue
            if isinstance(found, list):
                assert len(found) < 5_000_000
    with mock.patch.object(subprocess, "run", answer), mock.patch.object(queue, "PAUSES", ()):
        resources.refused(said, Slurm())
    for line in said.splitlines()[:50]:
        for cell in line.split("|"):
            facts.seconds(cell)
            facts.bytes_of(cell)


from pathlib import Path  # noqa: E402 - below what it is about

HERE = Path("logs")
SEEDS = [
    bytes([code]) + text
    for text in (QUEUED, PAST, JOB, CONFIG, PARTITION, NODES, b"\xff\xfe\0", b"1|2|3\n" * 50,
                 b"|12_[0-99999999999]|P|0:0||||||||||\n", b"|12_[a-b]|P|0:0||||||||||\n", b"1.2.3M|12.0|P|||||||||||\n",
                 b"slurm: Unable to contact slurm controller\n", b"Invalid job id specified\n", b"JobId=1" + b" " * 20000,
                 b"|1_[" + b"9" * 5000 + b"]|P|0:0||||||||||\n", b"9" * 400 + b"K|1.0|P|||||||||||\n")
    for code in (0, 3)
]  # fmt: skip
SLURM = Target(_slurm, lambda: SEEDS, [b"|", b"\n", b"[0-9]", b"%", b"_", b"=", b"UNLIMITED", b"PartitionName=", b" MaxTime=",
                                       b"Default=YES", b"12_", b".batch", b"K", b"-", b":", b"\r", b"\x1b[0m"])  # fmt: skip
