"""SLOR: how fluent a language model finds a text, apart from its length and how rare its words are."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from auxkern.core.files import replace_file
from auxkern.model import base
from auxkern.model.fingerprints import fingerprint
from auxkern.model.text import IGNORED, Example, TextFormat, padded
from auxkern.ops.cross_entropy import cross_entropy
from auxkern.training.examples import packed_ids
from auxkern.training.progress import PartsDone

FORMAT = "auxkern unigram counts 1"
_AT_ONCE = 1024  # texts that a tokenizer gets in one call
_NAMES = ("source", "data_fingerprint", "tokenizer_fingerprint")


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """64 hexadecimal digits that name how a tokenizer splits text, and its ids.

    SHA-256 over all that a fast tokenizer does, but for padding and truncation, which are set and unset
    from call to call; over the vocabulary alone of one that is written in Python.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: Any = sorted(tokenizer.get_vocab().items())
    else:
        rules = {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class UnigramCounts:
    """How often each token stands in a body of text: the unigram model of SLOR.

        p_unigram(v) = (counts[v] + 1) / (tokens + V)           add-one smoothing over all V ids (Laplace)

    Attributes:
        counts: (V,) int64.
        source: what the text was, in words.
        data_fingerprint: SHA-256 of its token ids, in their order.
        tokenizer_fingerprint: of the tokenizer that split it, see ``tokenizer_fingerprint``.

    Raises:
        TypeError: counts are not int64.
        ValueError: counts are not one row of natural numbers.
    """

    counts: Tensor
    source: str
    data_fingerprint: str
    tokenizer_fingerprint: str

    def __post_init__(self) -> None:
        if self.counts.dtype != torch.int64:
            raise TypeError(f"counts must be int64, got {self.counts.dtype}; convert them with .long()")
        if self.counts.dim() != 1 or not len(self.counts):
            raise ValueError(f"counts must have the shape (V,), got {tuple(self.counts.shape)}")
        if bool((self.counts < 0).any()):
            raise ValueError(f"counts hold {int(self.counts.min())}; a number of tokens is at least 0")

    @classmethod
    def of_ids(
        cls, sequences: Iterable[Sequence[int]], vocab_size: int, *, source: str, tokenizer_fingerprint: str
    ) -> UnigramCounts:
        """Counts every id of the sequences.

        Args:
            sequences: ids (T) of a text each, without start and end, which SLOR does not score.
            vocab_size: V, the ids that have a probability.
            source, tokenizer_fingerprint: what to keep with the counts.

        Raises:
            ValueError: an id lies outside [0, V).
        """
        if vocab_size < 1:
            raise ValueError(f"vocab_size is {vocab_size}; it must be 1 or more")
        counts, digest = torch.zeros(vocab_size, dtype=torch.int64), hashlib.sha256()
        some: list[int] = []
        for i, ids in enumerate(sequences):
            _check_ids(ids, vocab_size, f"sequence {i}")
            digest.update(packed_ids(ids))
            some.extend(ids)
            if len(some) > 1 << 20:
                counts += torch.bincount(torch.tensor(some), minlength=vocab_size)
                some = []
        counts += torch.bincount(torch.tensor(some, dtype=torch.int64), minlength=vocab_size)
        return cls(counts, source, digest.hexdigest(), tokenizer_fingerprint)

    @classmethod
    def of_texts(
        cls, texts: Sequence[str], text_format: TextFormat, vocab_size: int, *, source: str
    ) -> UnigramCounts:
        """Counts the tokens of whole texts, whatever ``text_format.max_length`` is.

        Raises:
            TypeError: texts is a str, or one of them is not a str.
            ValueError: an id lies outside [0, V).
        """
        tokenizer = text_format.tokenizer
        rows = (text for _, text in _prompts_and_texts(texts, None, tokenizer))
        return cls.of_ids(
            rows, vocab_size, source=source, tokenizer_fingerprint=tokenizer_fingerprint(tokenizer)
        )

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.counts)

    @property
    def tokens(self) -> int:
        """How many were counted."""
        return int(self.counts.sum())

    def log_probs(self) -> Tensor:
        """(V,) float64 natural logarithms of p_unigram."""
        smoothed = self.counts.double() + 1
        return (smoothed / smoothed.sum()).log()

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, whole or not at all.

        Raises:
            OSError: the folder does not exist or cannot be written.
        """
        metadata = {"format": FORMAT, **{name: getattr(self, name) for name in _NAMES}}
        replace_file(Path(path), safetensors.torch.save({"counts": self.counts.contiguous()}, metadata))

    @classmethod
    def load(cls, path: str | Path) -> UnigramCounts:
        """Reads what ``save`` wrote.

        Raises:
            OSError: there is no such file.
            ValueError: it is damaged, or holds something else.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(
                        f"{path} has the format {metadata.get('format')!r}, not {FORMAT!r}; "
                        "name a file that UnigramCounts.save wrote"
                    )
                return cls(file.get_tensor("counts"), *(metadata[name] for name in _NAMES))
        except (safetensors.SafetensorError, KeyError) as error:
            raise ValueError(f"{path} is damaged ({error}); count again and save") from error


