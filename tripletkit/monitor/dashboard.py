"""`tripletkit study dashboard`: Optuna's own pages about a study, for as long as the terminal."""

from __future__ import annotations

import errno
import getpass
import importlib.util
import io
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from socketserver import TCPServer, ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from tripletkit import log
from tripletkit.config import Config
from tripletkit.errors import ConfigError
from tripletkit.log import logger
from tripletkit.tune import storage
from tripletkit.tune.retry import redacted

PORT = 8080
TRIES = 20  # ports from there on, unless one was asked for
PATIENCE = 10.0  # seconds for a storage that is away, before a page says so
LIBRARY = logging.getLogger("optuna_dashboard")
# The pages load what comes from here alone, whatever the notes of a study say, and stand in no frame.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Application = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]


def serve(config: Config, host: str, port: int | None) -> None:
    """Serve the pages on host:port until Ctrl-C, SIGTERM or SIGHUP, and say where they are.

    Raises as `opened`.
    """
    with opened(config, host, port) as (server, lines):
        for line in (*lines, "Ctrl-C ends it"):
            log.out.print(line, soft_wrap=True)
        with _ended_by_signals(server):
            server.serve_forever()


@contextmanager
def opened(config: Config, host: str, port: int | None) -> Iterator[tuple[_Server, list[str]]]:
    """A server that is bound, and lines that say what it serves, where, and to whom.

    Without a `port` it is the first free one from PORT on; 0 is any. Raises ConfigError without
    optuna-dashboard and for an address that cannot be had, StorageError without the study.
    """
    if importlib.util.find_spec("optuna_dashboard") is None:
        raise ConfigError(
            "the dashboard needs optuna-dashboard", hint="pip install 'tripletkit[dashboard]'"
        )
    study = storage.open_study(
        config.tuning, seed=0, workers=1, patience=PATIENCE, read_only=True
    ).study
    with _listening(host, port) as server:
        server.set_app(_guarded(_pages(study._storage), host))
        bound = server.server_port
        if port is None and bound != PORT:
            logger.info("port %d is taken: %d instead", PORT, bound)
        page = f"dashboard/studies/{study._study_id}"
        yield (
            server,
            [
                f"study {study.study_name} ({storage.location(config.tuning)}), read only",
                *_addresses(host, bound, page, os.environ),
            ],
        )


# Pages


def _pages(shared: Any) -> Application:
    """Optuna's application. Its complaints come in our log, a line each."""
    import optuna_dashboard

    LIBRARY.propagate = False
    LIBRARY.handlers = [_Briefly()]
    application: Application = optuna_dashboard.wsgi(shared)
    return application


