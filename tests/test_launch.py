"""Jobs that are really started: on a Slurm cluster, and in the background of this host."""

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from tests.cluster import ACCOUNT, MAX_ARRAY_SIZE, wait
from tripletkit.cluster import launch, preflight, queue, resources
from tripletkit.cluster.launch import Job
from tripletkit.config import Slurm
from tripletkit.errors import ClusterError, ConfigError, RunError

SMALL = {"account": ACCOUNT, "mem": "300M", "cpus_per_task": 1, "gpus": 0, "time": "20"}
ROOT = Path(__file__).parent.parent


class Report:
    """A call that says where it runs and, told to wait, ends when `release` exists."""

    def __init__(self, folder, *, waits=False):
        self.folder = str(folder)
        self.waits = waits

    def __call__(self):
        begun = time.time()
        umask = os.umask(0o022)
        os.umask(umask)
        facts = {
            "pid": os.getpid(), "session": os.getsid(0), "umask": umask, "begun": begun,
            "environ": dict(os.environ),
        }  # fmt: skip
        print("written to stdout")
        print("written to stderr", file=sys.stderr)
        self.tell("begun", facts)
        while self.waits and not Path(self.folder, "release").exists():
            time.sleep(0.05)
        self.tell("ended", {**facts, "ended": time.time()})
        return 0

    def tell(self, what, facts):
        path = Path(self.folder, f"{what}_{os.getpid()}.json")
        aside = path.with_suffix(".tmp")
        aside.write_text(json.dumps(facts))
        aside.rename(path)


class Nest:
    """A call that submits another job from within its own."""

    def __init__(self, folder):
        self.folder = folder

    def __call__(self):
        inner = job(self.folder, "inner")
        submitted = launch.submit(inner, Report(self.folder), cluster="slurm")
        print("submitted", *submitted.jobs)
        return 0


class Saboteur:
    """A call that has Slurm close a partition when it is packed for the `fatal`th time."""

    def __init__(self, partition, fatal):
        self.partition = partition
        self.left = fatal

    def __reduce__(self):
        self.left -= 1
        if self.left == 0:
            command = ["scontrol", "update", f"PartitionName={self.partition}", "State=DRAIN"]
            subprocess.run(command, check=True)
        return Report, ("/nonexistent",)


def job(folder, stage="tune", count=1, dependency=None, **slurm):
    return Job(
        stage=stage, name=f"{stage}:test", slurm=Slurm(**{**SMALL, **slurm}), count=count,
        log_dir=Path(folder) / "logs", dependency=dependency,
    )  # fmt: skip


def told(folder, what="ended", count=1):
    """What that many calls said."""
    wait(
        lambda: len(list(folder.glob(f"{what}_*.json"))) >= count,
        lambda: "\n".join(
            f"{log}: {log.read_text()}" for log in sorted((folder / "logs").glob("*.*"))
        ),
        60,
    )
    return [json.loads(path.read_text()) for path in folder.glob(f"{what}_*.json")]


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def held_job(slurm):
    """Something that others can wait for, for ever."""
    return slurm.sbatch("true", "--hold", "--mem=10")


# Slurm: a job and its logs


def test_a_job_writes_the_logs_that_its_name_promises_and_no_others(slurm, tmp_path):
    asked = job(tmp_path, "best", setup=["echo set up", "echo moaned >&2"])
    submitted = launch.submit(asked, Report(tmp_path), cluster="slurm")
    [number] = submitted.jobs
    assert number.isdecimal(), "a single job is no array"
    slurm.wait_state(number, {"COMPLETED"})
    logs = tmp_path / "logs"
    assert {path.name for path in logs.iterdir()} == {
        "submitit", f"best_training_{number}.out", f"best_training_{number}.err",
    }  # fmt: skip
    assert submitted.out == (logs / f"best_training_{number}.out",)
    text = submitted.out[0].read_text()
    assert text.index("set up") < text.index("written to stdout")
    errors = submitted.out[0].with_suffix(".err").read_text()
    assert errors.splitlines() == ["moaned", "written to stderr"]
    assert not [name for name in files_below(logs) if name.endswith("log.out")]


