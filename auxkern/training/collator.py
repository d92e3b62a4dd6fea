"""Examples of different lengths into one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from auxkern.model.text import IGNORED, padded

_NEEDED = ("input_ids", "labels", "condition_ids")
_STATES, _FROZEN, _TOLD = "lm_states", "frozen", "told"
_OUTPUT = {"hidden": 1, "pointer": 2, "end": 1}  # dimensions of what is cached that differ in length


class AuxCollator:
    """Pads encoded examples on the right into a batch; also a ``data_collator`` of transformers' Trainer.

    Each item has input_ids (T) and labels (T), condition_ids (K), as lists of int or int tensors, and,
    in all items of a batch or in none, told, how many of the first ids are the base prompt, lm_states
    (T, 1 + L, D), the cached states of the base, and frozen: of auxiliaries held frozen, by name,
    condition_ids (K) and what is cached of their output, hidden (T, D), pointer (T, K) and end (T).

    Args:
        pad_token_id: fills ids where their mask is 0.

    Raises:
        TypeError: pad_token_id is not an int.
        ValueError: it is negative.
    """

    def __init__(self, pad_token_id: int) -> None:
        if isinstance(pad_token_id, bool) or not isinstance(pad_token_id, Integral):
            raise TypeError(f"pad_token_id must be an int, got {pad_token_id!r}; pass TextFormat.pad_id")
        if pad_token_id < 0:
            raise ValueError(f"pad_token_id is {pad_token_id}; it must be 0 or more")
        self.pad_token_id: int = int(pad_token_id)

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of B items.

        Returns:
            input_ids, attention_mask and labels (B, T), -100 where there is padding, condition_ids and
            condition_mask (B, K), and told (B,) if the items have it, all int64; lm_states
            (B, T, 1 + L, D) in the dtype of the items', zeros where there is padding, if the items have them;
            and frozen, by name condition_ids and
            condition_mask (B, K) and the outputs (B, T, D), (B, T, K) and (B, T), for
            ``AuxTunedForCausalLM.forward``.

        Raises:
            TypeError: lm_states is not a tensor.
            ValueError: there are no items, a field is missing or unknown, or shapes disagree.
        """
        if not items:
            raise ValueError("a batch needs one item at least, got none")
        for i, item in enumerate(items):
            _check_fields(i, item)
        batch: dict[str, Any] = {}
        ids, labels, conditions = ([item[name] for item in items] for name in _NEEDED)
        batch["input_ids"], batch["attention_mask"] = padded(ids, self.pad_token_id)
        batch["labels"], _ = padded(labels, IGNORED)
        batch["condition_ids"], batch["condition_mask"] = padded(conditions, self.pad_token_id)
        if all(_TOLD in item for item in items):
            batch[_TOLD] = torch.tensor([item[_TOLD] for item in items])
        having = sum(_STATES in item for item in items)
        if having == len(items):
            states = [item[_STATES] for item in items]
            kinds = {(some.shape[1:], some.dtype) for some in states}
            if len(kinds) > 1:
                seen = " and ".join(sorted(f"{tuple(shape)} {dtype}" for shape, dtype in kinds))
                raise ValueError(f"items have {_STATES} of {seen}; all must come from the same cached states")
            batch[_STATES] = pad_sequence(states, batch_first=True)
        elif having:
            raise ValueError(
                f"{having} of {len(items)} items have {_STATES}; give them to all items of a batch or to none"
            )
        frozen = [item.get(_FROZEN, {}) for item in items]
        if any(frozen):
            batch[_FROZEN] = {
                name: self._of_frozen([one[name] for one in frozen]) for name in _same_names(frozen)
            }
        return batch

    def _of_frozen(self, given: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch of what B items know of one auxiliary."""
        ids, mask = padded([one["condition_ids"] for one in given], self.pad_token_id)
        outputs = [name for name in _same_names(given) if name != "condition_ids"]
        return {
            "condition_ids": ids,
            "condition_mask": mask,
            **{name: _filled([one[name] for one in given], _OUTPUT[name]) for name in outputs},
        }


def _same_names(some: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names that mappings have, where all have the same.

    Raises:
        ValueError: they have not.
    """
    first = some[0]
    for i, one in enumerate(some):
        if one.keys() != first.keys():
            raise ValueError(
                f"item {i} has {list(one)} in {_FROZEN} but item 0 {list(first)}; give all items of a batch "
                "the same"
            )
    return list(first)


def _filled(tensors: Sequence[Tensor], ragged: int) -> Tensor:
    """Tensors that differ in the length of their first dimensions in one, with zeros where one is shorter."""
    sizes = [max(tensor.shape[d] for tensor in tensors) for d in range(ragged)]
    filled = tensors[0].new_zeros(len(tensors), *sizes, *tensors[0].shape[ragged:])
    for row, tensor in zip(filled, tensors, strict=True):
        row[tuple(slice(size) for size in tensor.shape[:ragged])] = tensor
    return filled


def _check_fields(i: int, item: Mapping[str, Any]) -> None:
    for name in _NEEDED:
        if name not in item:
            raise ValueError(
                f"item {i} has no {name}; TextFormat.example makes items with {', '.join(_NEEDED)}"
            )
    unknown = [name for name in item if name not in (*_NEEDED, _STATES, _FROZEN, _TOLD)]
    if unknown:
        raise ValueError(f"item {i} has the unknown field {unknown[0]!r}; drop it before the batch is made")
    length = len(item["input_ids"])
    if len(item["labels"]) != length:
        raise ValueError(
            f"item {i} has {length} input_ids but {len(item['labels'])} labels; they must be as many"
        )
    if _STATES not in item:
        return
    states = item[_STATES]
    if not isinstance(states, Tensor):
        raise TypeError(f"item {i} has {_STATES} of type {type(states).__name__}; it must be a tensor")
    if states.dim() != 3 or len(states) != length:
        raise ValueError(
            f"item {i} has {length} input_ids but {_STATES} of shape {tuple(states.shape)}; "
            "they must be (T, 1 + L, D) of the same sequence"
        )


def moved(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A batch of ``AuxCollator`` on a device, with what is known of auxiliaries held frozen."""
    return {
        name: moved(value, device) if isinstance(value, Mapping) else value.to(device)
        for name, value in batch.items()
    }
