"""Peers of ``python -m auxkern.bench --op generate``: other programs, here pretended ones."""

import importlib
import json
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from auxkern.bench import __main__ as bench
from auxkern.bench import generate, peers, plot, tables
from auxkern.bench.peers import exchange
from auxkern.bench.results import GenerateRun, Throughput
from auxkern.model import TextFormat
from tests.support.tiny import byte_tokenizer, tiny_lm_for, tiny_pair

# In place of a peer's Python: what it is asked goes to asked-N.json beside it, and {answer} is what it says.
_PRETENDED = """#!{python}
import json, pathlib, sys
asked = json.loads(pathlib.Path(sys.argv[2]).read_text())
here = pathlib.Path(__file__).parent
number = len(list(here.glob("asked-*.json")))
(here / f"asked-{{number}}.json").write_text(json.dumps({{"script": sys.argv[1], **asked}}))
answer = {{"versions": {{"pretended": "1.2"}}, "counts": asked["lengths"], "seconds": 2.0, "nll": 3.25}}
{answer}
pathlib.Path(sys.argv[3]).write_text(json.dumps(answer))
"""


@pytest.fixture
def pretended(tmp_path):
    """A function that makes the interpreter; ``answer`` is Python that changes what it says."""

    def make(answer=""):
        python = tmp_path / "peer" / "python"
        python.parent.mkdir(exist_ok=True)
        python.write_text(_PRETENDED.format(python=sys.executable, answer=answer))
        python.chmod(python.stat().st_mode | stat.S_IXUSR)
        return python

    return make


@pytest.fixture
def tiny_work(monkeypatch):
    tokenizer = byte_tokenizer()
    lm = tiny_lm_for(tokenizer)
    model = tiny_pair("shared head, features, pointer", lm, lm_layers=[], pointer_reads_lm=False)
    work = generate.Work(
        model, TextFormat(tokenizer), [*"abc"], ["", "x", "yy"], [3, 9, 1], model.lm, model.auxiliary
    )
    work = replace(work, sentences=[[1, 5, 7], [1, 9]], files=peers.LmFiles(Path("m"), Path("g"), Path("c")))
    monkeypatch.setattr(generate, "new_work", lambda options, device: work)
    return work


def command(*arguments):
    return bench.main(["--op", "generate", "--device", "cpu", *map(str, arguments)])


def asked_of(python):
    files = sorted(python.parent.glob("asked-*.json"), key=lambda one: int(one.stem.split("-")[1]))
    return [json.loads(one.read_text()) for one in files]


def test_a_peer_is_asked_for_the_same_requests_and_stands_in_the_record(
    tiny_work, pretended, tmp_path, capsys
):
    python = pretended()
    assert command("--batch", 2, "--peer", f"ctranslate2={python}", "--json", tmp_path / "x.json") == 0
    run = GenerateRun.from_json((tmp_path / "x.json").read_text())
    texts = {one.implementation: one for one in run.results}
    for precision in ("int8", "float32"):
        one = texts[f"CTranslate2 {precision}"]
        assert (one.batch, one.requests, one.tokens, one.seconds) == (2, 3, 13, 2.0)
        assert run.nll[f"CTranslate2 {precision}"] == 3.25
    assert run.machine["pretended"] == "1.2"
    assert run.sentences == 2
    check, *writes, score, _ = asked_of(python)
    assert check["task"] == "check"
    assert [one["precision"] for one in writes] == ["int8", "float32"]
    start = tiny_work.text_format.start_id
    for one in writes:
        assert Path(one["script"]).name == "with_ctranslate2.py"
        assert (one["task"], one["batch"], one["lengths"]) == ("write", 2, [3, 9, 1])
        assert one["filters"] == {"temperature": 1.0, "top_k": 50, "top_p": 0.9}
        assert one["threads"] == torch.get_num_threads()
        assert [ids[0] for ids in one["prompts"]] == [start] * 3
        assert [len(ids) for ids in one["prompts"]] == [1, 2, 3]  # a byte is a token
        assert (one["model"], one["gguf"], one["cache"]) == ("m", "g", "c")
    assert (score["task"], score["sentences"]) == ("score", [[1, 5, 7], [1, 9]])
    out = capsys.readouterr().out
    assert "CTranslate2 int8" in out
    assert "3.2500" in out


