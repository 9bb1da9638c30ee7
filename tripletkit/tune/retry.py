"""Storage calls that outlast an outage: a database restart, a locked file, a network hiccup."""

from __future__ import annotations

import errno
import functools
import json
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import psycopg2
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import exc

from tripletkit.errors import NoStudyError, StorageAway, StorageError
from tripletkit.log import logger

PATIENCE = 600.0  # seconds of trying before a call gives up
LAST_PATIENCE = 10.0  # and once the process is asked to stop
LONGEST_PAUSE = 15.0  # seconds between two tries

T = TypeVar("T")


class TurnLost(StorageError):  # noqa: N818 - an outcome
    """Others may have had their turn meanwhile: read the study anew and start over."""


# PendingRollbackError: what Optuna's own second try of a read raises once the connection is gone.
_OUTAGES = (
    exc.OperationalError,
    exc.InterfaceError,
    exc.PendingRollbackError,
    exc.TimeoutError,
    psycopg2.OperationalError,
    psycopg2.InterfaceError,
    OSError,
    StorageError,  # the server's job is not running
)
_ERRORS = (
    StorageInternalError,
    exc.SQLAlchemyError,
    psycopg2.Error,
    OSError,
    StorageError,
    json.JSONDecodeError,
)

_NO_TABLES = r"no such table|relation .* does not exist"
# What waiting does not mend, when we come for the first time. Later it is an outage like others:
# while our server moves to another node, another user's may answer on its port.
_HINTS = {
    r"authentication failed|no password supplied": "put the password into the file that the "
    "environment variable PGPASSFILE names, mode 0600, as a line host:port:database:user:password",
    r'(role|database) "[^"]*" does not exist|no pg_hba\.conf entry': "name a database and a user "
    "that may use it: --storage-url postgresql://USER@HOST:PORT/DATABASE",
    r"Permission denied|Read-only file system": "name a place of yours with --storage-path",
    _NO_TABLES: "`tripletkit tune` creates it",
}
_REFUSED = re.compile("|".join(_HINTS))
_NOT_OURS = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)
# Another launcher creates the same tables at this moment.
_RACE = re.compile(r"already exists|duplicate key|UNIQUE constraint")


@dataclass
class Retry:
    """Calls a function until it succeeds, for up to `patience` seconds (default PATIENCE).

    `where` names the storage in messages. Says once that the storage is away and once that it is
    back. Raises StorageAway when it gives up, soon if `should_stop`, and StorageError at once for
    what waiting does not mend; whatever is no fault of the storage passes through.
    """

    where: str
    patience: float | None = None
    should_stop: Callable[[], bool] = bool  # never
    worked: bool = False
    away_since: float | None = None

    def __call__(self, call: Callable[[], T]) -> T:
        """The result of `call`."""
        patience = PATIENCE if self.patience is None else self.patience
        began = time.monotonic()
        deadline = began + patience
        pause = 0.25
        while True:
            try:
                result = call()
            except TurnLost:
                raise
            except _ERRORS as error:
                if not _is_outage(error, self.worked):
                    raise self._error("cannot be used", error, StorageError) from error
                if self.should_stop():
                    deadline = min(deadline, began + LAST_PATIENCE)
                now = time.monotonic()
                left = deadline - now
                if left <= 0:
                    what = f"has been away for {now - began:.0f} s"
                    raise self._error(what, error, StorageAway) from error
                if self.away_since is None:
                    self.away_since = time.monotonic()
                    logger.warning(
                        "%s is away: %s; trying again for %.0f s", self.where, reason(error), left
                    )
            else:
                if self.away_since is not None:
                    away = time.monotonic() - self.away_since
                    logger.info("%s is back after %.0f s", self.where, away)
                self.away_since, self.worked = None, True
                return result
            self._sleep(min(pause * random.uniform(0.5, 1), left))  # noqa: S311 - no secret
            pause = min(2 * pause, LONGEST_PAUSE)

    def _sleep(self, seconds: float) -> None:
        """Sleep, but not long once we are asked to stop."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 1.0))
            if self.should_stop():
                return

    def _error(self, what: str, error: Exception, kind: type[StorageError]) -> StorageError:
        if isinstance(error, StorageError):
            return kind(error.message, hint=error.hint)
        why = reason(error)
        hint = "is it up, and reached from this machine? `tripletkit doctor` looks"
        if isinstance(error, json.JSONDecodeError):
            hint = "a line of the journal is damaged: mend or remove it in an editor"
        for pattern, remedy in _HINTS.items():
            if re.search(pattern, why):
                hint = remedy
        if kind is StorageError and re.search(_NO_TABLES, why):
            kind = NoStudyError
        return kind(f"{self.where} {what}: {why}", hint=hint)


def reason(error: BaseException) -> str:
    """What went wrong, on one line, without SQL and without passwords."""
    cause = _cause(error)
    if isinstance(cause, exc.DBAPIError) and cause.orig is not None:
        cause = cause.orig
    return redacted(" ".join(str(cause).split())) or type(cause).__name__


def redacted(text: str) -> str:
    """`text` without the passwords of URLs and connection strings in it."""
    # The password may itself hold an @, and the user's name a slash.
    text = re.sub(r"(://[^:?#\s]*):\S*@", r"\1:***@", text)
    value = r"('(?:\\.|[^'\\])*('|$)|[^\s&]+)"
    return re.sub(r"\b(\w*password)\s*=\s*" + value, r"\1=***", text, flags=re.IGNORECASE)


def _cause(error: BaseException) -> BaseException:
    """Optuna's StorageInternalError hides the error of the database behind one sentence."""
    return error.__cause__ or error if isinstance(error, StorageInternalError) else error


