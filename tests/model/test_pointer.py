"""The pointer beside its formula, written as loops."""

import math

import pytest
import torch

from auxkern.model.interface import AuxiliaryInputs
from auxkern.model.pointer import Pointer
from tests.support.tiny import PAD


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


def _ending(text, condition):
    """For each place of the condition: the longest n so that the text ends with the n tokens up to there."""
    return [
        max(n for n in range(j + 2) if text[len(text) - n :] == condition[j + 1 - n : j + 1])
        for j in range(len(condition))
    ]


def _plain(pointer, hidden, memory, ids, condition, lm_scores):
    """Hidden states (T, D), scores (T, K), end (T) and marks (T, D) of one sequence, token by token."""
    rows = []
    K = len(condition)
    for t in range(len(ids)):
        text = ids[: t + 1]
        longest = max((n for end in range(t + 2) for n in _ending(ids[:end], condition)), default=0)
        share = longest / max(1, K)
        lacking = 1 - share if condition else 0.0
        written = float(K > 0 and text[-K:] == condition)
        h = hidden[t] + share * pointer.covered + written * pointer.completed
        scores = []
        for j in range(K):
            score = pointer.query(h) @ pointer.key(memory[j]) / math.sqrt(pointer.key.out_features)
            if j == 0:
                score = score + pointer.start(h)[0]
            elif text[-j:] == condition[:j]:
                score = score + 10 * pointer.follow(h)[0]
            if pointer.against_lm is not None:
                score = score + pointer.against_lm(h)[0] * (lm_scores[t, j] - 10) / 10
            scores.append(score)
        marks = share * pointer.mark_share + lacking * pointer.mark_lacking + written * pointer.mark_written
        scores = torch.stack(scores) if scores else torch.zeros(0)
        rows.append((h, scores, 10 * lacking * pointer.end(h)[0] + torch.zeros(()), marks))
    return [torch.stack(part) for part in zip(*rows, strict=True)]


@pytest.mark.parametrize("reads_lm", [True, False])
def test_scores_follow_the_formula_with_padding_on_either_side(reads_lm):
    pointer = _pointer(0, reads_lm=reads_lm)
    texts = [[7, 8, 7, 8, 4, 7, 8, 4, 8], [8, 5, 8, 7], [8, 8]]
    conditions = [[7, 8, 4, 7], [8], []]
    ids = torch.tensor([texts[0], [PAD] * 5 + texts[1], texts[2] + [PAD] * 7])
    mask = torch.tensor([[1] * 9, [0] * 5 + [1] * 4, [1] * 2 + [0] * 7])
    condition = torch.tensor([conditions[0], conditions[1] + [PAD] * 3, [PAD] * 4])
    condition_mask = torch.tensor([[1] * 4, [1, 0, 0, 0], [0] * 4])
    hidden, memory, lm_scores = torch.randn(3, 9, 6), torch.randn(3, 4, 6), 10 * torch.randn(3, 9, 4)
    inputs = _inputs(ids, mask, condition, condition_mask, lm_scores if reads_lm else None)
    coverage = pointer.coverage(inputs, None)
    found = pointer(hidden, pointer.keys(memory), inputs, coverage)
    for row, start, stop in ((0, 0, 9), (1, 5, 9), (2, 0, 2)):
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
        torch.testing.assert_close(coverage.marks[row, start:stop], marks)
    longest = [[1, 2, 3, 4], [1, 0, 0, 0], [0] * 4]
    ending = [[0, 1, 0, 0], [0] * 4, [0] * 4]
    assert coverage.stretches.unbind(-1)[0].tolist() == longest
    assert coverage.stretches.unbind(-1)[1].tolist() == ending


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 5, 6])
def test_a_text_in_two_calls_is_the_text_in_one(cut):
    pointer = _pointer(1)
    ids, condition = torch.tensor([[9, 5, 9, 5, 8, 8, 9]]), torch.tensor([[9, 5, 8]])
    one, hidden, lm_scores = torch.ones_like(ids), torch.randn(1, 7, 6), torch.randn(1, 7, 3)
    keys = pointer.keys(torch.randn(1, 3, 6))

    def call(first, last, past):
        inputs = _inputs(ids[:, first:last], one[:, :last], condition, one[:, :3], lm_scores[:, first:last])
        coverage = pointer.coverage(inputs, past)
        return *pointer(hidden[:, first:last], keys, inputs, coverage), coverage.marks, coverage

    whole, begun = call(0, 7, None), call(0, cut, None)
    rest = call(cut, 7, begun[-1].stretches)
    for part, every in zip(rest[:-1], whole[:-1], strict=True):
        torch.testing.assert_close(part, every[:, cut:])
    assert torch.equal(rest[-1].stretches, whole[-1].stretches)


@pytest.mark.parametrize("K", [0, 1, 5])
def test_a_text_token_by_token_is_covered_as_the_text_at_once(K):
    pointer, generator = _pointer(6), torch.Generator().manual_seed(7)
    # Of two tokens, so that stretches overlap; padding before some texts and after others.
    ids = torch.randint(2, 4, (16, 20), generator=generator)
    column, ends = torch.arange(20), torch.randint(0, 8, (16, 1), generator=generator)
    before = torch.arange(16)[:, None] % 2 == 0
    mask = torch.where(before, column >= ends, column < 20 - ends).long()
    condition = torch.randint(2, 4, (16, K), generator=generator)
    condition_mask = (torch.arange(K) < torch.arange(16)[:, None] % (K + 1)).long()
    whole = pointer.coverage(_inputs(ids, mask, condition, condition_mask, None), None)
    past, each = None, []
    for t in range(ids.shape[1]):
        inputs = _inputs(ids[:, t : t + 1], mask[:, : t + 1], condition, condition_mask, None)
        each.append(pointer.coverage(inputs, past))
        past = each[-1].stretches
    for name in ("share", "lacking", "written", "begun"):
        assert torch.equal(torch.cat([getattr(one, name) for one in each], 1), getattr(whole, name))
    assert torch.equal(past, whole.stretches)
    assert whole.written.any() == (K > 0)


def test_padding_after_a_text_does_not_break_a_stretch():
    pointer = _pointer(4)
    ids, condition = torch.tensor([[5, 9, 5, PAD, PAD]]), torch.tensor([[9, 5, 8]])
    mask, one = torch.tensor([[1, 1, 1, 0, 0]]), torch.ones_like(condition)
    past = pointer.coverage(_inputs(ids, mask, condition, one, None), None).stretches
    assert past.tolist() == [[[1, 0], [2, 2], [0, 0]]]
    idle = _inputs(torch.tensor([[PAD]]), torch.tensor([[1, 1, 1, 0, 0, 0]]), condition, one, None)
    assert torch.equal(pointer.coverage(idle, past).stretches, past)
    more = _inputs(torch.tensor([[8]]), torch.tensor([[1, 1, 1, 0, 0, 1]]), condition, one, None)
    assert pointer.coverage(more, past).written.tolist() == [[[1.0]]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_coverage_keeps_the_modules_dtype(dtype):
    pointer, ids = _pointer(5).to(dtype), torch.tensor([[5, 7]])
    inputs = _inputs(ids, torch.ones_like(ids), ids, torch.ones_like(ids), torch.randn(1, 2, 2, dtype=dtype))
    found = pointer(
        torch.randn(1, 2, 6, dtype=dtype),
        pointer.keys(torch.randn(1, 2, 6, dtype=dtype)),
        inputs,
        pointer.coverage(inputs, None),
    )
    assert {part.dtype for part in found} == {dtype}


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
        assert coverage.marks.any() != exact
