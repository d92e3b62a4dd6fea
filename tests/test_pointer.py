"""The pointer beside its formula, written as loops."""

import math

import torch
from pairs import PAD

from auxkern.model.auxiliary import AuxiliaryInputs, Pointer


def _inputs(ids, mask, condition, condition_mask):
    nothing = torch.zeros(0)
    return AuxiliaryInputs(ids, mask, condition, condition_mask, nothing, nothing)


def _plain(pointer, hidden, memory, ids, condition):
    """(T, K) scores and (T, D) hidden states of one sequence, token by token."""
    states, rows = [], []
    for t in range(len(ids)):
        share = sum(token in ids[: t + 1] for token in condition) / max(1, len(condition))
        h = hidden[t] + share * pointer.covered
        row = []
        for j in range(len(condition)):
            score = pointer.query(h) @ pointer.key(memory[j]) / math.sqrt(pointer.key.out_features)
            if j > 0 and ids[t] == condition[j - 1]:
                score = score + pointer.follow(h)[0]
            row.append(score)
        states.append(h)
        rows.append(torch.stack(row))
    return torch.stack(states), torch.stack(rows)


def test_scores_follow_the_formula_with_padding_on_either_side():
    torch.manual_seed(0)
    pointer = Pointer(6, 4)
    with torch.no_grad():
        for parameter in pointer.parameters():
            parameter.normal_()
    texts, conditions = [[5, 7, 8, 9, 7], [7, 8, 3]], [[7, 8, 4], [8]]
    ids = torch.tensor([texts[0], [PAD, PAD, *texts[1]]])
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    condition = torch.tensor([conditions[0], [*conditions[1], PAD, PAD]])
    condition_mask = torch.tensor([[1] * 3, [1, 0, 0]])
    hidden, memory = torch.randn(2, 5, 6), torch.randn(2, 3, 6)
    inputs = _inputs(ids, mask, condition, condition_mask)
    states, scores, seen = pointer(hidden, pointer.keys(memory), inputs, None)
    for row, start in ((0, 0), (1, 2)):
        exact = _plain(pointer, hidden[row, start:], memory[row], texts[row], conditions[row])
        torch.testing.assert_close(states[row, start:], exact[0])
        torch.testing.assert_close(scores[row, start:, : len(conditions[row])], exact[1])
    assert seen.tolist() == [[True, True, False], [True, False, False]]


def test_a_text_in_two_calls_is_the_text_in_one():
    torch.manual_seed(1)
    pointer = Pointer(6, 4)
    with torch.no_grad():
        for parameter in pointer.parameters():
            parameter.normal_()
    ids, condition = torch.tensor([[5, 7, 8, 9]]), torch.tensor([[9, 5, 8]])
    one, hidden = torch.ones_like(ids), torch.randn(1, 4, 6)
    keys = pointer.keys(torch.randn(1, 3, 6))
    whole = pointer(hidden, keys, _inputs(ids, one, condition, one[:, :3]), None)
    _, _, seen = pointer(hidden[:, :2], keys, _inputs(ids[:, :2], one[:, :2], condition, one[:, :3]), None)
    rest = pointer(hidden[:, 2:], keys, _inputs(ids[:, 2:], one, condition, one[:, :3]), seen)
    for part, every in zip(rest[:2], whole[:2], strict=True):
        torch.testing.assert_close(part, every[:, 2:])
    assert torch.equal(rest[2], whole[2])
