"""``make gpu ARGS=--tune`` without a GPU: choosing, going on, and that every candidate compiles."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402

from auxkern.backends.triton import tuned  # noqa: E402
from auxkern.backends.triton.cases import H100  # noqa: E402
from auxkern.backends.triton.configs import Config, Configs  # noqa: E402
from auxkern.backends.triton.launch import Launch  # noqa: E402
from auxkern.backends.triton.logits_loss.kernels import forward_kernel  # noqa: E402
from auxkern.inspect import assembly  # noqa: E402
from auxkern.inspect.targets import TARGETS  # noqa: E402
from benchmarks.gpu import __main__ as script  # noqa: E402
from benchmarks.gpu import tuning  # noqa: E402
from benchmarks.gpu.candidates import Candidates, table  # noqa: E402
from benchmarks.gpu.tuning import Bench, Tuning  # noqa: E402
from benchmarks.gpu.works import Trial, Work, plans  # noqa: E402

CPU = torch.device("cpu")
COMPILED = pytest.mark.skipif(
    not isinstance(forward_kernel, triton.JITFunction), reason="TRITON_INTERPRET=1: nothing is compiled"
)


def a_work(name: str) -> Work:
    """Its call returns one number, and remembers with which backend it was called."""

    def prepare(device: torch.device, N: int, V: int) -> Callable[[Trial], list[torch.Tensor]]:
        def call(backend: Trial) -> list[torch.Tensor]:
            backend.launches = [backend.gpu(device).configs]
            return [torch.ones(1)]

        return call

    return Work(name, 8, 64, prepare)


FORWARD = (Config(1, 8, 4), Config(4, 8, 4), Config(1, 4, 2))
CHOICES = [
    Candidates("forward.2", FORWARD, (a_work("many"), a_work("few"))),
    Candidates("recomputed_width", (0, 1024), (a_work("heads"),)),
]


class KnownTimes:
    """Times by the configuration of a trial; the default's are 1."""

    def __init__(self, times: Callable[[Configs, int], float]) -> None:
        self.times, self.calls = times, 0

    def seconds(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        self.calls += 1
        return [self.times(_configs(call), self.calls) for call in calls]


def _configs(call: Callable[[], object]) -> Configs:
    call()
    (cell,) = [c.cell_contents for c in call.__closure__ if isinstance(c.cell_contents, Trial)]
    return cell.gpu(CPU).configs


def bench_of(times: Callable[[Configs, int], float], wrong: Any = lambda *_: "") -> Bench:
    return Bench(H100, CPU, KnownTimes(times), wrong, lambda line: None)


def a_tuning() -> Tuning:
    return Tuning(H100.name, H100.capability, {"triton": "3.7"}, "make gpu ARGS=--tune")


def run(
    bench: Bench, folder: Path, *, start: Tuning | None = None, seconds: float = 60
) -> tuple[Tuning, int]:
    its = (start or a_tuning()).resumed(folder)
    path, left = tuning.tune(bench, its, CHOICES, folder, time.monotonic() + seconds)
    assert path == folder / "H100_SXM.json"
    return its, left


def by_vectors(many: dict[int, float]) -> Callable[[Configs, int], float]:
    """Times of ``forward.2`` by its (vectors, warps); all else takes 1."""
    return lambda configs, call: many.get((configs.forward[2].vectors, configs.forward[2].warps), 1.0)


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({(1, 8): 0.97, (4, 8): 0.9}, Config(4, 8, 4)),
        ({(1, 8): 0.97, (4, 8): 1.5}, Config(1, 8, 4)),
        ({(1, 8): 0.985, (4, 8): 0.99}, None),  # less than 2 % faster
    ],
)
def test_the_fastest_is_chosen_if_it_is_worth_it(tmp_path, times, chosen):
    its, left = run(bench_of(by_vectors(times)), tmp_path)
    assert left == 0
    assert its.choices == ({} if chosen is None else {"forward.2": tuned.written(chosen)})
    # The file says so to dispatch.
    file = tuned.Tuned.read(tmp_path / "H100_SXM.json")
    configs = tuned.chosen(H100.configs, file.choices)
    assert configs.forward[2] == (chosen or H100.configs.forward[2])
    assert (file.device, file.capability, file.command) == (H100.name, 9, "make gpu ARGS=--tune")


