"""A PostgreSQL of one's own, in a folder on a shared disk: no administrator needed."""

from tripletkit.tune.database.client import (
    Status,
    connection,
    down,
    max_connections_for,
    status,
    wait_until_up,
)
from tripletkit.tune.database.job import BY_SIGNAL, serve
from tripletkit.tune.database.server import Connection

__all__ = [
    "BY_SIGNAL",
    "Connection",
    "Status",
    "connection",
    "down",
    "max_connections_for",
    "serve",
    "status",
    "wait_until_up",
]
