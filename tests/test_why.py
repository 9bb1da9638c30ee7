"""Why a trial or a job is as it is: real jobs that end in every way, and recorded facts.

The jobs of one real cluster end or wait while this module is set up; then they are asked about.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from typer.testing import CliRunner

from tests.cluster import Cluster, wait
from tripletkit import config as configuration
from tripletkit import fsio
from tripletkit.cli import diagnosis as command
from tripletkit.cluster import jobs, queue
from tripletkit.cluster.queue import PastJob, QueuedJob
from tripletkit.config import Config
from tripletkit.monitor import diagnosis as rules
from tripletkit.monitor import remedies, site
from tripletkit.monitor.diagnosis import Diagnosis, diagnose
from tripletkit.monitor.doctor import examine
from tripletkit.monitor.facts import JobFacts, Line, TrialFacts
from tripletkit.monitor.inventory import Inventory
from tripletkit.monitor.why import Why, why_jobs, why_trial
from tripletkit.paths import LogPaths, StudyPaths
from tripletkit.tune import attempts, claims, storage, study
from tripletkit.tune.claims import Worker

# A worker, as far as others can see: it keeps its record, says something, and lives.
WORKER = """
import sys, time
from pathlib import Path
from tripletkit.cluster import jobs
from tripletkit.paths import LogPaths
record = jobs.new_record(jobs.current_job(), "tune", "tune:s", "config.toml")
with jobs.recorded(LogPaths(Path(sys.argv[1])), record):
    print(f"job {record.job} on {record.host}: tune:s", file=sys.stderr, flush=True)
    time.sleep(600)
