"""What two runs have in common and what not: result, configuration, data, code, machine.

Everything comes from the folders of the runs, also of those from before there was provenance.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from tripletkit import provenance, repository
from tripletkit.config import Config
from tripletkit.errors import ConfigError, DataError
from tripletkit.log import logger
from tripletkit.paths import RunPaths, StudyPaths, TrialPaths, run_paths
from tripletkit.repository import BLANK
from tripletkit.tune import attempts

Pairs = dict[str, tuple[Any, Any]]  # name -> what a and b have, where they differ

SHAPING = ("global.seed", "training_model.", "training.")  # keys that a result depends on
PLACES = re.compile(
    r"paths\..*|global\..*_dir|.*\.(log_file|wandb_run_name|output_dir|storage_path)"
)
SECRET = re.compile(r".*\.(setup|webhook\w*)")  # they may hold one, by mistake
DATA = ("training embeddings", "difficulty bands", "validation embeddings")
CODE = {"tripletkit": "tripletkit's own code", "work": "the working folder's code"}


@dataclass(frozen=True)
class Run:
    """What the folder of a run holds."""

    paths: RunPaths
    settings: Mapping[str, Any]
    """Every key of the configuration, as `section.key`, defaults included."""
    records: list[dict[str, Any]]
    """The lines of metrics.jsonl."""
    state: Mapping[str, Any]
    """The newest checkpoint; empty without one."""
    provenance: dict[str, Any] | None

    @property
    def start(self) -> dict[str, Any]:
        """The newest start; empty if there is no provenance."""
        return provenance.newest(self.provenance)

    @property
    def data(self) -> dict[str, dict[str, Any]]:
        """Facts about the data, by their names in a checkpoint; at least the fingerprint."""
        if self.provenance is not None:
            found: dict[str, dict[str, Any]] = self.provenance.get("data", {})
            return found
        return {k: {"fingerprint": v} for k, v in self.state.get("data", {}).items() if v}


def open_run(folder: Path) -> Run:
    """Read a run's folder. Raises ConfigError if it is none, DataError if its files are broken."""
    from tripletkit.train import checkpoint as checkpoints
    from tripletkit.train.trackers import read_metrics

    if StudyPaths(folder).identity.exists():
        raise ConfigError(f"{folder} is a study", hint="name one of its trials, by its folder")
    paths = run_paths(folder.absolute())
    saved = paths.saved()
    if not (paths.config.exists() or saved):
        raise ConfigError(
            f"{folder} is not the folder of a run: it holds neither {paths.config.name} nor "
            "checkpoints"
        )
    found = checkpoints.newest(saved)
    return Run(
        paths=paths,
        settings=_settings(paths.config) if paths.config.exists() else {},
        records=read_metrics(paths.metrics),
        state=found[1] if found else {},
        provenance=provenance.read(paths.root),
    )


def compare(a: Run, b: Run) -> dict[str, Any]:
    """All differences as plain values, for `report` or as JSON."""
    differing = _differing(a.settings, b.settings)
    kinds: dict[str, Pairs] = {"settings": {}, "other": {}, "paths": {}}
    for key, pair in differing.items():
        kinds[_kind(key)][key] = (BLANK, BLANK) if SECRET.fullmatch(key) else pair
    return {
        "a": str(a.paths.root),
        "b": str(b.paths.root),
        "result": {
            "a": outcome(a),
            "b": outcome(b),
            "history": history(a, b),
            "weights": weights(a, b),
        },
        "configuration": kinds,
        "data": _data(a, b),
        "code": _code(a, b),
        "machine": _machine(a, b),
    }


def is_identical(found: Mapping[str, Any]) -> bool:
    """Whether every epoch, and every weight of every checkpoint that both have, is the same."""
    result = found["result"]
    pairs = result["weights"].values()
    return (
        result["history"]["same"] == "all"
        and bool(pairs)
        and all(each["identical"] for each in pairs)
    )


# --- result ----------------------------------------------------------------------------------


def outcome(run: Run) -> dict[str, Any]:
    """How far a run got, how long it took, and its metrics: raw, at its best, in the end."""
    from tripletkit.train.evaluation import better

    monitor = run.settings.get("training.monitor", "val_loss")
    best: dict[str, Any] = {}
    for record in (each for each in run.records if monitor in each):
        if better(monitor, record[monitor], best.get(monitor)):
            best = record
    validated = [record for record in run.records if "val_loss" in record]
    last = validated[-1] if validated else {}
    progress = run.state.get("progress", {})
    return {
        "status": _status(run),
        "epochs": progress.get("epoch", run.records[-1]["epoch"] if run.records else 0),
        "seconds": _seconds(run),
        "monitor": monitor,
        "raw": run.records[0].get("raw", {}) if run.records else {},
        "best": _metrics(best),
        "last": _metrics(last),
    }


def _status(run: Run) -> str:
    if run.state.get("finished"):
        early = run.state.get("progress", {}).get("early_stopped")
        return "finished early" if early else "finished"
    tried = attempts.read(TrialPaths(run.paths.root, run.paths.root).attempts)
    ended = tried[-1].get("outcome") if tried else None
    return "unfinished" if ended in (None, "stopped") else str(ended)


def _seconds(run: Run) -> float | None:
    """Of all starts; None if one of them was killed, or nobody took the time."""
    starts = run.provenance["starts"] if run.provenance else []
    if not starts or any(each.get("ended") is None for each in starts):
        return None
    return sum(
        (datetime.fromisoformat(s["ended"]) - datetime.fromisoformat(s["started"])).total_seconds()
        for s in starts
    )


