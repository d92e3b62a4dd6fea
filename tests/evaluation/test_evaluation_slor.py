"""SLOR against its formula on whole logits of one text at a time, and unigram counts by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoTokenizer

from auxkern.evaluation import slor as module
from auxkern.evaluation.slor import SlorScores, UnigramCounts, slor, tokenizer_fingerprint
from auxkern.model.fingerprints import fingerprint
from auxkern.model.text import TextFormat
from tests.support.tiny import WORDS, V, word_lm, word_tokenizer

FLOAT32_SUM = 2e-5  # absolute, in nats per token: float32 logits of another shape of batch
TEXTS = ["w1 w2 w3", "w90", "", "w5 w5 w5 w5 w5 w5", "w7 w1", "w2 w3 w4 w5"]
SOURCE = ["w1 w1 w1 w2", "w5 w5", ""]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tokenizer")
    word_tokenizer().save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def form(tokenizer: Any) -> TextFormat:
    return TextFormat(tokenizer)


def counts_of(form: TextFormat, vocab_size: int = V) -> UnigramCounts:
    return UnigramCounts.of_texts(SOURCE, form, vocab_size, source="six words")


def by_formula(lm: Any, text: str, prompt: str = "", vocab_size: int = V) -> float:
    """SLOR from whole float64 probabilities; word i has the id i + 4, the sequence starts with 0."""
    context = [0, *(int(word[1:]) + 4 for word in prompt.split())]
    ids = [int(word[1:]) + 4 for word in text.split()]
    seen = [int(word[1:]) + 4 for line in SOURCE for word in line.split()]
    with torch.no_grad():
        p = lm(input_ids=torch.tensor([context + ids])).logits[0, :, :vocab_size].double().softmax(-1)
    total = 0.0
    for t, v in enumerate(ids):
        total += math.log(p[len(context) + t - 1, v])
        total -= math.log((seen.count(v) + 1) / (len(seen) + vocab_size))
    return total / len(ids)


def test_counts_and_their_probabilities_by_hand(form: TextFormat) -> None:
    counts = counts_of(form)
    assert counts.vocab_size == V
    assert counts.tokens == 6
    # Neither start nor end is counted.
    assert counts.counts.nonzero().flatten().tolist() == [5, 6, 9]
    assert counts.counts[[5, 6, 9]].tolist() == [3, 1, 2]
    log_probs = counts.log_probs()
    assert log_probs.dtype == torch.float64
    assert log_probs[[5, 6, 9, 50]].exp().tolist() == pytest.approx([4 / 103, 2 / 103, 3 / 103, 1 / 103])
    assert log_probs.exp().sum().item() == pytest.approx(1.0)


def test_many_ids_are_counted_in_parts() -> None:
    row = [1, 3, 3] * 200_000
    counts = UnigramCounts.of_ids([row, row, [2]], 5, source="", tokenizer_fingerprint="")
    assert counts.counts.tolist() == [0, 400_000, 1, 800_000, 0]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
@pytest.mark.parametrize("lm_term", ["head", "logits"])
def test_slor_is_the_formula(form: TextFormat, batch_size: int, lm_term: str) -> None:
    lm = word_lm()
    found = slor(lm, form, TEXTS, counts_of(form), batch_size=batch_size, lm_term=lm_term)
    expected = [by_formula(lm, text) if text else None for text in TEXTS]
    assert found.values[2] is None
    assert [v for v in found.values if v is not None] == pytest.approx(
        [v for v in expected if v is not None], abs=FLOAT32_SUM
    )
    assert found.tokens == (3, 1, 0, 6, 2, 4)
    assert found.empty == 1
    assert found.mean == pytest.approx(sum(v for v in expected if v) / 5, abs=FLOAT32_SUM)
    assert found.lm_log_probs[2] == found.unigram_log_probs[2] == 0.0


def test_a_uniform_lm_against_uniform_counts_is_zero(form: TextFormat) -> None:
    lm = word_lm()
    torch.nn.init.zeros_(lm.lm_head.weight)
    nothing = UnigramCounts.of_texts([], form, V, source="nothing")
    found = slor(lm, form, ["w1 w2 w3", "w9"], nothing)
    assert found.values == pytest.approx((0.0, 0.0), abs=1e-6)
    assert found.lm_log_probs == pytest.approx((-3 * math.log(V), -math.log(V)), rel=1e-6)


def test_a_prompt_is_read_and_not_scored(form: TextFormat) -> None:
    lm = word_lm()
    found = slor(lm, form, ["w1 w2", "w1 w2"], counts_of(form), prompts=["w8 w9 w10", ""])
    expected = [by_formula(lm, "w1 w2", "w8 w9 w10"), by_formula(lm, "w1 w2")]
    assert found.values == pytest.approx(expected, abs=FLOAT32_SUM)
    assert abs(expected[0] - expected[1]) > 0.01
    assert found.tokens == (2, 2)


def test_fewer_ids_than_the_lm_has(form: TextFormat) -> None:
    lm = word_lm()
    found = slor(lm, form, ["w1 w2 w3"], counts_of(form, 90))
    assert found.values == pytest.approx([by_formula(lm, "w1 w2 w3", vocab_size=90)], abs=FLOAT32_SUM)
    with pytest.raises(ValueError, match=r"text 1 has the id 94, outside \[0, 90\)"):
        slor(lm, form, ["w1", "w90"], counts_of(form, 90))


def test_a_text_is_cut_as_in_training(tokenizer: Any) -> None:
    lm, short = word_lm(), TextFormat(tokenizer, max_length=4)
    counts = counts_of(short)
    assert counts.tokens == 6, "counts are of whole texts"
    found = slor(lm, short, ["w1 w2 w3 w4 w5", "w1 w2 w3"], counts)
    assert found.tokens == (3, 3)
    assert found.values == pytest.approx([by_formula(lm, "w1 w2 w3")] * 2, abs=FLOAT32_SUM)
    with pytest.raises(ValueError, match="prompt 0 takes 4 tokens with the start token"):
        slor(lm, short, ["w1"], counts, prompts=["w1 w2 w3"])


def test_it_says_which_lm_and_which_counts(form: TextFormat) -> None:
    lm, counts = word_lm(), counts_of(form)
    found = slor(lm, form, ["w1"], counts)
    assert found.lm_fingerprint == fingerprint(lm)
    assert (found.counts_source, found.counts_fingerprint) == ("six words", counts.data_fingerprint)
    assert slor(lm, form, ["w1"], counts, lm_fingerprint="known").lm_fingerprint == "known"
    other = UnigramCounts.of_texts(["w1 w1", "w1 w2", "w5 w5"], form, V, source="six words")
    assert torch.equal(other.counts, counts.counts)
    assert other.data_fingerprint != counts.data_fingerprint


def test_counts_are_saved_and_loaded(form: TextFormat, tmp_path: Path) -> None:
    counts = counts_of(form)
    counts.save(tmp_path / "counts.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["counts.safetensors"]
    loaded = UnigramCounts.load(tmp_path / "counts.safetensors")
    assert torch.equal(loaded.counts, counts.counts)
    for name in ("source", "data_fingerprint", "tokenizer_fingerprint"):
        assert getattr(loaded, name) == getattr(counts, name)


def test_files_that_hold_no_counts_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is damaged"):
        UnigramCounts.load(path)
    path.write_bytes(safetensors.torch.save({"counts": torch.zeros(3)}))
    with pytest.raises(ValueError, match="has the format None"):
        UnigramCounts.load(path)
    path.write_bytes(safetensors.torch.save({"counts": torch.zeros(3)}, {"format": module.FORMAT}))
    with pytest.raises(ValueError, match="is damaged"):
        UnigramCounts.load(path)
    with pytest.raises(FileNotFoundError):
        UnigramCounts.load(tmp_path / "none")


def test_counts_of_another_tokenizer_are_refused(form: TextFormat) -> None:
    other = UnigramCounts.of_ids([[5]], V, source="", tokenizer_fingerprint="f" * 64)
    with pytest.raises(ValueError, match="count the source again"):
        slor(word_lm(), form, ["w1"], other)


def test_a_tokenizers_fingerprint_is_of_what_it_does(tokenizer: Any, tmp_path: Path) -> None:
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["w1", "w1 w2"], padding=True, truncation=True, max_length=1)
    assert tokenizer_fingerprint(tokenizer) == before
    tokenizer.save_pretrained(tmp_path)
    other = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer_fingerprint(other) == before
    other.add_tokens(["another"])
    assert tokenizer_fingerprint(other) != before


def test_vocabulary_sized_products_are_never_whole(form: TextFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """The LM's own output embedding does not run, so no (B, T, V) logits come from it."""
    lm, ran = word_lm(), []
    lm.lm_head.register_forward_hook(lambda *_: ran.append(1))
    slor(lm, form, TEXTS, counts_of(form))
    assert not ran
    slor(lm, form, TEXTS, counts_of(form), lm_term="logits")
    assert ran