def test_the_log_says_why_python_did_not_start(slurm, tmp_path):
    asked = job(tmp_path, setup=["export PATH=/nonexistent"])
    [out] = launch.submit(asked, Report(tmp_path), cluster="slurm").out
    wait(lambda: out.exists() and "srun" in out.with_suffix(".err").read_text(), lambda: "?", 30)
    assert "srun: command not found" in out.with_suffix(".err").read_text()


def test_the_log_has_the_last_words_of_a_cancelled_job_and_those_of_slurm(slurm, tmp_path):
    submitted = launch.submit(job(tmp_path), Report(tmp_path, waits=True), cluster="slurm")
    told(tmp_path, "begun")
    queue.cancel(submitted.jobs)
    slurm.wait_state(submitted.jobs[0], {"CANCELLED"})
    text = submitted.out[0].read_text() + submitted.out[0].with_suffix(".err").read_text()
    assert "Bypassing signal SIGTERM" in text, "submitit's handler, which ours replaces"
    assert f"STEP {submitted.jobs[0]}.0 ON" in text


def test_both_starts_of_a_requeued_job_are_in_one_log(slurm, tmp_path):
    submitted = launch.submit(job(tmp_path), Report(tmp_path, waits=True), cluster="slurm")
    told(tmp_path, "begun")
    assert queue.job_facts(submitted.jobs[0])["Requeue"] == "1"
    assert queue.requeue(submitted.jobs[0])
    (tmp_path / "release").touch()
    slurm.wait_state(submitted.jobs[0], {"COMPLETED"})
    assert submitted.out[0].read_text().count("written to stdout") == 2


def test_what_a_job_asks_for(slurm, tmp_path):
    asked = job(
        tmp_path, mem="1G", cpus_per_task=2, gpus=1, time="0-5:30", partition="low", qos="normal",
        mail="user@example.org",
    )  # fmt: skip
    submitted = launch.submit(asked, Report(tmp_path), cluster="slurm")
    assert "#SBATCH --requeue" in launch.script(asked), "whatever the cluster's default is"
    facts = queue.job_facts(submitted.jobs[0])
    expected = {
        "JobName": "tune:test", "Account": ACCOUNT, "Partition": "low", "QOS": "normal",
        "TimeLimit": "05:30:00", "Requeue": "1", "NumCPUs": "2", "MinMemoryNode": "1G",
        "TresPerNode": "gres:gpu:1", "MailUser": "user@example.org", "MailType": "FAIL",
    }  # fmt: skip
    assert {key: facts.get(key) for key in expected} == expected
    [facts] = told(tmp_path)
    environ = facts["environ"]
    assert environ["SLURM_CPUS_PER_TASK"] == "2"
    assert environ["CUDA_VISIBLE_DEVICES"] == "0"
    assert environ["SLURM_STEP_NUM_TASKS"] == "1"


def test_gres_replaces_gpus(slurm, tmp_path):
    text = launch.script(job(tmp_path, gpus=4, gres="gpu:1"))
    assert "--gres=gpu:1" in text
    assert "--gpus" not in text


# Slurm: arrays


def test_an_array_runs_no_more_than_max_concurrent_at_once(slurm, tmp_path):
    submitted = launch.submit(
        job(tmp_path, count=4, max_concurrent=2), Report(tmp_path), cluster="slurm"
    )
    array = submitted.jobs[0].partition("_")[0]
    assert submitted.jobs == tuple(f"{array}_{index}" for index in range(4))
    assert [path.name for path in submitted.out] == [f"tune_{each}.out" for each in submitted.jobs]
    told(tmp_path, count=4)
    slurm.wait_state(array, {"COMPLETED"})
    rows = queue.past([array])
    wait(lambda: all(row.end for row in queue.past([array])), lambda: str(rows), 20)
    spans = [
        tuple(map(datetime.fromisoformat, (row.start, row.end))) for row in queue.past([array])
    ]
    at_once = [sum(start <= begun < end for start, end in spans) for begun, _ in spans]
    assert max(at_once) <= 2
    for path in submitted.out:
        assert "written to stdout" in path.read_text()
        assert "written to stderr" in path.with_suffix(".err").read_text()


