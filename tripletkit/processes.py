"""Processes of one job: one per GPU for a training, or several workers of a study.

The parent computes nothing. It hands on the request to stop, waits, and none outlives it.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from tripletkit import boundary, log
from tripletkit.cluster import preempt
from tripletkit.errors import RunError, TripletkitError
from tripletkit.log import logger

ASK_SECONDS = 0.2  # so often the parent looks whether it was asked to stop

HEAR_SECONDS = 1.0
END_SECONDS = 10.0  # a process that has said its last word has so long to go

# What a process runs: it gets a function that says whether it was asked to stop.
Work = Callable[[Callable[[], bool]], Any]


class Outcome(NamedTuple):
    """What became of a process: the result of its work, or what went wrong."""

    result: Any
    error: BaseException | None


def run(
    works: Sequence[Work],
    environments: Sequence[Mapping[str, str]],
    *,
    should_stop: Callable[[], bool],
    together: bool,
    restarts: int = 0,
) -> list[Outcome]:
    """Run each of `works`, which must be picklable, in a process of its own, to the end.

    `environments` are variables that each process sees from its start on. Processes that work
    `together` all end when one fails. Others go on; a process that is killed is started again, up
    to `restarts` times.
    """
    with contextlib.ExitStack() as stack:
        family = [
            stack.enter_context(_Member(number, *each))
            for number, each in enumerate(zip(works, environments, strict=True))
        ]
        told = False
        while running := [each for each in family if not each.ended]:
            if should_stop() and not told:
                told = True
                for each in running:
                    each.ask_to_stop()
            for connection in wait([each.connection for each in running], ASK_SECONDS):
                each = next(each for each in running if each.connection is connection)
                each.conclude()
                if each.killed and each.starts <= restarts and not told:
                    logger.warning("%s: starting it again", each.error)
                    each.start()
                elif each.error is not None and not together:  # the end may be hours away
                    logger.error("process %d of this job ended: %s", each.number, each.error)
            if together and any(each.error for each in family):
                _hear_out(family)
                break
        return [Outcome(each.result, each.error) for each in family]


def results(outcomes: Sequence[Outcome]) -> list[Any]:
    """The results, or the error that came first: those it worked with may fail over one that failed."""
    errors = [each.error for each in outcomes if each.error is not None]
    for error in sorted(errors, key=lambda e: not isinstance(e, TripletkitError)):
        raise error
    return [each.result for each in outcomes]


def _hear_out(family: Sequence[_Member]) -> None:
    """One failed: another may have failed before it, and be about to say so."""
    for each in family:
        if not each.ended and each.connection.poll(HEAR_SECONDS):
            each.conclude()


def launched() -> bool:
    """Whether a launcher, such as torchrun, started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def follows() -> bool:
    """Whether another one of them leads: it writes and talks."""
    return launched() and os.environ["RANK"] != "0"


class _Member:
    """One process and what has become of it. Leaving the block ends it."""

    def __init__(self, number: int, work: Work, environment: Mapping[str, str]) -> None:
        self.number = number
        self.work = work
        self.environment = environment
        self.starts = 0
        self.connection: Connection
        self.process: Any

    def __enter__(self) -> _Member:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()

    def start(self) -> None:
        self.ended = self.killed = False
        self.result: Any = None
        self.error: BaseException | None = None
        self.starts += 1
        # Not forked: threads and CUDA do not survive that.
        context = multiprocessing.get_context("spawn")
        if self.starts > 1:
            self.connection.close()
        self.connection, theirs = context.Pipe(duplex=False)
        self.process = context.Process(
            target=_work,
            args=(self.work, dict(self.environment), theirs, not log.err.is_terminal),
            name=f"process {self.number}",
        )
        with _signals_wait():
            self.process.start()
        theirs.close()

    def ask_to_stop(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGUSR1)

    def conclude(self) -> None:
        """Take what it left; it has closed its end of the pipe, or is about to."""
        try:
            self.result, self.error = self.connection.recv()
            self.process.join(END_SECONDS)
            self.process.kill()
        except EOFError:
            self.process.join()
            self.killed = True
            code = self.process.exitcode
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            self.error = RunError(
                f"process {self.number} of this job died ({how})",
                hint="SIGKILL mostly means that memory ran out: ask for more (slurm.mem)"
                if code == -signal.SIGKILL
                else "the log above may say why",
            )
        self.ended = True


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """A process that is started meanwhile gets signals only when it is ready for them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, preempt.WATCHED)
    # The first process would start this helper of Python's, which then unblocks some of them.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, preempt.WATCHED)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _work(work: Work, environment: dict[str, str], answer: Connection, plain: bool) -> None:
    """The life of a process: work, and say how it ended."""
    os.environ.update(environment)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    boundary.prepare_process(plain=plain)
    result: Any = None
    error: BaseException | None = None
    with preempt.watch() as stop:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, preempt.WATCHED)
        try:
            result = work(stop)
        except TripletkitError as ours:
            error = ours
        except BaseException as bug:  # noqa: BLE001 - the parent's boundary sees to it
            bug.add_note(traceback.format_exc())
            error = _that_travels(bug)
        answer.send((result, error))
        if error is not None:
            # What it held may wait for the others, who are not coming: NCCL does, for one.
            logging.shutdown()
            os._exit(1)


def _that_travels(bug: BaseException) -> BaseException:
    """The exception, or one that says the same, if it cannot be pickled and read again."""
    try:
        pickle.loads(pickle.dumps(bug))  # noqa: S301 - our own
    except Exception:  # noqa: BLE001 - whatever its class does in there
        return RuntimeError("".join(traceback.format_exception(bug)))
    return bug


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
