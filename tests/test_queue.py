"""What we read from Slurm, on a real cluster."""

import contextlib
import os
import socket
import time

import pytest

from tests.cluster import ACCOUNT, NODES, wait
from tripletkit.cluster import queue
from tripletkit.errors import ClusterError

SMALL = ("--mem=100", "--time=5")


@contextlib.contextmanager
def configuration(slurm, monkeypatch, **changes):
    """Talk to the cluster with another slurm.conf of our own."""
    text = (slurm.folder / "slurm.conf").read_text()
    for key, value in changes.items():
        lines = [
            f"{key}={value}" if line.startswith(f"{key}=") else line for line in text.split("\n")
        ]
        text = "\n".join(lines)
    path = slurm.folder / "other.conf"
    path.write_text(text)
    with monkeypatch.context() as patch:
        patch.setenv("SLURM_CONF", str(path))
        yield


def submit(slurm, command, *options):
    return slurm.sbatch(command, *SMALL, *options)


def ended_rows(job, count=1):
    """Rows of the accounting, which learns of things after the controller; the limit comes last."""
    rows = []

    def found():
        rows[:] = queue.past([job])
        return len(rows) >= count and all(row.end and row.limit for row in rows)

    wait(found, lambda: str(rows), 20)
    return rows


# squeue


def test_a_row_for_each_element_of_an_array(slurm):
    job = submit(slurm, "sleep 60", "--array=0-5:2%1", "--job-name=odd | name, of mine")
    slurm.wait_state(f"{job}_0", {"RUNNING"})
    rows = {row.id: row for row in queue.queued([job])}
    assert sorted(rows) == [f"{job}_0", f"{job}_2", f"{job}_4"]
    running, waiting = rows[f"{job}_0"], rows[f"{job}_2"]
    assert running.state == "RUNNING"
    assert running.node in NODES
    assert running.reason == ""
    assert running.start.startswith("20")
    assert running.limit == "5:00"
    assert (waiting.state, waiting.reason, waiting.node) == ("PENDING", "JobArrayTaskLimit", "")
    assert {row.name for row in rows.values()} == {"odd | name, of mine"}


def test_an_element_is_asked_for_alone_and_an_array_as_a_whole(slurm):
    array = submit(slurm, "sleep 60", "--array=0-2", "--hold")
    single = submit(slurm, "sleep 60", "--hold")
    assert [row.id for row in queue.queued([f"{array}_1"])] == [f"{array}_1"]
    assert {row.id for row in queue.queued([f"{array}_1", single])} == {f"{array}_1", single}
    everything = {f"{array}_{index}" for index in range(3)} | {single}
    assert {row.id for row in queue.queued([array, single])} == everything
    assert {row.id for row in queue.queued()} == everything


def test_jobs_that_slurm_does_not_know_are_not_queued(slurm):
    job = submit(slurm, "sleep 60", "--hold")
    assert queue.queued(["99999"]) == []
    assert queue.queued(["99999_3"]) == []
    assert queue.queued(["99998", "99999"]) == []
    assert [row.id for row in queue.queued(["99999", job, f"{job}1_7"])] == [job]
    assert queue.queued([]) == []


def test_a_job_that_ended_is_not_queued(slurm):
    job = submit(slurm, "true")
    slurm.wait_state(job, {"COMPLETED"})
    assert queue.queued([job]) == []