def test_what_is_much_slower_somewhere_is_not_chosen(tmp_path):
    def times(configs: Configs, call: int) -> float:
        return {(4, 8): 0.5 if call == 1 else 1.1, (1, 8): 0.9}.get(
            (configs.forward[2].vectors, configs.forward[2].warps), 1.0
        )

    its, _ = run(bench_of(times), tmp_path)
    assert its.choices == {"forward.2": tuned.written(Config(1, 8, 4))}


def test_what_is_wrong_or_fails_is_dropped_and_named(tmp_path):
    said: list[str] = []

    def wrong(trial: Trial, *rest: Any) -> str:
        return "spills" if trial.gpu(CPU).configs.forward[2] == FORWARD[0] else ""

    bench = replace(bench_of(by_vectors({(1, 8): 0.1, (4, 8): 0.2, (1, 4): 0.9}), wrong), say=said.append)

    def failing(backend: Trial) -> list[torch.Tensor]:
        if backend.gpu(CPU).configs.forward[2] == FORWARD[1]:
            raise RuntimeError("out of shared memory\nat line 3")
        backend.launches = []
        return [torch.ones(1)]

    work = Work("failing", 8, 64, lambda device, N, V: failing)
    measured = bench.measure(replace(CHOICES[0], works=(work,)), {})
    assert [one.dropped for one in measured.tried] == ["spills", "RuntimeError: out of shared memory", ""]
    assert measured.chosen == tuned.written(FORWARD[2])
    assert any("dropped, spills" in line and str(tuned.written(FORWARD[0])) in line for line in said)


def test_choices_that_do_not_go_together_are_dropped(tmp_path):
    its = Candidates("filter", (replace(H100.configs.filter, block=4096),), (a_work("filtered"),))
    measured = bench_of(lambda configs, call: 1.0).measure(its, {})
    assert measured.tried[0].dropped.startswith("ValueError: sample.block is 2048; filter.block, 4096")
    assert measured.chosen is None


def test_later_choices_are_measured_beside_those_before(tmp_path):
    seen: list[Configs] = []

    def times(configs: Configs, call: int) -> float:
        seen.append(configs)
        return by_vectors({(4, 8): 0.9})(configs, call)

    run(bench_of(times), tmp_path)
    assert [configs.forward[2] for configs in seen[-3:]] == [Config(4, 8, 4)] * 3
    assert [configs.recomputed_width for configs in seen[-3:]] == [512, 0, 1024]


def test_a_run_goes_on_where_another_one_was_stopped(tmp_path):
    def stopped(configs: Configs, call: int) -> float:
        if call == 3:  # in the second choice
            raise KeyboardInterrupt
        return by_vectors({(4, 8): 0.9})(configs, call)

    with pytest.raises(KeyboardInterrupt):
        run(bench_of(stopped), tmp_path)
    assert tuned.Tuned.read(tmp_path / "H100_SXM.json").choices == {
        "forward.2": tuned.written(Config(4, 8, 4))
    }
    bench = bench_of(lambda configs, call: {0: 0.8}.get(configs.recomputed_width, 1.0))
    its, left = run(bench, tmp_path)
    assert (bench.timer.calls, left) == (1, 0)
    assert its.choices == {"forward.2": tuned.written(Config(4, 8, 4)), "recomputed_width": 0}
    # All is done: nothing is measured again, and the file stays as it is.
    bench = bench_of(lambda configs, call: 0.1)
    assert run(bench, tmp_path)[0].choices == its.choices
    assert bench.timer.calls == 0


def test_no_choice_is_begun_when_time_is_up(tmp_path):
    its, left = run(bench_of(lambda configs, call: 1.0), tmp_path, seconds=-1)
    assert (its.measured, left) == ({}, 2)
    assert tuned.Tuned.read(tmp_path / "H100_SXM.json").choices == {}


