"""The tables of `tripletkit status`, once or again and again."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple

from tripletkit import log
from tripletkit.log import logger
from tripletkit.monitor.inventory import Inventory, Job, spans
from tripletkit.monitor.status import DAY, Room, Status, Study, gather

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text

# Columns, below which the value of the last epoch is left out, and what jobs say has its own lines.
NARROW = 96
NODE = 16  # columns of a node's name
DONE = "COMPLETED"  # the state of a job that did what it was to do
STYLES = {
    "FAIL": "red", "FAILED": "red", "KILLED": "red", "TIMEOUT": "red", "OUT_OF_MEMORY": "red",
    "NODE_FAIL": "red", "WAITING": "yellow", "PENDING": "yellow", "RUNNING": "green",
}  # fmt: skip
WORDS = {
    "RUNNING": "running", "WAITING": "waiting", "COMPLETE": "complete", "PRUNED": "pruned",
    "FAIL": "failed",
}  # fmt: skip


def show(inventory: Inventory, room: Room | None) -> None:
    """Print the status once."""
    status = gather(inventory, room)
    for warning in status.warnings:
        logger.warning("%s", warning)
    log.out.print(render(status, log.out.width, room))


def watch(inventory: Inventory, every: float, room: Room | None) -> None:
    """Print the status every so many seconds, in place on a terminal, until Ctrl-C."""
    try:
        if log.out.is_terminal:
            _watch_in_place(inventory, every)
        while True:
            log.out.print(datetime.now().astimezone().isoformat(" ", "seconds"))
            show(inventory, room)
            time.sleep(every)
    except KeyboardInterrupt:
        pass  # the way to end it


def _watch_in_place(inventory: Inventory, every: float) -> None:
    from rich.console import Group
    from rich.live import Live

    with Live(console=log.out, auto_refresh=False) as live:
        while True:
            jobs = 5
            # Headings, summary and warnings need the other lines.
            room = Room(max(3, log.out.height - jobs - 12), jobs)
            status = gather(inventory, room)
            now = datetime.now().astimezone().strftime("%H:%M:%S")
            warnings = [f"warning: {warning}" for warning in status.warnings]
            shown = render(status, log.out.width, room)
            live.update(Group(shown, *warnings, f"{now}; Ctrl-C ends it"), refresh=True)
            time.sleep(every)


def render(status: Status, width: int, room: Room | None) -> Group:
    """The tables and the summary, for a terminal of that width."""
    from rich.console import Group

    parts: list[RenderableType] = []
    if status.rows:
        parts.append(_trial_table(status, width))
    if status.hidden:
        parts.append(f"... and {status.hidden} older trials: --all shows them")
    lines = _job_lines(status.others)
    shown, left_out = _chosen(lines, room)
    if shown:
        parts.append(_job_table(shown, width))
        if width < NARROW and (notes := _notes(shown)):
            parts.append(Group(*notes))
    parts += left_out
    lost = [
        row.number
        for row in status.rows
        if row.state == "RUNNING" and (job := status.jobs.get(row.job or "")) and job.over
    ]
    if lost:
        numbers = ", ".join(map(str, lost))
        parts.append(f"no job works on trial {numbers} any more: `tripletkit doctor --fix`")
    if status.study is not None:
        parts.append(summary(status.study))
    elif not lines:
        parts.append("no jobs")
    return Group(*(part for each in parts for part in (each, "")))


def summary(study: Study) -> str:
    """The study in one line."""
    counts = counted(study)
    to_come = study.total - sum(study.states.values())
    counts += [f"{to_come} to come"] if to_come > 0 and study.budget is None else []
    parts = [f"study {study.name}, {study.total} trials: {', '.join(counts)}"]
    if study.best is not None:
        epoch = f" in epoch {study.best.epoch}" if study.best.epoch is not None else ""
        parts.append(
            f"best: trial {study.best.number}, {study.objective} {shown_value(study.best.value)}{epoch}"
        )
    if study.budget is not None:
        parts.append(study.budget)
    elif study.seconds_left is not None:
        workers = f"{study.workers} worker{'s' if study.workers > 1 else ''}"
        parts.append(f"about {_about(study.seconds_left)} left at this pace of {workers}")
    return "; ".join(parts)


def counted(study: Study) -> list[str]:
    """`3 running`, `12 complete`, ..."""
    return [f"{count} {WORDS[state]}" for state, count in study.states.items() if count]


def clock(seconds: float | None) -> str:
    """`2-03:00:00`, `1:02:03` or `2:03`, as squeue prints it."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}-{hours:02}:{minutes:02}:{rest:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _trial_table(status: Status, width: int) -> Table:
    from rich.text import Text

    table = simple_table("trial", "state", "job", "job state", "node", "epoch", "best")
    if width >= NARROW:
        table.add_column("last", justify="right", no_wrap=True)
    table.add_column("elapsed/limit", justify="right", no_wrap=True)
    for name in ("trial", "epoch", "best"):
        next(column for column in table.columns if column.header == name).justify = "right"
    for row in status.rows:
        job = status.jobs.get(row.job or "") if row.state not in ("COMPLETE", "PRUNED") else None
        state = f"{row.state} {row.cause['kind'] if row.cause else ''}".rstrip()
        epochs = f"{row.epoch}/{status.study.max_epochs}" if status.study and row.epoch else ""
        cells = [
            str(row.number),
            Text(state, STYLES.get(row.state, "")),
            row.job or "",
            Text(_state(job), STYLES.get(job.state, "")) if job else "",
            middle(_short(job.node if job and job.node else row.host), NODE),
            epochs,
            shown_value(row.best),
            *([shown_value(row.last)] if width >= NARROW else []),
            _times(job) if job and job.active and row.state == "RUNNING" else clock(row.seconds),
        ]
        table.add_row(*cells)
    return table


