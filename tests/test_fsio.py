"""Files that are whole or absent, and locks that die with their holder."""

import errno
import signal
import subprocess
import sys

import pytest

from tripletkit import fsio
from tripletkit.data.store import cached


def test_atomic_write_publishes_at_the_end(tmp_path):
    path = tmp_path / "sub" / "a.bin"
    with fsio.atomic_write(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert path.read_bytes() == b"new"
    assert [p.name for p in path.parent.iterdir()] == ["a.bin"]


def test_failed_write_leaves_the_old_file_and_no_rest(tmp_path):
    path = tmp_path / "a.txt"
    fsio.write_text(path, "old")

    def fail_half_way():
        with fsio.atomic_write(path, "w") as file:
            file.write("half of the n")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_digest_depends_on_borders_and_order():
    keys = {fsio.digest(parts) for parts in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["abc"], [])}
    assert len(keys) == 5
    assert fsio.digest([b"ab", "c"]) == fsio.digest(["ab", b"c"])


def test_lock_is_free_again_when_its_holder_is_killed(tmp_path):
    lock = tmp_path / "lock"
    code = (
        "import sys, time, pathlib\nfrom tripletkit import fsio\n"
        "with fsio.exclusive_lock(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n    time.sleep(60)\n"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(lock)], stdout=subprocess.PIPE)
    assert holder.stdout is not None
    with holder, holder.stdout as output:
        assert output.readline() == b"held\n"
        with fsio.exclusive_lock(lock, wait=False) as found:
            assert not found.ours
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with fsio.exclusive_lock(lock, wait=False) as found:
            assert found == fsio.Lock(ours=True, sure=True)


def test_without_locks_on_the_file_system_work_goes_on_with_a_warning(
    tmp_path, monkeypatch, caplog
):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with fsio.exclusive_lock(tmp_path / "lock") as found:
        assert found == fsio.Lock(ours=True, sure=False)
    assert "no file locks" in caplog.text


def test_of_two_builders_without_locks_the_second_takes_what_the_first_published(
    tmp_path, monkeypatch
):
    def refuse(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    folder = tmp_path / "cache" / "key"

    def anything(folder, facts):
        pass

    def first(aside):
        (aside / "a").write_text("first")
        return {"by": "first"}

    def second(aside):
        monkeypatch.setattr("os.getpid", lambda: 1)
        cached(folder, first, anything)  # meanwhile, elsewhere
        (aside / "a").write_text("second")
        return {"by": "second"}

    assert cached(folder, second, anything)["by"] == "first"
    assert (folder / "a").read_text() == "first"
    assert not list(folder.parent.glob("*.tmp"))