def test_a_folder_of_another_device_or_version_is_refused(tmp_path):
    run(bench_of(lambda configs, call: 1.0), tmp_path)
    for other in (replace(a_tuning(), capability=10), replace(a_tuning(), versions={"triton": "3.8"})):
        with pytest.raises(
            ValueError, match=r"tuning.json was measured with .* give another OUT, or delete it"
        ):
            other.resumed(tmp_path)


def test_spills_beyond_the_defaults_are_wrong():
    def trial(**spills: int) -> Trial:
        made = Trial(H100)
        made.binaries = [SimpleNamespace(name=name, n_spills=n) for name, n in spills.items()]
        return made

    ones = [torch.ones(1)]
    usual = trial(one=2, other=0)
    assert tuning.wrong(trial(one=2, other=0), usual, ones, ones) == ""
    assert tuning.wrong(trial(one=1, other=4), usual, ones, ones) == "other spills registers"
    assert tuning.wrong(trial(one=2, other=0), usual, [2 * ones[0]], ones).startswith("result 0 is off")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda x: x, ""),
        (lambda x: [x[0] + 2**-21, *x[1:]], ""),  # 4 units of the largest, 1
        (lambda x: [x[0] + 1e-4, *x[1:]], "result 0 is off by 839 units"),
        (lambda x: [x[0] * torch.nan, *x[1:]], "result 0 is off by nan units"),
        (lambda x: [x[0], x[1] + 2**-8, x[2]], ""),
        (lambda x: [x[0], x[1] + 1, x[2]], "result 1 is off by"),
        (lambda x: [*x[:2], x[2] + (torch.arange(100) < 2)], ""),
        (lambda x: [*x[:2], x[2] + (torch.arange(100) < 3)], "result 2 differs at 3 of 100 places"),
    ],
)
def test_results_may_differ_by_the_order_of_sums(change, problem):
    right = [torch.linspace(0, 1, 7), torch.linspace(0, 1, 7, dtype=torch.bfloat16), torch.arange(100)]
    assert tuning.different(change(right), right)[: len(problem) or None] == problem


def test_memory_that_a_candidate_does_not_write_shows():
    memory = torch.zeros(3)

    def call(backend: Trial) -> list[torch.Tensor]:
        if backend.gpu(CPU).configs.forward[2] == H100.configs.forward[2]:
            memory.fill_(1)
        return [memory]

    work = Work("idle", 8, 64, lambda device, N, V: call)
    bench = replace(
        bench_of(lambda configs, call: 1.0), wrong=lambda trial, usual, *both: tuning.different(*both)
    )
    bench = replace(bench, timer=type("Same", (), {"seconds": lambda self, calls: [1.0] * len(calls)})())
    measured = bench.measure(replace(CHOICES[0], works=(work,)), {})
    assert all("off by nan" in one.dropped for one in measured.tried)


# --- the table ---------------------------------------------------------------------------------


TABLE = {its.key: its for its in table(H100.configs)}
# One choice of each kind of kernel; `make test-slow` takes all, and compiles what has most candidates.
ROUTES = ("cache_share", "recomputed_width")
SOME = ("forward.8", "fused.1", "tiles.parts.2.crowded", "draw_tiles.half.1.roomy", "filter")


def _name(launch: Launch) -> str:
    return f"{launch.source().hash()} {launch.options}"


def _alternatives(its: Candidates) -> Iterator[tuple[Any, list[list[Launch]]]]:
    """Of each value, the default first, the launches of each work, small."""
    calls = [work.prepare(CPU, min(work.N, 64), 131072) for work in its.works]
    for value in (tuned.keys(H100.configs)[its.key], *its.values):
        configs = tuned.chosen(H100.configs, {its.key: tuned.written(value)})
        yield value, [plans(call, replace(H100, configs=configs)) for call in calls]


QUICK = SOME[:3]