"""
HUNGRY = "memory = bytearray(300 * 2**20)\nfor i in range(0, len(memory), 4096): memory[i] = 1\n"
LONG = "exec sleep 600"


class Site(NamedTuple):
    """The jobs by what happens to them, and the study whose trials some of them work on."""

    config: Config
    paths: StudyPaths
    jobs: dict[str, str]

    @property
    def inventory(self) -> Inventory:
        return Inventory(self.config)

    def job(self, name: str, element: str = "") -> Why:
        job = self.jobs[name] + element
        return why_jobs(self.inventory, [job])[job]

    def trial(self, name: str) -> Why:
        return why_trial(self.inventory, TRIALS.index(name))


# Those that work on a trial, in the order of the trials.
TRIALS = ["killed", "preempted", "node_failure", "requeued", "running", "timeout", "cancelled"]


@pytest.fixture(scope="module")
def there(cluster: Cluster, tmp_path_factory) -> Iterator[Site]:
    """Everything that can happen to a job, on one cluster and at about the same time."""
    folder = tmp_path_factory.mktemp("site")
    config = configuration.with_values(
        Config(),
        global_={"log_dir": folder / "logs", "scratch_dir": folder},
        paths={
            "train_parquet_path": folder / "none.parquet",
            "val_parquet_path": folder / "none.parquet",
        },
        tuning={
            "study_name": "s", "storage_path": folder / "study.db", "n_trials": 8,
            "output_dir": folder / "trials", "objective": "map@r", "max_epochs": 4,
        },
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name in os.environ.keys() - cluster.environment.keys():
            patch.delenv(name)
        patch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
        paths = StudyPaths(config.tuning.output_dir / "s")
        shared = study.prepare(config, paths)
        yield Site(config, paths, happen(cluster, config, folder, shared, paths))
        cluster.reset()


def happen(cluster: Cluster, config: Config, folder: Path, shared, paths) -> dict[str, str]:
    logs = LogPaths(config.global_.log_dir)
    logs.root.mkdir()
    fsio.write_text(folder / "good.toml", configuration.dump(config))
    (folder / "bad.toml").write_text("[training]\nbatch_size = 0\n")
    (folder / "worker.py").write_text(WORKER)
    (folder / "hungry.py").write_text(HUNGRY + "import time\ntime.sleep(60)\n")
    python, harness = f"exec {sys.executable}", f"exec {sys.executable} -m tripletkit.worker"

    def sbatch(command: str, *options: str, node: str | None = None) -> str:
        where = f"--nodelist={node}" if node else "--exclude=n1,n4"
        name = "%A_%a" if any("--array" in option for option in options) else "%j"
        files = [f"--output={logs.root}/tune_{name}.out", f"--error={logs.root}/tune_{name}.err"]
        return cluster.sbatch(command, *files, "--job-name=tune:s", where, *options)

    there = {
        "killed": sbatch(f"{python} {folder}/worker.py {logs.root}"),
        "running": sbatch(f"{python} {folder}/worker.py {logs.root}"),
        "data_error": sbatch(f"{harness} train --config {folder}/good.toml"),
        "bad_configuration": sbatch(f"{harness} train --config {folder}/bad.toml"),
        "out_of_memory": sbatch(f"{python} {folder}/hungry.py", "--mem=100M"),
        "timeout": sbatch(LONG),
        "cancelled": sbatch(LONG),
        "silent": sbatch(f"echo begun; {LONG}"),
        "requeued": sbatch(LONG),
        "preempted": sbatch(LONG, "--partition=low", "--exclusive", node="n1"),
        "node_failure": sbatch(LONG, node="n4"),
        "killed_in_a_shell": sbatch("sh -c 'kill -9 $$'"),
        "signal": sbatch("kill -USR2 $$"),
        "no_python": sbatch("exec /no/such/python -m tripletkit.worker"),
        "no_module": sbatch(f"{python} -m tripletkit_is_not_here"),
        "no_log_folder": sbatch("true", "--output=/no/such/folder/%j.out", "--error=/no/such/%j.err"),
        "done": sbatch("true"),
        "begin": sbatch("true", "--begin=now+1hour"),
        "held": sbatch("true", "--hold"),
        "cancelled_while_it_waited": sbatch("true", "--hold"),
        "array": sbatch(LONG, "--array=0-1%1"),
    }  # fmt: skip
    cluster.wait_state(there["timeout"], {"RUNNING"})
    # The controller looks at time limits every half a minute.
    cluster.run("scontrol", "update", f"jobid={there['timeout']}", "EndTime=now+1")
    for name in {*TRIALS, "silent"} - {"timeout"}:
        cluster.wait_state(there[name], {"RUNNING"})
    for number, name in enumerate(TRIALS):
        found = claims.claim(
            shared, Worker(there[name], 0, "here", 1), 99, lambda ids: dict.fromkeys(ids, "running")
        )
        assert found.trial.number == number
        found.trial.report(0.5, 2)
        attempts.begin(paths.trial(number).attempts, found.owner, from_epoch=1)
        paths.trial(number).lock.touch()

    cluster.kill_node("n4")
    # Somebody notices before the controller does, which takes it half a minute.
    cluster.run("scontrol", "update", "NodeName=n4", "State=DOWN", "Reason=dead")
    records = [logs.record(there[name]) for name in ("killed", "running")]
    wait(lambda: all(jobs.read(record) for record in records), lambda: "no records", 60)
    os.kill(jobs.read(records[0]).pid, signal.SIGKILL)
    cluster.run("scontrol", "requeuehold", there["requeued"])
    cluster.run("scancel", there["cancelled"], there["cancelled_while_it_waited"])
    cluster.sbatch(LONG, "--partition=high", "--exclusive", "--nodelist=n1")
    there["never"] = sbatch("true", f"--dependency=afternotok:{there['done']}")
    there["large"] = sbatch("true", "--nodes=3", "--exclusive", "--exclude=n4")
    there["after"] = sbatch("true", f"--dependency=afterany:{there['running']}")
    # An old log, of the start before, does not make a job suspect.
    for path in logs.of_job(there["silent"]):
        os.utime(path, (time.time() - 7200,) * 2)

    ended = there.keys() - {
        "running", "silent", "begin", "held", "array", "large", "never", "after",
    }  # fmt: skip

    def missing() -> set[str]:
        past = queue.past(there[name] for name in ended)
        known = {run.id for run in past if run.end}
        return {name for name in ended if there[name] not in known}

    wait(lambda: not missing(), lambda: f"accounting has no end of {missing()}", 90)
    return there


# Jobs that ended


@pytest.mark.parametrize(
    ("name", "kind", "words", "who_says_so", "what_to_do"),
    [
        ("killed", "killed", "was killed (signal 9) on n", "sacct: FAILED, exit code 0:9", "--mem"),
        ("killed_in_a_shell", "killed", "was killed (signal 9)", "sacct: FAILED", "--mem"),
        ("signal", "timeout", "died of SIGUSR2", "sacct: FAILED, exit code 0:12", "--time"),
        ("data_error", "data_error", "none.parquet", "exit code 3", "tripletkit data check"),
        ("bad_configuration", "bad_configuration", "configuration", "batch_size", "config.toml"),
        ("out_of_memory", "host_oom", "ran out of memory", "xceeded", "--mem 512M"),
        ("timeout", "timeout", "its time limit", "sacct: TIMEOUT", "--time 00:02:00"),
        ("cancelled", "cancelled", "was cancelled", "sacct: CANCELLED", "the same command"),
        ("cancelled_while_it_waited", "cancelled", "while it waited", "sacct: CANCELLED", "same"),
        ("no_python", "no_start", "could not start", "/no/such/python: not found", "slurm.setup"),
        ("no_module", "no_start", "could not start", "No module named", "slurm.setup"),
        ("no_log_folder", "no_start", "log could not be created", "0:53", "global.log_dir"),
        ("done", "complete", "is done", "sacct: COMPLETED", "nothing to do"),
    ],
)
def test_a_job_that_ended(there, name, kind, words, who_says_so, what_to_do):
    found = there.job(name).diagnosis
    assert (found.kind, found.summary.split()[:2]) == (kind, ["job", there.jobs[name]])
    assert words in found.summary
    assert any(who_says_so in line for line in found.evidence), found.evidence
    assert what_to_do in found.remedy


def test_a_log_is_quoted_with_its_line(there):
    found = there.job("no_module").diagnosis
    log = f"{there.config.global_.log_dir}/tune_{there.jobs['no_module']}.err"
    assert found.evidence[0].startswith(f"{log}, line 1: ")
    assert found.evidence[0].endswith("No module named tripletkit_is_not_here")


# Jobs that wait or run


@pytest.mark.parametrize(
    ("name", "element", "reason", "words", "what_to_do"),
    [
        ("begin", "", "BeginTime", "held back", "wait"),
        ("held", "", "JobHeldUser", "held back by its user", "scontrol release {job}"),
        ("array", "_1", "JobArrayTaskLimit", "--max-concurrent", "ArrayTaskThrottle=N JobId={job}"),
        ("never", "", "DependencyNeverSatisfied", "never start", "tripletkit cancel {job}"),
        ("after", "", "Dependency", "after another job", "wait"),
        ("large", "", "Resources", "as soon as enough is free", "ask for less"),
    ],
)
def test_a_job_that_waits(there, name, element, reason, words, what_to_do):
    found = there.job(name, element).diagnosis
    assert found.kind == "pending"
    assert words in found.summary
    assert found.evidence[0] == f"squeue: PENDING, {reason}"
    assert what_to_do.format(job=there.jobs[name]) in found.remedy


def test_a_job_that_runs(there):
    found = there.job("running").diagnosis
    assert found.kind == "running"
    assert found.remedy == "nothing to do"
    assert "runs on n" in found.summary


def test_a_job_that_runs_but_says_nothing(there, monkeypatch):
    assert there.job("silent").diagnosis.kind == "running"  # not for long yet
    monkeypatch.setattr(rules, "SILENT", 3)
    found = there.job("silent").diagnosis
    assert found.kind == "silent"
    assert "its log is silent for" in found.summary
    assert found.evidence[-1].endswith("line 1: begun")
    assert f"scontrol requeue {there.jobs['silent']}" in found.remedy


# Trials


def test_a_trial_whose_job_was_killed(there):
    found, history = there.trial("killed")
    assert found.kind == "killed"
    assert found.summary.startswith("trial 0, after epoch 2 of 4, has lost its worker: job ")
    assert found.evidence[:2] == (
        "the study: trial 0 is RUNNING", "the study: map@r 0.5000 at epoch 2",
    )  # fmt: skip
    assert "tripletkit doctor --fix" in found.remedy
    (attempt,) = history
    assert (attempt.attempt, attempt.from_epoch) == (1, 1)
    assert attempt.node in ("n2", "n3")
    assert attempt.how == "killed (FAILED, exit code 0:9)"
    assert attempt.started <= attempt.ended <= fsio.timestamp()


@pytest.mark.parametrize(
    ("name", "state", "words"),
    [
        ("preempted", "PREEMPTED", "had to make room for a job of higher priority"),
        ("node_failure", "NODE_FAIL", "lost its node n4"),
        ("requeued", "REQUEUED", "sent back to the queue by hand"),
    ],
)
def test_a_trial_whose_job_comes_back(there, name, state, words):
    found, (attempt,) = there.trial(name)
    assert found.kind == name
    assert words in found.summary
    assert "now it waits in the queue" in found.summary
    assert "and then goes on with it" in found.summary
    assert any(f"sacct: {state}" in line for line in found.evidence)
    assert attempt.how == f"killed ({state})"
    assert "nothing is lost but the time since the last checkpoint" in found.remedy
    assert "doctor" not in found.remedy


@pytest.mark.parametrize(("name", "state"), [("timeout", "TIMEOUT"), ("cancelled", "CANCELLED")])
def test_a_trial_whose_job_does_not_come_back(there, name, state):
    found, (attempt,) = there.trial(name)
    assert found.kind == name
    assert "has lost its worker" in found.summary
    assert "`tripletkit doctor --fix`" in found.remedy
    assert attempt.how == f"killed ({state})"


def test_a_trial_that_runs(there):
    found, (attempt,) = there.trial("running")
    assert found.kind == "running"
    assert found.summary.startswith("trial 4, after epoch 2 of 4: its job ")
    assert (attempt.ended, attempt.how) == ("", "")


def test_a_node_that_failed_is_named_in_the_remedy(there):
    assert "ExcNodeList=n4" in there.trial("node_failure").diagnosis.remedy


def test_a_trial_of_an_unreachable_study_is_known_from_its_folder(there):
    away = configuration.with_values(
        there.config, tuning={"storage_path": there.config.global_.log_dir / "none.db"}
    )
    inventory = there.inventory
    inventory.config = away
    found, (attempt,) = why_trial(inventory, 0)
    assert found.kind == "storage_lost"
    assert "there is no study" in found.summary
    assert "attempts.jsonl, line 1" in found.evidence[0]
    assert attempt.job == there.jobs["killed"]


# The commands on that cluster


def run(there: Site, *arguments: str):
    app = typer.Typer()
    command.add_to(app)
    file = there.config.global_.log_dir / "given.toml"
    fsio.write_text(file, configuration.dump(there.config))
    done = CliRunner().invoke(app, [*arguments, "--config", str(file)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout


def test_the_command_takes_trials_and_jobs(there):
    code, printed = run(there, "why", "trial:0")
    assert code == 0
    assert printed.startswith("trial 0, after epoch 2 of 4, has lost its worker")
    assert "[killed]" in printed
    assert "\nwhat to do: " in printed
    assert "\nattempt 1: job " in printed
    _, printed = run(there, "why", f"job:{there.jobs['timeout']}", "--json")
    (answer,) = json.loads(printed).values()
    assert answer["kind"] == "timeout"
    _, printed = run(there, "why", f"job:{there.jobs['array']}")
    assert [line.split(":")[0] for line in printed.splitlines()] == ["running", "pending"]


def test_doctor_hands_back_what_is_lost_and_shows_the_cluster(there):
    """The last of the tests with this study, which it changes."""
    shared = storage.open_study(there.config.tuning, seed=0, workers=1)
    lost = [TRIALS.index(name) for name in ("killed", "timeout", "cancelled")]
    before = shared.study.get_trials()
    code, printed = run(there, "doctor")
    for number in lost:
        assert f"wrong: trial {number} is RUNNING, but its job" in printed
    assert code == 1
    _, printed = run(there, "doctor", "--fix")
    for number in lost:
        assert f"repaired: trial {number} is RUNNING" in printed
    for was, now in zip(before, shared.study.get_trials(), strict=True):
        assert now.state.name == ("WAITING" if was.number in lost else "RUNNING")
        assert (now.user_attrs, now.intermediate_values) == (
            was.user_attrs,
            was.intermediate_values,
        )

    assert f"wrong: job {there.jobs['never']} of the study cannot start" in printed
    assert f"tripletkit cancel {there.jobs['never']}" in printed
    assert "no worker runs" not in printed  # some wait
    assert "PreemptType = preempt/partition_prio" in printed
    assert "KillWait = 5 sec" in printed
    assert "MaxArraySize = 41" in printed
    assert "cred_expire=10" in printed
    assert "sacct is on" in printed
    assert (
        "lowgrace = MaxTime=1-00:00:00, DefaultTime=00:10:00, PreemptMode=REQUEUE, GraceTime=30"
        in printed
    )
    assert "main (default) = MaxTime=1-00:00:00, DefaultTime=00:10:00: its jobs run" in printed


def test_without_an_answer_of_slurm_nothing_is_handed_back(there, monkeypatch, tmp_path):
    (tmp_path / "slurm.conf").touch()
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    found = list(examine(there.inventory))
    assert "queue" in {each.kind for each in found}
    assert not {"lost", "no_worker"} & {each.kind for each in found}
    code, _ = run(there, "doctor", "--fix")
    assert code == 1


# Facts that were recorded elsewhere, or made


RAN = PastJob(
    id="7_3", state="FAILED", exit_code="1:0", node="n2", elapsed="00:31:05", limit="03:00:00",
    submit="2026-01-01T10:00:00", start="2026-01-01T10:01:00", end="2026-01-01T10:32:05",
    max_rss=None, req_mem="32G", reason="", name="tune:s",
)  # fmt: skip
RECORD = jobs.Record(
    job="7_3", stage="tune", name="tune:s", host="n2", pid=1, restart=0, config="c.toml",
    started="2026-01-01T10:01:01Z",
)  # fmt: skip
TRIAL = TrialFacts(
    number=3, state="RUNNING", objective="recall@100", folder="trials/s/trial_00003", epochs=15,
    reports={1: 0.5, 2: 0.75}, owner={"job": "7_3"},
)  # fmt: skip
ATTEMPT = {"attempt": 1, "job": "7_3", "restart": 0, "host": "n2", "from_epoch": 0}


def ended(**facts) -> JobFacts:
    return JobFacts(id="7_3", state="gone")._replace(**facts)


def lines(*texts: str) -> tuple[Line, ...]:
    return tuple(Line("tune_7_3.err", n, text) for n, text in enumerate(texts, 1))


def of_job(**facts) -> Diagnosis:
    return diagnose(None, ended(**facts))


def test_host_oom_under_control_groups_from_a_recorded_row_of_sacct():
    """Where the kernel kills, Slurm has a state for it; the test cluster has no control groups."""
    run = RAN._replace(state="OUT_OF_MEMORY", exit_code="0:125", max_rss=33_285_996 * 1024)
    found = of_job(runs=(run,))
    assert found.kind == "host_oom"
    assert "ran out of memory: it used 31.7G of 32G" in found.summary
    assert "--mem 64G" in found.remedy


@pytest.mark.parametrize(
    "text",
    [
        "slurmstepd: error: Detected 1 oom_kill event in StepId=7.0. Some of the step tasks have been",
        "slurmstepd: error: Detected 1 oom-kill event(s) in step 7.0 cgroup. Some of your processes",
        "numpy.core._exceptions._ArrayMemoryError: Unable to allocate 74.5 GiB for an array",
    ],
)
def test_host_oom_from_recorded_lines_of_logs(text):
    found = of_job(runs=(RAN._replace(exit_code="137:0"),), log=lines("loading", text, "bye"))
    assert found.kind == "host_oom"
    assert found.evidence[0] == f"tune_7_3.err, line 2: {text}"


@pytest.mark.parametrize(
    ("used", "kind"), [(31 * 2**30, "host_oom"), (9 * 2**30, "killed"), (None, "killed")]
)
def test_killed_near_the_memory_it_asked_for_is_out_of_memory(used, kind):
    found = of_job(runs=(RAN._replace(exit_code="137:0", max_rss=used),), record=RECORD)
    assert found.kind == kind
    assert "--mem" in found.remedy


@pytest.mark.parametrize(
    ("asked", "used", "more"),
    [
        ("2000M", 2000 * 2**20, "4G"),
        ("32G", None, "64G"),
        ("60G", 60 * 2**30, "128G"),
        ("100G", 100 * 2**30, "224G"),
        ("4Gn", 3 * 2**30, "8G"),
    ],
)
def test_the_memory_to_ask_for_next(asked, used, more):
    run = RAN._replace(state="OUT_OF_MEMORY", req_mem=asked, max_rss=used)
    assert f"--mem {more};" in of_job(runs=(run,)).remedy


def test_gpu_memory_is_told_from_host_memory():
    text = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    found = of_job(runs=(RAN,), log=lines(text))
    assert found.kind == "cuda_oom"
    cause = {"kind": "cuda_oom", "message": "CUDA out of memory."}
    trial = TRIAL._replace(state="FAIL", cause=cause, batch_size=4096)
    found = diagnose(trial, None)
    assert found.kind == "cuda_oom"
    assert "--set training.batch_size=2048" in found.remedy
    assert "--set training.placement=host" in found.remedy
    tuned = diagnose(trial._replace(params={"batch_size": 4096}), None)
    assert "--set tuning.space.batch_size.high=2048" in tuned.remedy


@pytest.mark.parametrize(
    ("code", "message", "kind"),
    [
        (1, "this is a bug in tripletkit 0.1", "bug"),
        (1, "3 trials in a row failed", "failed"),
        (2, "training.batch_size", "bad_configuration"),
        (3, "train.parquet: truncated", "data_error"),
        (5, "study.db has been away for 600 s", "storage_lost"),
        (130, "study s has trials left", "stopped"),
    ],
)
def test_what_the_job_says_of_itself(code, message, kind):
    record = jobs.Record(**{**RECORD.__dict__, "ended": "x", "exit_code": code, "message": message})
    found = of_job(
        runs=(RAN._replace(exit_code=f"{code}:0"),), record=record, record_file="7_3.json"
    )
    assert found.kind == kind
    assert message in found.summary
    assert found.evidence[0] == f"7_3.json: exit code {code}, {message!r}"


@pytest.mark.parametrize(
    ("elapsed", "log", "kind"),
    [
        ("02:58:30", (), "timeout"),
        ("00:31:05", (), "preempted"),
        ("02:31:05", ("2100 s to the time limit: too few for another trial",), "timeout"),
    ],
)
def test_a_job_that_asked_to_go_on_in_a_new_start(elapsed, log, kind):
    record = jobs.Record(**{**RECORD.__dict__, "ended": "x", "exit_code": 85})
    run = RAN._replace(state="REQUEUED", elapsed=elapsed)
    waiting = QueuedJob("7_3", "PENDING", "0:00", "3:00:00", "", "", "BeginTime", "tune:s")
    found = of_job(state="pending", queued=waiting, runs=(run,), record=record, log=lines(*log))
    assert found.kind == kind
    assert "held back for a while" in found.summary


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("DUE TO TIME LIMIT ***", "timeout"),
        ("DUE TO PREEMPTION ***", "preempted"),
        ("DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS ***", "node_failure"),
        ("***", "cancelled"),
    ],
)
def test_without_accounting_the_last_words_of_slurm_tell(words, kind):
    text = f"slurmstepd: error: *** JOB 7 ON n2 CANCELLED AT 2026-01-01T10:32:05 {words}"
    found = of_job(record=RECORD, log=lines("epoch 3", text))
    assert found.kind == kind
    assert text in found.evidence[0]


def test_a_job_that_could_not_start_again_is_not_judged_by_its_record_of_before():
    record = jobs.Record(**{**RECORD.__dict__, "ended": "x", "exit_code": 85})
    first, second = RAN._replace(state="REQUEUED"), RAN._replace(exit_code="1:0")
    log = lines("No module named 'tripletkit'")
    found = of_job(runs=(first, second), record=record, log=log)
    assert found.kind == "no_start"


def test_a_process_of_a_host_that_ended_without_a_word():
    record = jobs.Record(**{**RECORD.__dict__, "job": "local-17", "host": "big"})
    found = diagnose(None, JobFacts("local-17", "gone", record=record, record_file="r"))
    assert found.kind == "killed"
    assert "on big" in found.summary
    assert "dmesg" in found.remedy


def test_a_trial_with_nan_names_its_learning_rate():
    cause = {"kind": "nan", "message": "the training loss became nan in epoch 1"}
    trial = TRIAL._replace(state="FAIL", cause=cause, params={"learning_rate": 0.03})
    found = diagnose(trial, None)
    assert (found.kind, "epoch 1" in found.summary) == ("nan", True)
    assert json.dumps(cause) in found.evidence[0]
    assert "learning_rate was 0.03" in found.remedy


def test_a_trial_killed_again_and_again_is_explained_by_its_last_job():
    cause = {"kind": "killed", "message": "killed 3 times without finishing an epoch"}
    trial = TRIAL._replace(state="FAIL", cause=cause, attempts=[ATTEMPT])
    run = RAN._replace(state="OUT_OF_MEMORY", max_rss=2**35)
    found = diagnose(trial, ended(runs=(run,)))
    assert found.kind == "host_oom"
    assert "killed 3 times" in found.summary
    assert "--mem 64G" in found.remedy
    assert diagnose(trial, ended(runs=(RAN._replace(exit_code="9:0"),))).kind == "killed"


def test_a_trial_may_be_killed_again_and_again_while_its_job_goes_on():
    """It was one process of several."""
    cause = {"kind": "killed", "message": "killed 3 times without getting further"}
    trial = TRIAL._replace(state="FAIL", cause=cause, attempts=[ATTEMPT])
    found = diagnose(trial, ended(state="running"))
    assert found.kind == "killed"
    assert found.summary == "trial 3 failed: killed 3 times without getting further"
    assert "--mem" in found.remedy


def test_of_several_trials_on_a_gpu_fewer_need_less_of_its_memory():
    cause = {"kind": "cuda_oom", "message": "CUDA out of memory"}
    trial = TRIAL._replace(state="FAIL", cause=cause, batch_size=256)
    assert "--trials-per-gpu" not in diagnose(trial, None).remedy
    assert diagnose(trial._replace(per_gpu=4), None).remedy.startswith(
        "--trials-per-gpu 3, or --set"
    )


def test_a_trial_that_waits_says_what_its_last_worker_met():
    record = jobs.Record(**{**RECORD.__dict__, "ended": "x", "exit_code": 5, "message": "db: away"})
    attempt = {**ATTEMPT, "outcome": "stopped", "message": "db: away"}
    trial = TRIAL._replace(state="WAITING", attempts=[attempt], workers=3)
    found = diagnose(trial, ended(record=record))
    assert found.kind == "storage_lost"
    assert "trial 3 waits for a worker, after epoch 2 of 15" in found.summary
    on = diagnose(trial, ended(state="running"))
    assert on.kind == "stopped"
    assert "left it: db: away" in on.summary
    assert "one of the 3 workers" in on.remedy
    assert "none has worked on it" in diagnose(trial._replace(attempts=()), None).summary


def test_a_trial_that_nobody_signed():
    found = diagnose(TRIAL._replace(owner=None), None)
    assert found.kind == "lost"
    assert "doctor --fix" in found.remedy


def test_a_complete_trial_needs_nothing():
    found = diagnose(TRIAL._replace(state="COMPLETE", value=0.75, attempts=[ATTEMPT] * 2), None)
    assert found.summary == "trial 3 is complete in 2 attempts: recall@100 0.7500"
    assert found.remedy == "nothing to do"


@pytest.mark.parametrize("pruner", ["median", "successive_halving"])
def test_a_pruned_trial_shows_the_values_that_decided(tmp_path, pruner):
    config = configuration.with_values(
        Config(),
        global_={"log_dir": tmp_path},
        tuning={"storage_path": tmp_path / "s.db", "pruner": pruner, "max_epochs": 9},
    )
    shared = storage.create(config.tuning)
    for value in (0.5, 0.6, 0.7, 0.8, 0.9):
        trial = shared.study.ask()
        trial.report(value, 1)
        trial.report(value, 3)
        trial.should_prune()
        shared.study.tell(trial, value)
    bad = shared.study.ask()
    bad.report(0.1, 1)
    if pruner == "median":
        bad.report(0.2, 3)
    assert bad.should_prune()
    shared.study.tell(bad, state=storage.optuna.trial.TrialState.PRUNED)
    found, _ = why_trial(Inventory(config), 5)
    assert found.kind == "pruned"
    assert {
        "median": "best value, 0.2000, is below 0.7000, the median at epoch 3 of the 5 trials",
        "successive_halving": "0.1000 at epoch 1 is not in the best third of the 6 trials",
    }[pruner] in found.summary


@pytest.mark.parametrize(
    "reason",
    [
        "Priority", "Resources", "QOSMaxJobsPerUserLimit", "QOSMaxGRESPerUser", "AssocGrpGRES",
        "AssocGrpCpuLimit", "AssocGrpCPUMinutesLimit", "AssocMaxJobsLimit", "QOSGrpNodeLimit",
        "ReqNodeNotAvail, UnavailableNodes:n1", "Nodes required for job are DOWN, DRAINED or reserved",
        "launch failed requeued held", "PartitionTimeLimit", "BadConstraints", "Reservation",
        "QOSMaxWallDurationPerJobLimit", "InvalidAccount", "Licenses", "job requeued in held state",
    ],
)  # fmt: skip
def test_reasons_of_squeue_are_explained(reason):
    words, what_to_do = remedies.waits(reason)
    assert "Slurm says" not in words
    assert what_to_do
    waiting = QueuedJob("7", "PENDING", "0:00", "3:00:00", "", "", reason, "tune:s")
    assert words in diagnose(None, JobFacts("7", "pending", queued=waiting)).summary


def test_a_reason_that_nobody_has_heard_of_is_quoted():
    assert remedies.waits("FluxCapacitor")[0] == "Slurm says FluxCapacitor"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"PreemptType": "preempt/none"}, "no job has to make room"),
        ({"PreemptMode": "GANG,SUSPEND"}, "stops and goes on later"),
        ({"PreemptMode": "CANCEL"}, "does not come back"),
        ({"SlurmctldParameters": "x,preempt_send_user_signal"}, "told by our signal"),
        ({}, "cred_expire=120 s"),
        ({"AccountingStorageType": "accounting_storage/none"}, "sacct is off"),
        ({"AccountingStorageEnforce": "none"}, "without an account"),
        ({"AccountingStorageEnforce": "associations,limits,qos"}, "its limits hold"),
    ],
)
def test_other_clusters(settings, said):
    assert any(said in f"{each.value}: {each.meaning}" for each in site.explain(settings))
