"""Where a result comes from: configuration, code, data, machine. `provenance.json` of a run.

It holds one entry per start, since a run may go on elsewhere and with other code. It alone has times
in it. What cannot be found out is null; no run fails or waits because of it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from tripletkit import __version__, fsio, repository
from tripletkit import config as configuration
from tripletkit.config import ENV_PREFIX, Config
from tripletkit.log import logger
from tripletkit.paths import RunPaths, run_paths
from tripletkit.repository import BLANK

FORMAT = 1
PACKAGES = ("torch", "numpy", "pyarrow", "optuna", "submitit", "pydantic")
CPU_INFO = Path("/proc/cpuinfo")
DRIVER = Path("/proc/driver/nvidia/version")
# Variables that may change a result, or say which software was there.
VARIABLES = (
    "ATEN_CPU_CAPABILITY", "CONDA_DEFAULT_ENV", "CUBLAS_WORKSPACE_CONFIG", "CUDA_VISIBLE_DEVICES",
    "DNNL_MAX_CPU_ISA", "LOADEDMODULES", "MKL_CBWR", "MKL_NUM_THREADS", "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS", "ONEDNN_MAX_CPU_ISA", "OPENBLAS_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF",
    "VIRTUAL_ENV", "WORLD_SIZE",
)  # fmt: skip
SLURM = {
    "job": "SLURM_JOB_ID", "array_job": "SLURM_ARRAY_JOB_ID", "array_task": "SLURM_ARRAY_TASK_ID",
    "restart": "SLURM_RESTART_COUNT", "partition": "SLURM_JOB_PARTITION",
    "account": "SLURM_JOB_ACCOUNT", "nodes": "SLURM_JOB_NODELIST", "cluster": "SLURM_CLUSTER_NAME",
}  # fmt: skip
_SECRET = re.compile(rf"{repository.SECRETS}|url|dsn|setup", re.IGNORECASE)
_ASSIGNED = re.compile(
    rf"((?:{_SECRET.pattern})[\w.-]{{0,40}}['\"]?\s*[=:]).+", re.IGNORECASE | re.DOTALL
)
_DIFF_NAME = re.compile(r"(?:\.\./)?code_[0-9a-f]+\.diff")


def read(run_folder: Path) -> dict[str, Any] | None:
    """What is known of the run in this folder; None if it is from before there was provenance.

    {"format_version": 1, "data": {NAME: {...}}, "starts": [{...}, ...]}, as documented in
    docs/reference/data-formats.md. Use `newest` for the start that counts.
    """
    path = run_paths(run_folder).provenance
    try:
        found = fsio.parse_json(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read: %s", path, error)
        return None
    if not _is_ours(found):
        logger.warning("%s is not a provenance of ours", path)
        return None
    ours: dict[str, Any] = found
    return ours


def _is_ours(found: Any) -> bool:
    """Whether its readers find the tables that they look into."""
    if not isinstance(found, dict) or not isinstance(starts := found.get("starts"), list):
        return False
    if not all(isinstance(start, dict) for start in starts):
        return False
    times = [start.get(key) for start in starts for key in ("started", "ended")]
    if not all(each is None or _is_time(each) for each in times):
        return False
    data = found.get("data", {})
    parts = [start.get(key, {}) for start in starts for key in ("versions", "trainer", "machine")]
    codes = [start.get("code", {}) for start in starts]
    if not all(isinstance(each, dict) for each in (data, *parts, *codes)):
        return False
    inner = [*data.values(), *(entry for code in codes for entry in code.values())]
    return all(each is None or isinstance(each, dict) for each in inner)


def _is_time(text: Any) -> bool:
    try:
        datetime.fromisoformat(text)
    except (TypeError, ValueError):
        return False
    return True


def newest(found: Mapping[str, Any] | None) -> dict[str, Any]:
    """The last start of what `read` gave; empty if there is none."""
    starts = found["starts"] if found else []
    return starts[-1] if starts else {}


def code_diff(run_folder: Path, code: Mapping[str, Any] | None) -> str | None:
    """The changes that were not committed of one entry of a start's `code`; None without any."""
    name = (code or {}).get("diff")
    if not name or not _DIFF_NAME.fullmatch(name):
        return None
    for path in (run_folder / name, run_folder / Path(name).name):  # a trial may have been copied
        with contextlib.suppress(OSError):
            return path.read_text(errors="replace")
    return None


