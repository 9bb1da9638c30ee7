"""What git says of a folder, asked so that nothing in the repository's configuration is run.

Repositories come from anywhere: their configuration may name monitors, filters, drivers, hooks and
remotes that are programs. Git is asked to do without all of them, and gets a few seconds.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import signal
import subprocess
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

SECONDS = 5.0  # for an answer: a large repository on a slow disk must not hold up a training
MOST_BYTES = 2 * 2**20  # of a diff; more is data, not code
MOST_NAMES = 100  # of untracked files
LONG = 5000  # lines; longer changes are not compared line by line

_SAFE = {
    "safe.directory": "*",  # shared folders belong to others
    "core.fsmonitor": "false",
    "core.hooksPath": os.devnull,
    "core.untrackedCache": "keep",
    "diff.submodule": "short",
    "diff.noprefix": "false",
    "diff.mnemonicPrefix": "false",
    "diff.renames": "false",
    "status.renames": "false",
    "color.ui": "false",
}
_DIFF = ("--binary", "--no-color", "--no-ext-diff", "--no-textconv", "--ignore-submodules=dirty")
_STATUS = ("--porcelain=v2", "--branch", "-z", "--ignore-submodules=dirty")
_DRIVER = re.compile(r"filter\.(.+)\.(?:clean|smudge|process|required)")

BLANK = "***"
# Names of what holds a secret. Patterns begin with them, never with what may stand before: a search
# takes a time then that grows with the length of a line, and not with its square.
SECRETS = (
    r"pass(?:word|wd|phrase)|secret|token|credential|(?:api|access|private)_?key|webhook|bearer"
    r"|authorization|login\("
)
_SECRET = re.compile(rf"({SECRETS})([\w.-]{{0,40}}['\"\])]*\s*[:=]\s*)?.+", re.IGNORECASE)
_SUSPECT = re.compile(rf"://|{SECRETS}")  # in lower case, which is several times quicker
_ADDRESS = re.compile(r"://([\w.:\[\]-]*)(\S*)")  # its host, unless a user is before that; the rest


class State(NamedTuple):
    """The work tree that a folder is in, as it is now."""

    root: Path
    commit: str | None
    """None before the first commit."""
    branch: str | None
    """None when HEAD is detached."""
    remote: str | None
    """The address of `origin`, or else of the first remote, without credentials."""
    changes: int | None
    """Tracked files that differ from the commit; None: git did not say in time."""
    untracked: tuple[str, ...] | None
    """At most MOST_NAMES; folders that hold nothing else end in a slash. None: not in time."""
    diff: bytes
    """From the commit to the files as they are, secrets blanked; empty without changes."""
    cut: bool
    """Whether the diff was too long, and its end is missing."""


class _NoAnswerError(Exception):
    """Git is not installed, took too long, or refused."""


def state(folder: Path, *, holding: Path | None = None) -> State | None:
    """The state of the repository that `folder` is in; None without one, or without git.

    With `holding`, a file: None also if that is in the folder of the repository but not part of
    it, as an environment of installed packages is. And None if the repository lies elsewhere than
    its files: its settings can name anybody's folder as theirs.
    """
    ask = _Asker(folder)
    try:
        root = Path(os.fsdecode(ask("rev-parse", "--show-toplevel")).removesuffix("\n"))
        where = ("rev-parse", "--absolute-git-dir")
        if ask(*where) != _Asker(root)(*where):
            return None
        if holding is not None:
            ask("ls-files", "--error-unmatch", "--", str(holding))
        settings = _settings(ask("config", "--list", "-z"))
    except _NoAnswerError:
        return None
    commit: str | None = None
    branch: str | None = None
    changes: int | None = None
    untracked: tuple[str, ...] | None = None
    diff = b""
    try:
        ask.switch_off(settings)
        entries = ask.entries("status", *_STATUS, "--untracked-files=no")
        facts = dict(e[2:].split(" ", 1) for e in entries if e.startswith("# "))
        commit = None if facts["branch.oid"] == "(initial)" else facts["branch.oid"]
        branch = None if facts["branch.head"] == "(detached)" else facts["branch.head"]
        changed = sum(not e.startswith("# ") for e in entries)
        if commit is not None and changed:
            diff = ask("diff", *_DIFF, "HEAD", "--")
        changes = changed
        entries = ask.entries("status", *_STATUS, "--untracked-files=normal")  # may take long
        untracked = tuple(e.removeprefix("? ") for e in entries if e.startswith("? "))[:MOST_NAMES]
    except _NoAnswerError:  # these are quick in any repository
        commit = commit or ask.line("rev-parse", "--quiet", "--verify", "HEAD")
        branch = branch or ask.line("symbolic-ref", "--quiet", "--short", "HEAD")
    return State(
        root=root,
        commit=commit,
        branch=branch,
        remote=_remote(settings),
        changes=changes,
        untracked=untracked,
        diff=_blanked(diff[:MOST_BYTES]),
        cut=len(diff) > MOST_BYTES,
    )


def without_credentials(address: str) -> str:
    """The address without user and password."""
    scheme, separator, rest = address.partition("://")
    return scheme + separator + rest.rpartition("@")[2] if separator else address


def hosts_only(text: str) -> str:
    """`text` with addresses cut down to their host: user, password and path may all be the secret."""

    def shown(found: re.Match[str]) -> str:
        host, rest = found.groups()
        return f"://{'' if '@' in rest else host}{BLANK if rest else ''}"

    return _ADDRESS.sub(shown, text)


def diff_of_diffs(a: str, b: str) -> str:
    """Where two sets of changes differ, file by file."""
    ours, theirs = _by_file(a), _by_file(b)
    parts = []
    for file in dict.fromkeys([*ours, *theirs]):
        one, other = ours.get(file, []), theirs.get(file, [])
        if one == other:
            continue
        if max(len(one), len(other)) > LONG:
            parts.append(f"{file}: changes of {len(one)} and {len(other)} lines, too long to show")
            continue
        parts += difflib.unified_diff(one, other, f"a: {file}", f"b: {file}", lineterm="", n=1)
    return "\n".join(parts)


def _by_file(diff: str) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in diff.splitlines():
        if line.startswith("diff --git "):
            lines = files.setdefault(line.rpartition(" b/")[2], [])
        elif not line.startswith("index "):
            lines.append(re.sub(r"^@@ \S+ \S+ @@", "@@", line))  # line numbers say nothing here
    return files


def _blanked(diff: bytes) -> bytes:
    """A diff without what may be a secret: what follows on the name of one, to the end of its line.

    It still tells states apart that differ in no more than a secret: the whole file's hash is in it.
    """
    lines = diff.decode("latin-1").split("\n")  # any bytes, and the same ones back
    code = True
    for number, line in enumerate(lines):
        if line.startswith(("@@", "diff --git ")):
            code = line.startswith("@@")
        if code and _SUSPECT.search(line.lower()):
            lines[number] = _SECRET.sub(rf"\1\2{BLANK}", hosts_only(line))
    return "\n".join(lines).encode("latin-1")


def _settings(listed: bytes) -> dict[str, str]:
    pairs = (entry.partition("\n") for entry in os.fsdecode(listed).split("\0") if entry)
    return {name: value for name, _, value in pairs}


def _remote(settings: dict[str, str]) -> str | None:
    urls = {k: v for k, v in settings.items() if re.fullmatch(r"remote\..+\.url", k)}
    url = urls.get("remote.origin.url", next(iter(urls.values()), None))
    return None if url is None else without_credentials(url).partition("?")[0]


class _Asker:
    """Calls git for one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
        self.environment |= {
            "LC_ALL": "C",
            "GIT_TERMINAL_PROMPT": "0",
            "GIT_NO_LAZY_FETCH": "1",
            "GIT_ALLOW_PROTOCOL": "none",
        }
        self.options = _options(_SAFE)

    def switch_off(self, settings: Mapping[str, str]) -> None:
        """Do without the filters that the repository's settings name, from here on."""
        for name in settings:
            if driver := _DRIVER.fullmatch(name):
                if "=" in driver[1]:
                    raise _NoAnswerError(f"{name} cannot be switched off")
                own = f"filter.{driver[1]}."  # "" is no command
                off = {own + key: "" for key in ("clean", "smudge", "process")}
                self.options += _options({**off, own + "required": "false"})

    def line(self, *arguments: str) -> str | None:
        """One line of an answer; None if there is none."""
        try:
            return os.fsdecode(self(*arguments)).strip() or None
        except _NoAnswerError:
            return None

    def entries(self, *arguments: str) -> list[str]:
        """What git prints with -z."""
        return os.fsdecode(self(*arguments)).split("\0")[:-1]

    def __call__(self, *arguments: str) -> bytes:
        """What git prints, up to one byte more than MOST_BYTES."""
        command = ["git", "--no-pager", "--no-optional-locks", *self.options]
        return _output([*command, "-C", str(self.folder), *arguments], self.environment)


def _options(settings: Mapping[str, str]) -> list[str]:
    return [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]


def _output(command: list[str], environment: dict[str, str]) -> bytes:
    try:
        process = subprocess.Popen(  # noqa: S603 - arguments of ours
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
    except OSError as error:
        raise _NoAnswerError(str(error)) from None

    def end() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(SECONDS, end)
    timer.start()
    with process:
        assert process.stdout is not None
        answer = process.stdout.read(MOST_BYTES + 1)
        enough = len(answer) > MOST_BYTES
        if enough:
            end()
    timer.cancel()
    if process.returncode and not enough:
        raise _NoAnswerError(f"exit code {process.returncode}")
    return answer
