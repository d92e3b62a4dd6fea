"""States of the frozen language model for a data set, computed once and read memory-mapped.

A folder holds ``index.json``, which says whose states they are and where each sequence lies, and
safetensors shards: ``states`` (tokens, 1 + L, D), final hidden states and then those of L chosen
layers, and ``lm_nll`` (tokens,) float32. The index is written first, each shard when it is whole, and
every shard carries the digest of its index; so the folder is finished when no shard is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from auxkern.core.files import replace_file
from auxkern.core.terms import Head
from auxkern.model.base import check_output_head, hidden_width, output_head, run_base
from auxkern.model.fingerprints import fingerprint
from auxkern.model.native import compute_of
from auxkern.model.text import IGNORED, padded
from auxkern.ops.cross_entropy import cross_entropy
from auxkern.training.examples import Items, data_fingerprint, packed_ids
from auxkern.training.fit import checked_lengths
from auxkern.training.progress import PartsDone

FORMAT = 1
INDEX = "index.json"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
_STALE_SECONDS = 3600
_EXACT = "float32"  # of the computes


@dataclass
class _Shard:
    """Consecutive sequences of the longest-first order; their places in the data set, and their tokens."""

    members: list[int] = field(default_factory=list)
    tokens: int = 0


class _Layout(NamedTuple):
    """Which sequences are computed, and where they go."""

    shards: list[_Shard]
    places: list[list[int]]  # of every sequence of the data set: shard, first token, number of tokens

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)


def announce_size(
    encoded: Items, lm: Any, layers: Sequence[int], dtype: torch.dtype | str = torch.float16
) -> int:
    """Bytes that ``cache_lm_states`` would write, to the kilobyte a shard; nothing is computed.

    Args:
        encoded, lm, layers, dtype: as there.

    Raises:
        ValueError: a sequence is empty, or the dtype is another one.
    """
    per_token = (1 + len(layers)) * hidden_width(lm) * DTYPES[_dtype_name(dtype)].itemsize
    per_token += torch.float32.itemsize  # lm_nll
    return sum(len(encoded[i]["input_ids"]) for i in _unique(encoded)[0]) * per_token


def states_folder(
    root: str | Path,
    data_fp: str,
    base_fp: str,
    layers: Sequence[int],
    dtype: torch.dtype | str = torch.float16,
    compute: str = _EXACT,
) -> Path:
    """A folder below ``root`` whose name differs where data set, base, layers, dtype or compute do."""
    chosen = "-".join(str(layer) for layer in layers) or "none"
    narrow = "" if compute == _EXACT else f"_{compute}"
    return Path(root) / f"{data_fp[:16]}_{base_fp[:16]}_layers-{chosen}_{_dtype_name(dtype)}{narrow}"


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
    folder.mkdir(parents=True, exist_ok=True)
    base = base_fingerprint or fingerprint(lm)
    header = _header(data_fingerprint(encoded), base, layers, _dtype_name(dtype), hidden_width(lm))
    compute = compute_of(lm) or _EXACT
    header |= {} if compute == _EXACT else {"compute": compute}
    if (folder / INDEX).is_file():
        shard_tokens = _read_index(folder, header).get("shard_tokens", shard_tokens)
    layout = _layout(encoded, shard_tokens)
    digest = _begin(folder, header, layout, shard_tokens)
    missing = [s for s, shard in enumerate(layout.shards) if not _is_whole(folder, s, digest, shard.tokens)]
    if missing:
        check_output_head(lm)
    report = PartsDone(progress, layout.tokens)
    report.add(layout.tokens - sum(layout.shards[s].tokens for s in missing))
    for s in missing:
        tensors = _computed(
            lm, encoded, layout.shards[s], tuple(layers), batch_tokens, DTYPES[header["dtype"]], report
        )
        replace_file(_shard_file(folder, s), safetensors.torch.save(tensors, {"index": digest}))
    return LMStates.open(folder, encoded, base, layers)


class LMStates:
    """The stored states of a data set: ``states[i]`` for its i-th sequence, read from disk when asked for.

    Files are opened when they are first read, in each process anew; so it may go to a loader's workers.

    Attributes:
        folder: where they lie.
        layers: the L chosen layers.
        dtype: of the states.
        fingerprint: of the data set, see ``data_fingerprint``.
    """

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        """Use ``LMStates.open``, which checks what the folder holds."""
        self.folder = folder
        self.layers = tuple(index["layers"])
        self.dtype = DTYPES[index["dtype"]]
        self.fingerprint = index["data"]
        self._places = torch.tensor(index["sequences"], dtype=torch.int64).view(-1, 3)
        self._opened: dict[int, Any] = {}
        self._process = os.getpid()

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
        index = _read_index(folder, _header(data_fingerprint(encoded), base_fingerprint, layers))
        digest = hashlib.sha256((folder / INDEX).read_bytes()).hexdigest()
        tokens: dict[int, int] = {}
        for shard, first, length in index["sequences"]:
            tokens[shard] = max(tokens.get(shard, 0), first + length)
        missing = [s for s in sorted(tokens) if not _is_whole(folder, s, digest, tokens[s])]
        if missing:
            raise ValueError(
                f"{folder} is not finished: {len(missing)} of {len(tokens)} shards are missing; "
                "call cache_lm_states again, which goes on where it stopped"
            )
        return cls(folder, index)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Tensor:
        """(T, 1 + L, D) states of a sequence, final hidden states first, on the CPU, in memory of its own."""
        return self._read("states", index)

    def lm_nll(self, index: int) -> Tensor:
        """(T,) float32, in nats: at position t what the base alone gives token t + 1; 0 at the last."""
        return self._read("lm_nll", index)

    def dataset(self, encoded: Items) -> StatesDataset:
        """The encoded examples with "lm_states" (T, 1 + L, D) added, for ``AuxCollator``.

        Raises:
            ValueError: they are not the examples that these states were computed for.
        """
        asked = data_fingerprint(encoded)
        if asked != self.fingerprint:
            raise ValueError(_other_states("data set", self.fingerprint, asked, self.folder))
        return StatesDataset(encoded, self)

    def _read(self, name: str, index: int) -> Tensor:
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no sequence {index} among {len(self)}")
        shard, first, length = self._places[index].tolist()
        if self._process != os.getpid():
            self._opened, self._process = {}, os.getpid()
        if shard not in self._opened:
            self._opened[shard] = safe_open(_shard_file(self.folder, shard), framework="pt")
        # A slice shares the whole file's mapping; a copy may be sent, saved and written to.
        return self._opened[shard].get_slice(name)[first : first + length].clone()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": {}}


class StatesDataset(Dataset[dict[str, Any]]):
    """Encoded examples, each with its ``lm_states``; made by ``LMStates.dataset``."""

    def __init__(self, encoded: Items, states: LMStates) -> None:
        self.encoded = encoded
        self.states = states

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.encoded[index], "lm_states": self.states[index]}


def _unique(encoded: Items) -> tuple[list[int], list[int]]:
    """The first place of every different sequence, and for every sequence the first of its equals."""
    seen: dict[bytes, int] = {}
    first_of = []
    for i in range(len(encoded)):
        ids = encoded[i]["input_ids"]
        if len(ids) == 0:
            raise ValueError(f"the input_ids of item {i} are empty; a sequence has its start token at least")
        first_of.append(seen.setdefault(packed_ids(ids), i))
    return list(seen.values()), first_of


def _layout(encoded: Items, shard_tokens: int) -> _Layout:
    unique, first_of = _unique(encoded)
    length = {i: len(encoded[i]["input_ids"]) for i in unique}
    shards: list[_Shard] = []
    place: dict[int, list[int]] = {}
    # Longest first: little padding in a batch, and too little memory shows in the first one.
    for i in sorted(unique, key=lambda i: (-length[i], i)):
        if not shards or shards[-1].tokens + length[i] > shard_tokens:
            shards.append(_Shard())
        place[i] = [len(shards) - 1, shards[-1].tokens, length[i]]
        shards[-1].members.append(i)
        shards[-1].tokens += length[i]
    return _Layout(shards, [place[i] for i in first_of])


def _cheapest_batches(rows: list[list[int]], batch_tokens: int) -> Iterator[list[list[int]]]:
    """Rows, longest first, in batches of at most ``batch_tokens`` padded tokens, or of one row.

    Batches that cost least together, a batch costing its padded tokens and what it takes to start it.
    """
    lengths = [len(row) for row in rows]
    n = len(rows)
    start = batch_tokens // 64  # what it takes to start a batch, in tokens: grows with the device
    drops = [i for i in range(1, n) if lengths[i] < lengths[i - 1]]
    cost, stop_of = [0] * (n + 1), [n] * (n + 1)
    for first in reversed(range(n)):
        full = min(n, first + max(1, batch_tokens // lengths[first]))
        # Stopping inside a run of equal lengths gains nothing, unless the batch is full.
        stops = [full, *drops[bisect_right(drops, first) : bisect_left(drops, full)]]
        cost[first], stop_of[first] = min(
            (lengths[first] * (stop - first) + start + cost[stop], stop) for stop in stops
        )
    first = 0
    while first < n:
        yield rows[first : stop_of[first]]
        first = stop_of[first]


def _computed(
    lm: Any,
    encoded: Items,
    shard: _Shard,
    layers: tuple[int, ...],
    batch_tokens: int,
    dtype: torch.dtype,
    report: PartsDone,
) -> dict[str, Tensor]:
    """One shard: states (tokens, 1 + L, D) in ``dtype``, lm_nll (tokens,) float32."""
    states = torch.empty(shard.tokens, 1 + len(layers), hidden_width(lm), dtype=dtype)
    lm_nll = torch.empty(shard.tokens, dtype=torch.float32)
    first = 0
    rows = [list(encoded[i]["input_ids"]) for i in shard.members]
    for batch in _cheapest_batches(rows, batch_tokens):
        exact, nll = _states_and_nll(lm, batch, layers)
        last = first + len(nll)
        states[first:last] = _stored(exact, layers, dtype)
        lm_nll[first:last] = nll
        report.add(len(nll))
        first = last
    return {"states": states, "lm_nll": lm_nll}


@torch.no_grad()
def _states_and_nll(lm: Any, batch: list[list[int]], layers: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """States (n, 1 + L, D) of the n real tokens, row after row, and the nll (n,) of what follows each."""
    head = output_head(lm)
    input_ids, mask = (tensor.to(lm.device) for tensor in padded(batch, 0))
    states = run_base(lm, input_ids, mask, layers=layers).states
    following = torch.full_like(input_ids, IGNORED)
    following[:, :-1] = input_ids[:, 1:].masked_fill(mask[:, 1:] == 0, IGNORED)
    real = mask.bool().to(states.device)
    packed = states[real]
    # The rows of padding would cost as much as the others in the product with the head.
    term = Head(packed[:, 0].to(head.weight.device), *head)
    nll = cross_entropy([term], following[mask.bool()].to(head.weight.device), reduction="none")
    return packed, nll


def _stored(states: Tensor, layers: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    stored = states.to(dtype)
    if not stored.isfinite().all():
        for k, name in enumerate(["the final hidden states", *(f"layer {layer}" for layer in layers)]):
            if not states[:, k].isfinite().all():
                raise ValueError(
                    f"{name} of the base held NaN or infinity; load it in a dtype that can hold them"
                )
            if not stored[:, k].isfinite().all():
                largest = states[:, k].abs().max().item()
                wider = "bfloat16" if dtype == torch.float16 else "float32"
                raise ValueError(
                    f"{name} of the base reached {largest:.4g}, beyond the {torch.finfo(dtype).max:.4g} of "
                    f'{_dtype_name(dtype)}; pass dtype="{wider}" and another folder'
                )
    return stored.cpu()


def _dtype_name(dtype: torch.dtype | str) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype is {name}; states are stored in one of {', '.join(DTYPES)}")
    return name


def _header(
    data: str, base: str, layers: Sequence[int], dtype: str | None = None, width: int | None = None
) -> dict[str, Any]:
    """What must agree between a folder and its user; dtype and width only with one who writes."""
    header: dict[str, Any] = {"format": FORMAT, "data": data, "base": base, "layers": [*map(int, layers)]}
    if dtype is not None:
        header |= {"dtype": dtype, "shape": ["tokens", 1 + len(layers), width]}
    return header


_NAMES = {"data": "data set", "base": "base's fingerprint", "shape": "shape of the states"}


def _other_states(what: str, stored: object, asked: object, folder: Path) -> str:
    return (
        f"the {what} of the states in {folder} is {stored}, but yours is {asked}; use another folder "
        "(states_folder names one) or delete this one"
    )


def _read_index(folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; cache_lm_states writes it")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); delete the folder and cache again") from error
    stored = index if isinstance(index, dict) else {}
    for key, value in expected.items():
        if stored.get(key) != value:
            raise ValueError(_other_states(_NAMES.get(key, key), stored.get(key), value, folder))
    return index


def _begin(folder: Path, header: dict[str, Any], layout: _Layout, shard_tokens: int) -> str:
    """Writes the index where there is none, and removes what a killed process left; the index's digest."""
    path = folder / INDEX
    places = {"shard_tokens": shard_tokens, "tokens": layout.tokens, "sequences": layout.places}
    written = json.dumps({**header, **places})
    if not path.is_file():
        replace_file(path, written)
    elif path.read_text(encoding="utf-8") != written:
        raise ValueError(f"{path} places the sequences in another way; delete {folder} and cache again")
    for unfinished in (*folder.glob(f".{INDEX}.*"), *folder.glob(".shard-*")):
        # A younger one may be written at this moment, by a process that should not be at work here.
        if time.time() - unfinished.stat().st_mtime > _STALE_SECONDS:
            unfinished.unlink()
    return hashlib.sha256(written.encode()).hexdigest()


def _shard_file(folder: Path, shard: int) -> Path:
    return folder / f"shard-{shard:05d}.safetensors"


def _is_whole(folder: Path, s: int, digest: str, tokens: int) -> bool:
    """Whether a shard is there; one that is there but belongs to other states is refused."""
    path = _shard_file(folder, s)
    if not path.is_file():
        return False
    try:
        with safe_open(path, framework="pt") as shard:
            owner = (shard.metadata() or {}).get("index")
            size = shard.get_slice("lm_nll").get_shape()
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and call cache_lm_states again") from error
    if owner != digest or size != [tokens]:
        raise ValueError(
            f"{path} belongs to another {INDEX} than the one beside it; delete it and cache again"
        )
    return True
