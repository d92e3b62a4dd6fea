"""Outputs of auxiliaries that are held frozen for a data set, computed once and read memory-mapped.

A folder, as in ``state_shards``, holds of one auxiliary ``hidden`` (tokens, D), which its output embedding
reads, and, of one with a pointer, ``pointer`` (tokens, K), K that of the longest condition, and ``end``
(tokens,) in float32. A pointer's scores are kept and not made again: they need the condition's states and the
base's logits, and are few beside the hidden states, unless conditions are long.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from auxkern.model.frozen import base_side, frozen_output
from auxkern.model.inputs import PairInputs
from auxkern.model.modeling import AuxTunedForCausalLM
from auxkern.model.native import compute_of
from auxkern.model.text import padded
from auxkern.training.examples import Items, packed_ids
from auxkern.training.progress import PartsDone
from auxkern.training.state_shards import (
    DTYPES,
    EXACT,
    FORMAT,
    Sequences,
    Shard,
    StoredSequences,
    cheapest_batches,
    dtype_name,
    narrowed,
    whole_index,
    write_shards,
)


class FrozenOutputs(StoredSequences):
    """The stored outputs of one auxiliary: ``outputs[i]`` for the i-th sequence, read when asked for.

    Made by ``cache_frozen_outputs``, for ``LMStates.dataset``.
    """

    def __init__(self, folder: Path, index: dict[str, Any], name: str, widths: Sequence[int]) -> None:
        super().__init__(folder, index)
        self.name, self._parts, self._widths = name, index["parts"], widths

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """hidden (T, D) and, of a pointer, pointer (T, K) and end (T), on the CPU."""
        parts = {part: self._read(part, index) for part in self._parts}
        if "pointer" in parts:
            parts["pointer"] = parts["pointer"][:, : self._widths[index]]
        return parts

    def fingerprint_of(self, encoded: Items) -> str:
        """Of a data set: its sequences and the conditions of this auxiliary."""
        return _data_fingerprint(_sequences(encoded, self.name))


def outputs_folder(
    root: str | Path, model: AuxTunedForCausalLM, name: str, encoded: Items, dtype: torch.dtype | str
) -> Path:
    """A folder below ``root`` whose name differs where data set, auxiliary, its base, dtype or compute do."""
    data, compute = _data_fingerprint(_sequences(encoded, name)), compute_of(model.lm) or EXACT
    narrow = "" if compute == EXACT else f"_{compute}"
    own = model.config.on_top_of[name]["fingerprint"]
    return Path(root) / f"{data[:16]}_auxiliary-{own[:16]}_{dtype_name(dtype)}{narrow}"


def outputs_size(model: AuxTunedForCausalLM, name: str, encoded: Items, dtype: torch.dtype | str) -> int:
    """Bytes that ``cache_frozen_outputs`` would write, to the kilobyte a shard; nothing is computed."""
    other = model._named(name)
    per_token = _width(other) * DTYPES[dtype_name(dtype)].itemsize
    if other.config.pointer:
        per_token += (1 + max(_widths(encoded, name))) * torch.float32.itemsize
    return _sequences(encoded, name).tokens * per_token


def cache_frozen_outputs(
    model: AuxTunedForCausalLM,
    name: str,
    encoded: Items,
    folder: str | Path,
    *,
    dtype: torch.dtype | str = torch.float16,
    shard_tokens: int = 32_768,
    progress: Callable[[int, int], None] | None = None,
) -> FrozenOutputs:
    """Runs the base and an auxiliary over every sequence once, and keeps the auxiliary's output in a folder.

    What is in the folder already is not run again, as with ``cache_lm_states``; the base runs once more for
    each auxiliary, on its exact states.

    Args:
        model: holds the auxiliary frozen (``hold_frozen``).
        name: of the auxiliary.
        encoded: examples with its conditions.
        folder: made where it is missing; see ``outputs_folder``.
        dtype: of the stored hidden states, float16, bfloat16 or float32; a pointer's scores stay float32.
        shard_tokens: tokens of a shard.
        progress: called with tokens done and tokens in all.

    Raises:
        OSError: the folder cannot be written; a later call goes on.
        ValueError: the folder holds outputs of another data set, auxiliary or base, or a value is not finite
            in ``dtype``.
    """
    other, sequences, widths = model._named(name), _sequences(encoded, name), _widths(encoded, name)
    width, has_pointer = _width(other), other.config.pointer
    header: dict[str, Any] = {
        "format": FORMAT,
        "data": _data_fingerprint(sequences),
        "base": model.config.base_fingerprint,
        "auxiliary": model.config.on_top_of[name]["fingerprint"],
        "parts": ["hidden", *(["pointer", "end"] if has_pointer else [])],
        "dtype": dtype_name(dtype),
    }
    compute = compute_of(model.lm) or EXACT
    header |= {} if compute == EXACT else {"compute": compute}
    stored = DTYPES[header["dtype"]]

    def computed(shard: Shard, report: PartsDone) -> dict[str, Tensor]:
        tensors = {"hidden": torch.empty(shard.tokens, width, dtype=stored)}
        if has_pointer:
            tensors["pointer"] = torch.zeros(shard.tokens, max(widths))
            tensors["end"] = torch.empty(shard.tokens)
        rows, token, members = [encoded[i]["input_ids"] for i in shard.members], 0, iter(shard.members)
        for some in cheapest_batches(rows, 1024 if model.device.type == "cpu" else 8192):
            conditions = [_condition(encoded[i], name) for _, i in zip(some, members, strict=False)]
            ids, mask, *condition = (t.to(model.device) for t in (*padded(some, 0), *padded(conditions, 0)))
            batch = PairInputs(ids, mask, *condition)
            output = frozen_output(model, name, batch, base_side(model, batch, other.config.lm_layers))
            real, place = mask.bool(), slice(token, token + sum(map(len, some)))
            what = f"hidden states of the auxiliary {name!r}"
            tensors["hidden"][place] = narrowed(output.hidden[real], stored, what)
            if output.pointer is not None and output.end is not None:
                scores = output.pointer[real]
                tensors["pointer"][place, : scores.shape[1]] = scores.float().cpu()
                tensors["end"][place] = output.end[real].float().cpu()
            report.add(place.stop - token)
            token = place.stop
        return tensors

    write_shards(Path(folder), header, sequences, shard_tokens, computed, progress)
    return FrozenOutputs(Path(folder), whole_index(Path(folder), header), name, widths)


def _width(model: AuxTunedForCausalLM) -> int:
    width: Any = model.auxiliary.hidden_size
    return int(width)


def _condition(item: Any, name: str) -> list[int]:
    ids: list[int] = list(item["frozen"][name]["condition_ids"])
    return ids


def _widths(encoded: Items, name: str) -> list[int]:
    return [len(_condition(encoded[i], name)) for i in range(len(encoded))]


def _sequences(encoded: Items, name: str) -> Sequences:
    items = [encoded[i] for i in range(len(encoded))]
    keys = [packed_ids(item["input_ids"]) + packed_ids(_condition(item, name)) for item in items]
    return Sequences(keys, [len(item["input_ids"]) for item in items])


def _data_fingerprint(sequences: Sequences) -> str:
    return hashlib.sha256(b"".join(sequences.keys)).hexdigest()
