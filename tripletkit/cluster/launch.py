"""Jobs start here, through submitit: as Slurm jobs, or as background processes of this host."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tripletkit import fsio, notify
from tripletkit.cluster import entry, queue, resources
from tripletkit.config import Slurm
from tripletkit.errors import ClusterError, ConfigError
from tripletkit.log import logger
from tripletkit.paths import LogPaths

if TYPE_CHECKING:
    import submitit
    from submitit.local.local import LocalJob

Call = Callable[[], int]  # small and picklable: a stage and a file, never data or secrets


@dataclass(frozen=True)
class Job:
    """What to start: `count` equal jobs, of which `slurm.max_concurrent` run at once."""

    stage: str
    name: str
    slurm: Slurm
    log_dir: Path
    count: int = 1
    dependency: str | None = None  # as sbatch reads it

    @property
    def logs(self) -> LogPaths:
        """Where its logs go."""
        return LogPaths(self.log_dir)


@dataclass(frozen=True)
class Submission:
    """What was started."""

    jobs: tuple[str, ...]  # "123", array elements "123_4", or "local-<pid>"
    cluster: str
    out: tuple[Path, ...]  # standard output of each job


def submit(job: Job, call: Call, *, cluster: str) -> Submission:
    """Start `job` on `cluster` ("slurm" or "local"), every process with `call`; returns at once.

    What a submission leaves in the log folder is for its user alone, but the jobs run with the
    umask of this process. Raises ConfigError or ClusterError, and leaves nothing behind then.
    """
    assert cluster in ("slurm", "local")
    _check(job)
    folder = _own_folder(job)
    umask = os.umask(0o077)
    try:
        start = _submit_to_slurm if cluster == "slurm" else _start_here
        jobs = start(job, call, folder, f"{umask:04o}")
    finally:
        os.umask(umask)
    return Submission(tuple(jobs), cluster, tuple(job.logs.out(job.stage, each) for each in jobs))


def script(job: Job) -> str:
    """The script that `submit` gives to sbatch; where a job is split, all of them in turn."""
    return "\n".join(scripts(job))


def scripts(job: Job) -> list[str]:
    """The script of each array that `job` becomes. Writes nothing."""
    _check(job)
    texts = []
    for count, at_once in _arrays(job):
        executor = _executor(job, count, at_once)
        if count > 1:
            executor.parameters["map_count"] = count
        texts.append(executor._make_submission_file_text(executor._submitit_command_str, ""))
    return texts


def environment() -> dict[str, str]:
    """What a job sees of our environment: no trace of a job that we may be running in ourselves.

    And nothing that sbatch would let win over the script (see resources.VARIABLES), nor the address
    of a webhook: some sites keep the environment of jobs in their accounting.
    """
    foreign = ["SBATCH_", "SUBMITIT_"]
    if "SLURM_JOB_ID" in os.environ:
        foreign.append("SLURM_")
    return {
        key: value
        for key, value in os.environ.items()
        if key == "SLURM_CONF" or not (key.startswith(tuple(foreign)) or key == notify.VARIABLE)
    }


def _check(job: Job) -> None:
    for what, text in {"global.log_dir": str(job.log_dir), "the job's name": job.name}.items():
        if not text.isprintable():
            raise ConfigError(f"{what} = {text!r} holds a character that cannot be printed")
    if "\\" in job.name:
        raise ConfigError(
            f"the job's name = {job.name!r} holds a \\, which Slurm reads as a quote of what follows",
            hint="rename the folder that it is called after",
        )
    if set("%\\") & set(str(job.log_dir)):
        raise ConfigError(
            f"global.log_dir = {job.log_dir} holds % or \\, which Slurm reads as a pattern",
            hint="choose another folder for logs",
        )


def _own_folder(job: Job) -> Path:
    """The folder for what submitit writes. Whoever could write there could run code as this user."""
    folder = job.logs.submitit
    try:
        job.log_dir.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
    except OSError as error:
        raise ConfigError(
            f"{error.filename}: {error.strerror}",
            hint="set global.log_dir to a folder of yours that all nodes see",
        ) from None
    with contextlib.suppress(OSError):
        if folder.lstat().st_uid == os.geteuid() and not folder.is_symlink():
            folder.chmod(0o700)  # a file system without rights is refused below
    os.close(entry.hold(folder))
    return folder


def _command(folder: Path | str) -> str:
    """The shell command of a job whose call submitit has put into `folder`."""
    return shlex.join([sys.executable, "-u", "-m", entry.__name__, str(folder)])


# Slurm


def _submit_to_slurm(job: Job, call: Call, folder: Path, umask: str) -> list[str]:
    from submitit.core.utils import FailedSubmissionError, UncompletedJobError

    arrays = [(count, _executor(job, count, at_once)) for count, at_once in _arrays(job)]
    jobs: list[str] = []
    variables = {**environment(), "SLURM_UMASK": umask}
    # One submission at a time, so that what a refused one leaves is known for sure.
    with fsio.exclusive_lock(folder / ".lock"), _as_environment(variables):
        before = set(folder.iterdir())
        try:
            for count, executor in arrays:
                with contextlib.redirect_stderr(io.StringIO()):  # submitit repeats sbatch there
                    submitted = executor.submit_array([call] * count)
                jobs += [each.job_id for each in submitted]
        except BaseException as error:
            with contextlib.suppress(ClusterError):  # without their files they end by themselves
                queue.cancel({each.partition("_")[0] for each in jobs})
            _remove_leftovers(set(folder.iterdir()) - before, jobs)
            if isinstance(error, (UncompletedJobError, FailedSubmissionError)):
                words = "; ".join(filter(None, map(str.strip, str(error).splitlines())))
                raise resources.refused(words, job.slurm) from None
            raise
    return jobs


def _executor(job: Job, count: int, at_once: int) -> submitit.SlurmExecutor:
    """What submits `count` elements as one array."""
    import submitit

    class Executor(submitit.SlurmExecutor):
        """submitit's, but that its jobs look whose folder they read from."""

        @property
        def _submitit_command_str(self) -> str:
            return _command(self.folder)

    if not queue.available():
        raise ClusterError(
            "there is no sbatch here", hint="submit from a login node, or use --cluster local"
        )
    values = resources.parameters(job.slurm, job.stage)
    identity = "%A_%a" if count > 1 else "%j"
    values["additional_parameters"] |= {
        "output": str(job.logs.out(job.stage, identity)),
        "error": str(job.logs.err(job.stage, identity)),
    }
    # "all" leads the output of the step through srun into the files above, where it is also said
    # why a step did not start. submitit names files of its own; the last of two flags counts.
    values["srun_args"] += ["--output=all", "--error=all"]
    if job.dependency:
        values["dependency"] = job.dependency
    executor = Executor(job.logs.submitit)
    executor.update_parameters(job_name=job.name, array_parallelism=at_once, **values)
    return executor


