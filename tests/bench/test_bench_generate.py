"""``python -m auxkern.bench --op generate`` on a tiny pair."""

import copy
import json
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import auxkern
from auxkern.bench import __main__ as bench
from auxkern.bench import generate, mixtures, plot, quality, report, tables
from auxkern.bench.results import GenerateRun, Throughput
from auxkern.machine import OtherWork
from auxkern.model import TextFormat
from auxkern.model.native import native_refusal
from tests.support.tiny import byte_tokenizer, tiny_lm_for, tiny_pair

SHARES = {"LM": 0.7, "heads": 0.125, "auxiliary": 0.1, "sampling": 0.05, "rest": 0.025}


def stored_run():
    """Speeds: engine 5 and 30, loop 5 and 10, LM alone 8 and 20 tokens per second."""
    seconds = {"engine": (80.0, 40.0), "two-model loop": (80.0, 120.0), "generate, LM alone": (50.0, 60.0)}
    results = [
        Throughput(name, batch, requests, tokens, times[i], SHARES if name == "engine" else {}, 0.0)
        for i, (batch, requests, tokens) in enumerate([(1, 16, 400), (32, 64, 1200)])
        for name, times in seconds.items()
    ]
    return GenerateRun(
        "python -m auxkern.bench --op generate",
        "2030-01-01T00:00:00+00:00",
        {"device": "cpu"},
        64,
        [8, 128],
        {"temperature": 1.0},
        {"LM": 134_500_000, "auxiliary": 4_800_000},
        results,
        ["a note"],
    )


@pytest.fixture
def work():
    tokenizer = byte_tokenizer()
    lm = tiny_lm_for(tokenizer)
    model = tiny_pair("shared head, features, pointer", lm, lm_layers=[], pointer_reads_lm=False)
    conditions, prompts = [*"abcdef"], ["", "x", "", "yy", "", "z"]
    lengths = [3, 9, 1, 5, 7, 2]
    return generate.Work(
        model, TextFormat(tokenizer), conditions, prompts, lengths, model.lm, model.auxiliary
    )


@pytest.fixture
def tiny_work(work, monkeypatch):
    monkeypatch.setattr(generate, "new_work", lambda count, device: work)
    return work


def command(*arguments):
    return bench.main(["--op", "generate", "--device", "cpu", *map(str, arguments)])


