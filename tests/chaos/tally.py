"""What must hold at the end, whatever happened: each check returns what is wrong, in words."""

from __future__ import annotations

import json
import os
import random
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq

from tests import fleet
from tests.chaos.faults import Happened
from tests.chaos.world import Trial, World
from tripletkit import config as configuration
from tripletkit.paths import run_paths
from tripletkit.train import checkpoint

DONE = ("COMPLETE", "PRUNED", "FAIL")


def problems(world: World, happened: Sequence[Happened], seed: int) -> Iterator[str]:
    """Everything that is wrong with a study that has come to its end."""
    yield from the_total(world)
    yield from nothing_lost(world)
    for trial in world.trials:
        yield from failure(world, trial) if trial.state == "FAIL" else epochs(world, trial.number)
    yield from files(world.disk)
    yield from files(world.logs.root)
    yield from words(world, happened)
    yield from no_bug(world)
    yield from exactness(world, seed)


def the_total(world: World) -> Iterator[str]:
    """Each number once, and each finished: as many as were asked for."""
    numbers = [each.number for each in world.trials]
    if numbers != list(range(world.asked)):
        yield f"asked for {world.asked} trials, the study has {numbers}"
    if open_ := [each for each in world.trials if each.state not in DONE]:
        yield f"not finished: {open_}"


def nothing_lost(world: World) -> Iterator[str]:
    """What was seen finished at any time is so at the end, with the same value."""
    at_the_end = {each.number: (each.state, each.value) for each in world.trials}
    for number, seen in world.finished.items():
        if at_the_end.get(number) != seen:
            yield f"trial {number} was {seen} and is {at_the_end.get(number)}"


def failure(world: World, trial: Trial) -> Iterator[str]:
    """No fault is the fault of a trial: none may end it as failed."""
    last = tries(world, trial.number)[-1:]
    why = [f"{each.get('cause')}: {each.get('message')}" for each in last]
    yield f"trial {trial.number} failed: {''.join(why) or 'no attempt is on record'}"


def tries(world: World, number: int) -> list[dict]:
    """The attempts at a trial; none if it failed before it had a folder."""
    paths = world.trial(number)
    return fleet.attempts(paths) if paths.attempts.exists() else []


def epochs(world: World, number: int) -> Iterator[str]:
    """Each epoch once, on file and in the study; the value is the best of them."""
    trial, paths = world.trials[number], world.trial(number)
    records = [json.loads(line) for line in paths.metrics.read_text().splitlines()]
    found = [record["epoch"] for record in records]
    if found != list(range(trial.epoch + 1)):
        yield f"{paths.metrics} has the epochs {found}, the study {trial.epoch}"
    last = configuration.load(paths.config, environ={}).training.num_epochs
    if trial.state == "COMPLETE" and trial.epoch != last:
        yield f"trial {number} is COMPLETE after {trial.epoch} of {last} epochs"
    if trial.state == "COMPLETE" and trial.value != max(record["map@r"] for record in records):
        yield f"trial {number} has the value {trial.value}, its metrics do not"
    sql = (
        "SELECT step, count(*) FROM trial_intermediate_values JOIN trials USING (trial_id) "
        f"WHERE number = {number} GROUP BY step ORDER BY step"
    )
    if (reports := world.server.execute(sql)) != [(epoch, 1) for epoch in found]:
        yield f"trial {number} was reported as {reports}, on file are {found}"
    ends = [each.get("outcome") for each in fleet.attempts(paths)]
    if (count := sum(end in ("complete", "pruned", "failed") for end in ends)) > 1:
        yield f"trial {number} ended {count} times: {ends}"


def files(root: Path) -> Iterator[str]:
    """Nothing torn under a final name, nothing left aside."""
    for path in sorted(root.rglob("*")):
        try:
            match path.suffix:
                case ".pt":
                    checkpoint.load(path)
                case ".json":
                    json.loads(path.read_text())
                case ".jsonl":
                    for line in path.read_text().splitlines():
                        json.loads(line)
                case ".toml":
                    tomllib.loads(path.read_text())
                case ".parquet":
                    pq.read_table(path)
                case ".tmp":
                    yield f"left aside: {path}"
        except Exception as error:  # noqa: BLE001 - whatever a reader raises
            yield f"torn: {path}: {error}"


def words(world: World, happened: Sequence[Happened]) -> Iterator[str]:
    """Every fault left a message about what happened."""
    for each in happened:
        if each.words and not each.said(world):
            logs = ", ".join(path.name for path in each.where) or "any log"
            yield f"no word of {each.fault.kind} ({each.whom}): {each.words!r} is not in {logs}"


def no_bug(world: World) -> Iterator[str]:
    """Whatever ended, ended with a message."""
    for path in world.all_logs():
        text = path.read_text(errors="replace")
        if "Traceback" in text:
            at = text.index("Traceback")
            yield f"{path.name}: {text[max(0, at - 500) : at + 3000]}"


def exactness(world: World, seed: int) -> Iterator[str]:
    """The trial that was interrupted most, and one by lot, trained in one go: the same bytes."""
    complete = [each.number for each in world.trials if each.state == "COMPLETE"]
    if not complete:
        yield "no trial is COMPLETE: none can be trained again"
        return
    count = {n: len(tries(world, n)) for n in complete}
    chosen = {max(count, key=lambda n: count[n]), random.Random(seed).choice(complete)}
    for number in sorted(chosen):
        trial, whole = world.trial(number), world.folder / f"whole_{number}"
        done = world.command(
            "train", "--config", str(trial.config), "--set", f"paths.checkpoint_dir={whole}",
            "--set", "training.resume_from_checkpoint=auto",
        )  # fmt: skip
        if done.returncode != 0:
            yield f"trial {number} cannot be trained again: {done.stdout}{done.stderr}"
            continue
        again, wrong = run_paths(whole), []
        if again.metrics.read_bytes() != trial.metrics.read_bytes():
            wrong += [f"trial {number} after {count[number]} attempts is not what one gives"]
        ours, theirs = checkpoint.load(trial.best), checkpoint.load(again.best)
        for key, tensor in ours["model_state_dict"].items():
            if not tensor.equal(theirs["model_state_dict"][key]):
                wrong += [f"trial {number}: {key} differs from that of one attempt"]
        yield from wrong
        if not wrong:
            world.say(f"trial {number}: {count[number]} attempts, the same bytes as in one go")


def age(world: World) -> None:
    """As if a day had passed: `doctor` leaves alone what may still be being written."""
    for root in (world.disk, world.logs.root):
        for path in root.rglob("*.tmp"):
            os.utime(path, (path.stat().st_atime - 86400, path.stat().st_mtime - 86400))


def printed(world: World, happened: Sequence[Happened]) -> str:
    """The tally."""
    states = Counter(each.state for each in world.trials)
    count = [len(tries(world, each.number)) for each in world.trials]
    kinds = Counter(each.fault.kind for each in happened)
    lost = len(list(nothing_lost(world)))
    lines = [
        f"faults {len(happened)}: " + ", ".join(f"{kind} {n}" for kind, n in sorted(kinds.items())),
        f"trials asked {world.asked} = "
        + " + ".join(f"{state} {states[state]}" for state in DONE)
        + f"; seen finished on the way {len(world.finished)}, of them lost {lost}",
        f"attempts {sum(count)}, of one trial at most {max(count, default=0)}",
        f"tune commands {world.commands}, refused with a message {len(world.refused)}",
    ]
    return "\n".join(lines)
