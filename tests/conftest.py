"""What all tests share, and how they are spread over the processes of a parallel run."""

import logging
import os
import signal

import pytest

# Consoles fix their width at import if it is there; readline, which pytest loads, gives it to the
# processes of a parallel run.
os.environ.pop("COLUMNS", None)

from tests.cluster.fixture import cluster, slurm  # noqa: F401 - fixtures
from tripletkit.log import logger

# A shell that starts us in the background has us ignore these, and what we start would too. A
# handler that does nothing is as good for us, and is not inherited.
for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)

# Files whose tests go to any process one by one, because the file as a whole takes minutes.
APART = {
    "tests/test_budget.py",
    "tests/test_chaos.py",
    "tests/test_concurrency.py",
    "tests/test_embed.py",
    "tests/test_exactness.py",
    "tests/test_fleet.py",
    "tests/test_group.py",
    "tests/test_isolation.py",
    "tests/test_resources.py",
    "tests/test_resume.py",
    "tests/test_worker.py",
}

# What takes longest, by its beginning, in the order in which a parallel run starts it; all else
# comes after it. Computing and waiting for Slurm take turns, for the sake of the processors.
LONGEST = (
    "test_fleet.py::test_the_final_training_goes_on_past_its_time_limit",
    "test_fleet.py::test_whatever_happens",
    "test_chaos.py::test_whatever",
    "test_launch.py",
    "test_database.py",
    "test_worker.py::test_of_jobs_that_slurm_ends",
    "test_worker.py::test_preempted",
    "test_status.py",
    "test_worker.py::test_away_storage",
    "test_storage.py",
    "test_fleet.py::test_a_fleet",
    "test_control.py",
    "test_slurm_scripts.py",
    "test_fleet.py",
    "test_group.py::test_on_slurm",
    "test_embed.py::test_an_array",
    "test_embed.py",
    "test_budget.py",
    "test_concurrency.py",
    "test_secrets.py",
    "test_dashboard.py",
    "test_isolation.py",
    "test_report.py",
    "test_hostile_names.py",
    "test_rerun.py",
    "test_exactness.py",
    "test_resources.py",
    "test_provenance.py",
    "test_export.py",
    "test_read_only.py",
    "test_slots.py",
    "test_fuzz.py",
    "test_resume.py",
    "test_database_jobs.py",
    "test_group.py::test_gpus",
    "test_why.py",
    "test_cluster.py",
    "test_worker.py",
    "test_store.py",
    "test_study_commands.py",
    "test_tune_worker.py",
    "test_doctor.py",
    "test_loop.py",
    "test_group.py",
    "test_cli.py",
    "test_logs.py",
    "test_retrieval.py",
    "test_queue.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """For --dist=loadfile: the tests of a file together, in the order that we give them."""
    if config.option.dist != "loadfile":
        return None  # xdist has others
    from xdist.scheduler import LoadFileScheduling

    class Scheduler(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return nodeid if file in APART else file

    config.option.loadscopereorder = False  # by the number of tests
    return Scheduler(config, log)


def pytest_collection_modifyitems(config, items) -> None:
    if hasattr(config, "workerinput"):  # a process of a parallel run
        items.sort(key=lambda item: rank(item.nodeid))


def rank(nodeid: str) -> int:
    """The place in LONGEST."""
    name = nodeid.removeprefix("tests/")
    return next((i for i, each in enumerate(LONGEST) if name.startswith(each)), len(LONGEST))


@pytest.fixture(autouse=True)
def log_records_reach_caplog():
    """Commands configure the logger for a terminal; tests want its records."""
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.INFO)
