"""The growth study: points are measured once, kept in the file, and drawn."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("rich")

from auxkern.bench.results import Run
from auxkern.bench.timing import Effort
from benchmarks import growth
from benchmarks.growth import Point, Preset

TINY = Preset(
    "float32",
    {
        "N": [Point(2, 300, (6, 4)), Point(4, 300, (6, 4))],
        "V": [Point(2, 300, (6, 4)), Point(2, 500, (6, 4))],
    },
)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(growth.PRESETS, "cpu", TINY)
    monkeypatch.setattr(growth, "_EFFORT", Effort(seconds=0.0, min_rounds=2, max_rounds=2))


def measured(path, *more):
    return growth.main(["--json", str(path), "--device", "cpu", *more])


def test_points_are_measured_once_and_drawn(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "growth.json", tmp_path / "growth.png"
    assert measured(path) == 0
    run = Run.from_json(path.read_text())
    assert [(case.N, case.V) for case in run.cases] == [(2, 300), (4, 300), (2, 500)]
    assert all({result.name for result in case.results} >= {"eager"} for case in run.cases)

    run.cases.pop(1)
    path.write_text(run.to_json())
    assert measured(path, "--plot", str(picture)) == 0
    again = Run.from_json(path.read_text())
    assert [(case.N, case.V) for case in again.cases] == [(2, 300), (2, 500), (4, 300)]
    assert again.cases[:2] == run.cases
    assert picture.stat().st_size > 5000


def test_results_of_another_machine_are_left_alone(tmp_path, capsys):
    path = tmp_path / "growth.json"
    assert measured(path) == 0
    record = json.loads(path.read_text())
    record["machine"]["torch"] = "1.0"
    path.write_text(json.dumps(record))
    with pytest.raises(SystemExit):
        measured(path)
    assert "torch was 1.0" in capsys.readouterr().err


def test_what_does_not_fit_is_left_out_with_a_note(tmp_path, monkeypatch, capsys):
    needed = growth.OPERATOR.needed_bytes
    monkeypatch.setattr(growth, "available_bytes", lambda device: 2**31)
    monkeypatch.setattr(growth.OPERATOR, "needed_bytes", lambda case: 2**40 if case.N == 4 else needed(case))
    path = tmp_path / "growth.json"
    assert measured(path) == 0
    cases = Run.from_json(path.read_text()).cases
    assert ["eager" in [result.name for result in case.results] for case in cases] == [True, False, True]
    assert "Eager PyTorch does not fit" in capsys.readouterr().out