def test_more_jobs_than_an_array_may_have_become_several(slurm, tmp_path):
    blocked = f"afterok:{held_job(slurm)}"
    asked = job(tmp_path, count=MAX_ARRAY_SIZE + 9, max_concurrent=5, dependency=blocked)
    submitted = launch.submit(asked, Report(tmp_path), cluster="slurm")
    assert len(set(submitted.jobs)) == MAX_ARRAY_SIZE + 9
    assert {row.id for row in queue.queued(submitted.jobs)} == set(submitted.jobs)
    arrays = sorted({each.partition("_")[0] for each in submitted.jobs})
    assert len(arrays) == 2
    throttles = [int(queue.job_facts(array)["ArrayTaskThrottle"]) for array in arrays]
    assert sorted(throttles) == [2, 3]


def test_the_largest_array_is_one_array(slurm, tmp_path):
    blocked = f"afterok:{held_job(slurm)}"
    asked = job(tmp_path, count=MAX_ARRAY_SIZE, dependency=blocked)
    submitted = launch.submit(asked, Report(tmp_path), cluster="slurm")
    assert len({each.partition("_")[0] for each in submitted.jobs}) == 1


# Slurm: refusals

REFUSED = [
    ({"account": "nobody"}, "Invalid account", "--account; you may charge: .*def-lab"),
    ({"partition": "nowhere"}, "Invalid partition", "--partition; there are: main, high, low"),
    ({"mem": "900G"}, "Memory specification|node configuration", "--mem, .*Nodes have: 8 CPUs, 16000 MB"),
    ({"gpus": 4}, "node configuration is not available", "--gpus.* gres gpu:1"),
    ({"gres": "tpu:1"}, "Invalid generic resource", "--gres.* gres gpu:1"),
    ({"constraint": "a100"}, "Invalid feature", "--constraint; `sinfo"),
    ({"dependency": "afterwards"}, "dependency problem", "--dry-run"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "words", "hint"), REFUSED, ids=[str(wrong) for wrong, *_ in REFUSED]
)
@pytest.mark.parametrize("count", [1, 3])
def test_a_refused_job_shows_the_words_of_sbatch_and_leaves_nothing(
    slurm, tmp_path, capfd, wrong, words, hint, count
):
    asked = job(tmp_path, count=count, **wrong)
    for attempt in (
        preflight.check,
        lambda asked: launch.submit(asked, Report(tmp_path), cluster="slurm"),
    ):
        with pytest.raises(ClusterError, match=f"^sbatch: .*({words})") as caught:
            attempt(asked)
        assert re.search(hint, caught.value.hint)
    assert queue.queued() == []
    assert [name for name in files_below(tmp_path) if not name.endswith(".lock")] == [
        "logs", "logs/submitit",
    ]  # fmt: skip
    assert capfd.readouterr().err == "", "the message is the boundary's to print"


def test_if_the_second_of_two_arrays_is_refused_the_first_is_cancelled(slurm, tmp_path):
    blocked = f"afterok:{held_job(slurm)}"
    asked = job(tmp_path, count=MAX_ARRAY_SIZE + 1, dependency=blocked, partition="high")
    try:
        with pytest.raises(ClusterError, match="partition not available"):
            launch.submit(asked, Saboteur("high", fatal=MAX_ARRAY_SIZE), cluster="slurm")
    finally:
        slurm.run("scontrol", "update", "PartitionName=high", "State=UP")
    assert {row.name for row in queue.queued()} == {"wrap"}, "only the job that was there before"
    assert files_below(tmp_path / "logs" / "submitit") == [".lock"]