def _metrics(record: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in record.items() if k not in ("raw", "bands", "step", "queries")}


def history(a: Run, b: Run) -> dict[str, Any]:
    """How far metrics.jsonl is the same, line by line.

    `same` is "all", "common" when one just goes on longer, or "none" or "some"; `epochs` how many
    lines behind epoch 0 are the same.
    """
    common = 0
    for one, other in zip(a.records, b.records, strict=False):
        if one != other:
            break
        common += 1
    same: Literal["all", "common", "some", "none"] = "some" if common else "none"
    if common and common == len(a.records) == len(b.records):
        same = "all"
    elif common and common == min(len(a.records), len(b.records)):
        same = "common"
    return {"same": same, "epochs": max(0, common - 1)}


def weights(a: Run, b: Run) -> dict[str, dict[str, Any]]:
    """Per checkpoint that both have at the same step: whether the heads are bit for bit the same."""
    from tripletkit.train import checkpoint as checkpoints

    found: dict[str, dict[str, Any]] = {}
    for mine in a.paths.saved():
        theirs = b.paths.checkpoints / mine.name
        if not theirs.exists():
            continue
        try:
            one, other = checkpoints.load(mine), checkpoints.load(theirs)
        except DataError as error:
            logger.warning("%s", error.message)
            continue
        if one.get("global_step") == other.get("global_step"):
            found[mine.name] = _apart(one["model_state_dict"], other["model_state_dict"])
    return found


def _apart(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    shapes = [{name: value.shape for name, value in each.items()} for each in (one, other)]
    if shapes[0] != shapes[1]:
        return {"identical": False, "largest": None, "scale": None}
    same = all(
        value.dtype == other[name].dtype
        and value.contiguous().numpy().tobytes() == other[name].contiguous().numpy().tobytes()
        for name, value in one.items()
    )
    return {
        "identical": same,
        "largest": max((float((v - other[k]).abs().max()) for k, v in one.items()), default=0.0),
        "scale": max((float(v.abs().max()) for v in one.values()), default=0.0),
    }


# --- configuration ---------------------------------------------------------------------------


def _settings(path: Path) -> dict[str, Any]:
    """Keys of other versions are kept as they are, and those that are missing have our default."""
    try:
        raw = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid TOML: {error}") from None
    sections = Config().model_dump(mode="json", by_alias=True)
    for name, table in raw.items():
        sections[name] = {**sections.get(name, {}), **table}
    return dict(_flat(sections))


def _flat(sections: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, table in sections.items():
        for key, value in table.items():
            if key == "space":
                yield from ((f"{name}.space.{k}", v) for k, v in value.items())
            else:
                yield f"{name}.{key}", value


def _kind(key: str) -> str:
    if PLACES.fullmatch(key):
        return "paths"
    return "settings" if key.startswith(SHAPING) else "other"


def _differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> Pairs:
    return {
        key: (a.get(key), b.get(key)) for key in dict.fromkeys([*a, *b]) if a.get(key) != b.get(key)
    }


# --- data, code, machine ---------------------------------------------------------------------


def _data(a: Run, b: Run) -> dict[str, dict[str, Any]]:
    """Per kind of data: `same`, which is None if one of the runs does not say, and the facts."""
    found: dict[str, dict[str, Any]] = {}
    for name in DATA:
        one, other = a.data.get(name), b.data.get(name)
        if one is None and other is None:
            continue
        same: bool | None = None
        if a.data and b.data:
            same = (one or {}).get("fingerprint") == (other or {}).get("fingerprint")
        found[name] = {"same": same, "a": one, "b": other}
    return found


def _code(a: Run, b: Run) -> dict[str, Any]:
    """Versions, commits, and the changes that were not committed; `known`: both runs say."""
    if not (a.start and b.start):
        return {"known": False, "versions": {}, "repositories": {}}
    repositories = {}
    for name in CODE:
        one, other = (run.start.get("code", {}).get(name) for run in (a, b))
        if one is None and other is None:
            continue
        diffs = [provenance.code_diff(r.paths.root, c) for r, c in ((a, one), (b, other))]
        patch = repository.diff_of_diffs(diffs[0] or "", diffs[1] or "")
        lost = [
            bool((each or {}).get("diff")) and diff is None
            for each, diff in zip((one, other), diffs, strict=True)
        ]
        repositories[name] = {
            "same": provenance.code_key(one) == provenance.code_key(other),
            "a": one,
            "b": other,
            "patch": patch,
            "lost": any(lost),
        }
    versions = _differing(a.start.get("versions", {}), b.start.get("versions", {}))
    return {"known": True, "versions": versions, "repositories": repositories}


def _machine(a: Run, b: Run) -> Pairs:
    return _differing(_surroundings(a.start), _surroundings(b.start))


def _surroundings(start: Mapping[str, Any]) -> dict[str, Any]:
    machine = dict(start.get("machine") or {})
    if "gpus" in machine:
        machine["gpus"] = [gpu["name"] for gpu in machine["gpus"]]
    trainer = {k: v for k, v in (start.get("trainer") or {}).items() if not k.startswith("from_")}
    facts = {"host": start.get("host"), **machine, **trainer}
    facts |= {f"slurm {key}": value for key, value in (start.get("slurm") or {}).items()}
    return facts | (start.get("environment") or {})
