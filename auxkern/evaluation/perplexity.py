"""What a pair and each of its models alone give to held-out text, in nats per token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from auxkern.core.terms import Term
from auxkern.model.base import lm_term, run_base
from auxkern.model.caches import AuxiliaryRows
from auxkern.model.inputs import BaseSide, PairInputs
from auxkern.model.pair_terms import DEFAULT
from auxkern.model.text import IGNORED
from auxkern.ops.cross_entropy import cross_entropy
from auxkern.training.collator import AuxCollator, moved
from auxkern.training.examples import Items
from auxkern.training.fit import checked_lengths
from auxkern.training.lm_states import LMStates
from auxkern.training.progress import PartsDone

_INPUTS = ("input_ids", "attention_mask", "condition_ids", "condition_mask")


@dataclass(frozen=True)
class NllReport:
    """Mean negative log-likelihood of the labels of a data set, in nats per token.

    Attributes:
        tokens: labels that are scored, those that are not -100.
        sequences: B of the data set.
        lm_nll: the base alone, which reads what the pair's base reads.
        aux_nll: the auxiliary alone, softmax(aux_scale * logits_aux).
        pair_nll: the sum of both, softmax(logits_LM + aux_scale * logits_aux).
        plain_nll: the base alone without its prefix and base prompt; None where it has none.
    """

    tokens: int
    sequences: int
    lm_nll: float
    aux_nll: float
    pair_nll: float
    plain_nll: float | None = None

    @property
    def lm_perplexity(self) -> float:
        """exp(lm_nll); infinite beyond what a float holds."""
        return _exp(self.lm_nll)

    @property
    def plain_perplexity(self) -> float | None:
        """exp(plain_nll), or None."""
        return None if self.plain_nll is None else _exp(self.plain_nll)

    @property
    def aux_perplexity(self) -> float:
        """exp(aux_nll); infinite beyond what a float holds."""
        return _exp(self.aux_nll)

    @property
    def pair_perplexity(self) -> float:
        """exp(pair_nll); infinite beyond what a float holds."""
        return _exp(self.pair_nll)


@torch.no_grad()
def evaluate_nll(
    model: Any,
    encoded: Items,
    *,
    batch_tokens: int = 1024,
    aux_scale: float | None = None,
    lm_states: LMStates | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> NllReport:
    """Scores every label of a data set by the pair, by its base alone, and by its auxiliary alone.

    One forward pass of each model; the model is in evaluation mode meanwhile. Sequences of like length
    go together, and only positions that have a label reach a vocabulary-sized product, so the logits
    (B, T, V) never exist at once. Batches change the figures by rounding only.

    Args:
        model: an ``AuxTunedForCausalLM``.
        encoded: examples with input_ids (T), labels (T) and condition_ids (K), see ``encode``.
        batch_tokens: most tokens of a batch, padding included; a longer sequence goes alone.
        aux_scale: mixing weight instead of the config's.
        lm_states: cached states of this data set for ``config.lm_layers``; then the base does not run.
        progress: called with tokens done and tokens in all (of input_ids), before the first batch and
            after each. What it raises ends the evaluation.

    Raises:
        ValueError: there is nothing to score, a sequence is longer than the base can take, or
            lm_states are of other data or layers.
        FloatingPointError: an nll is NaN or infinite; the message says whose.
    """
    if batch_tokens < 1:
        raise ValueError(f"batch_tokens is {batch_tokens}; it must be 1 or more")
    if not len(encoded):
        raise ValueError("encoded is empty; there is nothing to score")
    lengths = checked_lengths(model.lm, encoded)
    examples = encoded
    if lm_states is not None:
        config = model.config
        if config.lm_term != "head":
            raise ValueError(
                f'lm_states hold no logits, but lm_term is "{config.lm_term}"; leave lm_states out'
            )
        if list(lm_states.layers) != list(config.lm_layers):
            raise ValueError(
                f"lm_states hold the layers {list(lm_states.layers)}, but the auxiliary reads "
                f"{list(config.lm_layers)}; cache states for these"
            )
        examples = lm_states.dataset(encoded)
    collate = AuxCollator(model.config.pad_token_id or 0)
    scale = model.config.aux_scale if aux_scale is None else aux_scale
    sums, tokens = torch.zeros(3, dtype=torch.float64), 0
    done = PartsDone(progress, sum(lengths))
    was_training = model.training
    model.eval()
    try:
        done.add(0)
        for chosen in _token_batches(lengths, batch_tokens):
            batch = moved(collate(list(map(examples.__getitem__, chosen))), model.device)
            nll = _row_nll(model, batch, float(scale))
            sums += nll.double().sum(1).cpu()
            tokens += nll.shape[1]
            done.add(sum(lengths[i] for i in chosen))
    finally:
        model.train(was_training)
    if not tokens:
        raise ValueError(f"no label is to be scored: all of them are {IGNORED} in {len(encoded)} sequences")
    means = (sums / tokens).tolist()
    for name, mean in zip(("LM alone", "auxiliary alone", "pair"), means, strict=True):
        if not math.isfinite(mean):
            raise FloatingPointError(
                f"the mean nll of the {name} is {mean}; look at the weights and the dtype of both models"
            )
    return NllReport(tokens, len(encoded), *means)


@torch.no_grad()
def plain_nll(
    model: Any,
    encoded: Items,
    *,
    batch_tokens: int = 1024,
    progress: Callable[[int, int], None] | None = None,
) -> float:
    """Mean nll that a pair's base alone gives the labels of a data set, without its prefix.

    Args:
        model: an ``AuxTunedForCausalLM``.
        encoded: examples in ``TextFormat.plain``.
        batch_tokens, progress: as of ``evaluate_nll``.

    Raises:
        ValueError: a sequence is longer than the base can take, or has no label.
    """
    lm, lengths, V = model.lm, checked_lengths(model.lm, encoded), model.config.vocab_size
    collate, own = AuxCollator(model.config.pad_token_id or 0), model.config.lm_term == "logits"
    total, tokens, done = 0.0, 0, PartsDone(progress, sum(lengths))
    for chosen in _token_batches(lengths, batch_tokens):
        batch = moved(collate([encoded[i] for i in chosen]), lm.device)
        states, logits, *_ = run_base(lm, batch["input_ids"], batch["attention_mask"], want_logits=own)
        term = lm_term(lm, states[:, :, 0], logits)
        total += float(cross_entropy([term], batch["labels"], shift=True, reduction="sum", vocab_size=V))
        tokens += int((batch["labels"][:, 1:] != IGNORED).sum())
        done.add(sum(lengths[i] for i in chosen))
    if not tokens:
        raise ValueError(f"no label is to be scored: all of them are {IGNORED} in {len(encoded)} sequences")
    return total / tokens


def _exp(nll: float) -> float:
    try:
        return math.exp(nll)
    except OverflowError:
        return math.inf


def _token_batches(lengths: list[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices, longest sequences first, in batches of at most ``batch_tokens`` with padding, or of one."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    while order:
        count = max(1, batch_tokens // max(1, lengths[order[0]]))
        yield order[:count]
        order = order[count:]


def _row_nll(model: Any, batch: dict[str, Tensor], scale: float) -> Tensor:
    """(3, N) float32 nll of the N labels that count: the base's, the auxiliary's, the pair's."""
    labels = batch["labels"][:, 1:]
    b, t = (labels != IGNORED).nonzero(as_tuple=True)
    if not len(b):
        return torch.zeros(3, 0)
    target = labels[b, t][:, None]
    lm, added = _separate_terms(model, batch, b, t, scale)
    options: dict[str, Any] = {"reduction": "none", "vocab_size": model.config.vocab_size}
    pair, stats = cross_entropy([lm, *added], target, return_stats=True, **options)
    # The statistics of one pass have each term alone; an auxiliary with a pointer is two of them.
    alone = stats.term_nll[1] if len(added) == 1 else cross_entropy(added, target, **options)
    return torch.stack([stats.term_nll[0], alone, pair]).flatten(1).float()


def _separate_terms(
    model: Any, batch: dict[str, Tensor], b: Tensor, t: Tensor, scale: float
) -> tuple[Term, list[Term]]:
    """The base's term and the auxiliary's, apart even where they share an embedding; rows (N, 1).

    Row n predicts what follows position t[n] of sequence b[n].
    """
    ids, mask, conditions, condition_mask = (batch[name] for name in _INPUTS)
    inputs = PairInputs(ids, mask, conditions, condition_mask, batch.get("told"))
    logits, states = None, batch.get("lm_states")
    if states is None:
        states, logits, *_ = model.run_lm(inputs, model.config.lm_layers, None, use_cache=False)
    lm = lm_term(model.lm, states[b, t, :1], None if logits is None else logits[b, t][:, None])
    side = BaseSide(states, model.config.lm_layers, logits, None)
    output = model.auxiliary_output(AuxiliaryRows(DEFAULT, None, None), inputs, side, use_cache=False)
    # Each row as a sequence of one position, with the condition of its own sequence.
    rows = output.positions(lambda values: values[b, t][:, None])
    return lm, model.auxiliary_terms(rows, inputs.rows(b), scale)
