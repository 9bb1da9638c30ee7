"""The study that all workers share: on SQLite, an Optuna journal file, or PostgreSQL.

The launcher creates schema and study once; workers only open it, since most of them would die of
each other's `CREATE TABLE`. Every call through the opened study outlasts an outage (retry.py).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import sqlite3
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, get_storage
from sqlalchemy import event
from sqlalchemy.pool import NullPool

from tripletkit import fsio
from tripletkit.config import Tuning
from tripletkit.errors import ConfigError, NoStudyError, StorageError
from tripletkit.log import logger
from tripletkit.tune import journal
from tripletkit.tune.postgresql import Server
from tripletkit.tune.retry import Retry, RetryingStorage, TurnLost, redacted
from tripletkit.tune.sampler import Numbered

__all__ = ["WAYS_OUT", "Kind", "SharedStudy", "TurnLost", "create", "direction", "filesystem", "kind_of",
           "location", "open_study"]  # fmt: skip

Kind = Literal["sqlite", "journal", "postgresql"]
HOST = "tripletkit:host"

LAUNCH_PATIENCE = 10.0  # seconds; somebody sits in front of it

MOUNTINFO = Path("/proc/self/mountinfo")
# Where file locks or shared memory do not reach from one node to the other.
_NETWORK = re.compile(
    r"(nfs4?|lustre|gpfs|mmfs|beegfs|fhgfs|cifs|smb3|smbfs|ceph|glusterfs|wekafs|panfs|orangefs|pvfs2"
    r"|afs|dvs|coda|gfs2|ocfs2|quobyte|juicefs"
    r"|fuse\.(ceph|ceph-fuse|glusterfs|sshfs|juicefs|quobyte|mfs|s3fs|rclone|gcsfuse|lustre))"
)
WAYS_OUT = (
    "for workers on several nodes start a PostgreSQL with `tripletkit db up --cluster slurm`, or "
    "use an Optuna journal: --storage-path with a file *.journal"
)


@dataclass(frozen=True)
class SharedStudy:
    """A study open in this process.

    Within `turn()` no other worker of the study is in its turn. It raises TurnLost, at the end or
    from a storage call inside, when that may not have held: then read anew and start over.
    """

    study: optuna.Study
    turn: Callable[[], AbstractContextManager[None]]
    kind: Kind


def create(tuning: Tuning) -> SharedStudy:
    """Create schema and study unless they are there, and open it. For the launcher.

    Raises StorageError (also for SQLite where it is not safe), and ConfigError for a study of that
    name whose objective goes the other way.
    """
    retry = Retry(location(tuning), LAUNCH_PATIENCE)
    backend = _backend(tuning, retry, workers=1)
    with backend.exclusive("schema"):
        storage = RetryingStorage(retry(lambda: get_storage(backend.open(True))), retry)
        study = optuna.create_study(
            storage=storage,
            study_name=tuning.study_name,
            direction=direction(tuning.objective),
            load_if_exists=True,
            sampler=_sampler(tuning, 0),
            pruner=_pruner(tuning),
        )
        if backend.kind == "sqlite" and HOST not in study.user_attrs:
            study.set_user_attr(HOST, socket.gethostname())
    retry.patience = None
    return _checked(study, tuning, backend)


def open_study(
    tuning: Tuning,
    *,
    seed: int,
    workers: int,
    patience: float | None = None,
    should_stop: Callable[[], bool] = bool,
    read_only: bool = False,
) -> SharedStudy:
    """Open the study that `create` made. With one `seed` workers propose different parameters.

    `workers` is how many share the server's connections. `patience`: seconds to wait for a storage
    that is away, here and in every call (10 minutes); once `should_stop`, only a few. `read_only`: the
    database refuses what would change it, and nobody who writes waits for us; a journal file has no
    such mode. Raises NoStudyError, StorageError, ConfigError as `create`.
    """
    retry = Retry(location(tuning), patience, should_stop)
    backend = _backend(tuning, retry, workers, read_only=read_only)
    absent = NoStudyError(
        f"there is no study {tuning.study_name!r} in {retry.where}",
        hint="`tripletkit tune` creates it; see also --study-name and --storage-path",
    )
    if backend.kind != "postgresql" and not tuning.storage_path.exists():
        if backend.kind == "sqlite":
            absent.hint = f"{absent.hint}. If it is there on another node: {WAYS_OUT}"
        raise absent
    storage = RetryingStorage(retry(lambda: get_storage(backend.open(False))), retry)
    try:
        study = optuna.load_study(
            study_name=tuning.study_name,
            storage=storage,
            sampler=_sampler(tuning, seed),
            pruner=_pruner(tuning),
        )
    except KeyError:
        raise absent from None
    return _checked(study, tuning, backend)


def kind_of(tuning: Tuning) -> Kind:
    """What holds the study."""
    if tuning.storage_url is not None or tuning.storage_path.is_dir():
        return "postgresql"
    return "journal" if tuning.storage_path.suffix == ".journal" else "sqlite"


def location(tuning: Tuning) -> str:
    """Where the study lies, for messages; never with a password."""
    return redacted(tuning.storage_url or str(tuning.storage_path))


def direction(objective: str) -> Literal["minimize", "maximize"]:
    """Losses are to be small, retrieval metrics large."""
    return "minimize" if objective == "val_loss" else "maximize"


def filesystem(path: Path, mountinfo: Path | None = None) -> str:
    """The type of the file system that `path` is, or will be, on; "" where the kernel has no list.

    Source: proc_pid_mountinfo(5).
    """
    mountinfo = mountinfo or MOUNTINFO
    if not mountinfo.exists():
        return ""
    path, found = path.resolve(), (Path(), "")
    for line in mountinfo.read_text().splitlines():
        mount, _, source = line.partition(" - ")
        point = Path(re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), mount.split()[4]))
        # Of two at the same place the later one hides the other.
        if path.is_relative_to(point) and len(point.parts) >= len(found[0].parts):
            found = (point, source.split()[0])
    return found[1]


def _checked(study: optuna.Study, tuning: Tuning, backend: _Backend) -> SharedStudy:
    wanted, stored = direction(tuning.objective), study.direction.name.lower()
    if stored != wanted:
        raise ConfigError(
            f"study {tuning.study_name!r} is there to {stored}, but tuning.objective = "
            f"{tuning.objective!r} is to {wanted}",
            hint="give the new study another --study-name",
        )
    if backend.kind == "sqlite":
        host = study.user_attrs.get(HOST, socket.gethostname())
        if host != socket.gethostname():
            raise StorageError(
                f"{tuning.storage_path} belongs to processes on {host}, and this is "
                f"{socket.gethostname()}: SQLite loses trials when several nodes share a file",
                hint=WAYS_OUT,
            )
    return SharedStudy(study, lambda: backend.exclusive(f"turn {tuning.study_name}"), backend.kind)


def _sampler(tuning: Tuning, seed: int) -> optuna.samplers.BaseSampler:
    if tuning.sampler == "random":
        return Numbered(optuna.samplers.RandomSampler, seed)

    def tpe(seed: int) -> optuna.samplers.BaseSampler:
        with warnings.catch_warnings():  # both were experimental before Optuna 5
            warnings.simplefilter("ignore", ExperimentalWarning)
            return optuna.samplers.TPESampler(multivariate=True, constant_liar=True, seed=seed)

    return Numbered(tpe, seed)


def _pruner(tuning: Tuning) -> optuna.pruners.BasePruner:
    match tuning.pruner:
        case "median":
            warmup = max(1, tuning.max_epochs // 5)
            return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=warmup)
        case "successive_halving":
            # Rungs at about 1/9 and 1/3 of the epochs. A number: "auto" would differ by worker.
            rung = max(1, tuning.max_epochs // 9)
            return optuna.pruners.SuccessiveHalvingPruner(min_resource=rung, reduction_factor=3)
        case "none":
            return optuna.pruners.NopPruner()


class _Backend(NamedTuple):
    """One kind of storage. `open(True)` makes the schema; `exclusive(what)` is a lock."""

    kind: Kind
    open: Callable[[bool], BaseStorage]
    exclusive: Callable[[str], AbstractContextManager[None]]


def _backend(tuning: Tuning, retry: Retry, workers: int, *, read_only: bool = False) -> _Backend:
    _quiet_optuna()
    kind, path = kind_of(tuning), tuning.storage_path
    if kind == "postgresql":
        server = Server(tuning, retry)
        begin = "SET TRANSACTION READ ONLY" if read_only else ""
        url = "postgresql+psycopg2://"
        return _Backend(
            kind,
            lambda make: _rdb_storage(url, make, begin, **server.engine(workers)),
            server.exclusive,
        )
    if kind == "sqlite" and _NETWORK.fullmatch(where := filesystem(path)):
        raise StorageError(
            f"{path} is on a network file system ({where}), where SQLite loses trials",
            hint=WAYS_OUT + "; alone on one node, a --storage-path on its local disk will do",
        )

    def open_(make: bool) -> BaseStorage:
        if kind == "journal":
            return JournalStorage(journal.backend(path))
        return _open_sqlite(path, make, read_only)

    return _Backend(kind, open_, lambda _: _file_lock(path.with_name(path.name + ".turn"), retry))


@contextlib.contextmanager
def _file_lock(path: Path, retry: Retry) -> Iterator[None]:
    with ExitStack() as stack:
        retry(lambda: stack.enter_context(fsio.exclusive_lock(path)))
        yield


def _open_sqlite(path: Path, make: bool, read_only: bool) -> RDBStorage:
    """SQLite as many processes can share it.

    Without BEGIN IMMEDIATE two workers get the same waiting trial: a transaction that begins with
    a read does not lock, and SQLite ignores FOR UPDATE. Who only reads locks nobody out.
    """
    watched = read_only and not os.access(path.absolute().parent, os.W_OK, effective_ids=True)

    def connect() -> sqlite3.Connection:
        connection = sqlite3.connect(
            _address_to_watch(path) if watched else path,
            uri=watched, timeout=120, isolation_level=None, check_same_thread=False,
        )  # fmt: skip
        if read_only:
            connection.execute("PRAGMA query_only=ON")
        else:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=NORMAL")
        return connection

    begin = "BEGIN" if read_only else "BEGIN IMMEDIATE"
    engine = {"creator": connect, **({"poolclass": NullPool} if watched else {})}
    return _rdb_storage("sqlite:///study", make, begin, **engine)


def _address_to_watch(path: Path) -> str:
    """A database in a folder that is not ours to write in, where SQLite can make no files beside it.

    While others have it open those are there. Without them nobody has, and it is whole by itself;
    that may change, so each connection asks anew.
    """
    alone = not path.with_name(path.name + "-wal").exists()
    return f"{path.absolute().as_uri()}?mode=ro" + ("&immutable=1" if alone else "")


def _rdb_storage(url: str, make: bool, begin: str, **engine: Any) -> RDBStorage:
    """`begin` is what each transaction begins with."""
    try:
        storage = RDBStorage(url, engine_kwargs=engine, skip_table_creation=not make)
    except RuntimeError as error:  # the tables are of another version of Optuna
        raise ConfigError(f"the study's tables do not fit: {error}") from error
    if begin:

        @event.listens_for(storage.engine, "begin")
        def _begun(connection: Any) -> None:
            connection.exec_driver_sql(begin)

    return storage


def _quiet_optuna() -> None:
    """Optuna's warnings come in our log; its news do not."""
    optuna.logging.disable_default_handler()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    library = logging.getLogger("optuna")
    library.propagate, library.parent = True, logger
    # Its one warning quotes whole SQL statements when a connection breaks, which Retry reports.
    logging.getLogger("optuna.storages._rdb.storage").setLevel(logging.ERROR)