@pytest.mark.parametrize(
    ("answer", "note"),
    [
        ("if asked['precision'] == 'int8': answer['counts'][1:2] = [8]", "; text 1 has 8, not 9"),
        ("if asked['precision'] == 'int8': answer['counts'] = [9, 3, 1]", "; text 0 has 9, not 3"),
        ("if asked['precision'] == 'int8': answer['counts'] = [3, 9]", "12 tokens in 2 texts; 13 in 3"),
        ("if asked['precision'] == 'int8' and asked['lengths']: sys.exit('it broke')", "status 1: it broke"),
        ("if asked['precision'] == 'int8' and asked['lengths']: sys.exit(0)", "status 0: and said nothing"),
    ],
)
def test_a_peer_that_fails_is_noted_and_the_others_go_on(tiny_work, pretended, tmp_path, answer, note):
    pretending = f"if asked['task'] == 'write':\n    {answer}"
    peer = f"ctranslate2={pretended(pretending)}"
    assert command("--batch", 2, "--peer", peer, "--json", tmp_path / "x.json") == 1
    run = GenerateRun.from_json((tmp_path / "x.json").read_text())
    (failed,) = [one for one in run.notes if one.startswith("Failed: ")]
    assert failed.startswith("Failed: CTranslate2 int8, batch 2: it ")
    assert note in failed
    assert run.failed
    measured = [one.implementation for one in run.results]
    assert "CTranslate2 int8" not in measured
    assert measured[-1] == "CTranslate2 float32"


def test_scores_that_fail_are_noted(tiny_work, pretended, tmp_path):
    python = pretended("if asked['task'] == 'score': raise MemoryError")
    peer = f"ctranslate2={python}"
    assert command("--batch", 2, "--peer", peer, "--json", tmp_path / "x.json") == 1
    run = GenerateRun.from_json((tmp_path / "x.json").read_text())
    failed = [one for one in run.notes if one.startswith("Failed: ")]
    assert len(failed) == 2
    assert "Failed: CTranslate2 int8, nll: it ended with status 1" in failed[0]
    assert "MemoryError" in failed[0]
    assert {*run.nll} == {
        "engine",
        "engine, LM alone",
        "two-model loop",
        "generate, LM alone",
        "generate, pair",
    }


def test_a_peer_without_its_packages_ends_the_bench_before_anything_is_loaded(pretended, monkeypatch, capsys):
    monkeypatch.setattr(generate, "new_work", lambda *_: pytest.fail("it was loaded"))
    python = pretended("answer = {'missing': ['openvino_genai']}")
    assert command("--peer", f"openvino={python}") == 2
    message = capsys.readouterr().err
    assert f"{python} has no openvino_genai; install there: pip install" in message