@dataclass(frozen=True)
class SlorScores:
    """SLOR of some texts, and what it was made of; log-probabilities are natural.

    Attributes:
        values: one for each text, in nats per token; None for a text without tokens.
        lm_log_probs: log p_LM of each text after the start token and its prompt, 0 where it is empty.
        unigram_log_probs: log p_unigram of each text.
        tokens: |s| of each text.
        lm_fingerprint: of the LM's weights, see ``auxkern.model.fingerprint``.
        counts_source, counts_fingerprint: the text of the unigram counts, in words and as a digest.
    """

    values: tuple[float | None, ...]
    lm_log_probs: tuple[float, ...]
    unigram_log_probs: tuple[float, ...]
    tokens: tuple[int, ...]
    lm_fingerprint: str
    counts_source: str
    counts_fingerprint: str

    @property
    def empty(self) -> int:
        """Texts without tokens; they have no SLOR, and are in no mean."""
        return self.values.count(None)

    @property
    def mean(self) -> float:
        """Mean over the texts that are not empty, each with the same weight.

        Raises:
            ValueError: all are empty.
        """
        worded = [value for value in self.values if value is not None]
        if not worded:
            raise ValueError(f"all {len(self.values)} texts are empty; there is no SLOR to take a mean of")
        return sum(worded) / len(worded)


