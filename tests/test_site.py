"""What doctor says of a cluster: the settings that matter to our jobs, and what each means for them.

The cluster of the tests is asked, as it is and with other lines in its slurm.conf.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster import MAX_ARRAY_SIZE
from tripletkit import cli, fsio
from tripletkit.cluster import queue
from tripletkit.errors import ClusterError
from tripletkit.monitor import site
from tripletkit.monitor.site import Setting

REQUEUE = "a job that has to make room starts again later and goes on from its checkpoint"
CANCEL = (
    "a job that has to make room does not come back: another worker goes on with its trial, or "
    "`tripletkit tune` does"
)
SUSPEND = "a job that has to make room stops and goes on later, in place"
UNANNOUNCED = "a job that has to make room gets SIGTERM, maybe only at the end"
TO_THE_END = "its jobs run to their end"
TIMES = "MaxTime=1-00:00:00, DefaultTime=00:10:00"


@pytest.fixture
def configure(slurm) -> Iterator[Callable[..., None]]:
    """Replaces pieces of slurm.conf, old=new, and has the controller read it."""
    path = slurm.folder / "slurm.conf"
    before = path.read_text()

    def change(*pieces: str) -> None:
        text = path.read_text()
        for piece in pieces:
            old, _, new = piece.partition(" -> ")
            assert old in text
            text = text.replace(old, new)
        path.write_text(text)
        slurm.run("scontrol", "reconfigure")

    yield change
    path.write_text(before)
    slurm.run("scontrol", "reconfigure")


def settings() -> dict[str, tuple[str, str]]:
    """Value and meaning by name; each setting is there once."""
    found = site.settings()
    assert len({each.name for each in found}) == len(found)
    return {each.name: (each.value, each.meaning) for each in found}


def partitions() -> dict[str, tuple[str, str]]:
    return {each.name: (each.value, each.meaning) for each in site.partitions()}


# The cluster of the tests


def test_every_setting_with_its_value_and_what_it_means(slurm):
    version = slurm.run("sinfo", "--version").split()[-1]
    assert settings() == {
        "SLURM_VERSION": (version, "written for 21.08 and later"),
        "PreemptType": (
            "preempt/partition_prio",
            "jobs of partitions with a higher PriorityTier go first",
        ),
        "PreemptMode": ("REQUEUE", REQUEUE),
        "SlurmctldParameters": (
            "without preempt_send_user_signal",
            f"{UNANNOUNCED}: keep training.checkpoint_every_minutes small there",
        ),
        "KillWait": ("5 sec", "from SIGTERM to SIGKILL: the time to write a last checkpoint"),
        "JobRequeue": ("1", "our jobs ask to be requeued (--requeue), whatever it says"),
        "AuthInfo": (
            "cred_expire=10 s",
            "for so long a requeued job is held back (reason BeginTime)",
        ),
        "SlurmdTimeout": (
            "20 sec",
            "after so long a lost node is noticed, and its jobs requeued",
        ),
        "MaxArraySize": (
            str(MAX_ARRAY_SIZE),
            "`tripletkit tune` splits its workers into arrays below it",
        ),
        "MaxJobCount": ("10000", "jobs of all users that the controller keeps at once"),
        "MinJobAge": ("300 sec", "for so long Slurm itself remembers a job that ended"),
        "AccountingStorageType": (
            "accounting_storage/slurmdbd",
            "sacct is on: `tripletkit why` can tell how jobs ended",
        ),
        "AccountingStorageEnforce": (
            "associations",
            "jobs need an account that you may charge (--account)",
        ),
    }


def test_every_partition_with_its_limits_and_what_preemption_does_there(slurm):
    assert partitions() == {
        "main (default)": (TIMES, TO_THE_END),
        "high": (TIMES, TO_THE_END),
        "low": (f"{TIMES}, PreemptMode=REQUEUE, GraceTime=0", REQUEUE),
        "lowgrace": (f"{TIMES}, PreemptMode=REQUEUE, GraceTime=30", REQUEUE),
    }


def test_it_is_true_that_jobs_need_an_account_and_that_sacct_is_on(slurm):
    refused = slurm_refuses(slurm, "--account=nobody")
    assert "Invalid account" in refused
    job = slurm.sbatch("true")
    slurm.wait_state(job, {"COMPLETED"})
    assert [run.id for run in queue.past([job])] == [job]


def slurm_refuses(slurm, *options: str) -> str:
    """What sbatch says to a job that it does not take."""
    with pytest.raises(Exception, match="sbatch") as caught:
        slurm.sbatch("true", *options)
    return "".join(caught.value.__notes__)


# The same cluster, set up otherwise


def test_preempted_jobs_that_are_cancelled(configure):
    configure(
        "PreemptMode=REQUEUE\n\n -> PreemptMode=CANCEL\n\n",
        "low PriorityTier=1 PreemptMode=REQUEUE -> low PriorityTier=1 PreemptMode=CANCEL",
        "GraceTime=30 -> GraceTime=300",
    )
    assert settings()["PreemptMode"] == ("CANCEL", CANCEL)
    found = partitions()
    assert found["low"] == (f"{TIMES}, PreemptMode=CANCEL, GraceTime=0", CANCEL)
    assert found["lowgrace"] == (f"{TIMES}, PreemptMode=REQUEUE, GraceTime=300", REQUEUE)
    assert found["main (default)"] == (TIMES, TO_THE_END)


def test_preempted_jobs_that_are_suspended(configure):
    configure(
        "PreemptMode=REQUEUE\n\n -> PreemptMode=SUSPEND,GANG\n\n",
        "PriorityTier=1 PreemptMode=REQUEUE -> PriorityTier=1 PreemptMode=SUSPEND",
    )
    value, meaning = settings()["PreemptMode"]
    assert set(value.split(",")) == {"GANG", "SUSPEND"}
    assert meaning == SUSPEND
    assert partitions()["low"] == (f"{TIMES}, PreemptMode=SUSPEND, GraceTime=0", SUSPEND)


def test_no_preemption_at_all(configure):
    configure(
        "PreemptType=preempt/partition_prio -> PreemptType=preempt/none",
        "PreemptMode=REQUEUE -> PreemptMode=OFF",
    )
    found = settings()
    assert found["PreemptType"] == ("preempt/none", "no job has to make room for another")
    assert found["PreemptMode"] == ("OFF", "jobs run to their end")
    assert set(partitions().values()) == {(TIMES, "see PreemptType")}


def test_a_site_that_announces_preemption_by_our_signal(configure):
    configure(
        "KillWait=5 -> KillWait=90\nSlurmctldParameters=enable_configless,preempt_send_user_signal"
    )
    found = settings()
    assert found["SlurmctldParameters"] == (
        "with preempt_send_user_signal",
        "a job that has to make room is told by our signal, saves its state and asks to go on",
    )
    assert found["KillWait"][0] == "90 sec"


def test_limits_of_arrays_of_accounts_and_of_partitions(configure):
    configure(
        f"MaxArraySize={MAX_ARRAY_SIZE} -> MaxArraySize=11",
        "Enforce=associations -> Enforce=safe",  # which brings others with it
        "PartitionName=high -> PartitionName=high State=DRAIN MaxTime=UNLIMITED DefaultTime=2-0",
    )
    found = settings()
    assert found["MaxArraySize"][0] == "11"
    value, meaning = found["AccountingStorageEnforce"]
    assert "safe" in value
    assert meaning.startswith(
        "jobs need an account that you may charge (--account), and its limits"
    )
    assert "Assoc... and QOS..." in meaning
    value, _ = partitions()["high"]
    assert value == "MaxTime=UNLIMITED, DefaultTime=2-00:00:00, State=DRAIN"


# Other clusters, by their configuration


@pytest.mark.parametrize(
    ("found", "name", "value", "words"),
    [
        ({}, "AuthInfo", "cred_expire=120 s", "held back"),  # Slurm's default
        ({}, "PreemptType", "", "no job has to make room"),
        ({}, "PreemptMode", "", "run to their end"),
        ({"PreemptType": "preempt/qos"}, "PreemptType", "preempt/qos", "sacctmgr show qos"),
        ({"PreemptType": "preempt/own"}, "PreemptType", "preempt/own", "a plugin of this site"),
        ({"PreemptMode": "GANG"}, "PreemptMode", "GANG", "partitions differ"),
        (
            {"AccountingStorageType": "accounting_storage/none"},
            "AccountingStorageType", "accounting_storage/none",
            "sacct is off: `tripletkit why` has only logs and what jobs say about themselves",
        ),
        ({"AccountingStorageType": "(null)"}, "AccountingStorageType", "(null)", "sacct is off"),
        (
            {"AccountingStorageEnforce": "none"},
            "AccountingStorageEnforce", "none", "jobs run without an account, too",
        ),
        ({"AccountingStorageEnforce": "all"}, "AccountingStorageEnforce", "all", "limits hold"),
        ({"AccountingStorageEnforce": "1"}, "AccountingStorageEnforce", "1", "need an account"),
    ],
)  # fmt: skip
def test_what_other_sites_say(found, name, value, words):
    (setting,) = (each for each in site.explain(found) if each.name == name)
    assert setting.value == value
    assert words in setting.meaning


# In the report of doctor


def report(folder: Path, capsys, *flags: str) -> str:
    """What doctor prints, without a study."""
    file = folder / "config.toml"
    fsio.write_text(file, f'[tuning]\nstorage_path = "{folder}/study.db"\n')
    words = ["doctor", "--config", str(file), "--set", f"global.log_dir={folder}/logs", *flags]
    cli.run(lambda: cli.app(words, prog_name="tripletkit", standalone_mode=False))
    return capsys.readouterr().out


def test_doctor_shows_them(slurm, tmp_path, capsys):
    found = json.loads(report(tmp_path, capsys, "--json"))
    assert [Setting(**each) for each in found["cluster"]] == site.settings()
    assert [Setting(**each) for each in found["partitions"]] == site.partitions()
    printed = report(tmp_path, capsys).splitlines()
    for title, shown in (("cluster:", site.settings()), ("partitions:", site.partitions())):
        first = printed.index(title) + 1
        assert printed[first : first + len(shown)] == [
            f"  {each.name} = {each.value}: {each.meaning}" for each in shown
        ]


def test_doctor_shows_none_of_a_slurm_that_does_not_answer(slurm, tmp_path, capsys, monkeypatch):
    text = (slurm.folder / "slurm.conf").read_text()
    away = tmp_path / "away.conf"
    away.write_text(re.sub(r"(?m)^(SlurmctldPort|MessageTimeout)=.*", r"\1=2", text))
    monkeypatch.setenv("SLURM_CONF", str(away))
    monkeypatch.setattr(queue, "PAUSES", ())
    for ask in (site.settings, site.partitions):
        with pytest.raises(ClusterError, match="Unable to contact slurm controller"):
            ask()
    found = json.loads(report(tmp_path, capsys, "--json"))
    assert (found["cluster"], found["partitions"]) == ([], [])
    assert "queue" in {each["kind"] for each in found["findings"]}


def test_doctor_shows_none_where_there_is_no_slurm(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = json.loads(report(tmp_path, capsys, "--json"))
    assert (found["cluster"], found["partitions"]) == ([], [])
    assert "queue" not in {each["kind"] for each in found["findings"]}
