"""The benchmark of sampling: its check of tokens, what is written down, decoding from real logits."""

from __future__ import annotations

from functools import reduce
from operator import add

import pytest
import torch

pytest.importorskip("rich")
pytest.importorskip("transformers")

from transformers.generation import logits_process as warpers

import auxkern
from auxkern import SamplingParams as Filters
from auxkern.bench import __main__ as bench
from auxkern.bench import real, report, sample, tables
from auxkern.bench.cases import FILTERS, TEMPERATURE, VOCABULARIES, new_case, select_cases
from auxkern.bench.operators import Implementation
from auxkern.bench.results import PASSES, CaseResult, Measured, Result, Run, Timing
from auxkern.bench.runner import backends_for, measure_inputs
from auxkern.bench.sample import OPERATOR, inputs_of, kept_logprob, ours
from auxkern.bench.timing import Effort
from auxkern.core.draws import gumbel, random_bits

CPU = torch.device("cpu")
SHORT = Effort(seconds=0.0, min_rounds=2, max_rounds=2)
N, V = 64, 1001
PLAIN, BOTH = "temperature only", "top-k 50 + top-p 0.9"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(5)  # peers draw from PyTorch's generator


def made_inputs(filters=BOTH, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    terms = [(std * torch.randn(N, V, generator=generator)).to(dtype) for std in (3.0, 2.0)]
    return inputs_of(terms, filters)


def measured(*implementations, filters=BOTH, dtype=torch.float32):
    inputs = made_inputs(filters, dtype)
    case = CaseResult("sample", "made up", V, N, str(dtype).removeprefix("torch."), 2, filters=filters)
    return measure_inputs(inputs, case, implementations, CPU, SHORT, lambda share, doing: None)


def pipeline(dtype=torch.float32):
    (eager,) = (i for i in OPERATOR.implementations(CPU, dtype, []) if i.name == "eager")
    return eager


def drawing(run, mine):
    return Implementation("drawing", "", mine, run)


# ---- the check -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "filters",
    [
        *FILTERS.values(),
        Filters(top_k=50, top_p=0.9, min_p=0.02),
        Filters(top_k=2, min_p=0.3),
        Filters(top_k=V + 9, top_p=1e-9),
    ],
)
def test_what_float64_keeps_is_what_the_warpers_keep_there(filters):
    z = sum(t.double() for t in made_inputs().terms)
    kept = warpers.TemperatureLogitsWarper(TEMPERATURE)(None, z)
    if filters.top_k:
        kept = warpers.TopKLogitsWarper(filters.top_k)(None, kept)
    if filters.top_p < 1:
        kept = warpers.TopPLogitsWarper(filters.top_p)(None, kept)
    if filters.min_p:
        kept = warpers.MinPLogitsWarper(filters.min_p)(None, kept)
    found = kept_logprob((z - z.amax(-1, keepdim=True)) / TEMPERATURE, filters, rounding=0.0)
    # Float64 sums differ by the order of addition, and no float32 error is allowed for here but the sum's.
    torch.testing.assert_close(found, kept.log_softmax(-1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "filters",
    [Filters(top_k=2), Filters(top_p=0.4), Filters(min_p=0.9)],
)
def test_a_token_that_rounding_may_let_through_is_kept(filters):
    z = torch.tensor([[0.0, -0.1, -0.1 - 1e-6, -0.11, -9.0]], dtype=torch.float64)
    if filters.min_p:
        z[0, 1:3] += 0.1 + torch.tensor(0.9, dtype=torch.float64).log()
    counts = [
        int((kept_logprob(z, filters, rounding) > -torch.inf).sum()) for rounding in (0.0, 1e-6, 1e-2, 9.0)
    ]
    assert counts == sorted(counts)
    assert counts[0] < counts[1] < counts[-1] == 5


@pytest.mark.parametrize(
    ("filters", "dtype"),
    [(filters, torch.float32) for filters in FILTERS]
    + [(BOTH, torch.bfloat16), ("top-p 0.9", torch.float16)],
)
def test_right_samplers_are_timed(filters, dtype):
    case = measured(ours("reference"), pipeline(dtype), filters=filters, dtype=dtype)
    assert [result.message for result in case.results] == ["", ""]
    for result in case.results:
        assert set(result.passes) == {"draw"} == set(case.floor)
        assert result.draw_error == 0
        assert (result.loss_error, result.gradient_error) == (None, None)
    assert case.floor_bytes["draw"] == 2 * (N * V * dtype.itemsize // 4 * 4)


def test_all_that_runs_on_a_cpu_is_right():
    every = OPERATOR.implementations(CPU, torch.float32, backends_for(CPU, torch.float32, None)[0])
    assert [implementation.name for implementation in every][1:] == ["eager", "torch.compile"]
    results = measured(*every, filters=PLAIN).results
    assert [result.message for result in results] == ["", "", ""]


def drawn_from(inputs, terms=None, *, filters=BOTH, temperature=TEMPERATURE):
    """A draw that is right up to what is passed in."""
    z = reduce(add, terms or inputs.terms).double()
    scaled = (z - z.amax(-1, keepdim=True)) / temperature
    return torch.multinomial(kept_logprob(scaled, FILTERS[filters], 0.0).exp(), 1)[:, 0]


WRONG_PEERS = {
    "filters forgotten": (BOTH, lambda inputs: drawn_from(inputs, filters=PLAIN)),
    "top-p forgotten": (BOTH, lambda inputs: drawn_from(inputs, filters="top-k 50")),
    "auxiliary forgotten": (PLAIN, lambda inputs: drawn_from(inputs, inputs.terms[:1], filters=PLAIN)),
    "temperature forgotten": (PLAIN, lambda inputs: drawn_from(inputs, filters=PLAIN, temperature=1.0)),
    "greedy": (BOTH, lambda inputs: reduce(add, inputs.terms).argmax(-1)),
    "uniform over what is kept": (BOTH, lambda inputs: drawn_from(inputs, temperature=50.0)),
    "beyond the vocabulary": (BOTH, lambda inputs: drawn_from(inputs) + V),
    "no token": (BOTH, lambda inputs: torch.full((N,), -1)),
}


@pytest.mark.parametrize("name", WRONG_PEERS)
def test_wrong_peers_are_called_wrong_and_not_timed(name):
    filters, run = WRONG_PEERS[name]
    (result,) = measured(drawing(run, mine=False), filters=filters).results
    assert result.status == "wrong"
    assert result.passes == {}
    assert "is allowed" in result.message


def other_position(inputs):
    return auxkern.sample(
        inputs.terms, inputs.params, seed=inputs.seed, position=8, backend="reference"
    ).tokens


def one_row_off(inputs):
    tokens = ours("reference").run(inputs)
    tokens[5] = (tokens[5] + 1) % V
    return tokens


@pytest.mark.parametrize("run", [other_position, one_row_off, drawn_from])
def test_a_sampler_of_ours_must_draw_the_references_tokens(run):
    (result,) = measured(drawing(run, mine=True)).results
    assert result.status == "wrong"
    assert result.draw_error >= 1 / N


def test_tokens_that_tie_within_rounding_pass_and_count_as_errors():
    inputs = made_inputs(PLAIN)
    first = ours("reference").run(inputs)[5]
    second = (first + 1) % V
    noise = gumbel(random_bits(inputs.seed[5:6], torch.tensor([7]), V))[0]
    lm, aux = inputs.terms
    level = lm[5, first].double() + aux[5, first] + (noise[first] - noise[second]) * TEMPERATURE
    lm[5, second], aux[5, second] = level.float(), 0.0
    exact = OPERATOR.exact(inputs)
    assert exact.tokens[5] in (first, second)
    other = exact.tokens.clone()
    other[5] = first + second - other[5]
    implementation = drawing(lambda inputs: other, mine=True)
    errors = OPERATOR.check(inputs, exact, implementation, {"draw": other})
    assert errors.passed
    assert errors.values["draw"] == 1 / N
    aux[5, other[5]] -= 1e-3
    assert not OPERATOR.check(inputs, exact, implementation, {"draw": other}).passed


def test_the_check_sees_a_sampler_that_fails():
    def broken(inputs):
        raise RuntimeError("no such kernel")

    (result,) = measured(drawing(broken, mine=False)).results
    assert (result.status, result.message) == ("failed", "RuntimeError: no such kernel")


# ---- cases and options -----------------------------------------------------------------------------


def test_standard_cases_have_every_filter_and_quick_fewer():
    cases = select_cases("cpu", ops=["sample"])
    assert {case.filters for case in cases if case.N == 64} == set(FILTERS)
    assert {case.N for case in cases} == {1, 16, 64, 512}
    assert 0 < len(select_cases("cpu", ops=["sample"], quick=True)) < len(cases)
    assert {case.N for case in select_cases("cuda", ops=["sample"])} == {1, 64, 512}


def test_a_choice_of_rows_goes_through_every_filter():
    cases = select_cases("cpu", ops=["sample", "linear"], rows=[3], terms=3)
    assert cases[:-1] == [new_case("sample", "gpt2", 3, "float32", 3, filters) for filters in FILTERS]
    assert (cases[-1].op, cases[-1].terms, cases[-1].filters) == ("linear", 2, "")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "float64"], "invalid choice: 'float64'"),
        (["--terms", "9"], "invalid choice: 9"),
        (["--backend", "nobody"], "choose one of"),
        (["--op", "linear", "--terms", "3"], "leave --terms out"),
    ],
)
def test_bad_options_end_with_a_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main(["--op", "sample", "--device", "cpu", *arguments])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_without_transformers_the_command_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(bench, "is_installed", lambda package: False)
    with pytest.raises(SystemExit):
        bench.main(["--op", "sample", "--device", "cpu"])
    assert "pip install transformers" in capsys.readouterr().err


