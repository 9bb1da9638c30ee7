"""Signals become one flag."""

import os
import signal

import pytest

from tripletkit.cluster import preempt


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT])
def test_any_watched_signal_raises_the_flag_and_handlers_come_back(number):
    before = signal.getsignal(number)
    with preempt.watch() as stop_requested:
        assert not stop_requested()
        os.kill(os.getpid(), number)
        assert stop_requested()
    assert signal.getsignal(number) is before


def test_repeated_terminations_change_nothing():
    with preempt.watch() as stop_requested:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop_requested()


def test_a_second_ctrl_c_ends_at_once():
    def impatient():
        with preempt.watch():
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        impatient()