class _Briefly(logging.Handler):
    """Into our log, without the stack, which is of use to the library's authors only.

    Pages ask every few seconds: the same complaint again is not repeated.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last = ""

    def emit(self, record: logging.LogRecord) -> None:
        line, *_ = record.getMessage().splitlines() or [""]
        if line != self._last:
            self._last = line
            logger.log(record.levelno, "dashboard: %s", redacted(line))


class _Complaints(io.StringIO):
    """Where the library writes the stack of an error to; what matters is the last line."""

    def flush(self) -> None:
        if lines := self.getvalue().splitlines():
            LIBRARY.error(lines[-1])
        self.seek(0)
        self.truncate()


def _guarded(application: Application, host: str) -> Application:
    """Only what reads, and on a loopback address only what asks for this machine.

    The pages have buttons that delete studies and finish running trials. And any page in a browser
    can ask us under a name of its own that leads to 127.0.0.1, and read the answer.
    """
    names = {"localhost", "127.0.0.1", "[::1]", _in_url(host)} if _is_loopback(host) else None

    def answer(request: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        asked = re.sub(r":\d+$", "", request.get("HTTP_HOST", "").lower())
        if names is not None and asked not in names:
            reason = "this dashboard goes by 127.0.0.1 and localhost only, at whatever port"
        elif request["REQUEST_METHOD"] not in ("GET", "HEAD"):
            reason = "this dashboard is read only"
        else:
            return application(
                request,
                lambda status, headers, *more: start(
                    status, [*headers, ("Content-Security-Policy", POLICY)], *more
                ),
            )
        start("403 Forbidden", [("Content-Type", "application/json")])
        return [json.dumps({"reason": reason}).encode()]

    return answer


# Server


class _Server(ThreadingMixIn, WSGIServer):
    """A thread per request: a browser asks for much at once, and one answer may take seconds."""

    daemon_threads = True
    request_queue_size = 64

    def server_bind(self) -> None:
        # HTTPServer's would ask the name service who we are, which may take long.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]
        self.setup_environ()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - its place
        logger.debug("a request of %s broke off", client_address[0], exc_info=sys.exc_info())


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(WSGIRequestHandler):
    def get_environ(self) -> dict[str, Any]:
        # Optuna's pages want it, and not everybody sends it.
        return {"HTTP_ACCEPT_ENCODING": "", **super().get_environ()}

    def get_stderr(self) -> io.StringIO:
        return _Complaints()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - its name there
        logger.debug(format, *args)


@contextmanager
def _listening(host: str, port: int | None) -> Iterator[_Server]:
    """A server that is bound, to the first free of some ports unless it has to be this one."""
    ports = range(PORT, PORT + TRIES) if port is None else (port,)
    for each in ports:
        try:
            server = _bound(host, each)
        except OSError as error:
            if error.errno == errno.EADDRINUSE and each != ports[-1]:
                continue
            taken = error.errno == errno.EADDRINUSE
            what = f"ports {ports[0]} to {ports[-1]}" if len(ports) > 1 else f"port {each}"
            raise ConfigError(
                f"{what} of {host} cannot be had: {error.strerror or error}",
                hint="--port N names another, --port 0 takes any that is free"
                if taken or error.errno == errno.EACCES
                else "--host is an address or a name of this machine; 127.0.0.1 always is one",
            ) from None
        with server:
            yield server
        return


def _bound(host: str, port: int) -> _Server:
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    kind = _Server6 if family == socket.AF_INET6 else _Server
    return kind((str(address[0]), port), _Handler)


@contextmanager
def _ended_by_signals(server: _Server) -> Iterator[None]:
    """Let signals end `serve_forever`; with nohup, closing the terminal does not."""

    def end(*_: object) -> None:
        # From another thread: it waits for the loop, which this one is in.
        threading.Thread(target=server.shutdown, daemon=True).start()

    ends = [
        each for each in ENDS if each != signal.SIGHUP or signal.getsignal(each) != signal.SIG_IGN
    ]
    before = {each: signal.signal(each, end) for each in ends}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


# Addresses


def _addresses(host: str, port: int, page: str, environment: Mapping[str, str]) -> list[str]:
    """Lines that say where to find the page, and who else can."""
    name = _full_name(socket.gethostname())
    if not _is_loopback(host):
        shown = name if host in ("0.0.0.0", "::", "") else host  # noqa: S104 - compared
        return [
            f"http://{_in_url(shown)}:{port}/{page}",
            f"whoever reaches {shown} over the network can read it: there is no password",
        ]
    user = _user()
    jump = ""
    submitted_on = environment.get("SLURM_SUBMIT_HOST", "")
    if _short(submitted_on) not in ("", _short(name)):  # in a job, and not in a shell of salloc
        jump = f"-J {user}@{_full_name(submitted_on)} "
    there = f"{_in_url(host)}:{port}"
    return [
        f"http://{there}/{page}",
        f"from your own machine, through: ssh -N -L {port}:{there} {jump}{user}@{name}",
        f"whoever is logged in on {name} can read it: there is no password",
    ]


def _full_name(host: str) -> str:
    """The name with its domain, if anybody knows it."""
    full = socket.getfqdn(host)
    return host if full.startswith(("localhost", "ip6-")) or "." not in full else full


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # an account without a name
        return "USER"


def _short(host: str) -> str:
    return host.partition(".")[0]


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host == "::1" or host.startswith("127.")


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host