def test_every_way_is_measured_and_written_down(tiny_work, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path, picture = tmp_path / "generate.json", tmp_path / "generate.png"
    assert command("--batch", 4, 2, "--json", path, "--plot", picture) == 0
    record = json.loads(path.read_text())
    names = ["engine", "engine, LM alone", "two-model loop", "generate, LM alone", "generate, pair"]
    found = [(one["implementation"], one["batch"]) for one in record["results"]]
    assert found == [(name, batch) for batch in (2, 4) for name in names]
    for one in record["results"]:
        assert one["tokens"] == sum(tiny_work.lengths)
        assert one["requests"] == len(tiny_work.lengths)
        assert one["seconds"] > 0
    shares = record["results"][0]["shares"]
    assert set(shares) == {"LM", "heads", "auxiliary", "sampling", "rest"}
    assert sum(shares.values()) == pytest.approx(1)
    assert all(share >= 0 for share in shares.values())
    out = capsys.readouterr().out
    assert "two-model loop" in out
    assert "continuous batching of the LM alone does not run here" in out
    assert record["parameters"]["LM"] == sum(p.numel() for p in tiny_work.model.lm.parameters())
    trained = [*tiny_work.model.auxiliary.parameters(), *tiny_work.model.head.parameters()]
    assert record["parameters"]["auxiliary"] == sum(p.numel() for p in trained)
    assert picture.stat().st_size > 5000
    capsys.readouterr()
    assert report.main([str(path)]) == 0
    assert capsys.readouterr().out == out


def test_small_batches_write_fewer_texts_and_large_ones_all_at_once(work, monkeypatch, tmp_path):
    count = 20
    many = replace(work, conditions=["c"] * count, prompts=[""] * count, lengths=[1] * 16 + [2] * 4)
    monkeypatch.setattr(generate, "new_work", lambda count, device: many)
    slots, real = [], generate.engine
    monkeypatch.setattr(generate, "engine", lambda work, n: slots.append(n) or real(work, n))
    monkeypatch.setattr(generate, "differing", lambda work: [])
    assert command("--batch", 1, 8, 64, "--json", tmp_path / "x.json") == 0
    run = GenerateRun.from_json((tmp_path / "x.json").read_text())
    found = {(one.batch, one.requests, one.tokens) for one in run.results}
    assert found == {(1, 16, 16), (8, 20, 24), (64, 20, 24)}
    assert slots == [1, 1, 8, 8, 20, 20]  # for the pair, and for the LM alone
    assert "Batch 1 is measured on the first 16 of 20 requests." in run.notes
    assert "Batch 64 is all 20 requests at once." in run.notes
    assert not any(note.startswith("Batch 8 ") for note in run.notes)


def test_batches_of_the_issue_are_the_default():
    assert generate._parser().parse_args([]).batch == [1, 8, 32, 128]


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (RuntimeError, None)])
def test_what_is_finished_is_kept(tiny_work, monkeypatch, tmp_path, capsys, error, status):
    finished = stored_run().results[0]
    path = tmp_path / "x.json"

    def measured(*arguments):
        if not path.exists():
            return finished
        assert GenerateRun.from_json(path.read_text()).results == [finished]
        raise error

    monkeypatch.setattr(generate, "_measured", measured)
    if status is None:
        with pytest.raises(error):
            command("--batch", 2, "--json", path)
    else:
        assert command("--batch", 2, "--json", path) == status
    run = GenerateRun.from_json(path.read_text())
    assert run.results == [finished]
    assert run.interrupted is (status == 130)
    assert ("Interrupted: 1 of 5" in capsys.readouterr().out) is (status == 130)


def test_time_of_draws_is_the_products_beyond_what_sampling_takes(tiny_work, monkeypatch):
    monkeypatch.setattr(generate, "_sampling_seconds", lambda work, rows: 1e9)
    written = generate._engine(tiny_work, 2)
    shares = written.shares()
    assert written.seconds > 0
    assert shares["heads"] == 0
    assert 0 < shares["sampling"] < 1
    assert sum(shares.values()) == pytest.approx(1)


def test_sampling_is_timed_for_every_row_that_was_drawn(tiny_work, monkeypatch):
    real, drawn = auxkern.sample, []

    def slow(terms, *arguments, **options):
        drawn.append(terms[0].shape[0])
        time.sleep(0.005 * terms[0].shape[0])
        return real(terms, *arguments, **options)

    monkeypatch.setattr(auxkern, "sample", slow)
    seconds = generate._sampling_seconds(tiny_work, [1, 4, 0, 4, 1, 4])
    assert set(drawn) == {1, 4}
    assert 0.07 <= seconds < 0.7  # 5 ms for each of 14 rows, at least


class Batching:
    """In place of an LM whose library batches continuously: ``missing`` of its texts are too short."""

    def __init__(self, missing):
        self.missing = missing

    def generate_batch(self, inputs, generation_config):
        length = generation_config.max_new_tokens
        whole = [length] * (len(inputs) - self.missing) + [1] * self.missing
        return {i: SimpleNamespace(generated_tokens=[7] * n) for i, n in enumerate(whole)}