def _chosen(lines: Sequence[_Line], room: Room | None) -> tuple[list[_Line], list[str]]:
    """The lines of jobs that are shown, and what is said of the others.

    What runs, waits or failed has room before what is done, of which the newest few are shown.
    """
    if room is None:
        return list(lines), []
    done = [line for line in lines if line.state == DONE]
    others = [line for line in lines if line.state != DONE]
    kept = others[-room.jobs :]
    kept += done[max(0, len(done) - min(room.done, room.jobs - len(kept))) :]
    shown = [line for line in lines if line in kept]
    said = []
    for what, among in (("jobs", others), ("jobs that are done", done)):
        if hidden := sum(line not in shown for line in among):
            said.append(f"... and {hidden} older lines of {what}: --all shows them")
    return shown, said


class _Line(NamedTuple):
    """Jobs in a line of the table: elements of an array that are in the same state share one."""

    job: str
    name: str
    state: str
    node: str
    times: str
    note: str


def _job_lines(jobs: Iterable[Job]) -> list[_Line]:
    groups: dict[tuple[str, str, str, str], list[Job]] = {}
    for job in jobs:
        groups.setdefault((job.array, job.name, job.state, job.reason), []).append(job)
    return [_line(group) for group in groups.values()]


def _line(group: Sequence[Job]) -> _Line:
    first = group[0]
    nodes = {_short(job.node) for job in group}
    said = {job.record.message or "" for job in group if job.record}
    return _Line(
        job=" ".join(spans(job.id for job in group)),
        name=first.name,
        state=_state(first),
        node=nodes.pop() if len(nodes) == 1 else "",
        times=_times(first) if len(group) == 1 else f"{len(group)} jobs",
        note=said.pop() if len(said) == 1 else "",
    )


def _job_table(lines: Iterable[_Line], width: int) -> Table:
    from rich.text import Text

    beside = width >= NARROW
    table = simple_table("job", "name", "job state", "node", "elapsed/limit", *[""] * beside)
    for line in lines:
        style = STYLES.get(line.state.partition(" ")[0], "")
        table.add_row(
            middle(line.job, width // 4),
            middle(line.name, width // 4),
            Text(line.state, style),
            middle(line.node, NODE),
            line.times,
            *[line.note] * beside,
        )
    return table


def _notes(lines: Iterable[_Line]) -> list[Text]:
    """What jobs say of their end, a line each; `why` has all of it."""
    from rich.text import Text

    return [
        Text(f"{line.job}: {line.note}", no_wrap=True, overflow="ellipsis")
        for line in lines
        if line.note
    ]


# Cells


def simple_table(*headers: str) -> Table:
    """A table with these columns and few lines."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for header in headers:
        keep = header in ("trial", "job", "name", "node", "epoch", "best")
        table.add_column(header, no_wrap=keep, overflow="ellipsis" if keep else "fold")
    return table


def _state(job: Job) -> str:
    return f"{job.state} {job.reason if job.active else ''}".rstrip()


def _times(job: Job) -> str:
    return clock(job.elapsed) + (f"/{clock(job.limit)}" if job.limit else "")


def _short(host: str) -> str:
    return host.partition(".")[0]


def middle(text: str, most: int) -> str:
    """A name in so many columns at most, without its middle: beginning and end tell them apart."""
    if len(text) <= most:
        return text
    end = (most - 1) // 2
    return f"{text[: most - 1 - end]}…{text[len(text) - end :]}"


def shown_value(value: float | None) -> str:
    """An objective's value."""
    if value is None:
        return ""
    return f"{value:.4f}" if abs(value) >= 0.001 or value == 0 else f"{value:.2e}"


def _about(seconds: float) -> str:
    for unit, length in (("days", DAY), ("h", 3600.0)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{max(1, round(seconds / 60))} min"