@pytest.mark.parametrize("name", peers.KINDS)
def test_every_script_runs_where_nothing_of_its_peer_is_installed(name, tmp_path):
    # A virtual environment without packages, as python itself is without site-packages.
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    with pytest.raises(peers.PeerError, match=r"has no .*; install there: pip install"):
        peers.Peer(name, python).versions()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peer", "openvino"], "is not NAME=PYTHON"),
        (["--peer", "torch=python3"], "with one of openvino, ctranslate2, vllm, llama_cpp"),
        (["--peer", "openvino=/nowhere/bin/python"], "/nowhere/bin/python is no program"),
        (
            ["--peer", f"vllm={sys.executable}", "--peer", f"vllm={sys.executable}"],
            "names vllm more than once",
        ),
        (["--compute", "int4"], "invalid choice"),
        (["--sentences", "-1"], "at least 0"),
    ],
)
def test_bad_options_end_before_anything_is_loaded(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(generate, "new_work", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(SystemExit) as ended:
        command(*arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_the_interpreter_is_named_by_its_place_and_not_by_what_it_links_to(tmp_path):
    link = tmp_path / "python"
    link.symlink_to(sys.executable)
    assert peers.peer_from(f"openvino={link}").python == link


# What a script does with the exchange


_SCRIPT = """
import sys
sys.path.insert(0, {folder!r})
import exchange

def writer(asked):
    calls = []
    def write(prompts, lengths):
        calls.append(lengths)
        print(calls)
        return [[7] * length for length in lengths]
    return write

def scorer(asked):
    return lambda ids: -0.5 * sum(ids[1:])

exchange.main(exchange.Program({modules!r}, ["pytest"], writer, scorer))
"""


def exchanged(tmp_path, task, modules=("json",), **given):
    script, request, answer = (tmp_path / name for name in ("script.py", "asked.json", "answer.json"))
    script.write_text(_SCRIPT.format(folder=str(Path(exchange.__file__).parent), modules=modules))
    asked = {"precision": "int8", "threads": 1, "model": "m", "gguf": "g", "cache": "c", "filters": {}}
    asked |= {"batch": 2, "prompts": [], "lengths": [], "sentences": [], "task": task, **given}
    request.write_text(json.dumps(asked))
    done = subprocess.run(
        [sys.executable, script, request, answer], capture_output=True, text=True, check=True
    )
    return json.loads(answer.read_text()), done.stdout


def test_texts_are_counted_after_a_few_that_nobody_times(tmp_path):
    answer, printed = exchanged(tmp_path, "write", prompts=[[1], [1, 2], [3]], lengths=[5, 6, 7])
    assert answer["counts"] == [5, 6, 7]
    assert answer["versions"] == {"pytest": pytest.__version__}
    assert 0 <= answer["seconds"] < 5
    assert printed.splitlines()[-1] == "[[4, 4], [5, 6, 7]]"


def test_scores_are_a_mean_over_all_tokens_but_the_first(tmp_path):
    answer, _ = exchanged(tmp_path, "score", sentences=[[9, 1, 2, 3], [9, 4]])
    assert answer["nll"] == pytest.approx(0.5 * (1 + 2 + 3 + 4) / 4)


def test_modules_that_are_not_there_are_all_that_is_said(tmp_path):
    modules = ["json", "no_such_thing", "no_such.thing"]
    assert exchanged(tmp_path, "write", modules)[0] == {"missing": ["no_such_thing", "no_such.thing"]}


def test_what_is_converted_is_whole_and_is_not_converted_again(tmp_path):
    folder, calls = tmp_path / "cache" / "model", []

    def convert(into):
        calls.append(into)
        into.mkdir()
        (into / "weights").write_text("all")

    def broken(into):
        into.mkdir()
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        exchange.converted(folder, broken)
    assert [*folder.parent.iterdir()] == []
    for _ in range(2):
        assert exchange.converted(folder, convert) == folder
    assert (folder / "weights").read_text() == "all"
    assert len(calls) == 1
    assert [*folder.parent.iterdir()] == [folder]


# Tables


def stored_run():
    results = [
        Throughput("engine, int8", 8, 64, 1200, 10.0, {}, 0.0),
        Throughput("OpenVINO int8", 8, 64, 1200, 20.0, {}, 0.0),
        Throughput("OpenVINO float32", 8, 64, 1200, 40.0, {}, 0.0),
        Throughput("OpenVINO int8", 32, 64, 1200, 5.0, {}, 0.0),
    ]
    shares = {"linear": 0.5, "attention": 0.1, "layers": 0.0, "between": 0.2}
    run = GenerateRun("c", "d", {"device": "cpu"}, 64, [8, 128], {}, {"LM": 1, "auxiliary": 1}, results)
    run.peers, run.nll, run.sentences = ["OpenVINO int8", "OpenVINO float32"], {"OpenVINO int8": 3.14159}, 500
    run.kernels = {"engine, int8, batch 8": {**shares, "heads and draw": 0.15, "engine": 0.05}}
    return run


def test_a_line_is_compared_with_the_fastest_peer_at_its_own_batch():
    lines = tables.markdown(stored_run()).splitlines()
    assert lines[0].endswith("| Vs LM alone | Vs best peer | Nll |")
    assert lines[2] == "| **engine, int8** | 8 | 64 | 10.0 | 120.0 | - | - | 2.00x | - |"
    assert lines[3] == "| OpenVINO int8 | 8 | 64 | 20.0 | 60.0 | - | - | 1.00x | 3.1416 |"
    assert lines[4] == "| OpenVINO float32 | 8 | 64 | 40.0 | 30.0 | - | - | 0.50x | - |"
    assert "| engine, int8, batch 8 | 50.0% | 10.0% | 0.0% | 20.0% | 15.0% | 5.0% |" in lines
    assert "500 held-out sentences" in "".join(lines)
    assert GenerateRun.from_json(stored_run().to_json()) == stored_run()


def test_printed_tables_fit_100_columns(capsys):
    tables.print_run(stored_run())
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert "…" not in printed


def test_lines_of_one_program_share_a_colour_and_no_two_look_alike():
    engines = ["engine", "engine, bfloat16", "engine, int8", "engine, LM alone", "engine, LM alone, int8"]
    others = ["OpenVINO int8", "OpenVINO bfloat16", "OpenVINO float32", "CTranslate2 int8"]
    styles = plot._styles([*engines, *others, "two-model loop"])
    assert len({*styles.values()}) == len(styles) == 10
    assert len({styles[name][0] for name in engines[:3]}) == 1
    assert len({styles[name][0] for name in others[:3]}) == 1
    assert styles["OpenVINO int8"][0] != styles["CTranslate2 int8"][0]


class PretendedPipeline:
    """OpenVINO GenAI's, which takes as many requests as it is given, whatever ``max_num_seqs`` says."""

    def __init__(self, *args):
        self.running, self.at_a_time = {}, []

    def add_request(self, id, ids, config):
        self.running[id] = handle = SimpleNamespace(config=config, ids=[])
        handle.get_status = lambda: "RUNNING" if id in self.running else "FINISHED"
        handle.read_all = lambda: [SimpleNamespace(generated_ids=handle.ids)]
        return handle

    def step(self):
        self.at_a_time.append(len(self.running))
        for id, handle in list(self.running.items()):
            handle.ids.append(id)
            if len(handle.ids) == handle.config.max_new_tokens:
                del self.running[id]


def test_openvino_has_no_more_texts_at_a_time_than_it_is_asked_for(tmp_path, monkeypatch):
    pipeline = PretendedPipeline()
    genai = SimpleNamespace(
        SchedulerConfig=SimpleNamespace,
        ContinuousBatchingPipeline=lambda *args: pipeline,
        GenerationConfig=SimpleNamespace,
        GenerationStatus=SimpleNamespace(RUNNING="RUNNING"),
    )
    monkeypatch.setitem(sys.modules, "openvino_genai", genai)
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Tensor=list, __version__="1-pretended"))
    monkeypatch.syspath_prepend(Path(exchange.__file__).parent)
    (tmp_path / "openvino-1-int8").mkdir()
    with_openvino = importlib.import_module("with_openvino")
    lengths = [2, 5, 1, 1]
    asked = {"task": "write", "precision": "int8", "threads": 1, "model": "m", "gguf": "g", "batch": 2}
    asked |= {"cache": str(tmp_path), "prompts": [], "lengths": [], "filters": {}, "sentences": []}
    texts = with_openvino.writer(with_openvino.exchange.Asked(**asked))([[3]] * 4, lengths)
    assert texts == [[i] * length for i, length in enumerate(lengths)]
    assert pipeline.at_a_time == [2, 2, 2, 2, 1]