def test_continuous_batching_is_counted_by_what_it_writes(work, monkeypatch):
    monkeypatch.setattr(generate, "continuous_refusal", lambda work: None)
    notes = []
    *_, last = generate._runs(replace(work, plain_lm=Batching(0)), [2, 4], notes)
    result = generate._measured(last, lambda share, doing: None)
    assert (result.implementation, result.batch) == ("continuous, LM alone", 4)
    assert result.tokens == 128 * len(work.lengths)
    assert any("writes 128 tokens" in note for note in notes)
    with pytest.raises(RuntimeError, match="wrote 5 texts of 9 tokens, not 6"):
        generate.continuous(replace(work, plain_lm=Batching(1)), 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plot", "x.gif"], "must end in .png"),
        (["--json", "nowhere/at/all.json"], "does not exist"),
        (["--batch", "0"], "at least 1"),
    ],
)
def test_bad_options_end_before_anything_is_loaded(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(generate, "new_work", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(SystemExit) as ended:
        command(*arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_wrong_texts_are_not_timed(tiny_work, monkeypatch, tmp_path, capsys):
    real = generate.engine

    def wrong(work, slots):
        made = real(work, slots)
        table = made._runner._base.table
        assert callable(table.advance)
        table.advance = lambda *, opened: None  # columns are written over
        return made

    monkeypatch.setattr(generate, "engine", wrong)
    assert generate.main(["--json", str(tmp_path / "x.json"), "--device", "cpu"]) == 1
    assert "are wrong" in capsys.readouterr().err
    assert not (tmp_path / "x.json").exists()


def test_the_loop_computes_the_pairs_logits(work, monkeypatch):
    """The peer is given its due: its logits are the sum, and it stops where the longest text does."""
    seen = []

    def first(scores, count):
        seen.append(scores)
        return scores.argmax(-1, keepdim=True)

    monkeypatch.setattr(torch, "multinomial", first)
    monkeypatch.setattr(generate, "FILTERS", {"temperature": 1.0, "top_k": 1, "top_p": 1.0})
    rows = [1, 3]
    generate.two_model_loop(work, rows)
    greedy = work.model.generate(
        **generate.encoded(work, rows), do_sample=False, max_new_tokens=9, eos_token_id=None
    )
    drawn = torch.stack([scores.argmax(-1) for scores in seen], 1)
    assert torch.equal(drawn, greedy[:, -9:])


# What is drawn from the record


def test_a_record_comes_back_from_json():
    run = stored_run()
    assert GenerateRun.from_json(run.to_json()) == run


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "not a result"),
        ("{", "not a result"),
        ('{"kind": "gpu"}', "kind 'gpu', and 'generate'"),
        ('{"kind": "generate", "results": []}', "schema None, this version reads 1; run the benchmark again"),
        ('{"kind": "generate", "schema": 1, "results": [{"batch": 1}]}', "not a result"),
    ],
)
def test_other_json_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        GenerateRun.from_json(text)


def test_markdown_compares_with_each_peer_at_its_best_batch():
    lines = tables.markdown(stored_run()).splitlines()
    assert lines[0] == ("| Implementation | Batch | Requests | Seconds | Tokens/s | Vs loop | Vs LM alone |")
    assert lines[2] == "| **engine** | 1 | 16 | 80.0 | 5.0 | 0.50x | 0.25x |"
    assert lines[5] == "| **engine** | 32 | 64 | 40.0 | 30.0 | 3.00x | 1.50x |"
    assert lines[6] == "| two-model loop | 32 | 64 | 120.0 | 10.0 | 1.00x | 0.50x |"
    assert "| engine | 32 | 70.0% | 12.5% | 10.0% | 5.0% | 2.5% | 7.5% |" in lines
    assert lines[-1] == "a note"
    assert "LM of 134.5M parameters and auxiliary of 4.8M" in "".join(lines)


def test_nothing_to_compare_with_is_no_ratio():
    run = stored_run()
    run.results = run.results[:1]
    assert "| **engine** | 1 | 16 | 80.0 | 5.0 | - | - |" in tables.markdown(run)


def test_shares_that_are_not_known_are_no_table(capsys):
    run = stored_run()
    run.results = [replace(one, shares={}) for one in run.results]
    tables.print_run(run)
    for text in (tables.markdown(run), capsys.readouterr().out):
        assert "two-model loop" in text
        assert "the engine's time" not in text


