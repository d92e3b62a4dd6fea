"""Lines that are measured in several rounds have the median of them."""

from __future__ import annotations

from auxkern.bench.results import GenerateRun, Throughput
from auxkern.bench.rounds import round_jobs, spread_notes


def line(name: str, seconds: list[float]):
    left = iter(seconds)
    return name, lambda progress: Throughput(name, 8, 4, 100, next(left), {}, 0.1)


def run_of(*lines, rounds: int) -> GenerateRun:
    run = GenerateRun("c", "d", {}, 4, [8, 128], {}, {"LM": 1, "auxiliary": 1})
    run.results = [measure(None) for _, measure in lines]
    for _, job in round_jobs(lines, rounds, run):
        assert job(lambda *_: None) is None
    return run


def test_a_line_has_the_median_of_its_rounds_in_turn():
    order = []

    def noted(name: str, seconds: list[float]):
        title, measure = line(name, seconds)
        return title, lambda progress: (order.append(name), measure(progress))[1]

    run = run_of(noted("a", [1.0, 9.0, 2.0]), noted("b", [4.0, 3.0, 5.0]), rounds=3)
    assert order == ["a", "b"] * 3
    assert [(one.seconds, one.rounds) for one in run.results] == [
        (2.0, [1.0, 9.0, 2.0]),
        (4.0, [4.0, 3.0, 5.0]),
    ]
    assert GenerateRun.from_json(run.to_json()) == run
    (note,) = spread_notes(run)
    assert "median of 3 rounds" in note
    assert "800% apart (a, batch 8)" in note


def test_one_round_is_the_line_as_it_was_measured():
    run = run_of(line("a", [1.5]), rounds=1)
    assert (run.results[0].seconds, run.results[0].rounds) == (1.5, [])
    assert spread_notes(run) == []


def test_a_peer_that_fails_in_a_later_round_keeps_what_it_had():
    run = run_of(line("a", [1.5]), rounds=1)
    for _, job in round_jobs([("a", lambda progress: None)], 3, run):
        job(lambda *_: None)
    assert run.results[0].seconds == 1.5
