"""Tensors of the sequences of a data set in a folder: computed once, read memory-mapped.

A folder holds ``index.json``, which says what they are of and where each sequence lies, and safetensors
shards of tensors (tokens, ...). The index is written first, each shard when it is whole, and every shard
carries the digest of its index; so the folder is finished when no shard is missing.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from auxkern.core.files import replace_file
from auxkern.training.progress import PartsDone

FORMAT = 1
INDEX = "index.json"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
EXACT = "float32"  # of the computes
_STALE_SECONDS = 3600


@dataclass
class Shard:
    """Consecutive sequences of the longest-first order; their places in the data set, and their tokens."""

    members: list[int] = field(default_factory=list)
    tokens: int = 0


class _Layout(NamedTuple):
    """Which sequences are computed, and where they go."""

    shards: list[Shard]
    places: list[list[int]]  # of every sequence of the data set: shard, first token, number of tokens

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)


class Sequences(NamedTuple):
    """What names each sequence of a data set, equal ones the same, and their lengths in tokens."""

    keys: list[bytes]
    lengths: list[int]

    def unique(self) -> dict[bytes, int]:
        """The first place of every different sequence."""
        first: dict[bytes, int] = {}
        for i, key in enumerate(self.keys):
            first.setdefault(key, i)
        return first

    @property
    def tokens(self) -> int:
        """Of all different ones."""
        return sum(self.lengths[i] for i in self.unique().values())


def _layout(sequences: Sequences, shard_tokens: int) -> _Layout:
    unique, length = sequences.unique(), sequences.lengths
    shards: list[Shard] = []
    place: dict[int, list[int]] = {}
    # Longest first: little padding in a batch, and too little memory shows in the first one.
    for i in sorted(unique.values(), key=lambda i: (-length[i], i)):
        if not shards or shards[-1].tokens + length[i] > shard_tokens:
            shards.append(Shard())
        place[i] = [len(shards) - 1, shards[-1].tokens, length[i]]
        shards[-1].members.append(i)
        shards[-1].tokens += length[i]
    return _Layout(shards, [place[unique[key]] for key in sequences.keys])


def cheapest_batches(rows: list[list[int]], batch_tokens: int) -> Iterator[list[list[int]]]:
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


def write_shards(
    folder: Path,
    header: dict[str, Any],
    sequences: Sequences,
    shard_tokens: int,
    computed: Callable[[Shard, PartsDone], dict[str, Tensor]],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Computes the shards that are missing in a folder, and writes each when it is whole.

    Args:
        folder: made where it is missing.
        header: what the tensors are of; a folder of others is refused.
        sequences: of the data set.
        shard_tokens: of a shard, unless the folder has begun with another number.
        computed: gives the tensors (tokens, ...) of a shard, and says what is done.
        progress: called with tokens done and tokens in all.

    Raises:
        OSError: the folder cannot be written, or the disk is full; a later call goes on.
        ValueError: the folder holds others.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / INDEX).is_file():
        shard_tokens = read_index(folder, header).get("shard_tokens", shard_tokens)
    layout = _layout(sequences, shard_tokens)
    digest = _begin(folder, header, layout, shard_tokens)
    missing = [s for s, shard in enumerate(layout.shards) if not _is_whole(folder, s, digest, shard.tokens)]
    report = PartsDone(progress, layout.tokens)
    report.add(layout.tokens - sum(layout.shards[s].tokens for s in missing))
    for s in missing:
        tensors = computed(layout.shards[s], report)
        replace_file(_shard_file(folder, s), safetensors.torch.save(tensors, {"index": digest}))


class StoredSequences:
    """The tensors of each sequence in a folder that ``write_shards`` has finished, read when asked for.

    Files are opened when they are first read, in each process anew; so it may go to a loader's workers.
    """

    def __init__(self, folder: Path, index: dict[str, Any]) -> None:
        self.folder = folder
        self.dtype = DTYPES[index["dtype"]]
        self.fingerprint = index["data"]
        self._places = torch.tensor(index["sequences"], dtype=torch.int64).view(-1, 3)
        self._opened: dict[int, Any] = {}
        self._process = os.getpid()

    def __len__(self) -> int:
        return len(self._places)

    def check_data(self, asked: str) -> None:
        """Whether they are of a data set.

        Raises:
            ValueError: its fingerprint is another one.
        """
        if asked != self.fingerprint:
            raise ValueError(_other_states("data set", self.fingerprint, asked, self.folder))

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


def whole_index(folder: Path, header: dict[str, Any]) -> dict[str, Any]:
    """The index of a folder, once it is known to hold what the header says, and all of it.

    Raises:
        FileNotFoundError: there is no index in the folder.
        ValueError: it holds something else, or shards are missing.
    """
    index = read_index(folder, header)
    digest = hashlib.sha256((folder / INDEX).read_bytes()).hexdigest()
    tokens: dict[int, int] = {}
    for shard, first, length in index["sequences"]:
        tokens[shard] = max(tokens.get(shard, 0), first + length)
    missing = [s for s in sorted(tokens) if not _is_whole(folder, s, digest, tokens[s])]
    if missing:
        raise ValueError(
            f"{folder} is not finished: {len(missing)} of {len(tokens)} shards are missing; "
            "cache the states again, which goes on where it stopped"
        )
    return index


def dtype_name(dtype: torch.dtype | str) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype is {name}; states are stored in one of {', '.join(DTYPES)}")
    return name


def narrowed(values: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """Values in the dtype in which they are stored, on the CPU.

    Raises:
        ValueError: one is not finite, or too large for it; the message says of ``what``.
    """
    stored = values.to(dtype)
    if not values.isfinite().all():
        raise ValueError(f"{what} held NaN or infinity; load the base in a dtype that can hold them")
    if not stored.isfinite().all():
        largest = values.abs().max().item()
        wider = "bfloat16" if dtype == torch.float16 else "float32"
        raise ValueError(
            f"{what} reached {largest:.4g}, beyond the {torch.finfo(dtype).max:.4g} of "
            f'{dtype_name(dtype)}; pass dtype="{wider}" and another folder'
        )
    return stored.cpu()


_NAMES = {
    "data": "data set",
    "base": "base's fingerprint",
    "auxiliary": "auxiliary's fingerprint",
    "shape": "shape of the states",
}


def _other_states(what: str, stored: object, asked: object, folder: Path) -> str:
    return (
        f"the {what} of the states in {folder} is {stored}, but yours is {asked}; use another folder "
        "(states_folder names one) or delete this one"
    )


def read_index(folder: Path, expected: dict[str, Any]) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; cache the states first")
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
            names = shard.keys()
            sizes = {shard.get_slice(name).get_shape()[0] for name in names}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and cache the states again") from error
    if owner != digest or sizes != {tokens}:
        raise ValueError(
            f"{path} belongs to another {INDEX} than the one beside it; delete it and cache again"
        )
    return True
