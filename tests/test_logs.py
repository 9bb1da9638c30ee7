"""Logs: the last lines of each file of a job, trial or study, and what is added until it is over."""

import contextlib
import io
import os
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import fleet
from tests.test_doctor import WORKER, process
from tests.test_status import Ran, Screen, claim, prepare, record, runner, write_config
from tripletkit import cli, fsio, log
from tripletkit import config as configuration
from tripletkit.config import Config
from tripletkit.monitor import logs
from tripletkit.monitor.logs import Tail
from tripletkit.paths import LogPaths, StudyPaths
from tripletkit.tune import attempts


@pytest.fixture
def config(tmp_path, monkeypatch) -> Config:
    """A study on a machine without Slurm."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "logs").mkdir()
    return write_config(tmp_path)


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., Ran]:
    return runner(monkeypatch, capsys)


def write(config: Config, name: str, text: str | bytes) -> Path:
    """A log of a job."""
    path = config.global_.log_dir / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def add(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def numbered(count: int, first: int = 0) -> str:
    return "".join(f"line {number}\n" for number in range(first, first + count))


# The end of a file, and what is added to it


def last_lines(data: bytes, count: int) -> str:
    """The slow way: all lines, and then the last ones."""
    lines = re.findall(rb"[^\n]*\n|[^\n]+\Z", data)
    return b"".join(lines[max(len(lines) - count, 0) :]).decode(errors="replace")


# Bytes of lines: empty ones, with CRLF, of several bytes per letter, and that are no UTF-8.
PIECES = st.sampled_from(
    [b"\n", b"\n", b"a", b"bc", b"\r\n", "ü€".encode(), b"\xff", b"\xc3", b"\0"]
)
DATA = st.lists(PIECES, max_size=30).map(b"".join)


@settings(deadline=None)
@given(data=DATA, lines=st.integers(0, 12), block=st.integers(1, 9), added=DATA)
def test_the_last_lines_of_any_file(tmp_path_factory, data, lines, block, added):
    path = tmp_path_factory.getbasetemp() / "tail.log"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logs, "BLOCK", block)
        tail = Tail(path)
        tail.skip_to_last(lines)
    assert tail.read(to_the_end=True) == last_lines(data, lines)
    with path.open("ab") as file:
        file.write(added)
    assert tail.read(to_the_end=True) == added.decode(errors="replace")
    assert tail.read(to_the_end=True) == ""


@settings(deadline=None)
@given(parts=st.lists(DATA, max_size=8))
def test_whatever_the_steps_in_which_a_file_grows_its_lines_come_whole_and_once(
    tmp_path_factory, parts
):
    path = tmp_path_factory.getbasetemp() / "grows.log"
    path.write_bytes(b"")
    tail, said = Tail(path), []
    for part in parts:
        with path.open("ab") as file:
            file.write(part)
        said.append(tail.read())
        assert said[-1] in ("", said[-1].rpartition("\n")[0] + "\n")
    said.append(tail.read(to_the_end=True))
    assert "".join(said) == b"".join(parts).decode(errors="replace")


@pytest.mark.parametrize("lines", [0, 1, 900, 1000, 9999])
def test_the_last_lines_of_a_file_that_is_longer_than_a_block(tmp_path, lines):
    path = tmp_path / "long.log"
    data = "".join(f"{number:0200}\n" for number in range(1000)).encode()
    assert len(data) > 3 * logs.BLOCK
    path.write_bytes(data)
    tail = Tail(path)
    tail.skip_to_last(lines)
    assert tail.read() == last_lines(data, lines)


def test_a_file_that_is_not_there_yet_is_read_from_its_start(tmp_path):
    tail = Tail(tmp_path / "late.log")
    tail.skip_to_last(1)
    assert tail.read() == ""
    tail.path.write_text(numbered(3))
    assert tail.read() == numbered(3)


def test_a_file_that_was_cut_off_is_read_from_its_start(tmp_path):
    tail = Tail(tmp_path / "cut.log")
    tail.path.write_text(numbered(3))
    tail.skip_to_last(1)
    assert tail.read() == "line 2\n"
    tail.path.write_text("anew\n")
    assert tail.read() == "anew\n"


def test_a_file_that_was_replaced_is_read_from_its_start(tmp_path):
    tail = Tail(tmp_path / "replaced.log")
    tail.path.write_text(numbered(3))
    assert tail.read() == numbered(3)
    other = tmp_path / "other.log"
    other.write_text(numbered(9))  # longer than what was read
    other.replace(tail.path)
    assert tail.read() == numbered(9)


def test_a_file_that_vanishes_says_nothing(tmp_path):
    tail = Tail(tmp_path / "gone.log")
    tail.path.write_text(numbered(3))
    assert tail.read() == numbered(3)
    tail.path.unlink()
    assert tail.read(to_the_end=True) == ""
    tail.path.write_text("anew\n")
    assert tail.read() == "anew\n"


# Once


def test_both_files_of_a_job_are_shown_below_their_names(config, run):
    record(config, "local-1", "tune:s")
    write(config, "tune_local-1.err", numbered(60) + "no end")
    write(config, "tune_local-1.out", "result\n")
    seen = run(config, "logs", "local-1", "-n", "2")
    assert seen.code == 0
    assert seen.out == (
        "==> tune_local-1.err <==\nline 59\nno end\n==> tune_local-1.out <==\nresult\n"
    )


def test_fifty_lines_of_a_file_unless_said_otherwise(config, run):
    record(config, "local-1", "train:run-1")
    write(config, "train_local-1.err", numbered(70))
    write(config, "train_local-1.out", "")  # as good as none
    assert run(config, "logs", "run-1").out == numbered(50, 20)
    assert run(config, "logs", "run-1", "-n", "1").out == numbered(1, 69)
    assert run(config, "logs", "run-1", "-n", "999").out == numbered(70)
    assert run(config, "logs", "run-1", "-n", "0").out == ""
    assert run(config, "logs", "run-1", "-n", "-1").code == 2


def test_what_a_log_says_is_neither_wrapped_nor_interpreted(config, run):
    said = f"[red]{'long ' * 99}[/red] :smile: 50%\r\n"
    write(config, "tune_7.err", said.encode() + b"\xff\xfe\n")
    assert run(config, "logs", "7").out.replace("\r\n", "\n") == (said + "��\n").replace(
        "\r\n", "\n"
    )


def test_a_terminal_obeys_nothing_that_a_log_says(config, run):
    """Who may append to a log has no say over the terminal; in a pipe it is what it is."""
    said = "\x1b[31mred\x1b[0m \x1b]0;title\a\x1b[2J\n 10%\r 20%\r\n\u202eover\n"
    write(config, "tune_7.err", said)
    run(config, "status")  # writes the file
    file = config.global_.log_dir.parent / "given.toml"
    for terminal in (True, False):
        with Screen("logs", "7", "-c", file, terminal=terminal) as screen:
            assert screen.process.wait(60) == 0
            seen = screen.text.replace("\r\n", "\n")  # as a terminal ends its lines
            assert (said.replace("\r\n", "\n") in seen) == (not terminal)
            shown = "red \ufffd]0;title\ufffd\ufffd[2J\n 10%\n 20%\n\ufffdover\n"
            assert (shown in seen) == terminal


def test_the_elements_of_an_array_stand_before_their_lines(config, run):
    for element in (0, 2, 10):
        write(config, f"tune_12_{element}.out", f"element {element}\n\nno end")
    write(config, "tune_120_0.out", "of another array\n")
    assert run(config, "logs", "12").out == "".join(
        f"[tune_12_{element}] element {element}\n[tune_12_{element}] \n[tune_12_{element}] no end\n"
        for element in (0, 2, 10)
    )
    assert run(config, "logs", "12_2").out == "element 2\n\nno end"
    assert run(config, "logs", "12", "-n", "0").out == ""


def test_a_study_has_the_logs_of_all_that_worked_for_it(config, run):
    """Of its workers, of jobs that once had one of its trials, and of its final training."""
    shared, paths = prepare(config), StudyPaths(config.output_dir / "s")
    claim(shared, "8_0")
    attempts.begin(paths.trial(0).attempts, {"job": "5", "attempt": 1}, from_epoch=0)
    record(config, "9", "best:s")
    record(config, "10", "tune:other")
    record(config, "11", "train:run-1")
    for name in ("tune_5", "tune_8_0", "best_training_9", "tune_10", "train_11"):
        write(config, f"{name}.err", f"by {name}\n")
    assert run(config, "logs").out == (
        "[tune_5] by tune_5\n[tune_8_0] by tune_8_0\n[best_training_9] by best_training_9\n"
    )
    assert run(config, "logs", "other").out == "[tune_10] by tune_10\n"


def test_a_trial_has_a_log_of_its_own(config, run):
    claim(prepare(config), "12_0")
    write(config, "tune_12_0.err", "of its job\n")
    trial = StudyPaths(config.output_dir / "s").trial(0)
    seen = run(config, "logs", "trial:0")
    assert seen.code == 1
    assert f"error: trial 0 has written no log {trial.log}" in seen.err
    assert "hint: -f waits for it" in seen.err
    trial.root.mkdir()
    trial.log.write_text(numbered(3))
    assert run(config, "logs", "0", "-n", "2").out == numbered(2, 1)


def test_what_has_written_nothing_is_an_error(config, run):
    record(config, "local-1", "tune:s")
    seen = run(config, "logs", "local-1")
    assert (seen.code, seen.out) == (1, "")
    assert "error: job local-1 has written no log" in seen.err
    assert run(config, "logs").code == 1


# As it grows


class Following:
    """`logs -f` in a thread: what it has printed, and its exit code once it has ended."""

    def __init__(self, words: list[str], printed: io.StringIO, said: io.StringIO) -> None:
        self._printed, self._said = printed, said
        self.code: int | None = None
        self._thread = threading.Thread(target=self._follow, args=(words,), daemon=True)
        self._thread.start()

    def _follow(self, words: list[str]) -> None:
        self.code = cli.run(lambda: cli.app(words, prog_name="tripletkit", standalone_mode=False))

    @property
    def text(self) -> str:
        return self._printed.getvalue()

    def until(self, text: str) -> None:
        """Wait until it has printed all this."""
        fleet.until(
            lambda: self.text == text or self.code is not None, lambda: self.text, deadline=60
        )
        assert self.text == text

    def says(self, text: str) -> None:
        """Wait until it has complained about this."""
        fleet.until(lambda: text in self._said.getvalue(), self._said.getvalue, deadline=60)

    def ends(self) -> str:
        """Wait for its end; all that it has printed."""
        self._thread.join(60)
        assert self.code == 0, self.text
        return self.text


@pytest.fixture
def follow(monkeypatch) -> Callable[..., Following]:
    """Begin to follow; it looks more often than it does elsewhere."""
    monkeypatch.setattr(logs, "POLL", 0.02)
    monkeypatch.setattr(logs, "ASK", (0.1, 0.3))

    def begin(config: Config, *arguments: str) -> Following:
        file = config.global_.log_dir.parent / "given.toml"
        fsio.write_text(file, configuration.dump(config))
        printed, said = io.StringIO(), io.StringIO()
        monkeypatch.setattr(log.out, "_file", printed)  # what capsys reads is not safe for threads
        monkeypatch.setattr(sys, "stderr", said)
        return Following(["logs", "-f", *arguments, "--config", str(file)], printed, said)

    return begin


@pytest.fixture
def worker(config) -> Callable[..., contextlib.AbstractContextManager]:
    """A worker that lives within the block: its process and its job."""
    return lambda name="tune:s": process(WORKER, config.global_.log_dir, name)


def test_a_log_is_followed_from_its_first_line_to_its_last(config, follow, worker):
    with worker() as (living, job):
        paths = LogPaths(config.global_.log_dir)
        following = follow(config, job)
        following.says("waiting for the log")
        add(paths.err("tune", job), "begun")
        add(paths.err("tune", job), ", and more\nno end")
        heading = f"==> tune_{job}.err <==\n"
        following.until(f"{heading}begun, and more\n")
        add(paths.err("tune", job), " yet\n")
        following.until(f"{heading}begun, and more\nno end yet\n")
        add(paths.err("tune", job), "last words")
        living.kill()
        living.wait()
    assert following.ends() == f"{heading}begun, and more\nno end yet\nlast words\n"


def test_following_begins_with_the_last_lines(config, follow, worker):
    with worker() as (living, job):
        path = write(config, f"tune_{job}.err", numbered(9))
        following = follow(config, job, "-n", "2")
        said = f"==> tune_{job}.err <==\nline 7\nline 8\n"
        following.until(said)
        add(path, "line 9\n")
        following.until(f"{said}line 9\n")
        path.write_text("cut off\n")
        following.until(f"{said}line 9\ncut off\n")
        living.communicate()
    following.ends()


def test_what_is_over_is_shown_and_not_waited_for(config, follow):
    record(config, "local-1", "tune:s")
    write(config, "tune_local-1.err", "all\nof it")
    assert follow(config, "local-1").ends() == "all\nof it"


def test_what_is_over_and_has_written_nothing_is_an_error(config, run):
    record(config, "local-1", "tune:s")
    seen = run(config, "logs", "-f", "local-1")
    assert (seen.code, seen.out) == (1, "")
    assert "error: job local-1 has written no log" in seen.err
    assert "-f waits" not in seen.err


def test_a_study_is_followed_with_the_jobs_that_come_later(config, follow, worker):
    prepare(config)
    with worker() as (first, one), worker("tune:other") as (_, foreign):
        write(config, f"tune_{one}.err", numbered(3))
        write(config, f"tune_{foreign}.err", numbered(3))
        following = follow(config, "-n", "1")
        following.until(f"[tune_{one}] line 2\n")
        with worker() as (second, two):
            write(config, f"tune_{two}.out", numbered(2))
            said = f"[tune_{one}] line 2\n[tune_{two}] line 0\n[tune_{two}] line 1\n"
            following.until(said)
            first.communicate()
            write(config, f"tune_{one}.err", "")  # nobody follows it for nothing
            second.communicate()
        assert following.ends() == said


def test_a_trial_is_followed_from_job_to_job_until_it_is_finished(config, follow, worker):
    shared = prepare(config)
    trial = StudyPaths(config.output_dir / "s").trial(0)
    trial.root.mkdir()
    with worker() as (first, one), worker() as (_, two):
        claim(shared, one).trial.report(0.5, 1)
        trial.log.write_text("epoch 1\n")
        following = follow(config, "trial:0")
        following.until("epoch 1\n")
        first.kill()
        first.wait()
        add(trial.log, "its job died\n")
        following.until("epoch 1\nits job died\n")
        again = claim(shared, two, gone=[one])
        assert again.trial.number == 0
        add(trial.log, "epoch 2\nand the end")
        following.until("epoch 1\nits job died\nepoch 2\n")
        shared.study.tell(again.trial, 0.5)
        assert following.ends() == "epoch 1\nits job died\nepoch 2\nand the end"


def test_a_trial_is_not_followed_when_no_worker_is_left(config, follow, worker):
    shared = prepare(config)
    trial = StudyPaths(config.output_dir / "s").trial(0)
    trial.root.mkdir()
    trial.log.write_text("epoch 1\n")
    with worker() as (living, job):
        claim(shared, job)
        following = follow(config, "trial:0")
        following.until("epoch 1\n")
        living.kill()
        living.wait()
        assert following.ends() == "epoch 1\n"


def test_following_ends_with_ctrl_c(config, run, worker):
    with worker() as (_, job):
        run(config, "status")  # writes the file
        given_file = config.global_.log_dir.parent / "given.toml"
        with Screen("logs", "-f", job, "-c", given_file, terminal=False) as screen:
            screen.until("waiting for the log")
            assert screen.interrupt() == 130
        assert "Traceback" not in screen.text


# Real jobs


def test_an_array_on_a_cluster_is_followed_to_its_end(slurm, tmp_path, follow):
    """The second element starts when the first has ended: its log is not there before."""
    config = write_config(tmp_path)
    paths = LogPaths(config.global_.log_dir)
    paths.root.mkdir()
    command = (
        "echo begun; echo moaned >&2; "
        f"until [ -e {tmp_path}/go_$SLURM_ARRAY_TASK_ID ]; do sleep 0.1; done; printf ended"
    )
    array = slurm.sbatch(
        command, "--array=0-1%1", "--job-name=tune:s",
        f"--output={paths.out('tune', '%A_%a')}", f"--error={paths.err('tune', '%A_%a')}",
    )  # fmt: skip
    following = follow(config, array)
    one, two = (f"[tune_{array}_{element}]" for element in (0, 1))

    def said(*lines: str) -> None:
        fleet.until(
            lambda: sorted(following.text.splitlines()) == sorted(lines),
            lambda: following.text,
            deadline=60,
        )

    begun = (f"{one} begun", f"{one} moaned")
    said(*begun)
    (tmp_path / "go_0").touch()
    said(*begun, f"{two} begun", f"{two} moaned")
    assert following.code is None
    (tmp_path / "go_1").touch()
    following.ends()
    said(*begun, f"{two} begun", f"{two} moaned", f"{one} ended", f"{two} ended")


@pytest.mark.parametrize("named", ["job", "study"])
def test_a_slurm_that_does_not_answer_for_a_while_does_not_end_it(
    slurm, tmp_path, follow, monkeypatch, named
):
    """A job that waits has left no trace but in the queue."""
    config = write_config(tmp_path)
    paths = LogPaths(config.global_.log_dir)
    paths.root.mkdir()
    job = slurm.sbatch(
        "echo done", "--hold", "--job-name=tune:s",
        f"--output={paths.out('tune', '%j')}", f"--error={paths.err('tune', '%j')}",
    )  # fmt: skip
    following = follow(config, *([f"job:{job}"] if named == "job" else []))
    following.says("waiting for the log")
    (tmp_path / "empty.conf").touch()
    there = os.environ["SLURM_CONF"]
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "empty.conf"))
    following.says("cannot ask Slurm: ")
    assert following.code is None
    monkeypatch.setenv("SLURM_CONF", there)
    slurm.run("scontrol", "release", job)
    prefix = f"==> tune_{job}.out <==\n" if named == "job" else f"[tune_{job}] "
    assert following.ends() == f"{prefix}done\n"


def test_a_search_in_the_background_is_followed_to_its_end(tmp_path, run, follow):
    file = fleet.write_config(tmp_path)
    config = configuration.load(file, environ={})
    printed = fleet.tripletkit(
        "tune", "-c", file, "--cluster", "local", "--workers", "2", "--n-trials", "2",
        "--max-epochs", "2",
    )  # fmt: skip
    text = follow(config).ends()
    workers = set(re.findall(r"^\[tune_(local-\d+)\] ", text, re.MULTILINE))
    assert len(workers) == 2, printed
    for number in (0, 1):
        said = rf"^\[tune_local-\d+\] .*trial {number}: complete, map@r"
        assert len(re.findall(said, text, re.MULTILINE)) == 1
    assert text.count("nothing left to do in study small") == 2
