"""States of the frozen language model for a data set, computed once and read memory-mapped.

A folder, as in ``state_shards``, holds ``states`` (tokens, 1 + L, D), final hidden states and then those of L
chosen layers, and ``lm_nll`` (tokens,) float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from auxkern.core.terms import Head
from auxkern.model.base import check_output_head, hidden_width, output_head, run_base
from auxkern.model.fingerprints import fingerprint
from auxkern.model.native import compute_of
from auxkern.model.prefix import BasePrefix, PrefixStates, base_behind
from auxkern.model.text import IGNORED, padded
from auxkern.ops.cross_entropy import cross_entropy
from auxkern.training.examples import Items, data_fingerprint, packed_ids
from auxkern.training.fit import checked_lengths
from auxkern.training.frozen_outputs import FrozenOutputs
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


def announce_size(
    encoded: Items, lm: Any, layers: Sequence[int], dtype: torch.dtype | str = torch.float16
) -> int:
    """Bytes that ``cache_lm_states`` would write, to the kilobyte a shard; nothing is computed.

    Args:
        encoded, lm, layers, dtype: as there.

    Raises:
        ValueError: a sequence is empty, or the dtype is another one.
    """
    per_token = (1 + len(layers)) * hidden_width(lm) * DTYPES[dtype_name(dtype)].itemsize
    per_token += torch.float32.itemsize  # lm_nll
    return _sequences(encoded).tokens * per_token


def states_folder(
    root: str | Path,
    data_fp: str,
    base_fp: str,
    layers: Sequence[int],
    dtype: torch.dtype | str = torch.float16,
    compute: str = EXACT,
) -> Path:
    """A folder below ``root`` whose name differs where data set, base, layers, dtype or compute do."""
    chosen = "-".join(str(layer) for layer in layers) or "none"
    narrow = "" if compute == EXACT else f"_{compute}"
    return Path(root) / f"{data_fp[:16]}_{base_fp[:16]}_layers-{chosen}_{dtype_name(dtype)}{narrow}"


def cache_lm_states(
    lm: Any,
    encoded: Items,
    folder: str | Path,
    *,
    layers: Sequence[int],
    batch_tokens: int | None = None,
    shard_tokens: int = 32_768,
    dtype: torch.dtype | str = torch.float16,
    base_fingerprint: str | None = None,
    prefix: BasePrefix | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LMStates:
    """Runs the base over every sequence once, and keeps its states in a folder.

    Equal sequences are run and stored once. What is in the folder already is not run again: an
    interrupted call goes on at the first missing shard, a finished one returns at once. One process
    at a time may write into a folder.

    Args:
        lm: a causal LM of transformers, frozen, in its own precision and on its own device. What a narrow
            compute of ``load_base`` makes is kept apart from what float32 does.
        encoded: examples with "input_ids" (T), of any length the base can take.
        folder: made where it is missing; see ``states_folder``.
        layers: L hidden states beside the final ones, numbered as in ``run_base``.
        batch_tokens: most tokens of a batch, padding included; a longer sequence is run alone.
            Sequences of like length go together, so there is hardly any padding. Default: 1024 on a
            CPU, 8192 elsewhere.
        shard_tokens: tokens of a shard, which is held in memory until it is written: about
            (1 + L) * D * 2 bytes each, twice while it is written. Ignored where the folder has begun
            with another number.
        dtype: of the stored states, float16, bfloat16 or float32, as a torch dtype or a name.
        base_fingerprint: of the base's weights, if it is known already.
        prefix: what the base reads before every sequence, ``model.base_prefix``; its own states are not kept,
            and ``prefix.fingerprint`` names the base behind it.
        progress: called with tokens done and tokens in all, before the first batch and after each.
            What it raises ends the caching, which can be resumed.

    Raises:
        OSError: the folder cannot be written, or the disk is full; a later call goes on.
        ValueError: the folder holds other states, a sequence is empty or too long for the base, there
            is no such layer, the head is not one that ``output_head`` knows, or a state is not
            finite in ``dtype``; the message names the layer.
    """
    if batch_tokens is None:
        batch_tokens = 1024 if lm.device.type == "cpu" else 8192
    for name, size in (("batch_tokens", batch_tokens), ("shard_tokens", shard_tokens)):
        if size < 1:
            raise ValueError(f"{name} is {size}; it must be 1 or more")
    batch_tokens, shard_tokens = int(batch_tokens), int(shard_tokens)
    if lm.training:
        raise ValueError("lm is in training mode, and dropout would be stored; call lm.eval()")
    most = lm.config.get_text_config().num_hidden_layers
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, Integral) or not 0 <= layer <= most:
            raise ValueError(f"layers names {layer!r}, but {type(lm).__name__} has 0 to {most}")
    if not len(encoded):
        raise ValueError("encoded is empty; there are no states to compute")
    checked_lengths(lm, encoded)
    folder = Path(folder)
    base = base_fingerprint or fingerprint(lm)
    base = base if prefix is None else prefix.fingerprint(base)
    header = _header(data_fingerprint(encoded), base, layers, dtype_name(dtype), hidden_width(lm))
    compute = compute_of(lm) or EXACT
    header |= {} if compute == EXACT else {"compute": compute}

    kept = _Stored(layers, hidden_width(lm), DTYPES[header["dtype"]])

    def computed(shard: Shard, report: PartsDone) -> dict[str, Tensor]:
        check_output_head(lm)
        before = prefix.states() if prefix else None
        read = functools.partial(_states_and_nll, lm, layers=tuple(layers), before=before)
        return _computed(read, encoded, shard, batch_tokens, kept, report)

    write_shards(folder, header, _sequences(encoded), shard_tokens, computed, progress)
    return LMStates.open(folder, encoded, base, layers)


class LMStates(StoredSequences):
    """The stored states of a data set: ``states[i]`` for its i-th sequence, read from disk when asked for.

    Attributes:
        folder: where they lie.
        layers: the L chosen layers.
        dtype: of the states.
        fingerprint: of the data set, see ``data_fingerprint``.
    """

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        """Use ``LMStates.open``, which checks what the folder holds."""
        super().__init__(folder, index)
        self.layers = tuple(index["layers"])

    @classmethod
    def open(
        cls, folder: str | Path, encoded: Items, base_fingerprint: str, layers: Sequence[int]
    ) -> LMStates:
        """The states in a folder, if they are those of this data set, base and layers, and complete.

        Args:
            folder: what ``cache_lm_states`` wrote.
            encoded: the data set.
            base_fingerprint: of the base, see ``auxkern.model.base.fingerprint``.
            layers: the L chosen layers, in the order of the states.

        Raises:
            FileNotFoundError: there is no index in the folder.
            ValueError: data set, base, layers or format are others, or shards are missing.
        """
        folder = Path(folder)
        return cls(folder, whole_index(folder, _header(data_fingerprint(encoded), base_fingerprint, layers)))

    def __getitem__(self, index: int) -> Tensor:
        """(T, 1 + L, D) states of a sequence, final hidden states first, on the CPU, in memory of its own."""
        return self._read("states", index)

    def lm_nll(self, index: int) -> Tensor:
        """(T,) float32, in nats: at position t what the base alone gives token t + 1; 0 at the last."""
        return self._read("lm_nll", index)

    def dataset(self, encoded: Items, frozen: Mapping[str, FrozenOutputs] | None = None) -> StatesDataset:
        """The encoded examples with "lm_states" (T, 1 + L, D) added, for ``AuxCollator``.

        Args:
            encoded: the examples.
            frozen: what is stored of auxiliaries held frozen, by name; it is added in "frozen".

        Raises:
            ValueError: they are not the examples that these states were computed for.
        """
        self.check_data(data_fingerprint(encoded))
        for outputs in (frozen or {}).values():
            outputs.check_data(outputs.fingerprint_of(encoded))
        return StatesDataset(encoded, self, frozen or {})


class StatesDataset(Dataset[dict[str, Any]]):
    """Encoded examples, each with what is stored of it; made by ``LMStates.dataset``."""

    def __init__(self, encoded: Items, states: LMStates, frozen: Mapping[str, FrozenOutputs]) -> None:
        self.encoded = encoded
        self.states = states
        self.frozen = frozen

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = {**self.encoded[index], "lm_states": self.states[index]}
        if self.frozen:
            added = {name: {**item["frozen"][name], **out[index]} for name, out in self.frozen.items()}
            item["frozen"] = {**item["frozen"], **added}
        return item


def _sequences(encoded: Items) -> Sequences:
    keys, lengths = [], []
    for i in range(len(encoded)):
        ids = encoded[i]["input_ids"]
        if len(ids) == 0:
            raise ValueError(f"the input_ids of item {i} are empty; a sequence has its start token at least")
        keys.append(packed_ids(ids))
        lengths.append(len(ids))
    return Sequences(keys, lengths)


def _computed(
    read: Callable[[list[list[int]]], tuple[Tensor, Tensor]],
    encoded: Items,
    shard: Shard,
    batch_tokens: int,
    kept: _Stored,
    report: PartsDone,
) -> dict[str, Tensor]:
    """One shard: states (tokens, 1 + L, D), lm_nll (tokens,) float32.

    Args:
        read: what the base makes of a batch, see ``_states_and_nll``.
    """
    states = torch.empty(shard.tokens, 1 + len(kept.layers), kept.width, dtype=kept.dtype)
    lm_nll = torch.empty(shard.tokens, dtype=torch.float32)
    first = 0
    rows = [list(encoded[i]["input_ids"]) for i in shard.members]
    for batch in cheapest_batches(rows, batch_tokens):
        exact, nll = read(batch)
        last = first + len(nll)
        states[first:last] = kept.narrowed(exact)
        lm_nll[first:last] = nll
        report.add(len(nll))
        first = last
    return {"states": states, "lm_nll": lm_nll}


@torch.no_grad()
def _states_and_nll(
    lm: Any, batch: list[list[int]], layers: tuple[int, ...], before: PrefixStates | None
) -> tuple[Tensor, Tensor]:
    """States (n, 1 + L, D) of the n real tokens, row after row, and the nll (n,) of what follows each."""
    head = output_head(lm)
    input_ids, mask = (tensor.to(lm.device) for tensor in padded(batch, 0))
    if before is None:
        states = run_base(lm, input_ids, mask, layers=layers).states
    else:
        states = base_behind(before, lm, input_ids, mask, layers=layers, keeps=False).states
    following = torch.full_like(input_ids, IGNORED)
    following[:, :-1] = input_ids[:, 1:].masked_fill(mask[:, 1:] == 0, IGNORED)
    real = mask.bool().to(states.device)
    packed = states[real]
    # The rows of padding would cost as much as the others in the product with the head.
    term = Head(packed[:, 0].to(head.weight.device), *head)
    nll = cross_entropy([term], following[mask.bool()].to(head.weight.device), reduction="none")
    return packed, nll


class _Stored(NamedTuple):
    """How states are kept: of which layers beside the final ones, D wide, in which dtype."""

    layers: Sequence[int]
    width: int
    dtype: torch.dtype

    def narrowed(self, states: Tensor) -> Tensor:
        names = ["the final hidden states", *(f"layer {layer}" for layer in self.layers)]
        kept = [narrowed(states[:, k], self.dtype, f"{name} of the base") for k, name in enumerate(names)]
        return torch.stack(kept, dim=1)


def _header(
    data: str, base: str, layers: Sequence[int], dtype: str | None = None, width: int | None = None
) -> dict[str, Any]:
    """What must agree between a folder and its user; dtype and width only with one who writes."""
    header: dict[str, Any] = {"format": FORMAT, "data": data, "base": base, "layers": [*map(int, layers)]}
    if dtype is not None:
        header |= {"dtype": dtype, "shape": ["tokens", 1 + len(layers), width]}
    return header
