"""Messages to a webhook when something ended: a study, a training.

The address is a secret, as it mostly holds a token. It lies in a file of its user alone in the folder
of the run or study, and nowhere else. Whoever reports the end takes the file away first, so there is
one message per ending, whatever ends twice.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from tripletkit import __version__
from tripletkit.errors import ConfigError
from tripletkit.log import logger

VARIABLE = "TRIPLETKIT_WEBHOOK"
TRIES = 3
TIMEOUT = 10.0  # seconds for one try
LONGEST = 10_000  # characters of a file with an address; /dev/zero has no end
PAUSE = 1.0  # seconds before the second try; twice as long before the third
# Whatever hangs, name resolution included: then the job goes on.
PATIENCE = TRIES * TIMEOUT + 10.0


def address(given: str | None) -> str | None:
    """The address of a webhook, as `--webhook` or the variable gives it: an address, or a file.

    Raises ConfigError, without repeating the address, if it cannot be used.
    """
    if given and "://" in given:
        logger.warning(
            "others on this machine can read the address of --webhook while this runs (ps); "
            "--webhook FILE and the variable %s hide it", VARIABLE,
        )  # fmt: skip
    given = (given or os.environ.get(VARIABLE, "")).strip()
    if given and "://" not in given:
        given = _read(given)
    if not given:
        return None
    try:
        url = urlsplit(given)
        host, _ = url.hostname, url.port
        (host or "").encode("idna")  # as the connection does it
    except ValueError:  # its message may repeat the address
        raise _bad("is no address") from None
    if not given.isascii() or not given.isprintable() or " " in given or not host:
        raise _bad("is no address")
    if url.username is not None or url.password is not None:
        raise _bad("has a user or a password before its host, which is not supported")
    if url.scheme != "https" and not (url.scheme == "http" and _is_near(host)):
        raise _bad("must begin with https:// (http:// only to a private address)")
    return given


def _read(file: str) -> str:
    try:
        with Path(file).expanduser().open() as opened:
            return opened.read(LONGEST).strip()
    except OSError as error:
        raise _bad(f"is no address https://..., nor a file: {error.strerror}") from None
    except RuntimeError:  # ~nobody-here/...
        raise _bad("is no address https://..., nor a file: there is no such user") from None
    except ValueError:
        raise _bad("is to be in a file that is no text") from None


def keep(path: Path, url: str) -> str | None:
    """Leave the address for the processes that will report the end, in a file of mode 0600.

    Returns the one that was there before.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text().strip() if path.exists() else None
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    aside.unlink(missing_ok=True)
    try:
        # Through one handle: others may be able to rename files in a shared folder.
        handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(url + "\n")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return before


def forget(path: Path) -> bool:
    """No message, after all; false if somebody sends it already."""
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def send(path: Path, text: str, facts: Mapping[str, Any]) -> bool:
    """Send one message to the address in the file `path`, if there is one, and remove the file.

    The message is `{"text": text, "tripletkit": facts}`. Returns whether it arrived. Never raises,
    and takes no longer than PATIENCE; what goes wrong is one warning.
    """
    host = ""
    try:
        url = _take(path)
        if url is None:
            return False
        host = urlsplit(url).hostname or ""
        body = json.dumps({"text": text, "tripletkit": dict(facts)}, default=str).encode()
        problem = _within(PATIENCE, url, body)
    except Exception as error:  # noqa: BLE001 - a message is no reason to fail
        problem = type(error).__name__
    if problem:
        logger.warning("the webhook at %s did not get the message: %s", host, problem)
    else:
        logger.info("told the webhook at %s", host)
    return not problem


def _bad(what: str) -> ConfigError:
    return ConfigError(
        f"the webhook's address {what}", hint=f"see --webhook and the variable {VARIABLE}"
    )


def _is_near(host: str) -> bool:
    """On this machine, or a number in a private network."""
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_private
    return False


def _take(path: Path) -> str | None:
    """The address. Of several processes one gets it: the one that removes the file."""
    try:
        url = path.read_text().strip()
        path.unlink()
    except FileNotFoundError:
        return None
    return url or None


def _within(seconds: float, url: str, body: bytes) -> str:
    """`_deliver`, left alone after so many seconds."""
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(_deliver(url, body)), daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else f"no answer within {seconds:g} s"


def _deliver(url: str, body: bytes) -> str:
    """Post the message, again where that may help; returns what went wrong, "" if nothing."""
    problem = ""
    for turn in range(TRIES):
        if turn:
            time.sleep(PAUSE * 2 ** (turn - 1))
        again, problem = _post(url, body)
        if not again:
            break
    return problem


def _post(url: str, body: bytes) -> tuple[bool, str]:
    """Whether to try again, and what went wrong. Nothing of the address but the host is in it."""
    request = urllib.request.Request(  # noqa: S310 - `address` has seen to the scheme
        url,
        data=body,
        headers={
            "Content-Type": "application/json; charset=utf-8",
            "User-Agent": f"tripletkit/{__version__}",
        },
    )
    parts = urlsplit(url)
    handlers: list[Any] = [_NoRedirects]
    if parts.scheme == "http":  # private: no proxy leads there
        handlers.append(urllib.request.ProxyHandler({}))
    try:
        urllib.request.build_opener(*handlers).open(request, timeout=TIMEOUT).close()
    except urllib.error.HTTPError as error:
        error.close()
        return error.code >= 500 or error.code == 429, _answer(error, parts)
    except urllib.error.URLError as error:
        return True, _words(error.reason)
    except Exception as error:  # noqa: BLE001 - its message may repeat the address
        return True, _words(error)
    return False, ""


def _answer(error: urllib.error.HTTPError, sent: SplitResult) -> str:
    if not 300 <= error.code < 400:
        return f"HTTP {error.code}"
    there = urlsplit(error.headers.get("Location", "")).hostname or sent.hostname
    return f"HTTP {error.code}: it redirects to {there}; give the address that it redirects to"


def _words(reason: object) -> str:
    if isinstance(reason, TimeoutError):
        return f"no answer within {TIMEOUT:g} s"
    if isinstance(reason, OSError):
        return reason.strerror or type(reason).__name__
    return "it cannot be reached"


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Follows none: the message and the token of the address are for one host."""

    def redirect_request(self, *_args: Any, **_more: Any) -> None:
        return None
