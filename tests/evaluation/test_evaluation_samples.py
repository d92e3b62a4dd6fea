"""What ``auxkern evaluate`` measures in samples: SLOR, diversity, intervals, references as the ceiling."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from auxkern.commands import evaluate
from auxkern.evaluation.slor import UnigramCounts
from auxkern.model.text import Example, TextFormat
from auxkern.tasks.keywords import split_by_keyword
from tests.support.tiny import WORDS, V, save_tiny_pair

FLOAT32_SUM = 2e-5  # absolute, in nats per token: float32 logits of another shape of batch
SAMPLES = ("--samples", "20", "--max-new-tokens", "8")
WRITERS = ("lm", "pair", "reference")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved pair, and examples beside it: 20 conditions, a text of 5 words begins with each."""
    root = tmp_path_factory.mktemp("samples")
    lines = [{"condition": WORDS[i], "text": " ".join(WORDS[i : i + 5]), "prompt": "w90"} for i in range(20)]
    (root / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / "counted.jsonl").write_text('{"condition": "", "text": "w1 w1 w2"}\n' * 3)
    return save_tiny_pair(root, pointer=True, lm_layers=[1])


def run(folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    path = folder.parent / "out.json"
    path.unlink(missing_ok=True)
    data = () if "--task" in options else ("--file", str(folder.parent / "data.jsonl"))
    status = evaluate.main([str(folder), *data, "--json", str(path), *options])
    return status, json.loads(path.read_text()) if path.exists() else {}


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    status, record = run(folder, *SAMPLES, "--unigram", str(folder.parent / "counted.jsonl"))
    assert status == 0
    return record


def test_the_references_are_measured_as_the_samples_are(folder: Path, found: dict[str, Any]) -> None:
    reference = found["results"]["reference"]
    assert reference["nll"] is reference["perplexity"] is None
    assert (reference["contains_condition"], reference["contains_condition_interval"]) == (1.0, [1.0, 1.0])
    # 20 windows of 5 over 24 words: 100 tokens, 23 pairs.
    assert reference["distinct_1"] == pytest.approx(24 / 100)
    assert reference["distinct_2"] == pytest.approx(23 / 100)
    # A window shares 4 words with the one before it and 4 with the one after, so that every k-gram of the
    # 18 inner ones stands in another text; the outer two miss one of each order.
    outer = math.prod((5 - k) / (6 - k) for k in range(1, 5)) ** (1 / 4)
    assert reference["self_bleu_4"] == pytest.approx((18 + 2 * outer) / 20)
    assert reference["empty"] == 0


def test_slor_of_the_references_is_the_formula(folder: Path, found: dict[str, Any]) -> None:
    lm = LlamaForCausalLM.from_pretrained(folder.parent / "base").eval()
    # Each text of a file is counted once: w1 twice, w2 once.
    log_p = [math.log((1 + {5: 2, 6: 1}.get(v, 0)) / (3 + V)) for v in range(V)]
    values = []
    for i in range(20):
        ids = [0, 94, *range(i + 4, i + 9)]
        with torch.no_grad():
            lm_log_p = lm(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        values.append(sum(lm_log_p[t, ids[t + 1]].item() - log_p[ids[t + 1]] for t in range(1, 6)) / 5)
    assert found["results"]["reference"]["slor"] == pytest.approx(sum(values) / 20, abs=FLOAT32_SUM)
    low, high = found["results"]["reference"]["slor_interval"]
    # 20 values: the normal interval, but for skew.
    spread = 1.96 * float(torch.tensor(values).std(correction=0)) / math.sqrt(20)
    assert high - low == pytest.approx(2 * spread, rel=0.15)
    assert low < sum(values) / 20 < high


def test_intervals_lie_around_what_was_measured(found: dict[str, Any]) -> None:
    for who in WRITERS:
        for name in ("contains_condition", "slor"):
            low, high = found["results"][who][f"{name}_interval"]
            assert low <= found["results"][who][name] <= high
    share = found["results"]["pair"]["contains_condition"]
    low, high = found["results"]["pair"]["contains_condition_interval"]
    # Resampled shares of 20 are multiples of 1/20, about 1.96 standard errors away.
    assert 0 < share < 1
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(share * (1 - share) / 20), abs=0.11)
    assert found["samples"]["confidence"] == 0.95


def test_the_auxiliary_alone_writes_nothing(found: dict[str, Any]) -> None:
    aux = found["results"]["aux"]
    assert aux["nll"] > 0
    assert {aux[name] for name in evaluate._MEASURES} == {None}


def test_the_counts_are_named(folder: Path, found: dict[str, Any]) -> None:
    unigram = found["samples"]["unigram"]
    assert unigram["source"] == f"{folder.parent / 'counted.jsonl'}, each text once"
    assert (unigram["tokens"], unigram["vocab_size"]) == (3, V)


def test_counts_from_a_file_give_the_same(folder: Path, found: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder.parent / "base")
    counts = UnigramCounts.of_texts(["w1 w1 w2"], TextFormat(tokenizer), V, source="a file")
    counts.save(tmp_path / "counts.safetensors")
    status, again = run(folder, *SAMPLES, "--unigram", str(tmp_path / "counts.safetensors"))
    assert status == 0
    assert again["results"] == found["results"]
    assert again["samples"]["unigram"]["source"] == "a file"


def test_a_file_without_counts_has_all_but_slor(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, record = run(folder, *SAMPLES)
    assert status == 0
    assert record["samples"]["unigram"] is None
    for who in WRITERS:
        assert record["results"][who]["slor"] is None
        assert record["results"][who]["self_bleu_4"] > 0
    assert "SLOR" not in capsys.readouterr().out


def test_what_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, record = run(folder, *SAMPLES, "--unigram", str(folder.parent / "counted.jsonl"))
    out = capsys.readouterr().out
    assert "20 texts each" in out
    assert "p_unigram of 3 tokens" in out
    line = {row.split()[0]: row for row in out.splitlines() if row.split()}
    assert max(len(line[name]) for name in ("has", "SLOR", "self-BLEU-4")) <= 80
    for who in WRITERS:
        figures = record["results"][who]
        low, high = figures["slor_interval"]
        assert f"{figures['slor']:.2f} [{low:.2f}, {high:.2f}]" in line["SLOR"]
        assert f"{figures['contains_condition']:.1%} [" in line["has"]
        assert f"{figures['distinct_2']:.3f}" in line["distinct-2"]
        assert f"{figures['self_bleu_4']:.3f}" in line["self-BLEU-4"]


def test_a_task_counts_its_training_side(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = [Example(f"w{i % 90}", f"w{i % 90} w{i % 7}") for i in range(200)]
    monkeypatch.setattr("auxkern.tasks.keywords.keyword_examples", lambda *_: every)
    status, record = run(folder, "--task", "wordnet-keywords", "--samples", "4", "--max-new-tokens", "2")
    assert status == 0
    training, _ = split_by_keyword(every)
    assert record["samples"]["unigram"]["tokens"] == 2 * len({example.text for example in training})
    assert record["samples"]["unigram"]["source"] == "training side of wordnet-keywords, each text once"
    assert record["results"]["reference"]["slor"] is not None


def test_texts_that_are_empty_are_counted_and_left_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of three samples are empty: one SLOR, no interval of it, no self-BLEU."""

    def texts(model: Any, form: Any, requests: Any, **_: Any) -> Any:
        yield [evaluate.pair.Continuation(text, True) for text in ("", "w1 w2", "")]

    monkeypatch.setattr(evaluate.pair, "texts", texts)
    _, record = run(folder, "--samples", "3", "--unigram", str(folder.parent / "counted.jsonl"))
    pair = record["results"]["pair"]
    assert pair["empty"] == 2
    assert pair["slor"] is not None
    assert pair["slor_interval"] is pair["self_bleu_4"] is None
    assert pair["distinct_1"] == 1.0
    assert record["results"]["reference"]["empty"] == 0


def test_nothing_but_empty_texts_has_no_measure_but_a_share(folder: Path, monkeypatch: Any) -> None:
    def texts(model: Any, form: Any, requests: Any, **_: Any) -> Any:
        yield [evaluate.pair.Continuation("", True) for _ in requests]

    monkeypatch.setattr(evaluate.pair, "texts", texts)
    status, record = run(folder, "--samples", "3", "--unigram", str(folder.parent / "counted.jsonl"))
    assert status == 0
    figures = {name: record["results"]["lm"][name] for name in evaluate._MEASURES}
    assert {name for name, value in figures.items() if value is not None} == {
        "contains_condition",
        "contains_condition_interval",
        "empty",
    }


def test_one_sample_has_no_interval(folder: Path) -> None:
    status, record = run(folder, "--samples", "1", "--unigram", str(folder.parent / "counted.jsonl"))
    assert status == 0
    assert record["results"]["reference"]["slor"] is not None
    assert record["results"]["reference"]["slor_interval"] is None
    assert record["results"]["reference"]["contains_condition_interval"] is None


def test_samples_longer_than_the_base_takes_are_cut(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def texts(model: Any, form: Any, requests: Any, **_: Any) -> Any:
        yield [evaluate.pair.Continuation(" ".join(["w1"] * 100), False) for _ in requests]

    monkeypatch.setattr(evaluate.pair, "texts", texts)
    status, record = run(folder, "--samples", "2", "--unigram", str(folder.parent / "counted.jsonl"))
    assert status == 0
    assert record["results"]["pair"]["slor"] is not None


def test_ctrl_c_keeps_the_measures_that_are_complete(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = evaluate.pair.texts

    def texts(*args: Any, **options: Any) -> Any:
        if options["auxiliary"] is None:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(evaluate.pair, "texts", texts)
    status, record = run(folder, *SAMPLES)
    assert status == 130
    assert record["interrupted"]
    assert record["results"]["pair"]["distinct_1"] > 0
    assert record["results"]["lm"]["distinct_1"] is None
    assert "reference" not in record["results"]


@pytest.mark.parametrize("name", ["no/such.jsonl", "no/such.safetensors"])
def test_counts_that_do_not_exist_are_one_line_and_status_2(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(folder, "--unigram", name, "--samples", "3")
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"argument --unigram: {name} does not exist" in said
    assert len(said.splitlines()) == 1


def test_counts_that_nothing_uses_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(folder, "--unigram", str(folder.parent / "counted.jsonl")) == (2, {})
    assert "there are no samples to measure" in capsys.readouterr().err