# ---- writing down ----------------------------------------------------------------------------------


def test_one_small_case_from_options_to_files(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(bench, "QUICK", SHORT)
    monkeypatch.setitem(VOCABULARIES, "gpt2", V)
    peers = [ours("reference"), pipeline()]
    monkeypatch.setattr(OPERATOR, "implementations", lambda *arguments: peers)
    json_file, picture = tmp_path / "run.json", tmp_path / "run.png"
    options = ["--op", "sample", "--backend", "reference", "--quick", "--device", "cpu"]
    assert bench.main([*options, "--json", str(json_file), "--plot", str(picture)]) == 0
    run = Run.from_json(json_file.read_text())
    assert [case.filters for case in run.cases] == [PLAIN, BOTH]
    assert all(result.status == "ok" for case in run.cases for result in case.results)
    assert picture.stat().st_size > 5000
    printed = capsys.readouterr().out
    assert "sample · gpt2 · V 1,001 · N 64 · float32 · top-k 50 + top-p 0.9" in printed
    assert "Hugging Face" in printed
    table = tables.markdown(run).splitlines()
    assert table[0] == (
        "| Case | Implementation | Draw, ms | vs eager | vs best peer | % of floor | Memory, MB | Error |"
    )
    assert table[2].startswith("| gpt2, V 1,001, N 64, float32, temperature only | **auxkern reference** |")
    assert table[2].endswith("| 0 |")
    assert len({line.count("|") for line in table[:6]}) == 1
    assert "forward + backward" not in tables.markdown(run)


def mixed_run():
    time = Timing(0.002, 0.002, 0.002, 0.002, 0.002, 7)
    loss = CaseResult("cross_entropy", "gpt2", 50_257, 512, "float32", 2)
    draw = CaseResult("sample", "gpt2", 50_257, 64, "float32", 2, filters=BOTH, notes=["Noisy"])
    for case in (loss, draw):
        case.floor = dict.fromkeys(case.pass_names, time)
        passes = dict.fromkeys(case.pass_names, Measured(time, 10))
        case.results = [Result("eager", "what runs", False, "ok", "", passes=passes)]
    draw.results.append(Result("auxkern cpu", "what runs", True, "wrong", "error 0.5", draw_error=0.5))
    draw.results[0].draw_error = 0.015625
    loss.results[0].loss_error, loss.results[0].gradient_error = 1e-7, 2e-7
    return Run("python -m auxkern.bench", "2030-01-01T00:00:00+00:00", {"device": "cpu"}, [loss, draw])


def test_losses_and_draws_have_a_table_each_and_one_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    run = mixed_run()
    (tmp_path / "run.json").write_text(run.to_json())
    assert Run.from_json(run.to_json()) == run
    text = tables.markdown(run)
    assert [block.split("|")[3].strip() for block in text.split("\n\n")[:2]] == ["Forward, ms", "Draw, ms"]
    assert "| 2e-02 |" in text
    assert "|  | **auxkern cpu** | WRONG |" in text
    assert "gpt2, V 50,257, N 64, float32, top-k 50 + top-p 0.9: Noisy" in text
    for suffix in ("png", "svg"):
        assert report.main([str(tmp_path / "run.json"), "--plot", str(tmp_path / f"run.{suffix}")]) == 0
    tables.print_run(run)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert set(run.cases[0].pass_names) == set(PASSES)


# ---- real logits -----------------------------------------------------------------------------------


def real_logits():
    generator = torch.Generator().manual_seed(4)
    lm, aux = (2 * torch.randn(3, 5, 40, generator=generator) for _ in range(2))
    counted = torch.arange(5) < torch.tensor([[5], [3], [1]])
    return lm, aux, counted


def test_decoding_draws_from_the_last_position_that_is_not_padding():
    lm, aux, counted = real_logits()
    last = real.last_positions(lm, aux, counted)
    assert torch.equal(last.lm, torch.stack([lm[0, 4], lm[1, 2], lm[2, 0]]))
    assert torch.equal(last.aux, torch.stack([aux[0, 4], aux[1, 2], aux[2, 0]]))
    assert real.every_position(lm, aux, counted).lm.shape == (9, 40)


def test_real_tokens_are_compared_with_the_references(monkeypatch):
    positions = real.every_position(*real_logits())
    found = real.compare_tokens(positions, ["reference"])
    assert set(found) == {(filters, "reference") for filters in real.COMPARED}
    assert all(agreement == (9, 9, 0) and agreement.passed for agreement in found.values())
    assert "9 of 9 tokens" in real.token_facts(found)["sample, temperature only, reference"]

    monkeypatch.setattr(sample, "ours", lambda backend: drawing(other_position, mine=True))
    assert not all(agreement.passed for agreement in real.compare_tokens(positions, ["other"]).values())


def test_real_decoding_is_measured(monkeypatch):
    peers = [ours("reference"), pipeline()]
    monkeypatch.setattr(OPERATOR, "implementations", lambda *arguments: peers)
    positions = real.last_positions(*real_logits())
    what = ("sample", "made up", lambda: inputs_of([*positions], real.MEASURED))
    case = real.measured(*what, CPU, ["reference"], SHORT, lambda share, doing: None)
    assert case.title == f"sample · made up · V 40 · N 3 · float32 · {BOTH}"
    assert all(result.status == "ok" and set(result.passes) == {"draw"} for result in case.results)