# Of clusters that enforce what the one of the tests does not, in the words of Slurm 22.05.
FAILED = "sbatch: error: Batch job submission failed: "
POLICY = FAILED + (
    "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
)
SAID = {
    "sbatch: error: QOSMaxSubmitJobPerUserLimit; " + POLICY: "--workers",
    "sbatch: error: AssocMaxSubmitJobLimit; " + POLICY: "--workers",
    "sbatch: error: AssocGrpCPUMinutesLimit; " + POLICY: "sacctmgr show",
    FAILED + "Requested time limit is invalid (missing or exceeds some limit)": (
        "--time; the partitions allow: main 1-00:00:00"
    ),
    "sbatch: error: QOSMaxWallDurationPerJobLimit; " + POLICY: "--time",
    FAILED + "More processors requested than permitted": "Nodes have: 8 CPUs",
    FAILED + "Invalid qos specification": "--qos",
    FAILED + "Invalid wckey specification": "SBATCH_WCKEY",
    FAILED + "Invalid job array specification": "MaxArraySize",
    FAILED + "Socket timed out on send/recv operation": "squeue --me",
    "sbatch: error: something new": "--dry-run",
}


@pytest.mark.parametrize(("words", "hint"), SAID.items())
def test_advice_on_what_sbatch_says(slurm, words, hint):
    error = resources.refused(words, Slurm(**SMALL))
    assert error.message == words
    assert hint in error.hint


def test_a_controller_that_is_away(slurm, tmp_path, monkeypatch):
    monkeypatch.setattr(queue, "PAUSES", ())
    away = slurm.folder / "away.conf"
    text = (slurm.folder / "slurm.conf").read_text()
    text = re.sub(r"(?m)^MessageTimeout=.*", "MessageTimeout=2", text)
    away.write_text(re.sub(r"(?m)^SlurmctldPort=.*", "SlurmctldPort=1", text))
    monkeypatch.setenv("SLURM_CONF", str(away))
    for count in (1, 2):
        with pytest.raises(ClusterError, match="Unable to contact slurm controller") as caught:
            launch.submit(job(tmp_path, count=count), Report(tmp_path), cluster="slurm")
        assert "scontrol ping" in caught.value.hint
    assert files_below(tmp_path / "logs" / "submitit") in ([], [".lock"])


def test_a_host_without_sbatch(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for attempt in (
        lambda: launch.submit(job(tmp_path), Report(tmp_path), cluster="slurm"),
        lambda: launch.script(job(tmp_path)),
        lambda: preflight.check(job(tmp_path)),
    ):
        with pytest.raises(ClusterError, match="no sbatch here") as caught:
            attempt()
        assert "--cluster local" in caught.value.hint


# Slurm: the script


@pytest.mark.parametrize("count", [1, 3])
def test_the_dry_run_shows_what_is_submitted_and_writes_nothing(slurm, tmp_path, count):
    folder = tmp_path / "my lab's $HOME"
    asked = job(
        folder, count=count, max_concurrent=2, setup=["echo 'as it is' >&2 # $PWD"], gpus=1,
        dependency=f"afterok:{held_job(slurm)}",
    )  # fmt: skip
    text = launch.script(asked)
    assert list(tmp_path.iterdir()) == []
    assert "echo 'as it is' >&2 # $PWD" in text.splitlines()
    folder.mkdir()
    submitted = launch.submit(asked, Report(tmp_path), cluster="slurm")
    number = submitted.jobs[0].partition("_")[0]
    queued = slurm.run("scontrol", "write", "batch_script", number, "-")
    assert queued.strip() == text.strip()


def test_a_dry_run_of_several_arrays_shows_all_scripts(slurm, tmp_path):
    text = launch.script(job(tmp_path, count=MAX_ARRAY_SIZE + 1))
    assert re.findall(r"--array=(\S+)", text) == ["0-20%21", "0-20%21"]


def test_odd_folders_hold_logs_too(slurm, tmp_path):
    folder = tmp_path / "my lab's $HOME; true"
    folder.mkdir()
    submitted = launch.submit(job(folder), Report(folder), cluster="slurm")
    slurm.wait_state(*submitted.jobs, {"COMPLETED"})  # only then all that it said is in its log
    assert "written to stdout" in submitted.out[0].read_text()


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"account": "a\ntouch x"}, "slurm.account"),
        ({"partition": "a\rb"}, "slurm.partition"),
        ({"constraint": "a\n"}, "slurm.constraint"),
        ({"mail": "a\nb"}, "slurm.mail"),
        ({"mail": "nobody-of-that-name"}, "slurm.mail"),
        ({"mail": "me@"}, "slurm.mail"),
        ({"mail": "me@example.org, you@example.org"}, "slurm.mail"),
        ({"gres": "gpu\n:1"}, "slurm.gres"),
        ({"time": "3h"}, "slurm.time"),
        ({"mem": "lots"}, "slurm.mem"),
    ],
)
def test_values_that_cannot_go_into_a_script_are_refused_by_key(slurm, tmp_path, wrong, key):
    for attempt in (
        launch.script,
        preflight.check,
        lambda job: launch.submit(job, print, cluster="slurm"),
    ):
        with pytest.raises(ConfigError, match=re.escape(key)):
            attempt(job(tmp_path, **wrong))
    assert [name for name in files_below(tmp_path) if "." in name] == []