def test_printed_tables_fit_100_columns(capsys):
    tables.print_run(stored_run())
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert "…" not in printed
    assert "3.00x" in printed
    assert "7.5%" in printed
    assert "a note" in printed


def test_report_reads_what_the_file_says_it_is(tmp_path, capsys):
    path, page = tmp_path / "run.json", tmp_path / "README.md"
    path.write_text(stored_run().to_json())
    page.write_text("before\n<!-- bench:generate -->\n<!-- /bench:generate -->\nafter\n")
    assert report.main([str(path), "--update", str(page), "--name", "generate"]) == 0
    assert page.read_text().startswith("before\n<!-- bench:generate -->\n| Implementation | Batch |")
    assert page.read_text().endswith("a note\n<!-- /bench:generate -->\nafter\n")
    assert report.main([str(path), "--markdown"]) == 0
    assert capsys.readouterr().out == tables.markdown(stored_run())
    path.write_text('{"kind": "evaluation"}')
    assert report.main([str(path)]) == 2
    assert "kind 'evaluation'" in capsys.readouterr().err


def test_the_picture_names_lines_and_shares(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    (tmp_path / "run.json").write_text(stored_run().to_json())
    picture = tmp_path / "run.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):  # letters, not their outlines
        assert report.main([str(tmp_path / "run.json"), "--plot", str(picture)]) == 0
    svg = picture.read_text()
    for text in ("engine  30", "two-model loop  10", "generate, LM alone  20", "batch 32", ">70%<", ">7.5%<"):
        assert text in svg
    assert "Batch 1: the first 16 requests." in svg


@pytest.mark.parametrize("names", [["two-model loop"], ["engine"], ["a new one", "engine"]])
def test_a_part_of_a_run_is_drawn(names, tmp_path):
    pytest.importorskip("matplotlib")
    run = stored_run()
    engine = run.results[0]
    run.results = [replace(engine, implementation=name, shares={}) for name in names]
    plot.plot(run, tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 5000


def test_nothing_is_no_picture(tmp_path):
    run = stored_run()
    with pytest.raises(ValueError, match=r"must end in \.png"):
        plot.plot(run, tmp_path / "run.gif")
    run.results = []
    with pytest.raises(ValueError, match="nothing was timed"):
        plot.plot(run, tmp_path / "run.png")


@given(st.dictionaries(st.text(), st.floats(0, 1000), max_size=8), st.floats(0.5, 50))
def test_labels_keep_apart_and_in_order(heights, gap):
    found = plot.spread(heights, gap)
    assert found.keys() == heights.keys()
    order = sorted(heights, key=heights.__getitem__)
    placed = [found[name] for name in order]
    assert all(b - a >= gap * (1 - 1e-9) for a, b in pairwise(placed))
    assert all(found[name] >= height for name, height in heights.items())
    if all(heights[b] - heights[a] >= gap * (1 + 1e-9) for a, b in pairwise(order)):
        assert found == heights  # nothing moves without need


def test_other_work_is_named_where_it_took_a_tenth_of_the_machine():
    quiet, loud = stored_run().results[:2]
    loud, unknown = replace(loud, busy_cores=1.5), replace(quiet, busy_cores=None)
    assert generate.busy_notes([replace(quiet, busy_cores=0.7), unknown], 8) == []
    (note,) = generate.busy_notes([quiet, loud], 8)
    assert note.startswith("Busy: other programs kept up to 1.5 of 8 cores")
    assert "two-model loop (batch 1)" in note
    assert "engine" not in note


# Computes, the LM alone, scores, and native calls


def test_every_compute_has_its_lines(tiny_work, monkeypatch, tmp_path):
    both = replace(tiny_work, engines={"float32": tiny_work.model, "int8": tiny_work.model})
    monkeypatch.setattr(generate, "new_work", lambda options, device: both)
    assert command("--batch", 4, "--json", tmp_path / "x.json") == 0
    names = [one["implementation"] for one in json.loads((tmp_path / "x.json").read_text())["results"]]
    assert names[:4] == ["engine", "engine, LM alone", "engine, int8", "engine, LM alone, int8"]


def test_a_compute_whose_texts_are_wrong_is_named(tiny_work, monkeypatch, capsys):
    both = replace(tiny_work, engines={"float32": tiny_work.model, "int8": copy.copy(tiny_work.model)})
    monkeypatch.setattr(generate, "new_work", lambda options, device: both)
    monkeypatch.setattr(generate, "differing", lambda one: [] if one.model is tiny_work.model else [2])
    assert command("--batch", 4) == 1
    assert "texts of requests [2] in int8 are wrong" in capsys.readouterr().err


def test_the_engines_lm_alone_writes_what_the_lm_writes_greedily(work, monkeypatch):
    monkeypatch.setattr("auxkern.bench.work.FILTERS", {"temperature": 0.0})
    done = generate.engine(work, 3).generate(generate.requests(work, None))
    for i, one in enumerate(done):
        inputs = generate.encoded(work, [i])
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        ids = work.plain_lm.generate(
            **given, do_sample=False, max_new_tokens=work.lengths[i], eos_token_id=None, pad_token_id=0
        )
        assert list(one.token_ids) == ids[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("own_logits", [False, True])
def test_nll_is_the_mean_over_tokens_of_each_sentence_alone(work, own_logits):
    generator = torch.Generator().manual_seed(0)
    V = work.model.config.vocab_size
    sentences = [torch.randint(V, (n,), generator=generator).tolist() for n in (2, 9, 5, *[3] * 20)]
    total = 0.0
    for ids in sentences:
        logits = work.plain_lm(torch.tensor([ids])).logits[0, :-1].double()
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum").item()
    expected = total / sum(len(ids) - 1 for ids in sentences)
    # float32 products in another order, over about 60 tokens
    assert quality.mean_nll(work.plain_lm, sentences, own_logits=own_logits) == pytest.approx(
        expected, rel=1e-5
    )


def test_held_out_sentences_are_spread_and_each_is_there_once(monkeypatch):
    texts = [f"w{i}" for i in range(7) for _ in range(2)]
    splits = SimpleNamespace(test=[SimpleNamespace(text=text) for text in texts])
    task = SimpleNamespace(split=lambda: splits)
    monkeypatch.setattr(quality, "load_task", lambda name: task)
    text_format = TextFormat(byte_tokenizer())

    def read(count):
        every = quality.held_out_sentences(text_format, count)
        assert all(ids[0] == text_format.start_id for ids in every)
        assert all(ids[-1] != text_format.end_id for ids in every)
        return [text_format.decode(ids) for ids in every]

    assert read(3) == ["w0", "w2", "w4"]
    assert read(50) == [f"w{i}" for i in range(7)]


def test_a_profile_says_what_computes(work, monkeypatch, tmp_path):
    if native_refusal() is not None:
        pytest.skip(native_refusal())
    native = replace(work, model=work.model.use_native_kernels())
    monkeypatch.setattr(generate, "new_work", lambda options, device: native)
    assert command("--batch", 4, "--profile", "--json", tmp_path / "x.json") == 0
    run = GenerateRun.from_json((tmp_path / "x.json").read_text())
    assert [*run.kernels] == ["engine, batch 4", "engine, LM alone, batch 4"]
    for shares in run.kernels.values():
        assert [*shares] == ["linear", "attention", "layers", "between", "heads and draw", "engine"]
        assert sum(shares.values()) == pytest.approx(1)
        assert min(shares.values()) >= 0
        assert shares["linear"] + shares["layers"] > 0
        assert shares["heads and draw"] > 0
    assert "around each native call" in tables.markdown(run)


def test_other_work_does_not_count_programs_that_this_one_ran():
    before = OtherWork._seconds()
    if before is None:
        pytest.skip("no /proc/stat here")
    burn = "import time\nwhile time.process_time() < 0.4: pass"
    subprocess.run([sys.executable, "-c", burn], check=True)
    assert OtherWork._seconds()[1] - before[1] >= 0.35


def test_what_is_done_for_shares_of_the_time_is_not_timed(tiny_work):
    shares = {"LM": 1.0}
    late = generate.Written(None, lambda: time.sleep(0.5) or shares)
    measured = generate._measured(("x", 2, tiny_work, lambda work, batch: late), lambda *told: None)
    assert measured.seconds < 0.5
    assert measured.shares == shares


def test_what_an_engine_is_made_of_is_not_timed(tiny_work, monkeypatch):
    make = generate.engine

    def slowly(*given):
        made = make(*given)
        time.sleep(1.0)
        return made

    monkeypatch.setattr(generate, "engine", slowly)
    began = time.perf_counter()
    measured = generate._measured(("x", 2, tiny_work, generate._engine), lambda *told: None)
    assert measured.seconds < time.perf_counter() - began - 1.0


def test_mixtures_are_measured_beside_other_ways_and_noted(tiny_work, tmp_path, capsys):
    path = tmp_path / "generate.json"
    assert command("--batch", 4, "--mixtures", "--no-loops", "--sentences", 0, "--json", path) == 0
    record = json.loads(path.read_text())
    names = {one["implementation"] for one in record["results"]}
    assert names == {
        "engine",
        "engine, LM alone",
        "guidance, engine",
        "guidance, generate",
        "expert alone, engine",
        "anti-expert alone, engine",
        "proxy tuning, engine",
        "proxy tuning, three-model loop",
    }
    assert {one["tokens"] for one in record["results"]} == {sum(tiny_work.lengths)}
    speeds = {one["implementation"]: one["tokens"] / one["seconds"] for one in record["results"]}
    alone = ("engine, LM alone", "expert alone, engine", "anti-expert alone, engine")
    share = speeds["proxy tuning, engine"] * sum(1 / speeds[name] for name in alone)
    out = capsys.readouterr().out
    assert f"proxy tuning, engine, batch 4: {share:.2f} of what its models' own costs allow" in out
    times = speeds["guidance, engine"] / speeds["guidance, generate"]
    assert f"guidance, engine, batch 4: {times:.1f} times transformers' guidance at its best batch." in out


def test_the_loop_of_three_models_draws_from_their_sum(work):
    (_, _), (_, loop) = mixtures.others(work)
    lms = [(copy.deepcopy(lm).double(), weight) for lm, weight in loop.args[0]]
    assert [weight for _, weight in lms] == [1.0, 1.0, -1.0]
    assert len({lm.config.num_hidden_layers for lm, _ in lms}) == 2 or len(lms[0][0].base_model.layers) == 1
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixtures, "warped", lambda module, logits, **filters: seen.append(logits) or logits)
        patch.setattr(torch, "multinomial", lambda p, n: p.argmax(-1, keepdim=True))
        loop(work, [0, 1])
    # Each row's own text once more, without caches and padding.
    for row in (0, 1):
        inputs = generate.encoded(work, [row])["input_ids"]
        for logits in seen:
            expected = sum(weight * lm(inputs).logits[:, -1] for lm, weight in lms)
            assert (logits[row] - expected[0]).abs().max() <= 1e-4 * expected.abs().max()
            inputs = torch.cat([inputs, logits[row].argmax()[None, None]], 1)


def test_texts_of_mixtures_that_differ_end_the_run(tiny_work, monkeypatch, capsys):
    real = mixtures.Line.engine

    def of_another_expert(line, work, slots):
        models = copy.deepcopy(line.models)
        if models:
            models["expert"].get_input_embeddings().weight.mul_(3)
        return real(line._replace(models=models), work, slots)

    monkeypatch.setattr(mixtures.Line, "engine", of_another_expert)
    assert command("--batch", 2, "--mixtures", "--sentences", 0) == 1
    told = capsys.readouterr().err
    assert "the engine's texts are wrong: proxy tuning, engine (request 0)" in told
    assert "guidance" not in told
