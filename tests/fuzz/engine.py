"""Runs a target for a while in a process of its own, which may crash: then that is counted."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import logging
import mmap
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.draw import mutated
from tests.fuzz.judge import Surprise, Target, judge

TARGETS = {
    "toml": "configuration",
    "settings": "configuration",
    "limits": "configuration",
    "parquet": "tables",
    "schema": "tables",
    "cache": "caches",
    "checkpoint": "checkpoints",
    "state": "checkpoints",
    "records": "records",
    "slurm": "scheduler",
    "log": "logs",
    "dsn": "addresses",
    "webhook": "addresses",
}
MEMORY = 8 * 2**30  # of a child's address space: what an input claims to be must not be allocated
HANG = 300  # seconds without a new input
MOST = 1 << 20  # bytes of an input
ROOT = Path(__file__).resolve().parents[2]
HEADER = struct.Struct("<QQQQ")  # tried, taken, surprised, length of the input at work


@dataclass
class Tally:
    """What came of a target."""

    engine: str = "plain"
    tried: int = 0
    taken: int = 0
    surprised: int = 0  # inputs, of however few kinds
    seconds: float = 0.0
    crashes: list[str] = field(
        default_factory=list
    )  # of the interpreter, with the file of the input
    surprises: dict[str, str] = field(default_factory=dict)  # place: the file of the input

    def __str__(self) -> str:
        refused = self.tried - self.taken - len(self.crashes) - self.surprised
        bad = f"{len(self.surprises)} surprises, {len(self.crashes)} crashes"
        return (
            f"{self.tried:,} inputs ({self.engine}, {self.seconds:.0f} s): "
            f"{self.taken:,} taken, {refused:,} refused, {bad}"
        )


def find(name: str) -> Target:
    """A target by its name."""
    module = importlib.import_module(f"tests.fuzz.targets.{TARGETS.get(name, name)}")
    target: Target = getattr(module, name.upper())
    return target


def has_atheris() -> bool:
    return importlib.util.find_spec("atheris") is not None


def fuzz(name: str, *, seconds: float, runs: int, seed: int, engine: str, keep: Path) -> Tally:
    """Try inputs until `seconds` are over or `runs` are done (0: no limit), over crashes and all."""
    keep.mkdir(parents=True, exist_ok=True)
    tally = Tally(engine)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz.") as folder:
        journal = Path(folder) / "journal"
        while True:
            left = seconds - (time.monotonic() - began) if seconds else 0
            if (seconds and left < 1) or (runs and tally.tried >= runs):
                break
            journal.write_bytes(bytes(HEADER.size + MOST))
            order = {
                "name": name, "seconds": left, "runs": runs and runs - tally.tried, "engine": engine,
                "seed": seed + len(tally.crashes), "keep": str(keep.absolute()), "journal": str(journal),
                "found": str(Path(folder) / "found"),
            }  # fmt: skip
            code = _child(order, folder, journal)
            tried, taken, surprised, length = HEADER.unpack(journal.read_bytes()[: HEADER.size])
            tally.tried += tried
            tally.taken += taken
            tally.surprised += surprised
            if code == 0:
                break
            data = journal.read_bytes()[HEADER.size :][:length]
            how = signal.Signals(-code).name if code < 0 else f"exit {code}"
            tally.crashes.append(f"{how}: {_keep(keep, f'{name}-crash', data)}")
            if len(tally.crashes) > 50 or tried == 0:
                break
        found = Path(folder) / "found"  # of this run: `keep` holds those of earlier ones too
        for path in found.read_text().splitlines() if found.exists() else []:
            tally.surprises.setdefault(json.loads(Path(path).read_text())["place"], path)
    tally.seconds = time.monotonic() - began
    return tally


def _child(order: dict[str, object], folder: str, journal: Path) -> int:
    """Its exit code; one that hangs is killed."""
    log = Path(folder) / "log"
    with log.open("w") as out:
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.engine", json.dumps(order)], cwd=ROOT,
            stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        last, since = -1, time.monotonic()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = child.wait(2)
                break
            now = HEADER.unpack(journal.read_bytes()[: HEADER.size])[0]
            if now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > HANG:
                child.kill()
    if code:
        print(log.read_text(errors="replace")[-3000:], file=sys.stderr)
    return code


def _keep(keep: Path, name: str, data: bytes) -> Path:
    path = keep / f"{name}-{hashlib.sha256(data).hexdigest()[:12]}.bin"
    path.write_bytes(data)
    return path


# --- in the child ----------------------------------------------------------------------------


def _main(order: dict[str, object]) -> None:
    quiet = Path(os.devnull).open("w")  # noqa: SIM115 - to the end
    logging.raiseExceptions = False
    os.fsync = lambda _: None  # ten times as many inputs
    if os.access("/dev/shm", os.W_OK):
        tempfile.tempdir = "/dev/shm"
    warnings.simplefilter("error")
    if order["engine"] == "atheris":
        import atheris

        with atheris.instrument_imports(include=["tripletkit"]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            target = find(str(order["name"]))
            seeds = target.seeds()
    else:
        target = find(str(order["name"]))
        seeds = target.seeds()
    from tripletkit import log

    log.out.file = log.err.file = quiet
    log.logger.addHandler(logging.NullHandler())
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with Path(str(order["journal"])).open("r+b") as file:
        page = mmap.mmap(file.fileno(), 0)
    keep, name = Path(str(order["keep"])), str(order["name"])
    seen: set[str] = set()
    tried = taken = surprised = 0

    def one(data: bytes) -> None:
        nonlocal tried, taken, surprised
        tried += 1
        data = data[:MOST]
        HEADER.pack_into(page, 0, tried, taken, surprised, len(data))
        page[HEADER.size : HEADER.size + len(data)] = data
        try:
            taken += judge(target, data) == "taken"
        except Surprise as surprise:
            surprised += 1
            if surprise.place not in seen:
                seen.add(surprise.place)
                path = _keep(keep, name, data)
                told = "".join(traceback.format_exception(surprise.__cause__ or surprise))
                facts = {"place": surprise.place, "what": str(surprise), "traceback": told[-6000:]}
                path.with_suffix(".json").write_text(json.dumps(facts, indent=1))
                with Path(str(order["found"])).open("a") as found:
                    found.write(f"{path.with_suffix('.json')}\n")
        HEADER.pack_into(page, 0, tried, taken, surprised, 0)

    runs = int(str(order["runs"]))
    for data in seeds[: runs // 2 or None]:
        one(data)
    if order["engine"] == "atheris":
        _atheris(order, seeds, target, one)
    else:
        for data in _plain(order, seeds, target):
            one(data)


def _plain(order: dict[str, object], seeds: list[bytes], target: Target) -> Iterator[bytes]:
    source = random.Random(int(str(order["seed"])))
    seconds, runs = float(str(order["seconds"])), int(str(order["runs"]))
    began, count = time.monotonic(), len(seeds[: runs // 2 or None])
    while not (seconds and time.monotonic() - began > seconds) and not (runs and count >= runs):
        count += 1
        data = (
            source.choice(seeds)
            if seeds and source.random() < 0.7
            else source.randbytes(source.randrange(200))
        )
        yield mutated(data, source, target.words)


def _atheris(order: dict[str, object], seeds: list[bytes], target: Target, one: object) -> None:
    import atheris

    folder = Path(tempfile.mkdtemp(prefix="fuzz.corpus."))
    for number, data in enumerate(seeds):
        (folder / f"seed{number}").write_bytes(data)
    words = folder.with_suffix(".words")
    if target.words:
        words.write_text(
            "".join('"' + "".join(f"\\x{b:02x}" for b in w) + '"\n' for w in target.words)
        )
    flags = [
        f"-max_total_time={int(float(str(order['seconds'])))}", f"-runs={order['runs'] or -1}",
        f"-seed={int(str(order['seed'])) + 1}", "-rss_limit_mb=0", "-timeout=600", "-max_len=65536",
        *([f"-dict={words}"] if target.words else []), "-handle_segv=0", "-handle_bus=0", "-handle_abrt=0", "-verbosity=0",
    ]  # fmt: skip
    atheris.Setup(["fuzz", *flags, str(folder)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
