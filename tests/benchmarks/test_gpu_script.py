"""``python3 -m benchmarks.gpu``: what it does about its stages, seen without a GPU."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from auxkern.bench import report
from auxkern.bench.results import PASSES, CaseResult, Measured, Result, Run, Timing
from benchmarks.gpu import __main__ as script
from benchmarks.gpu import ceilings, device, selection, stages
from benchmarks.gpu.stages import ROOT, Reading, Stage

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
PYTHON = sys.executable


def results(folder: Path) -> dict[str, dict]:
    return {stage["name"]: stage for stage in json.loads((folder / "gpu.json").read_text())["stages"]}


def printing(name: str, figures: dict, read, seconds: float = 20) -> Stage:
    """A stage that prints made-up figures."""
    return Stage(name, (PYTHON, "-c", f"print({json.dumps(figures)!r})"), seconds, read)


def made_up_run() -> Run:
    """A loss whose forward pass moves 8 GB in 4 ms; what one reads and the other writes is twice that."""
    times = (0.004, 0.010)
    measured = {name: Measured(Timing(t, t, t, t, t, 9), 0) for name, t in zip(PASSES, times, strict=True)}
    case = CaseResult("cross_entropy", "gpt2", 50_257, 8192, "bfloat16", 2)
    case.floor = dict.fromkeys(PASSES, Timing(0.003, 0.003, 0.003, 0.003, 0.003, 9))
    case.floor_bytes = dict(zip(PASSES, (8_000_000_000, 16_000_000_000), strict=True))
    case.results = [Result("auxkern triton", "what runs", True, "ok", "", 0.0, 0.0, 1.0, measured)]
    return Run("python -m auxkern.bench", "2030-01-01T00:00:00+00:00", {"device": "GPU X"}, [case])


TIME = {"median": 0.002, "q1": 0.0019, "q3": 0.0021, "minimum": 0.001, "maximum": 0.003, "repeats": 50}
CEILINGS = {
    "copy": {"work": 5_000_000_000, "time": TIME, "rate": 2.5e12},
    "bf16 product": {"work": 2 * 8192**3, "time": TIME, "rate": 7e14},
}
FACTS = {
    "device": "GPU X, 80 GiB",
    "auxkern": "0",
    "torch": "1",
    "triton": "2",
    "python": "3",
    "driver": "580",
}
DEVICE = {"machine": FACTS, "peers": {"torch": "1", "liger-kernel": "missing"}}


# Options


def test_dry_run_lists_every_stage_within_nine_minutes(tmp_path, capsys):
    assert script.main([str(tmp_path / "new"), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = {line.split()[0]: float(line.split()[1]) for line in lines}
    total = listed.pop("total")
    assert list(listed) == ["device", "ceilings", "tests", "memcheck", "racecheck", "bench"]
    assert total == sum(listed.values()) <= 8 * 60
    assert all(len(line.split()) > 4 for line in lines[:-1])
    assert "pytest" in lines[2]
    assert not (tmp_path / "new").exists()


def test_make_passes_folder_and_options():
    make = [
        "make",
        "--no-print-directory",
        "--dry-run",
        "gpu",
        "OUT=some folder",
        "ARGS=--dry-run",
        "PYTHON=python3.9",
    ]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == 'python3.9 -m benchmarks.gpu "some folder" --dry-run'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "make gpu OUT=folder"),
        ([""], "make gpu OUT=folder"),
        ([__file__], "is a file"),
        ([f"{__file__}/below"], "is a file"),
        (["out", "--stage", "lunch"], "choose from device, ceilings"),
        (["out", "--dry"], "unrecognized arguments"),
    ],
)
def test_bad_options_end_with_a_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        script.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@NO_GPU
def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    command = [PYTHON, "-m", "benchmarks.gpu", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "sees no NVIDIA GPU" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@NO_GPU
def test_some_stages_only(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "_no_gpu", lambda: None)
    ran = []
    monkeypatch.setattr(script, "run_stages", lambda chosen, folder, command: ran.append(chosen) or 0)
    assert script.main([str(tmp_path), "--stage", "bench", "--stage", "device"]) == 0
    assert [stage.name for stage in ran[0]] == ["device", "bench"]


# Running stages


def test_a_failed_stage_keeps_the_results_of_the_others(tmp_path):
    chosen = [
        printing("ceilings", CEILINGS, stages.read_ceilings),
        Stage("broken", ("false",), 10),
        Stage("absent", ("no-such-program",), 10),
        Stage("lacking", (PYTHON,), 10, needs=("json", "no_such_module")),
        Stage("odd", ("true",), 10, lambda log, written: Reading(problem="nothing printed")),
        Stage("unread", ("true",), 10, lambda log, written: json.loads(log)),
        printing("device", DEVICE, stages.read_device),
    ]
    assert script.run_stages(chosen, tmp_path, "make gpu") == 1
    found = results(tmp_path)
    statuses = {name: stage["status"] for name, stage in found.items()}
    assert statuses == {
        "ceilings": "passed", "broken": "failed", "absent": "skipped", "lacking": "skipped",
        "odd": "failed", "unread": "failed", "device": "passed",
    }  # fmt: skip
    assert found["ceilings"]["figures"] == CEILINGS
    assert "exit status 1" in found["broken"]["reason"]
    assert "no-such-program is not installed" in found["absent"]["reason"]
    assert found["lacking"]["reason"].endswith("has no no_such_module")
    assert "cannot be read" in found["unread"]["reason"]
    assert found["device"]["seconds"] > 0


def test_skipped_stages_are_no_failure(tmp_path):
    assert script.run_stages([Stage("absent", ("no-such-program",), 10)], tmp_path, "make gpu") == 0


def running(marker: str) -> list[str]:
    """Command lines of living processes that hold ``marker``."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it ended in between
            continue
        if marker in line:
            found.append(line)
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_a_timeout_is_recorded_and_leaves_no_process(tmp_path):
    seconds = f"{os.getpid()}.25"  # of sleep, as a name for the processes
    session = f"import os, time; os.setsid(); time.sleep({seconds})"
    line = f"echo started; sleep {seconds} & {PYTHON} -c '{session}' & sleep {seconds}"
    start = time.monotonic()
    chosen = [Stage("slow", ("sh", "-c", line), 1.5), Stage("next", ("true",), 10)]
    assert script.run_stages(chosen, tmp_path, "make gpu") == 1
    assert time.monotonic() - start < 10
    found = results(tmp_path)
    assert found["slow"]["status"] == "timed out"
    assert found["next"]["status"] == "passed"
    assert (tmp_path / "slow.log").read_text() == "started\n"
    assert running(seconds) == []


@pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
    reason="started where Ctrl-C is ignored, as children are",
)
def test_a_stopped_stage_may_write_down_what_it_has(tmp_path):
    code = "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('{\"so far\": 3}')"
    read = lambda log, written: Reading(stages._printed(log) or {})  # noqa: E731
    assert script.run_stages([Stage("slow", (PYTHON, "-c", code), 2, read)], tmp_path, "make gpu") == 1
    assert results(tmp_path)["slow"]["figures"] == {"so far": 3}


@pytest.mark.skipif(
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN,
    reason="started where Ctrl-C is ignored, as children are",
)
@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_ends_the_stage_and_keeps_the_rest(tmp_path, which):
    def interrupt() -> None:
        deadline = time.monotonic() + 10
        while not (tmp_path / "slow.log").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(os.getpid(), which)

    chosen = [Stage("first", ("true",), 5), Stage("slow", ("sleep", "50"), 60), Stage("last", ("true",), 5)]
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        assert script.run_stages(chosen, tmp_path, "make gpu") == 130
    finally:
        thread.join()
    statuses = [stage["status"] for stage in results(tmp_path).values()]
    assert statuses == ["passed", "interrupted", "not run"]


def test_results_are_written_after_every_stage(tmp_path):
    copy = f"import shutil; shutil.copy({str(tmp_path / 'gpu.json')!r}, {str(tmp_path / 'then.json')!r})"
    chosen = [Stage("first", ("true",), 5), Stage("second", (PYTHON, "-c", copy), 20)]
    assert script.run_stages(chosen, tmp_path, "make gpu") == 0
    then = json.loads((tmp_path / "then.json").read_text())
    assert [stage["status"] for stage in then["stages"]] == ["passed", "not run"]


def test_time_that_is_left_goes_to_the_stage_that_takes_it(tmp_path):
    chosen = [Stage("quick", ("true",), 50), Stage("eager", ("true",), 10, takes_rest=True)]
    script.run_stages(chosen, tmp_path, "make gpu")
    assert 55 < results(tmp_path)["eager"]["budget"] <= 60


# Reading what stages print


def test_outcomes_of_tests_are_counted():
    log = (
        "tests/test_a.py::test_one[3 terms] PASSED  [ 1%]\n"
        "tests/test_a.py::test_two SKIPPED (needs two) [ 2%]\n"
        "tests/test_a.py::test_three[cpu] PASSED [ 3%]\ntests/test_a.py::test_three[cpu] ERROR [ 3%]\n"
        "[gw3] [ 40%] FAILED tests/test_b.py::test_four[a b] \n"
        "[gw1] [100%] PASSED tests/test_b.py::test_five \n"
        "FAILED tests/test_b.py::test_four[a b] - assert 0\n"
    )
    reading = stages.read_tests(log, None)
    assert reading.figures["outcomes"] == {"passed": 2, "skipped": 1, "error": 1, "failed": 1}
    assert reading.figures["failed"] == [
        "tests/test_a.py::test_three[cpu]",
        "tests/test_b.py::test_four[a b]",
    ]
    assert reading.problem.startswith("2 tests failed: tests/test_a.py")
    assert stages.read_tests("tests/a.py::t SKIPPED (why)\n", None).problem == "no test passed"
    assert stages.read_tests("tests/a.py::t PASSED\n", None).problem is None


