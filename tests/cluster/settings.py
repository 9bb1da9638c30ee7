"""The configuration files of the test cluster."""

import os
import secrets
import socket
from pathlib import Path

ACCOUNT = "def-lab"
USERS = ("root", "postgres")
NODES = ("n1", "n2", "n3", "n4")
MAX_ARRAY_SIZE = 41
SERVICES = ("slurmctld", "slurmdbd", "mariadb")

SLURM = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={slurmctld}
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
MailProg={folder}/mail
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job is held back: 2 minutes by default
AuthInfo=socket={folder}/munge/socket,cred_expire=10

# several nodes on one host, with more processors than it has; without control groups a job's
# memory is looked at every 2 s, and one that uses more than it asked for is killed
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
JobAcctGatherParams=OverMemoryKill,UsePss
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
DefMemPerCPU=2000
ReturnToService=2

AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={slurmdbd}
AccountingStoragePass={folder}/munge/socket
AccountingStorageEnforce=associations
AccountingStorageTRES=gres/gpu

# a lost node is noticed within half a minute, a slow one is not called lost
SlurmdTimeout=20
SlurmctldTimeout=60
MessageTimeout=20
KillWait=5
JobRequeue=1
MaxArraySize={max_array_size}

SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=0,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE

{nodes}
PartitionName=DEFAULT Nodes=ALL State=UP MaxTime=1-0 DefaultTime=10
PartitionName=main Default=YES PriorityTier=10 PreemptMode=OFF
PartitionName=high PriorityTier=20 PreemptMode=OFF
PartitionName=low PriorityTier=1 PreemptMode=REQUEUE GraceTime=0
PartitionName=lowgrace PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
"""

NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"
    " CPUs=8 RealMemory=16000 Gres=gpu:{gpus} State=UNKNOWN"
)

GPUS = {"n4": 2}  # the other nodes have one
GRES = "NodeName={name} Name=gpu File={folder}/nvidia[0-{last}]\n"

# Slurm calls it with -s SUBJECT ADDRESS: a line for each mail.
MAIL = """\
#!/bin/sh
printf '%s\\n' "$*" >>{folder}/mail.log
"""

SLURMDBD = """\
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={slurmdbd}
SlurmUser=root
PidFile={folder}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={mariadb}
StorageUser=slurm
StoragePass={password}
StorageLoc=accounting
"""

MARIADB = """\
[mariadbd]
user=root
datadir={folder}/mariadb
socket={folder}/mariadb.socket
pid-file={folder}/mariadb.pid
# when it starts it removes the temporary tables that it finds there, whosoever they are
tmpdir={folder}
bind-address=127.0.0.1
port={mariadb}
init-file={folder}/init.sql
skip-name-resolve
# nothing here outlives the tests: no flush to the disk, small files
innodb-flush-method=nosync
innodb-flush-log-at-trx-commit=0
innodb-lock-wait-timeout=900
skip-innodb-doublewrite
innodb-log-file-size=8M
innodb-buffer-pool-size=32M
"""

INIT = """\
CREATE USER IF NOT EXISTS 'slurm'@'127.0.0.1' IDENTIFIED BY '{password}';
GRANT ALL ON accounting.* TO 'slurm'@'127.0.0.1';
"""


def ours(ports: range) -> range:
    """Those of these ports that only this process of a parallel test run looks at.

    Between the look at a port and its use another process might find it free as well.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    return ports[worker % 16 :: 16]


def free_ports(count: int) -> list[int]:
    """Distinct ports of 127.0.0.1 that nothing uses, out of the range of outgoing connections."""
    found: list[int] = []
    while len(found) < count:
        port = secrets.choice(ours(range(12_000, 20_000)))  # tests of PostgreSQL take higher ones
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


def write(folder: Path) -> dict[str, int]:
    """Write every configuration file of a cluster into `folder`; the port of each daemon."""
    host = socket.gethostname().partition(".")[0]
    daemons = (*SERVICES, *NODES)
    ports = dict(zip(daemons, free_ports(len(daemons)), strict=True))
    values = {
        "folder": folder,
        "host": host,
        "max_array_size": MAX_ARRAY_SIZE,
        "password": secrets.token_hex(16),
        "nodes": "\n".join(
            NODE.format(name=name, host=host, port=ports[name], gpus=GPUS.get(name, 1))
            for name in NODES
        ),
        **ports,
    }

    def put(name: str, text: str, mode: int) -> None:
        path = folder / name
        path.touch(mode)
        path.write_text(text)

    put("slurm.conf", SLURM.format(**values), 0o644)
    put("mail", MAIL.format(**values), 0o755)
    gres = [GRES.format(name=name, folder=folder, last=GPUS.get(name, 1) - 1) for name in NODES]
    put("gres.conf", "AutoDetect=off\n" + "".join(gres), 0o644)
    for index in range(2):  # devices whose names end in their index
        (folder / f"nvidia{index}").symlink_to("/dev/null")
    put("slurmdbd.conf", SLURMDBD.format(**values), 0o600)
    put("mariadb.conf", MARIADB.format(**values), 0o600)
    put("init.sql", INIT.format(**values), 0o600)
    (folder / "munge").mkdir(mode=0o755)
    (folder / "munge" / "key").touch(0o600)
    (folder / "munge" / "key").write_bytes(secrets.token_bytes(128))
    return ports