def _keys(some: Iterable[str]) -> list[Any]:
    return [pytest.param(key, marks=() if key in some else pytest.mark.slow) for key in TABLE]


@COMPILED
@pytest.mark.parametrize("key", [its for its in _keys(SOME) if its.values[0] not in ROUTES])
def test_every_candidate_is_another_launch(key):
    """Of at least one of its works, which would measure nothing otherwise."""
    seen = {}
    for value, works in _alternatives(TABLE[key]):
        launched = tuple((_name(launch), launch.grid) for launches in works for launch in launches)
        assert launched not in seen, f"{value} launches what {seen[launched]} does"
        seen[launched] = value


@COMPILED
@pytest.mark.parametrize("key", _keys(QUICK))
def test_every_candidate_compiles_without_spills(key):
    target = TARGETS["sm_90"]
    (_, defaults), *alternatives = _alternatives(TABLE[key])
    # Those of the default have rules of their own.
    compiled = {_name(launch) for launches in defaults for launch in launches}
    for value, works in alternatives:
        for launch in (launch for launches in works for launch in launches):
            name = _name(launch)
            if name not in compiled:
                compiled.add(name)
                made = assembly.read(launch.compile(GPUTarget(target.backend, target.arch, target.warp)))
                assert made.spill_bytes == 0, f"{value}: {launch.kernel.fn.__name__}"
                assert made.shared_bytes <= target.shared_per_program, f"{value}: {launch.kernel.fn.__name__}"


def test_routes_follow_their_choices():
    def kernels(key: str, value: Any, work: int, N: int) -> list[str]:
        its = TABLE[key].works[work]
        gpu = replace(H100, configs=tuned.chosen(H100.configs, {key: value}))
        launches = plans(its.prepare(CPU, N, its.V if key == "cache_share" else 4096), gpu)
        return [launch.kernel.fn.__name__ for launch in launches]

    # 264 rows are two whole rounds of an H100's multiprocessors.
    assert kernels("cache_share", 0.3, 0, 264) == ["fused_kernel"]
    assert kernels("cache_share", 0.0, 0, 264) == ["forward_kernel", "combine_kernel", "backward_kernel"]
    assert "heads_gradient_kernel" in kernels("recomputed_width", 2048, 1, 8)
    assert "heads_scale_kernel" in kernels("recomputed_width", 0, 1, 8)


# --- the command -------------------------------------------------------------------------------


def test_dry_run_lists_keys_and_candidates(tmp_path, capsys):
    assert script.main([str(tmp_path / "new"), "--tune", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"forward.2: {tuned.written(Configs().forward[2])}"
    assert [line.split(":")[0] for line in lines if line[0] != " "] == list(TABLE)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out", "--tune", "--stage", "bench"], "--tune runs no stage; leave out --stage bench"),
        (["out", "--seconds", "60"], "--seconds 60 is for --tune"),
        (["--tune"], "make gpu OUT=folder"),
    ],
)
def test_bad_options_end_with_a_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        script.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_tunes_and_says_where_the_file_goes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "_no_gpu", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tuning, "described", lambda device: H100)
    monkeypatch.setattr(tuning, "EventTimer", lambda device: KnownTimes(by_vectors({(4, 8): 0.5})))
    monkeypatch.setattr(tuning, "table", lambda configs: CHOICES)
    monkeypatch.setattr(tuning, "wrong", lambda *_: "")
    assert script.main([str(tmp_path), "--tune", "--seconds", "60"]) == 0
    said = capsys.readouterr().err
    assert "forward.2: {'vectors': 4, 'warps': 8, 'programs': 4} takes 50% of the default's time" in said
    assert f"AUXKERN_GPU_CONFIGS={tmp_path}" in said
    record = json.loads((tmp_path / "tuning.json").read_text())
    assert record["command"] == f"python3 -m benchmarks.gpu {tmp_path} --tune --seconds 60"
    assert record["measured"]["forward.2"]["tried"][1]["shares"] == [0.5, 0.5]
