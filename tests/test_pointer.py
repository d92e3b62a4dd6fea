"""The pointer beside its formula, written as loops."""

import math

import pytest
import torch
from pairs import PAD

from auxkern.model.auxiliary import AuxiliaryInputs
from auxkern.model.pointer import Pointer


def _inputs(ids, mask, condition, condition_mask, lm_scores):
    nothing = torch.zeros(0)
    return AuxiliaryInputs(ids, mask, condition, condition_mask, nothing, nothing, lm_scores)


def _pointer(seed, **options):
    torch.manual_seed(seed)
    pointer = Pointer(6, 4, **options)
    with torch.no_grad():
        for parameter in pointer.parameters():
            parameter.normal_()
    return pointer


def _plain(pointer, hidden, memory, ids, condition, lm_scores):
    """Hidden states (T, D), scores (T, K), end (T) and marks (T, D) of one sequence, token by token."""
    rows = []
    for t in range(len(ids)):
        share = sum(token in ids[: t + 1] for token in condition) / max(1, len(condition))
        lacking = 1 - share if condition else 0.0
        h = hidden[t] + share * pointer.covered
        scores = []
        for j in range(len(condition)):
            score = pointer.query(h) @ pointer.key(memory[j]) / math.sqrt(pointer.key.out_features)
            if j > 0 and ids[t] == condition[j - 1]:
                score = score + pointer.follow(h)[0]
            if pointer.against_lm is not None:
                score = score + pointer.against_lm(h)[0] * (lm_scores[t, j] - 10) / 10
            scores.append(score)
        marks = share * pointer.mark_share + lacking * pointer.mark_lacking
        scores = torch.stack(scores) if scores else torch.zeros(0)
        rows.append((h, scores, lacking * pointer.end(h)[0] + torch.zeros(()), marks))
    return [torch.stack(part) for part in zip(*rows, strict=True)]


@pytest.mark.parametrize("reads_lm", [True, False])
def test_scores_follow_the_formula_with_padding_on_either_side(reads_lm):
    pointer = _pointer(0, reads_lm=reads_lm)
    texts, conditions = [[5, 7, 8, 9, 7], [7, 8, 3], [8, 8]], [[7, 8, 4], [8], []]
    ids = torch.tensor([texts[0], [PAD, PAD, *texts[1]], [*texts[2], PAD, PAD, PAD]])
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]])
    condition = torch.tensor([conditions[0], [*conditions[1], PAD, PAD], [PAD] * 3])
    condition_mask = torch.tensor([[1] * 3, [1, 0, 0], [0] * 3])
    hidden, memory, lm_scores = torch.randn(3, 5, 6), torch.randn(3, 3, 6), 10 * torch.randn(3, 5, 3)
    inputs = _inputs(ids, mask, condition, condition_mask, lm_scores if reads_lm else None)
    coverage = pointer.coverage(inputs, None)
    found = pointer(hidden, pointer.keys(memory), inputs, coverage)
    for row, start, stop in ((0, 0, 5), (1, 2, 5), (2, 0, 2)):
        K = len(conditions[row])
        states, scores, end, marks = _plain(
            pointer,
            hidden[row, start:stop],
            memory[row],
            texts[row],
            conditions[row],
            lm_scores[row, start:stop],
        )
        torch.testing.assert_close(found.hidden[row, start:stop], states)
        torch.testing.assert_close(found.scores[row, start:stop, :K], scores)
        torch.testing.assert_close(found.end[row, start:stop], end)
        torch.testing.assert_close(pointer.marks(coverage)[row, start:stop], marks)
    assert coverage.seen.tolist() == [[True, True, False], [True, False, False], [False] * 3]


def test_a_text_in_two_calls_is_the_text_in_one():
    pointer = _pointer(1)
    ids, condition = torch.tensor([[5, 7, 8, 9]]), torch.tensor([[9, 5, 8]])
    one, hidden, lm_scores = torch.ones_like(ids), torch.randn(1, 4, 6), torch.randn(1, 4, 3)
    keys = pointer.keys(torch.randn(1, 3, 6))

    def call(first, last, seen):
        inputs = _inputs(ids[:, first:last], one[:, :last], condition, one[:, :3], lm_scores[:, first:last])
        coverage = pointer.coverage(inputs, seen)
        return *pointer(hidden[:, first:last], keys, inputs, coverage), pointer.marks(coverage), coverage.seen

    whole, begun = call(0, 4, None), call(0, 2, None)
    rest = call(2, 4, begun[-1])
    for part, every in zip(rest[:-1], whole[:-1], strict=True):
        torch.testing.assert_close(part, every[:, 2:])
    assert torch.equal(rest[-1], whole[-1])


def test_a_pointer_that_reads_the_base_is_not_left_without():
    pointer, ids = _pointer(2), torch.tensor([[5]])
    inputs = _inputs(ids, ids, ids, ids, None)
    with pytest.raises(ValueError, match="lm_scores is None"):
        pointer(torch.zeros(1, 1, 6), torch.zeros(1, 1, 4), inputs, pointer.coverage(inputs, None))


def test_a_new_pointer_adds_nothing():
    torch.manual_seed(3)
    ids = torch.tensor([[5, 7]])
    inputs = _inputs(ids, torch.ones_like(ids), ids, torch.ones_like(ids), torch.randn(1, 2, 2))
    for exact in (False, True):
        pointer = Pointer(6, 4, exact=exact)
        coverage = pointer.coverage(inputs, None)
        hidden = torch.randn(1, 2, 6)
        found = pointer(hidden, pointer.keys(torch.randn(1, 2, 6)), inputs, coverage)
        assert torch.equal(found.hidden, hidden)
        assert not found.scores.any()
        assert not found.end.any()
        assert pointer.marks(coverage).any() != exact
