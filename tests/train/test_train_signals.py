"""Which signals stop a run between two steps."""

from __future__ import annotations

import os
import signal

import pytest

from rodimus_lab.train.signals import StopSignal


@pytest.mark.parametrize(("ignored", "other"), [("SIGINT", "SIGTERM"), ("SIGTERM", "SIGINT")])
def test_what_is_ignored_stays_ignored(ignored, other):
    former = signal.signal(signal.Signals[ignored], signal.SIG_IGN)
    try:
        with StopSignal() as signals:
            os.kill(os.getpid(), signal.Signals[ignored])
            assert signals.received is None
            os.kill(os.getpid(), signal.Signals[other])
            assert signals.received is signal.Signals[other]
        assert signal.getsignal(signal.Signals[ignored]) is signal.SIG_IGN
    finally:
        signal.signal(signal.Signals[ignored], former)