@pytest.mark.parametrize("name", ["100%", "a\\b", "a\nb"])
def test_folders_that_slurm_would_read_as_a_pattern_are_refused(slurm, tmp_path, name):
    with pytest.raises(ConfigError, match=r"global\.log_dir"):
        launch.submit(job(tmp_path / name), Report(tmp_path), cluster="slurm")
    assert list(tmp_path.iterdir()) == []


# Slurm: environment, rights, secrets


def test_variables_of_sbatch_fill_gaps_but_do_not_win(slurm, tmp_path, monkeypatch):
    for name, value in {
        "SBATCH_ACCOUNT": ACCOUNT, "SBATCH_PARTITION": "low", "SBATCH_TIMELIMIT": "99",
        "SBATCH_ARRAY_INX": "0-9", "SBATCH_NO_REQUEUE": "1", "SBATCH_SIGNAL": "INT@7",
        "SBATCH_JOB_NAME": "other", "SBATCH_EXPORT": "NONE", "SUBMITIT_PREEMPT_SIGNAL": "TERM",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    asked = job(tmp_path, account=None)
    text = launch.script(asked)
    assert f"--account={ACCOUNT}" in text
    assert "--partition=low" in text
    assert "--signal=USR2@120" in text
    assert "--partition=high" in launch.script(job(tmp_path, partition="high"))
    submitted = launch.submit(asked, Report(tmp_path), cluster="slurm")
    facts = queue.job_facts(submitted.jobs[0])
    assert (facts["Partition"], facts["TimeLimit"]) == ("low", "00:20:00")
    assert (facts["JobName"], facts["Requeue"]) == ("tune:test", "1")
    told(tmp_path)
    assert os.environ["SBATCH_PARTITION"] == "low", "our own environment stays as it was"


def test_a_job_can_submit_another(slurm, tmp_path):
    submitted = launch.submit(job(tmp_path, count=2), Nest(str(tmp_path)), cluster="slurm")
    inner = told(tmp_path, count=2)
    ids = {facts["environ"]["SLURM_JOB_ID"] for facts in inner}
    assert not any("SLURM_ARRAY_JOB_ID" in facts["environ"] for facts in inner)
    for path in submitted.out:
        words = path.read_text().split()
        ids.remove(words[words.index("submitted") + 1])
    assert not ids


def test_what_lies_about_is_for_the_user_alone_and_the_job_has_the_users_umask(slurm, tmp_path):
    before = os.umask(0o027)
    try:
        submitted = launch.submit(job(tmp_path), Report(tmp_path, waits=True), cluster="slurm")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)
    folder = tmp_path / "logs" / "submitit"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o600}
    [facts] = told(tmp_path, "begun")
    assert facts["umask"] == 0o027
    assert submitted.out[0].stat().st_mode & 0o777 == 0o640
    (tmp_path / "release").touch()
    told(tmp_path)


def test_a_folder_of_somebody_else_is_one_clear_error(slurm, tmp_path):
    (tmp_path / "logs").write_text("a file")
    with pytest.raises(ConfigError, match="logs") as caught:
        launch.submit(job(tmp_path), Report(tmp_path), cluster="slurm")
    assert "global.log_dir" in caught.value.hint


