"""What all tests share."""

import logging

import pytest

from tests.cluster.fixture import cluster, slurm  # noqa: F401 - fixtures
from tripletkit.log import logger


@pytest.fixture(autouse=True)
def log_records_reach_caplog():
    """Commands configure the logger for a terminal; tests want its records."""
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.INFO)
