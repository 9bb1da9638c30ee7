"""Fixtures of the tests that need Slurm: one cluster for the whole session."""

import os
from collections.abc import Iterator

import pytest

from . import FOREIGN, Cluster, running


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The cluster of this session, started by the first test that wants it."""
    with running() as cluster:
        yield cluster


@pytest.fixture
def slurm(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """The same cluster, this process talks to it, and what the test leaves is cleared away."""
    for name in [name for name in os.environ if name.startswith(FOREIGN)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    yield cluster
    cluster.reset()
