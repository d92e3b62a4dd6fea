"""Scoring a pair beside its two models, and ``auxkern evaluate``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from auxkern.commands import evaluate
from auxkern.core.seeds import drawn
from auxkern.evaluation.accuracy import keyword_accuracy
from auxkern.evaluation.perplexity import NllReport, evaluate_nll
from auxkern.model.text import Example
from auxkern.tasks.keywords import split_by_keyword
from auxkern.training.examples import EncodedExamples
from auxkern.training.lm_states import cache_lm_states
from tests.support.tiny import WORDS, V, save_tiny_pair, tiny_pair, word_lm

FLOAT32_MEAN = 2e-6  # relative: nll of a few nats, logits of both sides summed in another order
PAIRS: dict[str, dict[str, Any]] = {
    "own head": {},
    "pointer and features": {"pointer": True, "lm_layers": [1, 2], "aux_scale": 0.7},
    "shared head": {"head": "shared", "pointer": True, "aux_scale": 0.5},
    "encoder and decoder": {
        "architecture": "encoder-decoder",
        "pointer": True,
        "auxiliary_config": {
            "model_type": "t5",
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 1,
            "num_decoder_layers": 1,
            "num_heads": 2,
        },
    },
    "the base's own logits": {"lm_term": "logits"},
    "fewer ids than the base": {"vocab_size": 90},
}


def encoded(count: int = 9, ids: int = 90) -> EncodedExamples:
    """Ragged sequences, some with a prompt, with conditions of 1 to 3 tokens."""
    generator = torch.Generator().manual_seed(4)

    def draw(length: int) -> list[int]:
        return torch.randint(4, ids, (length,), generator=generator).tolist()

    items = []
    for i in range(count):
        sequence, prompt = draw(4 + 3 * i % 11), 1 + i % 3
        labels = [-100] * prompt + sequence[prompt:]
        items.append({"input_ids": sequence, "labels": labels, "condition_ids": draw(1 + i % 3)})
    return EncodedExamples(items)


def textbook(model: Any, examples: EncodedExamples) -> tuple[int, list[float]]:
    """Labels, and mean nll of base, auxiliary and pair, from whole logits of one sequence at a time."""
    model.eval()
    size, sums, count = model.config.vocab_size, torch.zeros(3, dtype=torch.float64), 0
    for item in examples:
        ids, condition = torch.tensor([item["input_ids"]]), torch.tensor([item["condition_ids"]])
        with torch.no_grad():
            lm = model.lm(input_ids=ids).logits[0, :-1, :size].double()
            both = model(ids, condition_ids=condition).logits[0, :-1].double()
        labels = torch.tensor(item["labels"][1:])
        for k, z in enumerate((lm, both - lm, both)):
            sums[k] += F.cross_entropy(z, labels, reduction="sum")
        count += int((labels != -100).sum())
    return count, (sums / count).tolist()


def three(report: NllReport) -> list[float]:
    return [report.lm_nll, report.aux_nll, report.pair_nll]


@pytest.mark.parametrize("fields", PAIRS.values(), ids=PAIRS)
def test_nll_is_the_textbooks(fields: dict[str, Any]) -> None:
    model, examples = tiny_pair("own head", word_lm(), **fields), encoded()
    report = evaluate_nll(model, examples)
    tokens, expected = textbook(model, examples)
    assert (report.tokens, report.sequences) == (tokens, len(examples))
    # The auxiliary's logits are a difference of float32 sums in the expectation.
    assert three(report) == pytest.approx(expected, rel=FLOAT32_MEAN)
    assert len({round(nll, 2) for nll in expected}) == 3


@pytest.mark.parametrize("batch_tokens", [1, 17, 10_000])
def test_batches_change_nothing(batch_tokens: int) -> None:
    model, examples = tiny_pair("own head", word_lm(), pointer=True, lm_layers=[2]), encoded()
    report = evaluate_nll(model, examples, batch_tokens=batch_tokens)
    assert three(report) == pytest.approx(three(evaluate_nll(model, examples)), rel=FLOAT32_MEAN)


def test_a_mixing_weight_of_zero_leaves_the_base() -> None:
    report = evaluate_nll(tiny_pair("own head", word_lm(), aux_scale=0.8), encoded(), aux_scale=0.0)
    assert report.pair_nll == pytest.approx(report.lm_nll, rel=FLOAT32_MEAN)
    assert report.aux_nll == pytest.approx(math.log(V))


def test_cached_states_stand_in_for_the_base(tmp_path: Path) -> None:
    lm, examples = word_lm(), encoded()
    model = tiny_pair("own head", lm, pointer=True, lm_layers=[1, 3])
    expected = evaluate_nll(model, examples)
    states = cache_lm_states(lm, examples, tmp_path, layers=[1, 3], dtype=torch.float32)
    runs: list[int] = []
    hook = lm.base_model.register_forward_hook(lambda *_: runs.append(1))
    report = evaluate_nll(model, examples, lm_states=states)
    hook.remove()
    assert not runs
    assert three(report) == pytest.approx(three(expected), rel=FLOAT32_MEAN)


def test_states_of_other_layers_or_data_are_refused(tmp_path: Path) -> None:
    lm, examples = word_lm(), encoded()
    states = cache_lm_states(lm, examples, tmp_path, layers=[1])
    with pytest.raises(ValueError, match=r"hold the layers \[1\], but the auxiliary reads \[2\]"):
        evaluate_nll(tiny_pair("own head", lm, lm_layers=[2]), examples, lm_states=states)
    with pytest.raises(ValueError, match="data set"):
        evaluate_nll(tiny_pair("own head", lm, lm_layers=[1]), encoded(3), lm_states=states)
    with pytest.raises(ValueError, match="hold no logits"):
        evaluate_nll(tiny_pair("own head", lm, lm_layers=[1], lm_term="logits"), examples, lm_states=states)


def test_progress_counts_every_token_and_dropout_is_off_meanwhile() -> None:
    model, examples = tiny_pair("own head", word_lm(), dropout=0.5).train(), encoded()
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        assert not model.training
        seen.append((done, total))

    first, second = (evaluate_nll(model, examples, batch_tokens=20, progress=progress) for _ in range(2))
    assert first == second
    assert model.training
    total = sum(len(item["input_ids"]) for item in examples)
    assert seen[0] == (0, total)
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen[: len(seen) // 2]] == sorted({done for done, _ in seen})


def test_the_mode_is_put_back_after_an_error() -> None:
    model = tiny_pair("own head", word_lm()).train()

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate_nll(model, encoded(), progress=stop)
    assert model.training


def test_what_cannot_be_scored_is_refused() -> None:
    model = tiny_pair("own head", word_lm())
    silent = EncodedExamples([{"input_ids": [0, 5], "labels": [-100, -100], "condition_ids": [5]}])
    long = EncodedExamples([{"input_ids": [5] * 65, "labels": [-100] + [5] * 64, "condition_ids": [5]}])
    for examples, message in (
        (silent, "no label"),
        (EncodedExamples([]), "empty"),
        (long, "sequence 0 has 65 tokens, but the base has positions for 64"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_nll(model, examples)
    with pytest.raises(ValueError, match="batch_tokens is 0"):
        evaluate_nll(model, encoded(), batch_tokens=0)


def test_nan_is_an_error_that_says_whose() -> None:
    model = tiny_pair("own head", word_lm())
    torch.nn.init.constant_(model.head.weight, math.nan)
    with pytest.raises(FloatingPointError, match="auxiliary alone is nan"):
        evaluate_nll(model, encoded())


def test_perplexity_is_the_exponential() -> None:
    report = NllReport(10, 2, lm_nll=math.log(20), aux_nll=800.0, pair_nll=0.0)
    assert report.lm_perplexity == pytest.approx(20)
    assert report.aux_perplexity == math.inf
    assert report.pair_perplexity == 1.0


def test_keyword_accuracy_counts_whole_words() -> None:
    samples = ["The bank of the river.", "banks", "BANK", "rob a  blood\nbank now"]
    assert keyword_accuracy(samples, ["bank", "bank", "bank", "blood bank"]) == 0.75


@pytest.mark.parametrize(
    ("samples", "keywords", "error"),
    [([], [], ValueError), (["a"], ["a", "b"], ValueError), ("a", ["a"], TypeError), (["a"], "a", TypeError)],
)
def test_keyword_accuracy_refuses(samples: Any, keywords: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        keyword_accuracy(samples, keywords)


# --------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pair, and examples beside it."""
    root = tmp_path_factory.mktemp("evaluate")
    lines = [{"condition": WORDS[i], "text": " ".join(WORDS[i : i + 5]), "prompt": "w1"} for i in range(20)]
    (root / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return save_tiny_pair(root, pointer=True, lm_layers=[1])


def run(folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    path = folder.parent / "out.json"
    path.unlink(missing_ok=True)
    data = () if "--task" in options else ("--file", str(folder.parent / "data.jsonl"))
    status = evaluate.main([str(folder), *data, "--json", str(path), *options])
    return status, json.loads(path.read_text()) if path.exists() else {}


def test_the_command_prints_and_writes_the_figures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = run(folder, "--samples", "20", "--max-new-tokens", "24")
    out = capsys.readouterr().out
    assert status == 0
    for who in ("lm", "aux", "pair"):
        nll, perplexity = found["results"][who]["nll"], found["results"][who]["perplexity"]
        assert perplexity == pytest.approx(math.exp(nll))
        assert f"{nll:.4f}" in out
    # 20 texts of 5 words, each with its end.
    assert found["data"]["tokens"] == 120
    assert found["command"].startswith("auxkern evaluate ")
    assert {"torch", "transformers", "auxkern", "device"} <= set(found["machine"])
    assert found["date"]
    assert not found["interrupted"]
    shares = [found["results"][who]["contains_condition"] for who in ("lm", "aux", "pair")]
    assert shares[1] is None
    # The pointer of this pair is as loud as the base.
    assert 0 <= shares[0] < shares[2] <= 1
    assert "reference" in found["results"], "see test_evaluation_samples.py"


def test_samples_do_not_depend_on_the_batch_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[list[str]] = []
    monkeypatch.setattr(evaluate, "distinct_n", lambda texts, n: kept.append(texts) or 0.5)
    for size in ("1", "7"):
        run(folder, "--samples", "9", "--batch-size", size, "--max-new-tokens", "6")
    assert kept[: len(kept) // 2] == kept[len(kept) // 2 :]
    assert len(kept[0]) == 9


def test_ctrl_c_while_sampling_keeps_the_nll(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate.pair, "texts", stop)
    status, found = run(folder, "--samples", "3")
    assert status == 130
    assert found["interrupted"]
    assert found["results"]["pair"]["nll"] > 0


def test_ctrl_c_while_scoring_writes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluate_nll", stop)
    assert run(folder) == (130, {})


def test_a_file_is_not_sampled_unless_asked(folder: Path) -> None:
    status, found = run(folder, "--examples", "7")
    assert status == 0
    assert found["data"]["sequences"] == 7
    assert found["samples"] is None


def test_examples_are_drawn_the_same_every_time_and_spread() -> None:
    examples = [Example(str(i), "text") for i in range(50)]
    some = drawn(examples, 12)
    assert some == drawn(examples, 12)
    assert len(some) == 12
    assert some == [example for example in examples if example in some], "in their old order"
    assert some != examples[:12]
    assert drawn(examples, 50) == drawn(examples, None) == examples


def test_the_task_scores_and_samples_what_is_held_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = [Example(f"w{i % 90}", f"w{i % 90} w{i}") for i in range(400)]
    monkeypatch.setattr("auxkern.tasks.keywords.keyword_examples", lambda *_: every)
    asked: list[str] = []
    real = evaluate.pair.texts

    def watched(model: Any, text: Any, requests: Any, **options: Any) -> Any:
        asked.extend(request.condition for request in requests)
        return real(model, text, requests, **options)

    monkeypatch.setattr(evaluate.pair, "texts", watched)
    status, found = run(folder, "--task", "wordnet-keywords", "--samples", "4", "--max-new-tokens", "2")
    assert status == 0
    training, validation = split_by_keyword(every)
    assert found["data"]["sequences"] == len(validation)
    assert len(set(asked)) == 4
    assert asked[:4] == asked[4:]
    assert not set(asked) & {example.condition for example in training}


@pytest.mark.parametrize(("keywords", "examples", "samples"), [(300, 600, 100), (30, 600, 100), (30, 40, 40)])
def test_a_task_has_100_samples_of_as_many_conditions_as_there_are(
    keywords: int, examples: int, samples: int
) -> None:
    options = evaluate._parser().parse_args(["model", "--task", "wordnet-keywords"])
    every = [Example(f"w{i % keywords}", f"text {i}") for i in range(examples)]
    asked = evaluate._asked(every, options)
    assert len({(example.condition, example.text) for example in asked}) == len(asked) == samples
    for turn in range(0, samples, keywords):
        some = [example.condition for example in asked[turn : turn + keywords]]
        assert len(set(some)) == len(some)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "21"], "--samples 21, but there are 20 examples"),
        (["--max-length", "2"], "leaves no room for text"),
        (
            ["--base", "/no/such/base"],
            "the base '/no/such/base' cannot be loaded: there is no folder /no/such/base; if it has moved",
        ),
    ],
)
def test_what_does_not_fit_is_one_line_and_status_2(
    folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(folder, *options) == (2, {})
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_bad_data_names_file_and_line(folder: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "bad.jsonl").write_text('{"condition": "w1", "text": "w2"}\n{"condition": "w1"}\n')
    assert evaluate.main([str(folder), "--file", str(tmp_path / "bad.jsonl")]) == 2
    assert f"{tmp_path / 'bad.jsonl'}, line 2" in capsys.readouterr().err


def test_without_rich_the_table_is_plain(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(evaluate.importlib.util, "find_spec", lambda name: None)
    aux, pair = {"nll": 12.25, "perplexity": 2.0}, {"nll": 0.5, "perplexity": 1234.5}
    evaluate._print_table({"lm": {"nll": 1.5, "perplexity": None}, "aux": aux, "pair": pair})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["nll", "perplexity"]
    assert lines[1].split() == ["LM", "alone", "1.5000", "beyond", "1e308"]
    assert lines[3].split() == ["pair", "0.5000", "1,234.50"]
    assert len({len(line) for line in lines}) == 1
