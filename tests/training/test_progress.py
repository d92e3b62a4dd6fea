"""What a person sees while training."""

from __future__ import annotations

import io
import itertools
import re
import sys

import pytest

from auxkern.training.progress import BarProgress, LineProgress, duration, progress_for

STEP = {
    "step": 20,
    "loss": 3.5,
    "lm_loss": 7.25,
    "learning_rate": 5e-4,
    "tokens_per_second": 1234.5,
    "seconds_left": 3723.0,
}
EVALUATION = {"step": 20, "evaluation": True, "nll": 3.25, "lm_nll": 7.0, "best": True}
WORDS = "loss 3.5000 (LM 7.250), 1,234 tokens/s, learning rate 5.00e-04, 1:02:03 left"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_hold_the_figures() -> None:
    stream = io.StringIO()
    progress = progress_for(stream)
    progress.start(0, 1000, "training")
    progress.record(STEP)
    progress.record(EVALUATION)
    progress.record({**EVALUATION, "lm_nll": None, "best": False})
    assert stream.getvalue().splitlines() == [
        f"step 20/1,000: {WORDS}",
        "step 20/1,000: validation nll 3.2500 (best), LM alone 7.0000",
        "step 20/1,000: validation nll 3.2500",
    ]


def test_lines_of_what_only_advances_come_seldom() -> None:
    stream = io.StringIO()
    progress = LineProgress(stream, seconds=1e9)
    progress.start(0, 5000, "tokens")
    for done in range(5000):
        progress.advance(done)
    assert stream.getvalue() == ""
    progress = LineProgress(stream, seconds=0.0)
    progress.start(0, 5000, "tokens")
    progress.advance(1000)
    assert stream.getvalue() == "tokens 1,000/5,000\n"


def test_logged_steps_come_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count()
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))  # a second goes by with each look
    stream = io.StringIO()
    progress = LineProgress(stream, seconds=10.0)
    progress.start(0, 100, "training")
    for step in range(1, 101):
        progress.advance(step)
        progress.record({**STEP, "step": step})
    progress.record({**EVALUATION, "step": 100})
    first, *between, last = stream.getvalue().splitlines()
    assert first == f"step 1/100: {WORDS}"
    assert last.startswith("step 100/100: validation nll")
    assert 5 <= len(between) <= 20
    assert all(line.endswith(WORDS) for line in between)


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_terminal_that_cannot_go_back_gets_lines(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    assert isinstance(progress_for(Terminal()), LineProgress)


def test_colours_that_are_asked_for_make_no_bar_in_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert isinstance(progress_for(io.StringIO()), LineProgress)


@pytest.mark.parametrize("coloured", [True, False])
def test_a_bar_has_colours_unless_they_are_unwanted(coloured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not coloured:
        monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    progress = progress_for(stream)
    progress.start(0, 10, "training")
    progress.advance(5)
    progress.close()
    shown = stream.getvalue()
    assert "training" in shown
    assert "5/10" in shown
    assert bool(re.search(r"\x1b\[(3|38;5;)\d", shown)) == coloured


def test_a_terminal_gets_a_bar_and_keeps_the_evaluations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    stream = Terminal()
    progress = progress_for(stream)
    assert isinstance(progress, BarProgress)
    progress.start(0, 1000, "training")
    progress.record(EVALUATION)
    progress.record(STEP)
    progress.advance(20)
    progress.close()
    progress.close()
    shown = stream.getvalue()
    assert "step 20/1,000: validation nll 3.2500 (best), LM alone 7.0000" in shown
    assert WORDS in shown
    assert "20/1000" in shown


def test_a_terminal_without_rich_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert isinstance(progress_for(Terminal()), LineProgress)


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.4, 59.6, 3599, 3600)] == ["0:00", "1:00", "59:59", "1:00:00"]
