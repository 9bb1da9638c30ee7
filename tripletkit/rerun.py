"""Training again what was trained before: the same configuration, data and threads, a new folder."""

from __future__ import annotations

import itertools
import json
import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tripletkit import compare, differences, fsio, inputs, log, provenance, submission
from tripletkit import config as configuration
from tripletkit.config import Config
from tripletkit.errors import DONE, ConfigError, DataError
from tripletkit.log import logger
from tripletkit.paths import run_paths
from tripletkit.submission import Cluster

# Of a job these are as the user has them today, where that says something; how much it needs is as
# the run had it, and may shape the result.
SITE = {
    "global_": ("log_dir",),
    "slurm": ("account", "partition", "qos", "constraint", "setup", "mail"),
}
SOFTWARE = ("tripletkit", "torch", "numpy", "cuda", "cudnn")


def rerun(
    run: compare.Run,
    overrides: Sequence[str] = (),
    *,
    today: Config | None = None,
    into: Path | None = None,
    cluster: Cluster = "here",
    anyway: bool = False,
    dry_run: bool = False,
) -> int:
    """Train again what is in a run's folder and, if that is done here, say how alike the two are.

    `today` is the user's configuration of today, if there is one; see SITE. `into` is a folder that
    is not there yet, or a rerun of the same run, which goes on. Raises DataError when data is gone,
    or is not what it was and not `anyway`.
    """
    from tripletkit.device import choose_device

    root = run.paths.root
    if not run.paths.config.exists():
        raise ConfigError(f"{root} holds no {run.paths.config.name}: nothing says how it trained")
    then = configuration.load(run.paths.config, overrides, environ={})
    then = _as_today(then, today, overrides)
    folder = into.absolute() if into is not None else _free_folder(root)
    if into is not None and folder.exists() and not _repeats(folder, root):
        raise ConfigError(
            f"{folder} exists, and is no rerun of {root}", hint="name another folder with --into"
        )
    config = _config(then, folder)
    inputs.check_files(config)
    _check_data(run, config, anyway=anyway)
    # Another machine will be what it is.
    device = str(choose_device(config.training.device)) if cluster == "here" else None
    for warning in _warnings(run, device):
        logger.warning("%s", warning)
    if cluster == "here":
        _take_threads(run)
    if not dry_run:
        fsio.check_writable(folder, "name another folder with --into")
        fsio.write_json(run_paths(folder).rerun_of, {"run": str(root)})
    log.out.print(f"rerun of {root}: {folder}", soft_wrap=True)
    code = submission.start("train", config, {}, cluster, dry_run=dry_run)
    diff = shlex.join(["tripletkit", "diff", str(root), str(folder)])
    if code != DONE or dry_run:
        return code
    if cluster != "here":
        log.out.print(f"when it is done: {diff}", soft_wrap=True)
        return DONE
    found = compare.compare(run, compare.open_run(folder))
    for line in differences.result_lines(found):
        log.out.print(line, soft_wrap=True)
    if not compare.is_identical(found):
        log.out.print(f"{diff} shows more", soft_wrap=True)
    return DONE


def _free_folder(root: Path) -> Path:
    """RUN-rerun, RUN-rerun-2, ...: the first that is not there, or that is a rerun to go on with."""
    for number in itertools.count(1):
        folder = root.with_name(f"{root.name}-rerun" + (f"-{number}" if number > 1 else ""))
        if not folder.exists():
            return folder
        if _repeats(folder, root) and not run_paths(folder).final.exists():
            return folder
    raise AssertionError


def _repeats(folder: Path, root: Path) -> bool:
    try:
        told = fsio.parse_json(run_paths(folder).rerun_of.read_text())
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and told.get("run") == str(root)


def _config(then: Config, folder: Path) -> Config:
    """The same run in another folder, and under another name."""
    wanted = then.training.resume_from_checkpoint
    return configuration.with_values(
        then,
        paths={"checkpoint_dir": folder},
        training={"resume_from_checkpoint": "auto" if wanted == "none" else wanted},
        logging={"log_file": None, "wandb_run_name": folder.name},
    )


def _as_today(then: Config, today: Config | None, overrides: Sequence[str]) -> Config:
    if today is None:
        return then
    given = {text.partition("=")[0].strip() for text in overrides}
    values: dict[str, dict[str, Any]] = {}
    for section, keys in SITE.items():
        ours = getattr(today, section)
        now = {key: getattr(ours, key) for key in keys if key in ours.model_fields_set}
        name = section.rstrip("_")
        values[section] = {k: v for k, v in now.items() if v and f"{name}.{k}" not in given}
    return configuration.with_values(then, **values)


