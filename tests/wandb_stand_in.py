"""A stand-in of the W&B server on the loopback device: the queries of its public API, no more.

The real `wandb` client talks to it. What it answers follows the queries in the client's source:
who am I, list a project's runs (in pages), one run in full, a run's sampled history.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Run:
    """A run as the server keeps it: `history` has a row per `run.log`, "NaN" is text in it."""

    name: str  # the display name
    config: Mapping[str, Any] = field(default_factory=dict)
    history: tuple[Mapping[str, Any], ...] = ()
    summary: Mapping[str, Any] | None = None  # the last values, when None
    state: str = "finished"
    id: str = ""

    def node(self) -> dict[str, Any]:
        """The GraphQL type Run."""
        summary = {key: value for row in self.history for key, value in row.items()}
        config = {key: {"desc": None, "value": value} for key, value in self.config.items()}
        return {
            "id": f"storage-{self.name}",
            "projectId": "1",
            "name": self.id or f"id-{self.name}",
            "displayName": self.name,
            "state": self.state,
            "tags": [],
            "historyLineCount": len(self.history),
            "user": {"name": "Ada", "username": "ada"},
            "config": json.dumps({"_wandb": {"value": {}}, **config}),
            "summaryMetrics": json.dumps(summary if self.summary is None else self.summary),
            "systemMetrics": "{}",
        }


class Server(ThreadingHTTPServer):
    """Answers one entity's queries, and keeps the names of those that it was asked."""

    daemon_threads = True

    def __init__(self, projects: Mapping[str, list[Run]], *, key: str, entity: str, page: int):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.projects = projects
        self.entity = entity
        self.page = page
        self.authorization = "Basic " + base64.b64encode(f"api:{key}".encode()).decode()
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, query: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        (operation,) = re.findall(r"query\s+(\w+)", query) or ["Viewer"]
        self.asked.append(operation)
        if operation in ("Viewer", "GetDefaultEntity"):
            return {"viewer": {"id": "1", "entity": self.entity, "username": "ada", "flags": "{}"}}
        runs = self.projects.get(variables["project"])
        if runs is None or variables["entity"] != self.entity:
            return {"project": None}
        if operation == "Runs":
            return {"project": self._page(runs, query, variables)}
        (run,) = (run for run in runs if run.node()["name"] == variables["name"])
        if operation == "Run":
            return {"project": {"run": _selected(run, query)}}
        if operation == "RunSampledHistory":
            sampled = [_sampled(run.history, **json.loads(s)) for s in variables["specs"]]
            return {"project": {"run": {"sampledHistory": sampled}}}
        raise NotImplementedError(operation)

    def _page(self, runs: list[Run], query: str, variables: Mapping[str, Any]) -> dict[str, Any]:
        if json.loads(variables["filters"]) or variables["order"] != "+created_at":
            raise NotImplementedError("filters and orders")
        first = int(variables["cursor"] or 0)
        last = first + min(variables["perPage"], self.page)
        edges = [
            {"node": _selected(run, query), "cursor": str(first + i + 1)}
            for i, run in enumerate(runs[first:last])
        ]
        more = {"endCursor": str(last), "hasNextPage": last < len(runs)}
        return {"runCount": len(runs), "runs": {"edges": edges, "pageInfo": more}}


def _selected(run: Run, query: str) -> dict[str, Any]:
    """The fields that the query names: the client loads the others when it needs them."""
    return {key: value for key, value in run.node().items() if re.search(rf"\b{key}\b", query)}


def _sampled(history: tuple[Mapping[str, Any], ...], keys: list[str], samples: int) -> Any:
    numbered = [{"_step": step, **row} for step, row in enumerate(history)]
    rows = [{key: row[key] for key in keys} for row in numbered if all(key in row for key in keys)]
    return rows[:: max(1, -(-len(rows) // samples))]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.path != "/graphql":  # the client's own telemetry
            self._send(404, {})
        elif self.headers["Authorization"] != self.server.authorization:
            self._send(401, {"errors": [{"message": "user is not logged in"}]})
        else:
            request = json.loads(body)
            try:
                data = self.server.answer(request["query"], request.get("variables") or {})
            except NotImplementedError as error:
                self._send(200, {"errors": [{"message": f"not in the stand-in: {error}"}]})
            else:
                self._send(200, {"data": data})

    def _send(self, status: int, content: Mapping[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Keep the tests' output clean."""


@contextlib.contextmanager
def serving(
    projects: Mapping[str, list[Run]], *, key: str, entity: str = "lab", page: int = 50
) -> Iterator[Server]:
    """A server for the length of the block; it gives at most `page` runs at a time."""
    with Server(projects, key=key, entity=entity, page=page) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
