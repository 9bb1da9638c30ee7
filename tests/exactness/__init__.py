"""Commands that are killed at random moments and started again, compared with untouched ones.

`python -m tests.exactness` does it with every command, as often as you like, and prints a tally.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests import fleet, toy
from tripletkit import cli
from tripletkit import config as configuration
from tripletkit.apply import outputs, projection
from tripletkit.data import bands, neighbors, parquet, split
from tripletkit.errors import DataError, Interrupted
from tripletkit.train import checkpoint as checkpoints
from tripletkit.tune import storage

# A server that has all loaded and forks: a process starts in milliseconds.
fork = multiprocessing.get_context("forkserver")
fork.set_forkserver_preload(["tests.exactness", "torch._dynamo", "onnxruntime", "plotly"])

# Times, process numbers, random names: what is right to differ.
APART = (
    "train.log", "provenance.json", "attempts.jsonl", "study.json", "study.db*", "logs", ".*.lock",
    ".lock", "study.db.turn", "evaluation.json", "evaluation.md", "report.html", "said", "moments",
)  # fmt: skip


class Moments:
    """Counts the calls and returns of the main thread, C functions too; may kill at the n-th."""

    def __init__(self, die_at: int | None, by: signal.Signals = signal.SIGKILL) -> None:
        self.die_at = die_at
        self.by = by
        self.count = 0

    def __call__(self, frame, event, argument) -> None:
        self.count += 1
        if self.count == self.die_at:
            os.kill(os.getpid(), self.by)


@dataclass(frozen=True)
class World:
    """What the commands read: data, bands, a study of two trials, a trained run."""

    root: Path
    config: Path

    @staticmethod
    def make(root: Path) -> World:
        toy.write_parquet(root / "test.parquet", buildings=30, dim=32, first=2000, noise=1.0)
        config = fleet.write_config(
            root,
            paths={
                "test_parquet_path": root / "test.parquet",
                "cache_dir": root / "cache",
                "difficulty_metadata_path": root / "bands.parquet",
                "checkpoint_dir": root / "run",
            },
            training={
                "num_epochs": 3, "checkpoint_every_minutes": 1e-9, "ucb_warmup_samples": 50,
                "batch_size": 32, "save_every_n_epochs": 2,
            },
            tuning={"n_trials": 2, "max_epochs": 2, "sampler": "random", "workers": 1},
        )  # fmt: skip
        for name, first in (("train", 0), ("val", 1000)):  # less of it: many processes read it
            toy.write_parquet(
                root / f"{name}.parquet", buildings=40, first=first, dim=32, noise=1.0
            )
        for number in range(3):
            place = root / "files" / f"{number}.parquet"
            toy.write_parquet(place, buildings=40, dim=32, first=100 * number, noise=1.0)
        world = World(root, config)
        for words in (["data", "bands"], ["train"], ["tune", "--cluster", "here"]):
            assert attempt([*words, "-c", str(config)], root).code == 0, (root / "said").read_text()
        return world


@dataclass(frozen=True)
class Command:
    """A command line in which WORLD and HERE are folders; all that it writes is in HERE."""

    words: str
    output: str = ""  # one that must not exist yet: with it the command is done
    prepare: Callable[[World, Path], None] = lambda world, here: None
    facts: Callable[[Path], object] = lambda here: None  # beside the files, what must be equal


def bring_the_study(world: World, here: Path) -> None:
    """For a command that reads one; its folder is known to it by its old name."""
    for path in world.root.glob("study.db*"):
        shutil.copy(path, here)


def trials(here: Path) -> object:
    """What a study has found."""
    config = configuration.load(here / "trials" / "small" / "config.toml", environ={})
    study = storage.open_study(config.tuning, seed=0, workers=1).study
    return [
        (t.number, t.state.name, t.params, t.values, t.intermediate_values)
        for t in study.get_trials(deepcopy=False)
    ]


def evaluation(here: Path) -> object:
    """All of it but its date, and the words for people."""
    found = json.loads((here / "out" / "evaluation.json").read_text())
    found.pop("created")
    return found


def page(here: Path) -> object:
    """All of it but its date."""
    return re.sub(r"\d{4}-\d\d-\d\dT[\d:]{8}Z", "", (here / "report.html").read_text())


IN = "-c WORLD/config.toml --set global.scratch_dir=HERE --set global.log_dir=HERE/logs"
HEAD = "--checkpoint WORLD/run/checkpoint_best.pt"
COMMANDS = {
    "train": Command(f"train {IN} --set paths.checkpoint_dir=HERE/run"),
    "train-host": Command(
        f"train {IN} --set paths.checkpoint_dir=HERE/run --set training.placement=host"
    ),
    "tune": Command(
        f"tune {IN} --cluster here --set tuning.output_dir=HERE/trials "
        "--set tuning.storage_path=HERE/study.db --set tuning.n_trials=4",
        facts=trials,
    ),
    "tune-tpe": Command(
        f"tune {IN} --cluster here --set tuning.output_dir=HERE/trials --set tuning.sampler=tpe "
        "--set tuning.storage_path=HERE/study.db --set tuning.n_trials=13 --max-epochs 1",
        facts=trials,
    ),
    "submit-best": Command(
        f"submit-best {IN} --cluster here --set tuning.storage_path=HERE/study.db "
        "--set paths.checkpoint_dir=HERE/final",
        prepare=bring_the_study,
    ),
    "embed": Command(f"embed WORLD/files HERE/out {IN} {HEAD}"),
    "embed --per-building": Command(f"embed WORLD/files HERE/out.parquet {IN} {HEAD} --per-building"),
    "data bands": Command(
        f"data bands {IN} --set paths.difficulty_metadata_path=HERE/bands.parquet",
        output="bands.parquet",
    ),
    "data check": Command(f"data check {IN} --set paths.cache_dir=HERE/cache"),
    "data split": Command("data split WORLD/files HERE/out", output="out/test.parquet"),
    "export": Command(f"export HERE/out {IN} {HEAD}", output="out"),
    "evaluate": Command(f"evaluate {IN} {HEAD} --output HERE/out --json", facts=evaluation),
    "report": Command(f"report WORLD/run {IN} -o HERE/report.html", facts=page),
}  # fmt: skip


@dataclass(frozen=True)
class End:
    """How an attempt ended."""

    code: int  # negative: the signal
    moments: int


def attempt(
    words: list[str],
    here: Path,
    die_at: int | None = None,
    by: signal.Signals = signal.SIGKILL,
) -> End:
    """Run a command in a process of its own; what it said is in HERE/said."""
    (here / "moments").unlink(missing_ok=True)
    process = fork.Process(target=_attempt, args=(words, here, die_at, by))
    process.start()
    process.join()
    assert process.exitcode is not None
    counted = here / "moments"
    return End(process.exitcode, int(counted.read_text()) if counted.exists() else 0)


def _attempt(words: list[str], here: Path, die_at: int | None, by: signal.Signals) -> None:
    torch.set_num_threads(1)
    _take_small_steps()
    os.environ["COLUMNS"] = "100"
    said = os.open(here / "said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    moments = Moments(die_at, by)
    sys.setprofile(moments)
    code = cli.run(lambda: cli.app(words, prog_name="tripletkit", standalone_mode=False))
    sys.setprofile(None)
    (here / "moments").write_text(str(moments.count))
    sys.exit(code)


def _take_small_steps() -> None:
    """So that there are many moments in the middle of a file."""
    parquet.BATCH_BYTES = 4 * 32 * 50
    parquet.BATCH_ROWS = split.BATCH_BYTES = 50
    bands.READ_ROWS = bands.GATHER_ROWS = 60
    neighbors.TILES = {"cpu": (64, 64)}
    projection.BLOCK_BYTES = 4 * 32 * 16
    projection.SEGMENT_BYTES = 4 * 32 * 32
    outputs.GROUP_BYTES = 50 * 70


@dataclass
class Tally:
    """What came of the rounds of a command."""

    rounds: int = 0
    kills: Counter = field(default_factory=Counter)
    differences: list[str] = field(default_factory=list)


def rounds(
    name: str,
    world: World,
    place: Path,
    *,
    count: int,
    seed: int = 0,
    kills: int = 5,
    until: float = math.inf,
) -> Tally:
    """Compare `count` runs, each killed up to `kills` times, with one that nobody touched.

    None begins after `until`, of the monotonic clock.
    """
    command, here = COMMANDS[name], place / "here"
    words = [
        word.replace("WORLD", str(world.root)).replace("HERE", str(here))
        for word in command.words.split()
    ]
    here.mkdir(parents=True)
    command.prepare(world, here)
    end = attempt(words, here)
    assert end.code == 0, (here / "said").read_text()
    whole, facts, moments = everything(here), command.facts(here), end.moments
    shutil.move(here, place / "whole")  # the same place for all: a configuration names it
    random_, tally = random.Random(f"{name} {seed}"), Tally()
    for _ in range(count):
        if time.monotonic() > until:
            break
        here.mkdir()
        command.prepare(world, here)
        died = []
        for _ in range(random_.randint(1, kills)):
            by = random_.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
            moment = random_.randint(1, moments)
            code = attempt(words, here, moment, by).code
            died.append((by.name, moment, code))
            if code in (-by, Interrupted.exit_code):
                tally.kills[by.name] += 1
            if code == 0 or _refused(command, here, code):
                break
            assert code in (-by, Interrupted.exit_code), (died, (here / "said").read_text())
        code = attempt(words, here).code
        assert code == 0 or _refused(command, here, code), (died, (here / "said").read_text())
        tally.rounds += 1
        found = everything(here)
        for path in sorted(whole.keys() | found.keys()):
            if whole.get(path) != found.get(path):
                how = _apart(whole.get(path), found.get(path))
                tally.differences.append(f"{name}, killed {died}: {path} differs: {how}")
        if command.facts(here) != facts:
            tally.differences.append(f"{name}, killed {died}: {facts} != {command.facts(here)}")
        if tally.differences:  # to look at
            shutil.copytree(here, place / "torn", dirs_exist_ok=True)
            return tally
        shutil.rmtree(here)
    return tally


def _apart(one: object, other: object) -> str:
    """Where two files begin to differ."""
    if not isinstance(one, bytes) or not isinstance(other, bytes):
        return "only one is there" if one is None or other is None else "not the same tensors"
    first = next((i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), -1)
    near = slice(max(0, first - 60), first + 60)
    return f"at byte {first} of {len(one)} and {len(other)}: {one[near]!r} and {other[near]!r}"


def _refused(command: Command, here: Path, code: int) -> bool:
    """Whether the command had done it all before it was killed, and will not do it twice."""
    return (
        code in (2, DataError.exit_code)
        and bool(command.output)
        and (here / command.output).exists()
    )


def flat(value, name: str = "") -> dict:
    """Nested dicts and lists as one dict; tensors as type, shape and bytes."""
    if isinstance(value, torch.Tensor):
        return {name: (value.dtype, value.shape, value.numpy().tobytes())}
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, item in items for k, v in flat(item, f"{name}.{key}").items()}
    return {name: value}


def everything(here: Path) -> dict[str, object]:
    """Every file, temporary ones too, by its path; without those that are right to differ.

    Their bytes; of checkpoints all that is in them, bit for bit, since a pickle tells whether two
    equal values are one object.
    """
    return {
        str(path.relative_to(here)): flat(checkpoints.load(path))
        if path.suffix == ".pt"
        else path.read_bytes()
        for path in sorted(here.rglob("*"))
        if path.is_file()
        and not any(
            part.match(pattern)
            for part in [*path.relative_to(here).parents, path.relative_to(here)]
            for pattern in APART
            if part.name
        )
    }