def test_dropout_is_off_meanwhile_and_progress_counts_texts(form: TextFormat) -> None:
    lm = word_lm(attention_dropout=0.5).train()
    seen: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        assert not lm.training
        seen.append((done, total))

    first, second = (
        slor(lm, form, TEXTS, counts_of(form), batch_size=4, progress=progress) for _ in range(2)
    )
    assert first == second
    assert lm.training
    assert seen == [(0, 6), (4, 6), (6, 6)] * 2


def test_nan_is_an_error_that_names_the_text(form: TextFormat) -> None:
    lm = word_lm()
    with torch.no_grad():
        lm.model.embed_tokens.weight[4 + 7] = math.nan
    with pytest.raises(FloatingPointError, match="log-probability of text 4 is nan"):
        slor(lm, form, TEXTS, counts_of(form))


def test_texts_without_one_that_can_be_scored(form: TextFormat) -> None:
    found = slor(word_lm(), form, ["", ""], counts_of(form))
    assert found.values == (None, None)
    assert found.empty == 2
    with pytest.raises(ValueError, match="all 2 texts are empty"):
        _ = found.mean
    assert slor(word_lm(), form, [], counts_of(form)) == SlorScores(
        (), (), (), (), found.lm_fingerprint, found.counts_source, found.counts_fingerprint
    )