def _is_outage(error: Exception, worked: bool) -> bool:
    cause = _cause(error)
    if not worked:
        if isinstance(cause, _NOT_OURS) or getattr(cause, "errno", None) == errno.EROFS:
            return False
        if _REFUSED.search(str(cause)):
            return False
        if _RACE.search(str(cause)):
            return True
    lost = isinstance(cause, exc.DBAPIError) and cause.connection_invalidated
    return lost or isinstance(cause, _OUTAGES)


def _forward(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.retry(functools.partial(getattr(self.storage, name), *args, **kwargs))

    method.__name__ = name
    return method


def _init(self: Any, storage: BaseStorage, retry: Retry) -> None:
    self.storage, self.retry = storage, retry


def _set_trial_state_values(
    self: Any, trial_id: int, state: TrialState, values: Sequence[float] | None = None
) -> bool:
    """As BaseStorage's. The only call that must not simply be repeated.

    When the connection broke after the commit, a second try would find the trial finished, or
    would take a released trial away from the worker that has got it meanwhile.
    """
    storage: BaseStorage = self.storage
    before: FrozenTrial | None = None
    tried = False

    def call() -> bool:
        nonlocal before, tried
        if state == TrialState.WAITING or tried:
            stored = storage.get_trial(trial_id)
            if tried and _is_done(stored, before, state, values):
                return True
            before = before or stored
        tried = True
        return storage.set_trial_state_values(trial_id, state=state, values=values)

    return cast(bool, self.retry(call))


def _is_done(
    stored: FrozenTrial,
    before: FrozenTrial | None,
    state: TrialState,
    values: Sequence[float] | None,
) -> bool:
    if state == TrialState.WAITING:  # taking a waiting trial sets its start anew
        started_anew = before is not None and stored.datetime_start != before.datetime_start
        return stored.state == state or started_anew
    if not state.is_finished() or stored.state != state:
        return False
    return values is None or stored.values == list(values)


# Every public method of BaseStorage, also those that Optuna will add. Optuna unwraps only its own
# storages, so it calls these.
RetryingStorage: Callable[[BaseStorage, Retry], BaseStorage] = type(
    "RetryingStorage",
    (BaseStorage,),
    {name: _forward(name) for name in vars(BaseStorage) if not name.startswith("_")}
    | {"__init__": _init, "set_trial_state_values": _set_trial_state_values},
)
