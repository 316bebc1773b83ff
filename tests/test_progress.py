"""Progress: lines in a log, by a clock that the test sets, and a bar on a terminal."""

import os
import sys

import pytest
import tqdm.std

from drank.project.progress import progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds, as tqdm reads them."""
    seconds = [1000.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: seconds[0])
    return seconds


@pytest.mark.parametrize(
    ("seconds", "quiet", "lines"),
    [
        (10, False, ["3 of 10 windows, 01:10 left", "6 of 10 windows, 00:40 left", "9 of 10 windows, 00:10 left"]),
        (2.9, False, []),  # done in less than half a minute
        (60, True, []),  # one process of several talks
    ],
)
def test_a_log_gets_a_line_every_half_minute(clock, capsys, monkeypatch, seconds, quiet, lines):
    monkeypatch.setenv("TQDM_DISABLE", "1")  # the switch of libraries does not silence these
    for _ in progress(range(10), desc="covariance", unit="windows", quiet=quiet):
        clock[0] += seconds
    assert capsys.readouterr().err.splitlines() == [f"covariance: {line}" for line in lines]


def test_a_counter_that_goes_on_from_a_checkpoint(clock, capsys):
    with progress(desc="healing", unit="steps", total=8, initial=4) as bar:
        for _ in range(4):
            clock[0] += 20
            bar.set_postfix(loss="3.1", refresh=False)
            bar.update()
    assert capsys.readouterr().err.splitlines() == [
        "healing: 6 of 8 steps, loss=3.1, 00:40 left",
        "healing: 8 of 8 steps, loss=3.1, 00:00 left",
    ]


def test_nobody_listening_ends_nothing(clock, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w", buffering=1) as broken:
        monkeypatch.setattr(sys, "stderr", broken)
        seen = []
        for item in progress(range(3), desc="covariance", unit="windows"):
            clock[0] += 60
            seen.append(item)
        assert seen == [0, 1, 2]
        monkeypatch.undo()
        with pytest.raises(BrokenPipeError):
            broken.flush()
        os.dup2(os.open(os.devnull, os.O_WRONLY), broken.fileno())


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for _ in progress(range(3), desc="covariance", unit="windows"):
        pass
    said = capsys.readouterr().err
    assert "\rcovariance: 100%|" in said
    assert "3/3 [" in said