REFUSALS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"texts": "w1 w2"}, TypeError, "texts must be a sequence of str"),
    ({"prompts": "w1"}, TypeError, "prompts must be a sequence of str"),
    ({"texts": ["w1", 3]}, TypeError, "text must be a str"),
    ({"prompts": ["w1", "w2"]}, ValueError, "1 texts and 2 prompts"),
    ({"batch_size": 0}, ValueError, "batch_size is 0"),
    ({"lm_term": "states"}, ValueError, "lm_term is 'states'"),
    ({"texts": [" ".join(WORDS[:64])]}, ValueError, "text 0 takes 65 tokens .* positions for 64"),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSALS)
def test_what_cannot_be_scored_is_refused(
    form: TextFormat, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    options = {"texts": ["w1"], **changes}
    with pytest.raises(error, match=message):
        slor(word_lm(), form, options.pop("texts"), counts_of(form), **options)


@pytest.mark.parametrize(
    ("counts", "error", "message"),
    [
        (torch.zeros(3), TypeError, "counts must be int64"),
        (torch.zeros(0, dtype=torch.int64), ValueError, r"shape \(V,\), got \(0,\)"),
        (torch.tensor([1, -1]), ValueError, "counts hold -1"),
        (torch.zeros(2, 2, dtype=torch.int64), ValueError, r"shape \(V,\), got \(2, 2\)"),
    ],
)
def test_counts_that_are_none_are_refused(counts: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        UnigramCounts(counts, "", "", "")


def test_ids_outside_the_vocabulary_are_not_counted() -> None:
    for ids in ([5], [-1, 2]):
        with pytest.raises(ValueError, match=f"sequence 1 has the id {ids[0]}, outside"):
            UnigramCounts.of_ids([[1], ids], 5, source="", tokenizer_fingerprint="")