@pytest.mark.parametrize(
    ("log", "figures", "problem", "skipped"),
    [
        ("6 cases are right\n===== ERROR SUMMARY: 0 errors", {"cases": 6, "errors": 0}, None, False),
        ("6 cases are right\n===== ERROR SUMMARY: 1 error", {"cases": 6, "errors": 1}, "errors", False),
        (
            "6 cases are right\n===== RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)",
            {"cases": 6, "errors": 0, "warnings": 1}, None, False,
        ),
        (
            "6 cases are right\n===== RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)",
            {"cases": 6, "errors": 2, "warnings": 0}, "errors", False,
        ),
        ("===== ERROR SUMMARY: 0 errors", {"cases": 0, "errors": 0}, "to its end", False),
        ("6 cases are right", {}, "no summary", False),
        ("===== Error: Device not supported", {}, None, True),
    ],
)  # fmt: skip
def test_sanitizer_summaries(log, figures, problem, skipped):
    reading = stages.read_sanitizer(log, None)
    assert reading.figures == figures
    assert (problem in reading.problem) if problem else reading.problem is None
    assert (reading.skipped is not None) == skipped


# Files


def whole_record(folder: Path) -> None:
    """Made-up results of three stages."""
    written = folder / "bench.json"
    bench = f"from pathlib import Path; Path({str(written)!r}).write_text({made_up_run().to_json()!r})"
    chosen = [
        printing("device", DEVICE, stages.read_device),
        printing("ceilings", CEILINGS, stages.read_ceilings),
        Stage("bench", (PYTHON, "-c", bench), 20, stages.read_bench, writes=written),
    ]
    assert script.run_stages(chosen, folder, "make gpu OUT=out") == 0
    assert not written.exists()


def test_markdown_and_report_show_the_made_up_results(tmp_path):
    pytest.importorskip("rich")
    whole_record(tmp_path)
    text = (tmp_path / "gpu.md").read_text()
    for part in (
        "- Device: GPU X, 80 GiB\n", "- Driver: 580\n",
        "- Versions: auxkern 0, torch 1, triton 2, python 3\n",
        "- Date: 20", "- Command: `make gpu OUT=out`\n", "| copy | 2,500 GB/s, read and written | 2.000 |",
        "| bf16 product | 700 TFLOP/s |", "liger-kernel missing", "| bench | passed |",
    ):  # fmt: skip
        assert part in text
    page = tmp_path / "README.md"
    page.write_text("<!-- bench:x -->\n<!-- /bench:x -->\n")
    arguments = [str(tmp_path / "gpu.json"), "--update", str(page), "--name", "x"]
    assert report.main(arguments) == 0
    lines = page.read_text().splitlines()
    assert lines[1].endswith("| Error | % of copy |")
    # 8 GB in 4 ms are 2 TB/s of 2.5; 16 GB in 10 ms are 1.6.
    assert lines[3].startswith("| gpt2, V 50,257, N 8,192, bfloat16 | **auxkern triton** | 4.00 ")
    assert lines[3].endswith("| 80 / 64 |")
    assert "device copy of 2,500 GB/s" in page.read_text()
    assert "driver 580" in page.read_text()
    assert report.main([str(tmp_path / "gpu.json")]) == 0


def test_report_says_when_there_is_no_benchmark(tmp_path, capsys):
    script.run_stages([Stage("first", ("true",), 5)], tmp_path, "make gpu")
    assert "- Device: unknown" in (tmp_path / "gpu.md").read_text()
    assert report.main([str(tmp_path / "gpu.json")]) == 2
    assert "holds no benchmark" in capsys.readouterr().err


# What the stages run, on a CPU


def test_facts_of_a_machine_without_a_gpu(capsys):
    assert device.main(["--device", "cpu"]) == 0
    reading = stages.read_device(capsys.readouterr().out, None)
    assert reading.problem is None
    assert reading.figures["machine"]["driver"] == "none"
    # The package's own: torch.__version__ names the build as well (+cu130), which some packages do not.
    assert reading.figures["peers"]["torch"] == importlib.metadata.version("torch")
    assert set(reading.figures["peers"]) == set(device.PEERS.values())


def test_ceilings_are_work_over_time(capsys):
    assert ceilings.main(["--device", "cpu", "--bytes", "400000", "--size", "64", "--seconds", "0.05"]) == 0
    reading = stages.read_ceilings(capsys.readouterr().out, None)
    assert reading.problem is None
    copy, product = reading.figures["copy"], reading.figures["bf16 product"]
    assert copy["work"] == 800_000
    assert product["work"] == 2 * 64**3
    assert copy["rate"] == pytest.approx(copy["work"] / copy["time"]["median"])


def test_the_selection_is_right_and_a_wrong_result_shows(monkeypatch, capsys):
    assert selection.main(["--device", "cpu", "--backend", "reference"]) == 0
    assert stages._CHECKED.search(capsys.readouterr().out)
    first, right = next(selection.examples()), selection.run

    def wrong(example, *arguments, **options):
        loss, *others = right(example, *arguments, **options)
        return [loss if options.get("double") else loss * 1.1, *others]

    monkeypatch.setattr(selection, "run", wrong)
    monkeypatch.setattr(selection, "examples", lambda: iter([first]))
    assert selection.main(["--device", "cpu", "--backend", "reference"]) == 1
    assert "cases are wrong" in capsys.readouterr().out