def _arrays(job: Job) -> list[tuple[int, int]]:
    """Size and throttle of the arrays that `job` becomes: one, unless Slurm's limit is lower."""
    if job.count == 1:
        return [(1, 1)]
    settings = queue.settings()
    limits = re.findall(r"max_array_tasks=(\d+)", settings.get("SchedulerParameters", ""))
    largest = min(int(limit) for limit in [settings["MaxArraySize"], *limits])
    number = -(-job.count // max(1, largest))
    at_once = job.slurm.max_concurrent or job.count
    if at_once < number:
        logger.warning("%d arrays run at least one element each, not %d", number, at_once)
    sizes, throttles = _shares(job.count, number), _shares(max(at_once, number), number)
    return list(zip(sizes, throttles, strict=True))


def _shares(total: int, parts: int) -> list[int]:
    return [total // parts + (part < total % parts) for part in range(parts)]


def _remove_leftovers(files: set[Path], jobs: list[str]) -> None:
    """Of the files that appeared, those of this submission; other jobs write there meanwhile."""
    arrays = "|".join({each.partition("_")[0] for each in jobs})
    ours = re.compile(rf"[0-9a-f]{{32}}\.pkl|\.submission_file_.*|({arrays})_.*")
    for path in files:
        if ours.fullmatch(path.name):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _as_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """submitit hands the environment of its process to sbatch."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


# Here


def _start_here(job: Job, call: Call, folder: Path, umask: str) -> list[str]:
    from submitit import LocalExecutor
    from submitit.local.local import LocalJob

    class Background(LocalExecutor):
        """A process in a session of its own, which no Ctrl-C and no hang-up of our terminal meets.

        submitit's own controller would stay in our session, end the job after a time limit and
        set CUDA_VISIBLE_DEVICES for it, so it is left out. The job id is that of the process.
        """

        def _submit_command(self, _command_of_submitit: str) -> LocalJob[Any]:
            line = (
                f"umask {umask}; export SUBMITIT_LOCAL_JOB_ID=$$; "
                f'exec {_command(self.folder)} </dev/null >>"$0$$.out" 2>>"$0$$.err"'
            )
            logs = job.logs.out(job.stage, "local-").with_suffix("")
            variables = {**environment(), "SUBMITIT_EXECUTOR": "local", **self.parameters}
            arguments = ["sh", "-c", line, str(logs)]
            pid = os.posix_spawn("/bin/sh", arguments, variables, setsid=True)
            return LocalJob(folder=self.folder, job_id=str(pid))

    # A new folder each time: process ids come again, and an old file must not be taken for ours.
    own = tempfile.mkdtemp(prefix="local-", dir=folder)
    jobs = []
    for index in range(min(job.count, job.slurm.max_concurrent or job.count)):
        executor = Background(own)
        executor.update_parameters(**_devices(index, resources.gpus(job.slurm)))
        jobs.append(f"local-{executor.submit(call).job_id}")
    return jobs


def _devices(index: int, gpus: int) -> dict[str, str]:
    """The GPUs of a background process: all that we see, or its turn where there are several."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        names = [str(i) for i, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]
    else:
        names = [name for name in visible.split(",") if name]
    if not gpus or len(names) <= gpus:
        return {}
    turn = (names[(index * gpus + k) % len(names)] for k in range(gpus))
    return {"CUDA_VISIBLE_DEVICES": ",".join(turn)}
