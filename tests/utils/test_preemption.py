"""Signals while training, in this process; tests/test_resume.py has them in runs."""

import logging
import os
import signal

import pytest

from src.utils.preemption import _StopFlag


def test_first_ctrl_c_asks_and_the_second_stops(caplog):
    before, flag = signal.getsignal(signal.SIGINT), _StopFlag(None)
    flag.register_signal_handlers()
    try:
        with caplog.at_level(logging.WARNING):
            os.kill(os.getpid(), signal.SIGINT)
        assert flag.requested
        assert "stopping after this rollout batch, with a checkpoint; Ctrl-C again stops at once" in caplog.text
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        flag.teardown()
    assert signal.getsignal(signal.SIGINT) is before