def test_secrets_travel_in_the_environment_only(slurm, tmp_path, monkeypatch):
    monkeypatch.setenv("PGPASSWORD", "sesame-open")
    submitted = launch.submit(job(tmp_path), Report(tmp_path, waits=True), cluster="slurm")
    [facts] = told(tmp_path, "begun")
    number = submitted.jobs[0]
    assert facts["environ"]["PGPASSWORD"] == "sesame-open"
    shown = [
        slurm.run("scontrol", "show", "job", number),
        slurm.run("scontrol", "write", "batch_script", number, "-"),
        slurm.run("ps", "-eo", "args"),
        slurm.run("sacct", "-j", number, "-P", "-o", "all"),
        *(
            path.read_text(errors="replace")
            for path in (tmp_path / "logs").rglob("*")
            if path.is_file()
        ),
    ]
    (tmp_path / "release").touch()
    told(tmp_path)
    assert not [text for text in shown if "sesame-open" in text]


# before it is submitted


def test_preflight_says_when_the_job_would_start_and_leaves_nothing(slurm, tmp_path, caplog):
    verdict = preflight.check(job(tmp_path, count=3), [tmp_path / "out" / "there"])
    assert verdict.startswith("to start at 20")
    assert verdict in caplog.text
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert list(tmp_path.iterdir()) == []
    assert queue.queued() == []


def test_a_job_that_would_wait_for_ever_is_refused(slurm, tmp_path):
    for wrong in ({"time": "1-00:01"}, {"time": "2-0", "partition": "low"}):
        with pytest.raises(ClusterError, match=r"longer than partition .*\(1-00:00:00\)") as caught:
            preflight.check(job(tmp_path, **wrong))
        assert "--time" in caught.value.hint
    preflight.check(job(tmp_path, time="1-0"))
    preflight.check(job(tmp_path, time="2-0", qos="normal"))  # may allow more than the partition


def test_folders_that_cannot_be_written_to_are_named(slurm, tmp_path):
    (tmp_path / "file").touch()
    for folder in (Path("/proc/nowhere/out"), tmp_path / "file" / "out", tmp_path / "file"):
        with pytest.raises(RunError, match=re.escape(f"{folder}: cannot write to")):
            preflight.check(job(tmp_path), [folder])


def test_a_short_limit_is_worth_a_warning(slurm, tmp_path, caplog):
    preflight.check(job(tmp_path, time="9:59"))
    assert "slurm.time = 9:59 is short" in caplog.text