@contextlib.contextmanager
def recorded(
    paths: RunPaths, config: Config, data: Mapping[str, Any], trainer: Mapping[str, Any]
) -> Iterator[None]:
    """Note a start of the run, and when it ended. Call it while the run's folder is ours.

    `data` maps the names of a checkpoint's fingerprints to facts about them. `trainer` is what it
    says about itself; `device` and `processes` must be in it.
    """
    found: dict[str, Any] = {}
    with _best_effort(paths):
        start = {
            "started": fsio.timestamp(),
            "ended": None,
            "config_digest": fsio.digest([configuration.dump(config)]),
            **now(trainer["device"], trainer["processes"]),
            "code": {name: _kept(paths, state) for name, state in code().items()},
            "trainer": trainer,
        }
        starts = (read(paths.root) or {"starts": []})["starts"]
        found = {"format_version": FORMAT, "data": data, "starts": [*starts, start]}
        _write(paths.provenance, found)
    try:
        yield
    finally:
        if found:
            with _best_effort(paths):
                found["starts"][-1]["ended"] = fsio.timestamp()
                _write(paths.provenance, found)


def _write(path: Path, found: Mapping[str, Any]) -> None:
    """As JSON with a start per line: a run may have many, and indentation takes long to write."""
    starts = ",\n".join(json.dumps(start, sort_keys=True) for start in found["starts"])
    head = json.dumps({"format_version": FORMAT, "data": found["data"]}, sort_keys=True)
    fsio.write_text(path, f'{head[:-1]}, "starts": [\n{starts}\n]}}\n')


@contextlib.contextmanager
def _best_effort(paths: RunPaths) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever it is, the training is worth more
        logger.warning("%s is incomplete: %s: %s", paths.provenance, type(error).__name__, error)


def now(device: str, processes: int = 1) -> dict[str, Any]:
    """This process: software, machine and job. `device` is torch's name of what it computes on."""
    return {
        "command": without_secrets(sys.argv),
        "environment": _environment(os.environ),
        "folder": str(_folder()),
        "host": socket.gethostname(),
        "machine": _machine(device, processes),
        "slurm": _slurm(os.environ),
        "versions": _versions(device),
    }


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """Arguments of a command, without the values of those that may hold a secret."""
    shown: list[str] = []
    blank_next = False
    for argument in arguments:
        if blank_next and not argument.startswith("--"):
            shown.append(BLANK)
        else:
            shown.append(_without_secrets(argument))
        blank_next = (
            argument.startswith("-") and "=" not in argument and bool(_SECRET.search(argument))
        )
    return shown


def _without_secrets(text: str) -> str:
    return _ASSIGNED.sub(rf"\1{BLANK}", repository.hosts_only(text))


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    names = sorted(k for k in environ if k in VARIABLES or k.startswith(ENV_PREFIX))
    return {
        name: BLANK if _SECRET.search(name) else _without_secrets(environ[name]) for name in names
    }


def _slurm(environ: Mapping[str, str]) -> dict[str, str] | None:
    if "SLURM_JOB_ID" not in environ:
        return None
    return {key: environ[variable] for key, variable in SLURM.items() if variable in environ}


def _versions(device: str) -> dict[str, str | None]:
    """What is installed, without importing it."""
    versions: dict[str, str | None] = {"tripletkit": __version__, "python": sys.version.split()[0]}
    versions |= {package: _version(package) for package in PACKAGES}
    if device.startswith("cuda"):
        import torch

        versions["cuda"] = torch.version.cuda
        versions["cudnn"] = str(torch.backends.cudnn.version())
        versions["driver"] = _first(DRIVER, r"Kernel Module\D*([\d.]+)")
    return versions


