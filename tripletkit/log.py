"""One logging set-up: rich on a terminal, plain lines in a job log, and a file if asked."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

logger = logging.getLogger("tripletkit")

SLOT = "TRIPLETKIT_SLOT"  # in the environment of a process of a worker that has several

# What a terminal would obey, and what turns the order of the text behind it: all that is not text, but
# for the tab and the end of a line.
_OBEYED = {
    *range(0x09),
    *range(0x0B, 0x20),
    *range(0x7F, 0xA0),
    *range(0x202A, 0x202F),
    *range(0x2066, 0x206A),
}
_SHOWN = dict.fromkeys(_OBEYED, "\N{REPLACEMENT CHARACTER}")


def visible(text: str) -> str:
    """`text` as a terminal can be given it: names come from files, and files from anybody."""
    return text.translate(_SHOWN)


class _Console(Console):
    """Rich's own control of the terminal goes through, that in texts does not."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)


# Results go to stdout, everything else to stderr, so that output can be piped. `:key:` in a name is
# no picture of a key.
out = _Console(highlight=False, markup=False, emoji=False)
err = _Console(stderr=True, highlight=False, emoji=False)


def setup(*, verbose: bool = False, plain: bool = False) -> None:
    """Send log records to stderr. Safe to call again.

    `plain` output has no colours and bars whatever it goes to: srun gives jobs a terminal of its
    own, and writes what arrives there into files.
    """
    from rich.logging import RichHandler

    if plain:
        out._color_system = err._color_system = None  # no_color leaves bold
        out._force_terminal = err._force_terminal = False
    for old in logger.handlers[:]:
        logger.removeHandler(old)
        old.close()
    handler: logging.Handler
    if err.is_terminal:
        handler = RichHandler(
            console=err, show_path=False, markup=False, log_time_format="%H:%M:%S"
        )
        handler.setFormatter(logging.Formatter(_prefix() + "%(message)s"))
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_plain())
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    logger.propagate = False


def only_errors() -> None:
    """Of several processes that do the same, one talks; the others only say what went wrong."""
    setup(plain=True)
    logger.setLevel(logging.ERROR)


@contextlib.contextmanager
def also_to(*files: Path | None) -> Iterator[None]:
    """Append log records to these files too, for the length of the block."""
    with contextlib.ExitStack() as stack:
        for path in files:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                handler = _File(path)
                handler.setFormatter(_plain())
                logger.addHandler(handler)
                stack.callback(handler.close)
                stack.callback(logger.removeHandler, handler)
        yield


@contextlib.contextmanager
def progress(total: int, description: str) -> Iterator[Callable[[int, str], None]]:
    """A bar with rate and time left on a terminal, nothing elsewhere.

    Yields `update(completed, description)`.
    """
    if not err.is_terminal:
        yield _silent
        return
    from rich import progress as bars

    columns = (
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=err, transient=True) as bar:
        task = bar.add_task(description, total=total)

        def update(completed: int, description: str) -> None:
            bar.update(task, completed=completed, description=description)

        yield update


def _silent(completed: int, description: str) -> None:
    """An `update` that shows nothing."""


class _File(logging.FileHandler):
    """A log that a full disk costs lines, and nobody their work."""

    lost = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Say so once, in the other logs."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.lost:
            self.lost = True
            logger.warning("%s loses lines: %s", self.baseFilename, error.strerror or error)

    def close(self) -> None:
        """What could not be written stays unwritten."""
        with contextlib.suppress(OSError):
            super().close()


class _Lines(logging.Formatter):
    """Lines for files, which are read in a terminal too."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


def _plain() -> logging.Formatter:
    return _Lines("%(asctime)s %(levelname)s " + _prefix() + "%(message)s", "%Y-%m-%d %H:%M:%S")


def _prefix() -> str:
    """`[job 12_3 slot 1] `, from what Slurm, torchrun and slots.py put into the environment."""
    env = os.environ
    job = env.get("SLURM_ARRAY_JOB_ID", env.get("SLURM_JOB_ID"))
    parts = []
    if job:
        task = env.get("SLURM_ARRAY_TASK_ID")
        parts.append(f"job {job}_{task}" if task else f"job {job}")
    if int(env.get("WORLD_SIZE", "1")) > 1:
        parts.append(f"rank {env.get('RANK', '0')}")
    if SLOT in env:
        parts.append(f"slot {env[SLOT]}")
    return f"[{' '.join(parts)}] " if parts else ""