def test_a_folder_that_other_hosts_do_not_see_is_worth_a_warning(
    slurm, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(preflight.socket, "gethostname", lambda: "login1.example.org")
    preflight.check(job("/dev/shm"), [tmp_path])
    assert "/dev/shm/logs" in caplog.text
    assert "on a disk of this host" in caplog.text


# limits


TIMES = {
    "1": 60, "90": 5400, "0:30": 30, "30:00": 1800, "90:30": 5430, "3:00:00": 10800,
    "25:00:00": 90000, "1-12": 129600, "1-12:30": 131400, "1-12:30:10": 131410, "03:00:00": 10800,
}  # fmt: skip


def test_time_limits_are_read_as_sbatch_reads_them(slurm):
    for text, expected in TIMES.items():
        assert resources.seconds(text) == expected
        number = slurm.sbatch("true", "--hold", "--mem=10", f"--time={text}")
        shown = queue.job_facts(number)["TimeLimit"]
        assert resources.seconds(shown) == -(-expected // 60) * 60, "Slurm rounds up to minutes"


@pytest.mark.parametrize("text", ["", "0", "0:00", "3h", "1:2:3:4", "-1", "1-", "UNLIMITED", "1.5"])
def test_what_is_no_time_limit(text):
    with pytest.raises(ValueError, match="limit"):
        resources.seconds(text)


def test_sizes_of_memory_are_those_of_sbatch(slurm, tmp_path):
    for text in ("1024", "500M", "2g", "2GB", "1048576K", "0", "1.5G", "1 G", "-1", "", "3X", "G"):
        script = f"#!/bin/bash\n#SBATCH --account={ACCOUNT} --mem='{text}'\ntrue\n"
        theirs = ours = True
        try:
            queue.test_only(script, os.environ)
        except ClusterError:
            theirs = False
        try:
            resources.parameters(Slurm(mem=text))
        except ConfigError:
            ours = False
        assert ours == theirs, text


def test_the_signal_comes_early_enough_to_save_and_late_enough_to_work():
    delays = {limit: resources.signal_delay(limit) for limit in (60, 120, 300, 600, 3600, 86400)}
    assert delays == {60: 20, 120: 24, 300: 60, 600: 120, 3600: 120, 86400: 120}


# in the background of this host


@contextlib.contextmanager
def background(asked, folder):
    """Jobs on this host, ended and gone when the block ends."""
    submitted = launch.submit(asked, Report(folder, waits=True), cluster="local")
    pids = [int(each.removeprefix("local-")) for each in submitted.jobs]
    try:
        yield submitted, pids
    finally:
        (folder / "release").touch()
        for pid in pids:
            os.waitpid(pid, 0)


def test_background_jobs_have_ids_and_logs_of_their_own(tmp_path):
    asked = job(tmp_path, count=5, max_concurrent=2)
    before = os.umask(0o027)
    try:
        with background(asked, tmp_path) as (submitted, pids):
            facts = told(tmp_path, "begun", count=2)
    finally:
        os.umask(before)
    assert {each["pid"] for each in facts} == set(pids)
    assert {each["environ"]["SUBMITIT_LOCAL_JOB_ID"] for each in facts} == {
        str(pid) for pid in pids
    }
    assert {each["umask"] for each in facts} == {0o027}
    for pid, path in zip(pids, submitted.out, strict=True):
        assert path == tmp_path / "logs" / f"tune_local-{pid}.out"
        assert "written to stdout" in path.read_text()
        assert path.with_suffix(".err").read_text() == "written to stderr\n"
    submitit = tmp_path / "logs" / "submitit"
    assert {path.stat().st_mode & 0o777 for path in (submitit, *submitit.iterdir())} == {0o700}


LAUNCHER = """
import sys, time
from tests.test_launch import Report, job
from tripletkit.cluster import launch
submitted = launch.submit(job(sys.argv[1]), Report(sys.argv[1], waits=True), cluster="local")
print(submitted.jobs[0], flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_background_job_outlives_the_terminal_that_started_it(tmp_path, number):
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    with launcher:
        pid = int(launcher.stdout.readline().removeprefix("local-"))
        [facts] = told(tmp_path, "begun")
        os.killpg(launcher.pid, number)
    assert launcher.returncode != 0
    assert facts["session"] == facts["pid"] == pid, "a session of its own"
    assert Path(f"/proc/{pid}").exists()
    (tmp_path / "release").touch()
    told(tmp_path)
    assert "written to stdout" in (tmp_path / "logs" / f"tune_local-{pid}.out").read_text()


@pytest.mark.parametrize(
    ("visible", "gpus", "expected"),
    [
        (None, 0, [None, None, None]),
        ("0,1", 0, ["0,1"] * 3),
        ("3", 1, ["3"] * 3),
        ("0,1", 1, ["0", "1", "0"]),
        ("4,5,6,7", 2, ["4,5", "6,7", "4,5"]),
        ("", 1, [""] * 3),
    ],
)
def test_background_jobs_take_turns_on_the_gpus(tmp_path, monkeypatch, visible, gpus, expected):
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with background(job(tmp_path, count=3, gpus=gpus), tmp_path) as (_, pids):
        facts = {each["pid"]: each["environ"] for each in told(tmp_path, "begun", count=3)}
    assert [facts[pid].get("CUDA_VISIBLE_DEVICES") for pid in pids] == expected


def test_a_background_job_within_a_slurm_job_is_none_itself(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    with background(job(tmp_path), tmp_path):
        [facts] = told(tmp_path, "begun")
    slurm = {key for key in facts["environ"] if key.startswith("SLURM")}
    assert slurm == {"SLURM_CONF"}


def test_an_old_call_is_never_run_for_a_process_of_the_same_number(tmp_path):
    """Process ids come again: every start has a folder of its own for its files."""
    for _ in range(2):
        with background(job(tmp_path), tmp_path):
            told(tmp_path, "begun")
    assert len({path.parent for path in tmp_path.rglob("*_submitted.pkl")}) == 2
