"""The options of sbatch for a job of one stage, as its configuration asks for them.

python sbatch_options.py STAGE CONFIG

Checks what `tripletkit` checks before it submits; prints the options, a NUL behind each.
"""

import sys
from pathlib import Path

from tripletkit import boundary, config, stages
from tripletkit.cluster import preflight, queue, resources
from tripletkit.cluster.launch import Job
from tripletkit.config import Config
from tripletkit.errors import ClusterError
from tripletkit.paths import LogPaths

# What a job asks for; of the small job behind the workers its sbatch file says it.
WHERE = ("account", "partition", "qos", "constraint", "wckey")
HOW_MUCH = ("time", "mem", "cpus_per_task")
MAIL = ("mail_user", "mail_type")


def options(stage: str, loaded: Config) -> list[str]:
    """The options for `stage`: an array of the study's workers, or one job."""
    slurm, logs = loaded.slurm, LogPaths(loaded.global_.log_dir)
    count = resources.workers(loaded, loaded.tuning.total) if stage == "tune" else 1
    job = Job(stage, stages.job_name(stage, loaded, {}), slurm, logs.root, count)
    asked = resources.parameters(slurm, stage)
    identity = "%A_%a" if stage == "tune" else "%j"
    found = [
        f"--job-name={job.name}",
        f"--output={logs.out(stage, identity)}",
        f"--error={logs.err(stage, identity)}",
        *_flags(asked, WHERE),
        *_flags(asked, MAIL),
    ]
    if stage == "tidy":
        return found
    if stage == "tune":  # `tune --prepare` has looked ahead
        at_once = f"%{slurm.max_concurrent}" if slurm.max_concurrent else ""
        found.append(f"--array=0-{_checked(count) - 1}{at_once}")
    else:
        preflight.check(job)
    gres = slurm.gres or (f"gpu:{slurm.gpus}" if slurm.gpus else "none")
    delay = resources.signal_delay(resources.seconds(slurm.time))
    if slurm.setup:
        sys.stderr.write("note: slurm.setup is not for sbatch files; their profile does that\n")
    return [*found, *_flags(asked, HOW_MUCH), f"--gres={gres}", f"--signal=B:USR1@{delay}"]


def _flags(asked: dict[str, object], keys: tuple[str, ...]) -> list[str]:
    return [f"--{key.replace('_', '-')}={asked[key]}" for key in keys if key in asked]


def _checked(count: int) -> int:
    largest = int(queue.settings()["MaxArraySize"])
    if count > largest:
        raise ClusterError(
            f"{count} workers are more than the {largest} elements of an array on this cluster",
            hint="`tripletkit tune` with the same flags splits them into several arrays",
        )
    return count


def main() -> None:
    """Print the options; errors become a message and an exit code."""
    stage, file = sys.argv[1:]

    def show() -> None:
        loaded = config.load(Path(file), environ={})
        loaded.global_.log_dir.mkdir(parents=True, exist_ok=True)
        sys.stdout.write("".join(f"{option}\0" for option in options(stage, loaded)))

    boundary.prepare_process()
    sys.exit(boundary.run(show).exit_code)


main()
