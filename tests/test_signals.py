"""Requests to stop: what counts as a second one, and what stays ignored."""

import os
import signal
import threading

import pytest

from nanostudy import signals
from nanostudy.signals import stop_requests

pytestmark = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_is_a_request(name):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with stop_requests() as stop:
        assert not stop()
        signal.raise_signal(number)
        assert stop()
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_interrupts_at_once():
    with stop_requests():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT] if os.name == "posix" else [])
def test_two_terminations_at_once_are_one_and_a_later_one_interrupts(monkeypatch, first):
    clock = [100.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: clock[0])
    with stop_requests() as stop:
        signal.raise_signal(first)
        clock[0] += signals.AT_ONCE - 0.1
        signal.raise_signal(signal.SIGTERM)
        assert stop()
        clock[0] += 0.2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)


def test_nohup_keeps_its_meaning():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_other_threads_have_no_signals():
    result = []

    def run():
        with stop_requests() as stop:
            result.append(stop())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert result == [False]
