import logging
import re

import pytest

from src.callbacks.checkpoint import RolloutCheckpoint
from src.callbacks.progress import RolloutProgress, TimeEstimate, clock
from tests.callbacks.conftest import Interrupt, fit


def progress_lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "src.callbacks.progress"]


def test_progress_lines_in_a_log(module, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    fit(module, [RolloutProgress(seconds_between_lines=1000)], tmp_path, batches=4)
    lines = progress_lines(caplog)
    assert [line.split("  ")[0] for line in lines] == ["rollout batch 1/4", "rollout batch 4/4"]
    assert all(word in lines[0] for word in ("reward", "tokens/s", "left"))
    assert lines[-1].endswith("0:00 left")


def test_resumed_run_counts_its_own_time(fresh_module, tmp_path, caplog):
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(fresh_module(), [RolloutCheckpoint(str(tmp_path / "c"), 1), Interrupt(at=5)], tmp_path, batches=8)
    caplog.set_level(logging.INFO)
    fit(fresh_module(), [RolloutProgress(1000)], tmp_path, batches=8, ckpt_path=tmp_path / "c" / "last.ckpt")
    lines = progress_lines(caplog)
    assert [line.split("  ")[0] for line in lines] == ["rollout batch 6/8", "rollout batch 8/8"]
    times = [word.split()[0].split(":") for word in lines[0].split("  ")[-1].split(", ")]
    gone, left = (60 * int(minutes) + int(seconds) for minutes, seconds in times)  # none is an hour, as since the machine was started
    assert left == pytest.approx(2 * gone, abs=2)


def test_progress_bar_in_a_terminal(module, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    fit(module, [RolloutProgress()], tmp_path, batches=2)
    shown = capsys.readouterr().out
    assert all(expected in shown for expected in ("reward=", "tokens/s=", "2/2"))


def test_clock():
    assert [clock(5), clock(65), clock(3661)] == ["0:05", "1:05", "1:01:01"]


def test_time_estimate_is_logged(module, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    fit(module, [TimeEstimate(evaluated_texts=10)], tmp_path)
    (line,) = progress_lines(caplog)
    assert re.fullmatch(r"GRACE: 2 batches of 2 texts on .*CPU threads.*; about \d+ minutes, evaluation included: until \d\d:\d\d", line)