@functools.cache
def _version(package: str) -> str | None:
    if loaded := getattr(sys.modules.get(package), "__version__", None):
        return str(loaded)  # quicker, and what is used
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def _machine(device: str, processes: int) -> dict[str, Any]:
    gpus = []
    if device.startswith("cuda"):
        import torch

        count = torch.cuda.device_count()
        ours = range(min(processes, count)) if processes > 1 else [torch.device(device).index or 0]
        facts = [torch.cuda.get_device_properties(number) for number in ours]
        gpus = [{"name": each.name, "memory_bytes": each.total_memory} for each in facts]
    return {
        "system": " ".join(os.uname()[i] for i in (0, 2, 4)),
        "cpu": _first(CPU_INFO, r"^model name\s*:\s*(.+)$") or os.uname().machine,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "gpus": gpus,
    }


def _first(file: Path, pattern: str) -> str | None:
    try:
        found = re.search(pattern, file.read_text(), re.MULTILINE)
    except OSError:
        return None
    return found[1].strip() if found else None


def code() -> dict[str, repository.State | dict[str, Any] | None]:
    """The repositories of tripletkit, if it runs from one, and of the working folder, if another."""
    return _code(_folder())


def _folder() -> Path:
    """The working folder; the root if it is no longer there."""
    try:
        return Path.cwd()
    except OSError:
        return Path("/")


def code_keys() -> dict[str, tuple[str | None, str | None]]:
    """Per entry of `code`, what two states must have in common to be the same code."""
    return {
        name: (state.commit, _diff_key(state.diff))
        if isinstance(state, repository.State)
        else code_key(state)
        for name, state in code().items()
    }


def code_key(kept: Mapping[str, Any] | None) -> tuple[str | None, str | None]:
    """The same of an entry that was written down: the commit, and the key of the changes."""
    if kept is None:
        return None, None
    name = Path(kept.get("diff") or "").stem
    return kept.get("commit"), name.removeprefix("code_") or None


def _diff_key(diff: bytes) -> str | None:
    return fsio.digest([diff])[:12] if diff else None


@functools.cache  # once per process: later changes are not those that it has loaded
def _code(folder: Path) -> dict[str, repository.State | dict[str, Any] | None]:
    here = Path(__file__).resolve()
    ours = repository.state(here.parent, holding=here)
    work = repository.state(folder)
    same = ours is not None and work is not None and ours.root == work.root
    return {"tripletkit": ours or _installed_from(), "work": None if same else work}


def _installed_from() -> dict[str, Any] | None:
    """The commit, if pip installed us from a repository; it notes where from."""
    with contextlib.suppress(metadata.PackageNotFoundError, ValueError, KeyError):
        origin = json.loads(metadata.distribution("tripletkit").read_text("direct_url.json") or "")
        return {
            "commit": origin["vcs_info"]["commit_id"],
            "remote": repository.without_credentials(origin["url"]),
        }
    return None


def _kept(
    paths: RunPaths, state: repository.State | dict[str, Any] | None
) -> dict[str, Any] | None:
    """A state as it is written down; its diff becomes a file, one for all that have the same."""
    if not isinstance(state, repository.State):
        return state
    kept = {
        "root": str(state.root),
        "commit": state.commit,
        "branch": state.branch,
        "remote": state.remote,
        "changes": state.changes,
        "untracked": state.untracked,
        "diff": None,
        "diff_cut": state.cut,
    }
    if key := _diff_key(state.diff):
        path = paths.code(key)
        kept["diff"] = os.path.relpath(path, paths.root)
        if not path.exists():
            aside = paths.root / path.name  # whatever a kill leaves is in the folder that is ours
            with fsio.atomic_write(aside) as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(state.diff)
            aside.replace(path)
    return kept
