"""Killed and started again, a command leaves what an untouched one leaves.

A round of the shorter commands; `python -m tests.exactness` makes as many as you like of all.
"""

import signal

import pytest

from tests import exactness
from tests.exactness import COMMANDS, World, rounds

SHORT = ("train", "tune", "submit-best", "data split", "data bands", "export", "evaluate")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World.make(tmp_path_factory.mktemp("exactness") / "world")


@pytest.mark.parametrize("name", SHORT)
def test_killed_at_random_moments_it_leaves_what_an_untouched_one_leaves(world, tmp_path, name):
    tally = rounds(name, world, tmp_path, count=1, kills=3, seed=1)
    assert tally.differences == []
    assert tally.rounds == 1
    assert tally.kills.total() > 0


def test_a_difference_is_found(world, tmp_path, monkeypatch):
    """One byte, in a file that was there before the first attempt."""
    seen = []

    def prepare(world: World, here) -> None:
        (here / "more").write_text(f"a{len(seen)}b")
        seen.append(here)

    command = exactness.Command(COMMANDS["data split"].words, "out/test.parquet", prepare)
    monkeypatch.setitem(COMMANDS, "data split", command)
    tally = rounds("data split", world, tmp_path, count=3, kills=1)
    assert tally.rounds == 1, "it stops, so that the folder can be looked at"
    (said,) = tally.differences
    assert "more differs: at byte 1 of 3 and 3: b'a0b' and b'a1b'" in said


def test_moments_are_counted_and_killed_at(tmp_path):
    end = exactness.attempt(["--version"], tmp_path)
    assert end.code == 0
    assert end.moments > 10
    assert exactness.attempt(["--version"], tmp_path, end.moments // 2).code == -signal.SIGKILL
    assert not (tmp_path / "moments").exists()