def _check_data(run: compare.Run, config: Config, *, anyway: bool) -> None:
    """Compare fingerprints, without building caches: a rerun may train elsewhere."""
    if not run.data:
        logger.warning("nothing in %s says which data it trained on", run.paths.root)
        return
    differing = []
    for name, key in _keys(config).items():
        facts = run.data.get(name)
        if facts is None:
            differing.append(f"{name} (it had none)")
        elif key == facts.get("content", facts["fingerprint"]):
            continue
        elif "content" not in facts and _sampled(config, name):
            logger.warning("%s: a sample, which nothing on file compares with", name)
        else:
            differing.append(name)
    if not differing:
        return
    what = f"not the data of {run.paths.root}; these differ: {', '.join(differing)}"
    if not anyway:
        raise DataError(
            what,
            hint="--set paths.KEY=FILE names where the same data is now; --anyway trains with this",
        )
    logger.warning("%s", what)


def _keys(config: Config) -> dict[str, str]:
    """The fingerprints of what the configuration names, as it is now."""
    from tripletkit.data import bands, parquet, store

    keys = {}
    train = store.content_key(parquet.find_files(inputs.parquet_path(config, "train")))
    keys["training embeddings"] = train
    if config.paths.val_parquet_path is not None:
        files = parquet.find_files(config.paths.val_parquet_path)
        keys["validation embeddings"] = store.content_key(files)
    if config.paths.difficulty_metadata_path is not None:
        files = parquet.find_files(config.paths.difficulty_metadata_path)
        keys["difficulty bands"] = bands.content_key(files, train)
    return keys


def _sampled(config: Config, name: str) -> bool:
    """Whether the fingerprint on file is that of a sample."""
    if name == "difficulty bands":
        return False
    prefix = "val_" if name.startswith("validation") else ""
    fraction = getattr(config.training, f"{prefix}sample_fraction")
    buildings = getattr(config.training, f"{prefix}sample_buildings")
    return bool(fraction < 1 or buildings > 0)


def _warnings(run: compare.Run, device: str | None) -> Iterator[str]:
    """What may keep the rerun from being identical; of the machine only if it is to be `device`."""
    then = run.start
    if not then:
        yield f"{run.paths.root} is from before there was provenance: code and machine may differ"
        return
    starts = run.provenance["starts"] if run.provenance else []
    for what, key in _PARTS.items():
        if len({json.dumps(key(start), sort_keys=True) for start in starts}) > 1:
            yield f"the run had {len(starts)} starts, not all with the same {what}"
    yield from _code_warnings(then.get("code", {}))
    now = provenance.now(device or "cpu")
    versions = then.get("versions", {})
    for name in SOFTWARE:
        if name in versions and versions[name] != now["versions"].get(name, versions[name]):
            yield f"{name} is {now['versions'][name]}, was {versions[name]}"
    if device is None:
        return
    before = then.get("trainer", {}).get("device", device)
    if device.partition(":")[0] != before.partition(":")[0]:
        yield f"it computes on {device}, the run did on {before}"
        return
    name = "cpu" if device == "cpu" else "gpus"
    there, here = (each.get("machine", {}).get(name) for each in (then, now))
    if name == "gpus":  # the run may have had several; of ours we know one
        there, here = (each[0]["name"] if each else None for each in (there, here))
    if there != here:
        yield f"it computes on {here}, the run did on {there}"


def _machine_of(start: Mapping[str, Any]) -> Any:
    trainer = {k: v for k, v in start.get("trainer", {}).items() if not k.startswith("from_")}
    return trainer, {k: start.get("machine", {}).get(k) for k in ("cpu", "gpus")}


def _code_of(start: Mapping[str, Any]) -> Any:
    return {name: provenance.code_key(each) for name, each in start.get("code", {}).items()}


# Of a start, what should be the same in all starts of a run that is to be repeated in one.
_PARTS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "configuration": lambda start: start.get("config_digest"),
    "code": _code_of,
    "machine": _machine_of,
}


def _code_warnings(then: Mapping[str, Any]) -> Iterator[str]:
    for name, state in provenance.code_keys().items():
        before = provenance.code_key(then.get(name))
        if state != before:
            yield f"{compare.CODE[name]} is {_state(state)}, was {_state(before)}"


def _state(key: tuple[str | None, str | None]) -> str:
    commit, changes = key
    if commit is None:
        return "in no commit"
    return f"commit {commit[:12]}" + (f" with changes {changes}" if changes else "")


def _take_threads(run: compare.Run) -> None:
    """As many threads as then: they decide in which order sums are rounded."""
    import torch

    trainer = run.start.get("trainer", {})
    threads = trainer.get("threads")
    if not isinstance(threads, int) or threads < 1:
        return
    before = torch.get_num_threads()
    # Several processes share what the variable says among them.
    os.environ["OMP_NUM_THREADS"] = str(threads * trainer.get("processes", 1))
    torch.set_num_threads(threads)
    if before != threads:
        logger.info("threads: %d, as the run had, instead of %d", threads, before)