@torch.no_grad()
def slor(
    lm: Any,
    text_format: TextFormat,
    texts: Sequence[str],
    counts: UnigramCounts,
    *,
    prompts: Sequence[str] | None = None,
    batch_size: int = 32,
    lm_term: str = "head",
    lm_fingerprint: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SlorScores:
    """Syntactic log-odds ratio of texts (Kann, Rothe & Filippova 2018, eq. 1); higher is more fluent.

        SLOR(s) = (log p_LM(s) - log p_unigram(s)) / |s|

    p_LM is that of ``lm``, a product over the tokens of s, of which the first follows the start token;
    |s| counts the same tokens. Neither start nor end is a token of s, so that a text which was cut off
    compares with one that ended. Deviations from the paper: all is over the LM's own tokens, as in the
    paper's variant on word pieces, WPSLOR, not over words; p_unigram is of ``counts``, smoothed, not of
    the LM's training data, which a pre-trained LM does not bring; with a prompt, p_LM is given the prompt
    too. So values compare only for one LM and one set of counts.

    Human text is no upper limit: what the LM writes itself is what it finds probable, and so is repetition
    that it expects; read it beside diversity. The first token, after the start token alone, is often by
    far the least probable one, and weighs more in a short text: compare texts of like length.

    Texts of like length go together; the logits (B, T, V) never exist at once unless
    lm_term="logits". The LM is in evaluation mode meanwhile.

    Args:
        lm: a causal LM of transformers, in its own precision and on its own device.
        text_format: gives the start token and the tokenizer; a max_length cuts texts as in training.
        texts: what is scored.
        counts: over the ids that count as the LM's vocabulary, and of the same tokenizer.
        prompts: what each text continues, which is not scored. None: empty ones.
        batch_size: B, texts at a time; it changes the values by rounding only.
        lm_term: "logits" for an LM whose output embedding ``output_head`` does not know.
        lm_fingerprint: of the LM's weights, if it is known already.
        progress: called with texts done and texts in all, before the first batch and after each.

    Raises:
        TypeError: texts or prompts is a str, or one of them is not a str.
        ValueError: the counts are of another tokenizer or too few ids, a prompt leaves no room for
            text, a text is longer than the LM can take, or an option is out of range.
        FloatingPointError: a log-probability is NaN or infinite; the message names the text.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be 1 or more")
    if lm_term not in ("head", "logits"):
        raise ValueError(f'lm_term is {lm_term!r}; choose "head" or "logits"')
    rows = _scored_rows(lm, text_format, texts, prompts, counts)
    unigram = counts.log_probs()
    lm_log_probs, done = [0.0] * len(rows), PartsDone(progress, len(rows))
    order = sorted(range(len(rows)), key=lambda i: (-sum(map(len, rows[i])), i))
    was_training = lm.training
    lm.eval()
    try:
        done.add(0)
        for first in range(0, len(rows), batch_size):
            chosen = order[first : first + batch_size]
            some = list(map(rows.__getitem__, chosen))
            values = _log_probs(lm, some, text_format.pad_id, counts.vocab_size, lm_term)
            for i, value in zip(chosen, values, strict=True):
                lm_log_probs[i] = value
            done.add(len(chosen))
    finally:
        lm.train(was_training)
    for i, value in enumerate(lm_log_probs):
        if not math.isfinite(value):
            raise FloatingPointError(
                f"the LM's log-probability of text {i} is {value}; look at its weights and its dtype"
            )
    tokens = tuple(len(text) for _, text in rows)
    expected = tuple(unigram[text].sum().item() for _, text in rows)
    of = zip(lm_log_probs, expected, tokens, strict=True)
    return SlorScores(
        tuple((p - q) / count if count else None for p, q, count in of),
        tuple(lm_log_probs),
        expected,
        tokens,
        lm_fingerprint or fingerprint(lm),
        counts.source,
        counts.data_fingerprint,
    )


def _prompts_and_texts(
    texts: Sequence[str], prompts: Sequence[str] | None, tokenizer: Any
) -> Iterable[tuple[list[int], list[int]]]:
    """Ids of [start] prompt and of the whole text, for each text."""
    for name, value in (("texts", texts), ("prompts", prompts)):
        if isinstance(value, str):
            raise TypeError(f"{name} must be a sequence of str, got the str {value!r:.60}; put it in a list")
    if prompts is not None and len(prompts) != len(texts):
        raise ValueError(f"there are {len(texts)} texts and {len(prompts)} prompts; pass as many")
    whole = TextFormat(tokenizer)
    for first in range(0, len(texts), _AT_ONCE):
        some = range(first, min(first + _AT_ONCE, len(texts)))
        examples = [Example("", texts[i], "" if prompts is None else prompts[i]) for i in some]
        for item in whole.examples(examples):
            begun = item["labels"].count(IGNORED)
            yield item["input_ids"][:begun], item["input_ids"][begun:-1]


def _scored_rows(
    lm: Any,
    text_format: TextFormat,
    texts: Sequence[str],
    prompts: Sequence[str] | None,
    counts: UnigramCounts,
) -> list[tuple[list[int], list[int]]]:
    """[start] prompt and the text that is scored, for each text; every refusal of data is here."""
    own = tokenizer_fingerprint(text_format.tokenizer)
    if counts.tokenizer_fingerprint != own:
        raise ValueError(
            f"counts are of a tokenizer with the fingerprint {counts.tokenizer_fingerprint[:16]}, but "
            f"text_format has {own[:16]}; count the source again with this tokenizer"
        )
    longest = base.positions_for(lm)
    limit, rows = text_format.max_length, []
    for i, (begun, text) in enumerate(_prompts_and_texts(texts, prompts, text_format.tokenizer)):
        if limit is not None and len(begun) >= limit:
            raise ValueError(
                f"prompt {i} takes {len(begun)} tokens with the start token, which leaves no room for text "
                f"in max_length={limit}; shorten it or raise max_length"
            )
        kept = text if limit is None else text[: limit - len(begun)]
        if longest is not None and len(begun) + len(kept) > longest:
            raise ValueError(
                f"text {i} takes {len(begun) + len(kept)} tokens with what is before it, but the LM has "
                f"positions for {longest}; pass a TextFormat with max_length={longest}"
            )
        _check_ids(kept, counts.vocab_size, f"text {i}")
        rows.append((begun, kept))
    return rows


def _check_ids(ids: Sequence[int], vocab_size: int, name: str) -> None:
    if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
        bad = min(ids) if min(ids) < 0 else max(ids)
        raise ValueError(
            f"{name} has the id {bad}, outside [0, {vocab_size}); count with the vocab_size of the tokenizer"
        )


def _log_probs(
    lm: Any, rows: list[tuple[list[int], list[int]]], pad_id: int, vocab_size: int, lm_term: str
) -> list[float]:
    """log p_LM of the B texts, each after what is before it."""
    input_ids, mask = padded([begun + text for begun, text in rows], pad_id)
    labels, _ = padded([[IGNORED] * len(begun) + text for begun, text in rows], IGNORED)
    output = base.run_base(lm, input_ids.to(lm.device), mask.to(lm.device), want_logits=lm_term == "logits")
    nll: Tensor = cross_entropy(
        [base.lm_term(lm, output.states[:, :, 0], output.logits)],
        labels.to(output.states.device),
        ignore_index=IGNORED,
        shift=True,
        reduction="none",
        vocab_size=vocab_size,
    )
    return (-nll.double().sum(1)).tolist()