def test_variables_of_the_user_do_not_change_what_is_read(slurm, monkeypatch):
    job = submit(slurm, "sleep 60", "--hold")
    for name, value in {
        "SQUEUE_STATES": "RUNNING", "SQUEUE_FORMAT": "%i", "SQUEUE_PARTITION": "low",
        "SQUEUE_USERS": "postgres", "SACCT_FORMAT": "jobid", "SLURM_TIME_FORMAT": "relative",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert [row.id for row in queue.queued([job])] == [job]
    assert [row.id for row in queue.queued()] == [job]


# sacct


def test_past_jobs_tell_how_they_ended(slurm):
    failed = submit(slurm, "exit 3", "--job-name=tune:a|b")
    killed = submit(slurm, "kill -9 $$")
    cancelled = submit(slurm, "sleep 60")
    slurm.wait_state(cancelled, {"RUNNING"})
    queue.cancel([cancelled])
    slurm.wait_state(failed, {"FAILED"})
    [row] = ended_rows(failed)
    assert (row.id, row.state, row.exit_code, row.name) == (failed, "FAILED", "3:0", "tune:a|b")
    assert row.node in NODES
    assert row.limit == "00:05:00"
    assert row.req_mem == "100M"
    assert row.submit <= row.start <= row.end
    [row] = ended_rows(killed)
    assert (row.state, row.exit_code) == ("FAILED", "0:9")
    [row] = ended_rows(cancelled)
    assert row.state == "CANCELLED"


def test_a_requeued_job_has_every_run_oldest_first(slurm):
    job = submit(
        slurm, "sleep $((60 - 60 * ${SLURM_RESTART_COUNT:-0}))", "--array=0-1", "--requeue"
    )
    slurm.wait_state(job, {"RUNNING"})
    assert queue.requeue(f"{job}_1")
    assert not queue.requeue(f"{job}_1"), "Slurm is already at it"
    slurm.wait_state(f"{job}_1", {"COMPLETED"})
    rows = ended_rows(f"{job}_1", count=2)
    assert [row.state for row in rows] == ["REQUEUED", "COMPLETED"]
    assert {row.id for row in rows} == {f"{job}_1"}
    assert rows[0].submit < rows[1].submit
    assert {row.id for row in queue.past([job])} == {f"{job}_0", f"{job}_1"}


def test_elements_that_never_ran_are_in_the_accounting_one_by_one(slurm):
    tasks = [task for task in range(41) if task % 3]  # too many pieces for Slurm to show all
    job = submit(slurm, "true", "--hold", f"--array={','.join(map(str, tasks))}%2")
    wait(lambda: queue.past([job]), lambda: "no rows", 20)
    rows = queue.past([job])
    assert [row.id for row in rows] == [f"{job}_{task}" for task in tasks]
    assert {row.state for row in rows} == {"PENDING"}
    assert {row.node for row in rows} == {""}


def test_the_largest_step_tells_the_memory(slurm):
    hold = "python3 -c 'import time; data = bytearray(300 << 20); time.sleep(5)'"
    job = submit(slurm, f"srun --mem=400 {hold}", "--mem=500")
    slurm.wait_state(job, {"COMPLETED"})
    [row] = ended_rows(job)
    assert row.max_rss
    assert 300 << 20 <= row.max_rss < 450 << 20


def test_without_accounting_there_is_no_past(slurm, monkeypatch):
    with configuration(slurm, monkeypatch, AccountingStorageType="accounting_storage/none"):
        assert queue.past(["1"]) == []
    assert queue.past([]) == []


# scancel, scontrol, sinfo


def test_cancel_takes_elements_and_does_not_mind_what_is_gone(slurm):
    job = submit(slurm, "sleep 60", "--array=0-2")
    slurm.wait_state(job, {"RUNNING"})
    queue.cancel([f"{job}_1"])
    slurm.wait_state(f"{job}_1", {"CANCELLED"})
    assert {row.id for row in queue.queued([job])} == {f"{job}_0", f"{job}_2"}
    queue.cancel([f"{job}_1", "99999", f"{job}_2"])
    slurm.wait_state(f"{job}_2", {"CANCELLED"})
    queue.cancel([])


def test_slurm_refuses_to_requeue(slurm):
    fixed = submit(slurm, "sleep 60", "--no-requeue")
    slurm.wait_state(fixed, {"RUNNING"})
    with pytest.raises(ClusterError, match="presently disabled"):
        queue.requeue(fixed)
    with pytest.raises(ClusterError, match="Invalid job id"):
        queue.requeue("99999")


def test_facts_of_a_job(slurm):
    job = submit(slurm, "sleep 60", "--array=0-1", "--job-name=a b", "--comment=x y=z", "--requeue")
    slurm.wait_state(job, {"RUNNING"})
    facts = queue.job_facts(f"{job}_1")
    assert facts["JobState"] == "RUNNING"
    assert (facts["ArrayJobId"], facts["ArrayTaskId"]) == (job, "1")
    assert facts["JobName"] == "a b"
    assert facts["Comment"] == "x y=z"
    assert facts["Requeue"] == "1"
    assert facts["EndTime"] > facts["StartTime"]
    assert queue.job_facts("99999") == {}


def test_facts_of_the_cluster(slurm):
    settings = queue.settings()
    assert settings["MaxArraySize"] == "41"
    assert settings["PreemptMode"] == "REQUEUE"
    assert settings["KillWait"] == "5 sec"
    partitions = {each["PartitionName"]: each for each in queue.partitions()}
    assert partitions["main"]["MaxTime"] == "1-00:00:00"
    assert partitions["lowgrace"]["GraceTime"] == "30"
    assert queue.nodes("low") == queue.nodes()
    assert queue.nodes() == [f"8 CPUs, 16000 MB, gres gpu:{count}" for count in (1, 2)]
    assert queue.node_hosts() == {socket.gethostname().partition(".")[0]}
    assert ACCOUNT in queue.accounts()


def test_a_script_is_judged_without_being_submitted(slurm):
    script = f"#!/bin/bash\n#SBATCH --account={ACCOUNT} --mem=100\ntrue\n"
    assert queue.test_only(script, os.environ).startswith("to start at 20")
    with pytest.raises(ClusterError, match="Invalid account"):
        queue.test_only(script.replace(ACCOUNT, "other"), os.environ)
    assert queue.queued() == []


# trouble


def test_a_controller_that_is_away_is_asked_again(slurm, monkeypatch, caplog):
    monkeypatch.setattr(queue, "PAUSES", (0.1,))
    away = {"SlurmctldPort": "1", "AccountingStoragePort": "1", "MessageTimeout": "2"}
    with configuration(slurm, monkeypatch, **away):
        with pytest.raises(
            ClusterError, match=r"squeue.*Unable to contact slurm controller"
        ) as caught:
            queue.queued(["1"])
        assert "scontrol ping" in caught.value.hint
        assert caplog.text.count("asking again") == 1
        for call in (queue.past, queue.cancel):
            with pytest.raises(ClusterError, match=r"Unable to contact|Connection refused"):
                call(["1"])
        with pytest.raises(ClusterError):
            queue.requeue("1")
    assert queue.queued(["1"]) == []


def test_a_command_that_hangs_is_given_up(slurm, monkeypatch):
    monkeypatch.setattr(queue, "TIMEOUT", 1.0)
    monkeypatch.setenv("SLURM_CONF", "/nonexistent/slurm.conf")  # Slurm looks for it for a minute
    begun = time.monotonic()
    with pytest.raises(ClusterError, match="squeue did not answer within 1 s"):
        queue.queued()
    assert time.monotonic() - begun < 10


def test_a_host_without_slurm(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not queue.available()
    assert queue.accounts() == []
    with pytest.raises(ClusterError, match="squeue: command not found"):
        queue.queued()
