"""Which jobs were started for an output of `embed`: the same command again starts no useless ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tripletkit import fsio
from tripletkit.cluster import jobs
from tripletkit.errors import ConfigError
from tripletkit.paths import LogPaths

# Of the options, what makes the work of a job another one; and what the user calls it.
SAME = {
    "source": "source",
    "weights": "checkpoint",
    "columns": "--columns",
    "dtype": "--dtype",
    "per_building": "--per-building",
}


def at_work(logs: LogPaths, options: Mapping[str, Any]) -> list[str]:
    """Jobs that were started for this output and run, or wait to.

    Raises ConfigError if they make it with other options.
    """
    try:
        found = fsio.parse_json(_file(logs, options).read_text())
        started, theirs = list(found["jobs"]), dict(found["options"])
    except (OSError, ValueError, LookupError, TypeError):
        return []
    states = jobs.states(logs, started)
    active = [job for job in started if states[job] in ("running", "pending")]
    other = [name for key, name in SAME.items() if theirs.get(key) != options.get(key)]
    if active and other:
        raise ConfigError(
            f"{named(active)} for {options['destination']} already, with another "
            f"{' and another '.join(other)}",
            hint=f"wait for the end, or `tripletkit cancel {active[0].partition('_')[0]}`",
        )
    return active


def note(logs: LogPaths, options: Mapping[str, Any], started: Sequence[str]) -> None:
    """Remember the jobs of this output."""
    fsio.write_json(_file(logs, options), {"jobs": list(started), "options": dict(options)})


def named(active: Sequence[str]) -> str:
    """`job 12 runs or waits`, `jobs 12_0, 12_1 run or wait`."""
    if len(active) == 1:
        return f"job {active[0]} runs or waits"
    return f"jobs {', '.join(active)} run or wait"


def _file(logs: LogPaths, options: Mapping[str, Any]) -> Path:
    return logs.output(fsio.digest([str(options["destination"])]))
