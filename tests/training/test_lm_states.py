"""Cached states of the base: right, computed once, resumed after any death, refused to strangers."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import OPTConfig, OPTForCausalLM

from auxkern.model.base import check_output_head, freeze
from auxkern.model.fingerprints import fingerprint
from auxkern.model.native import native_refusal, use_native_kernels
from auxkern.training import lm_states
from auxkern.training.collator import AuxCollator
from auxkern.training.examples import EncodedExamples, data_fingerprint
from auxkern.training.lm_states import LMStates, announce_size, cache_lm_states, states_folder
from auxkern.training.state_shards import cheapest_batches
from tests.support.launching import environment
from tests.support.tiny import tiny_lm

LAYERS = [2, 0]
BASE = "b" * 64  # any name will do where the weights do not matter
SIZES = {"batch_tokens": 24, "shard_tokens": 60}


def sequences(count: int = 40) -> EncodedExamples:
    """Random sequences of 1 to 12 ids; the sixth equals the third."""
    generator = torch.Generator().manual_seed(3)
    rows = [
        torch.randint(97, (1 + i % 12,), generator=generator).tolist() for i in torch.arange(count).tolist()
    ]
    rows[5] = rows[2]
    return EncodedExamples(
        {"input_ids": row, "labels": [-100, *row[1:]], "condition_ids": [i]} for i, row in enumerate(rows)
    )


def frozen_lm(**options: Any) -> Any:
    """Its states are of the order of 1: tolerances are absolute."""
    return freeze(tiny_lm(initializer_range=0.02, **options))


def cached(folder: Path, lm: Any = None, **options: Any) -> LMStates:
    options = {"layers": LAYERS, "base_fingerprint": BASE, **SIZES, **options}
    return cache_lm_states(frozen_lm() if lm is None else lm, sequences(), folder, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class Forwards:
    """Counts the sequences that go through a base."""

    def __init__(self, lm: Any) -> None:
        self.rows: list[tuple[int, ...]] = []
        lm.base_model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        for ids, mask in zip(kwargs["input_ids"], kwargs["attention_mask"], strict=True):
            self.rows.append(tuple(ids[mask == 1].tolist()))


@torch.no_grad()
def alone(lm: Any, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """States and nll of one unpadded sequence, by transformers and torch."""
    output = lm(input_ids=torch.tensor([ids]), output_hidden_states=True)
    every = output.hidden_states
    states = torch.stack([every[-1], *(every[layer] for layer in LAYERS)], dim=2)[0]
    nll = F.cross_entropy(output.logits[0, :-1], torch.tensor(ids[1:], dtype=torch.int64), reduction="none")
    return states, F.pad(nll, (0, 1))


@pytest.mark.parametrize("batch_tokens", [24, 2048])  # no padding; much of it
def test_states_are_those_of_each_sequence_alone(tmp_path, batch_tokens):
    lm, encoded = frozen_lm(), sequences()
    states = cached(tmp_path, lm, dtype=torch.float32, batch_tokens=batch_tokens)
    assert len(states) == len(encoded)
    for i in range(len(encoded)):
        expected, nll = alone(lm, encoded[i]["input_ids"])
        # Batched products sum in another order.
        torch.testing.assert_close(states[i], expected, rtol=0, atol=2e-6)
        torch.testing.assert_close(states.lm_nll(i), nll, rtol=0, atol=2e-6)
    assert torch.equal(states[-1], states[len(encoded) - 1])
    for outside in (40, -41):
        with pytest.raises(IndexError, match=f"no sequence {outside} among 40"):
            states[outside]


@pytest.mark.skipif(native_refusal() is not None, reason=str(native_refusal()))
@pytest.mark.parametrize("compute", ["bfloat16", "int8"])
def test_states_of_a_narrow_compute_are_near_and_kept_apart(tmp_path, compute):
    exact = cached(tmp_path / "exact", dtype=torch.float32)
    narrow = cached(tmp_path / compute, freeze(use_native_kernels(frozen_lm(), compute)), dtype=torch.float32)
    off = max(float((narrow[i] - exact[i]).abs().max()) for i in range(len(exact)))
    assert 0 < off < 0.1  # of states of the order of 1
    with pytest.raises(ValueError, match="compute of the states"):
        cached(tmp_path / "exact", freeze(use_native_kernels(frozen_lm(), compute)), dtype=torch.float32)
    with pytest.raises(ValueError, match="delete"):
        cached(tmp_path / compute, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, "bfloat16"])
def test_half_precision_rounds_the_states_and_not_the_nll(tmp_path, dtype):
    exact = cached(tmp_path / "exact", dtype="float32")
    half = cached(tmp_path / "half", dtype=dtype)
    assert str(half.dtype).endswith(str(dtype).removeprefix("torch."))
    for i in range(len(exact)):
        assert torch.equal(half[i], exact[i].to(half.dtype))
        assert torch.equal(half.lm_nll(i), exact.lm_nll(i))
        assert half.lm_nll(i).dtype == torch.float32


def test_the_states_of_no_layers_are_the_final_ones(tmp_path):
    some, none = cached(tmp_path / "some"), cached(tmp_path / "none", layers=[])
    assert none[7].shape == (8, 1, 32)
    assert torch.equal(none[7], some[7][:, :1])


def test_every_sequence_runs_once_and_reading_runs_none(tmp_path, monkeypatch):
    lm, encoded = frozen_lm(), sequences()
    monkeypatch.setattr(lm_states, "check_output_head", lambda lm: None)  # runs two tokens
    probe = Forwards(lm)
    states = cached(tmp_path, lm)
    different = {tuple(encoded[i]["input_ids"]) for i in range(len(encoded))}
    assert len(different) < len(encoded)
    assert sorted(probe.rows) == sorted(different)
    probe.rows.clear()
    opened = LMStates.open(tmp_path, encoded, BASE, LAYERS)
    for i in range(len(encoded)):
        assert torch.equal(opened[i], states[i])
    cached(tmp_path, lm)
    assert not probe.rows


def test_batches_are_full_and_not_padded():
    lengths = [9, 9, 9, 9, 9, 5, 5, 5, 4, 1]
    rows = [[0] * length for length in lengths]
    batches = list(cheapest_batches(rows, 18))
    assert [row for batch in batches for row in batch] == rows
    assert all(len(batch) * len(batch[0]) <= 18 for batch in batches)
    # Two of the 4 and 1 with three of 5 would pad; alone they cost nothing here.
    assert [len(batch) for batch in batches] == [2, 2, 1, 3, 1, 1]
    # A batch is not free where it may hold much: a little padding is better then.
    assert len(list(cheapest_batches(rows, 2048))) == 1
    assert [len(batch) for batch in cheapest_batches(rows, 4)] == [1] * 10


def test_the_size_is_announced(tmp_path):
    lm, encoded = frozen_lm(), sequences()
    for dtype in (torch.float16, torch.float32):
        announced = announce_size(encoded, lm, LAYERS, dtype)
        folder = tmp_path / str(dtype)
        cached(folder, lm, dtype=dtype)
        shards = list(folder.glob("*.safetensors"))
        assert len(shards) > 3
        assert 0 <= sum(path.stat().st_size for path in shards) - announced <= 1024 * len(shards)


def test_progress_counts_tokens(tmp_path):
    encoded, seen = sequences(), []
    cached(tmp_path, progress=lambda done, total: seen.append((done, total)))
    total = sum(len(ids) for ids in {tuple(encoded[i]["input_ids"]) for i in range(len(encoded))})
    done = [tokens for tokens, _ in seen]
    assert done[0] == 0
    assert done[-1] == total
    assert all(0 < after - before <= SIZES["batch_tokens"] for before, after in pairwise(done))
    assert {of for _, of in seen} == {total}
    seen.clear()
    cached(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(total, total)]


def test_an_interruption_is_resumed_to_the_same_bits(tmp_path):
    cached(tmp_path / "whole")

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    folder = tmp_path / "resumed"
    with pytest.raises(KeyboardInterrupt):
        cached(folder, progress=stop)
    written = content(folder)
    assert 1 < len(written) < len(content(tmp_path / "whole"))
    with pytest.raises(ValueError, match=r"not finished: [23] of 5 shards .* cache the states again"):
        LMStates.open(folder, sequences(), BASE, LAYERS)
    first = []
    cached(folder, shard_tokens=1000, progress=lambda done, total: first.append(done))
    assert first[0] > 0
    assert content(folder) == content(tmp_path / "whole")


def die(folder: str, at: int) -> None:
    """Run in a process of its own: kills it when ``at`` tokens are done."""

    def kill(done: int, total: int) -> None:
        if done >= at:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    cached(Path(folder), progress=kill)


def fill_the_disk(folder: str) -> None:
    """Run in a process of its own, whose files may not grow beyond 8 kB: too little for a shard."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))
    try:
        cached(Path(folder))
    except OSError as error:
        print("refused:", error)


def in_a_process(call: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", f"from {__name__} import *; {call}"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_kill_is_resumed_to_the_same_bits(tmp_path, threads):
    torch.set_num_threads(1)
    cached(tmp_path / "whole")
    folder = tmp_path / "killed"
    died = in_a_process(f"die({str(folder)!r}, 150)")
    assert died.returncode == -signal.SIGKILL, died.stderr
    written = content(folder)
    assert 1 < len(written) < len(content(tmp_path / "whole"))
    cached(folder)
    assert content(folder) == content(tmp_path / "whole")


@pytest.mark.skipif(sys.platform == "win32", reason="there is no limit on the size of files")
def test_a_full_disk_leaves_no_half_file(tmp_path):
    ended = in_a_process(f"fill_the_disk({str(tmp_path)!r})")
    assert ended.stdout.startswith("refused:"), ended.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["index.json"]


def test_what_a_killed_process_left_is_removed_when_it_is_old(tmp_path):
    cached(tmp_path)
    names = [".shard-00001.safetensors.abc", ".index.json.abc", ".shard-00002.safetensors.new", ".mine"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
        if not name.endswith("new"):
            os.utime(tmp_path / name, (0, 0))
    cached(tmp_path)
    assert sorted(path.name for path in tmp_path.glob(".*")) == [".mine", ".shard-00002.safetensors.new"]


def test_what_does_not_fit_float16_is_refused_by_name(tmp_path):
    lm = frozen_lm()
    with torch.no_grad():
        lm.model.layers[1].mlp.down_proj.weight.mul_(1e9)
    with pytest.raises(ValueError, match=r'layer 2 .* reached .* beyond the 6\.55e\+04 .* dtype="bfloat16"'):
        cached(tmp_path / "half", lm)
    assert not list((tmp_path / "half").glob("*.safetensors"))
    assert cached(tmp_path / "wide", lm, dtype="bfloat16")[11].abs().max() > 65504
    with torch.no_grad():
        lm.model.norm.weight[3] = 1e9
    with pytest.raises(ValueError, match=r"the final hidden states .* reached"):
        cached(tmp_path / "final", lm, layers=[])
    with torch.no_grad():
        lm.model.embed_tokens.weight[sequences()[11]["input_ids"][3]] = torch.nan
    with pytest.raises(ValueError, match=r"the final hidden states .* NaN or infinity"):
        cached(tmp_path / "nan", lm, dtype="float32")


def test_other_data_base_layers_and_formats_are_refused(tmp_path, monkeypatch):
    cached(tmp_path)
    encoded, other = sequences(), sequences(39)
    both = f"{data_fingerprint(encoded)}, but yours is {data_fingerprint(other)}; use another folder"
    cases = [
        ((other, BASE, LAYERS), both),
        (
            (encoded, "c" * 64, LAYERS),
            f"base's fingerprint .* is {BASE}, but yours is {'c' * 64}; use another",
        ),
        ((encoded, BASE, [0, 2]), r"layers .* is \[2, 0\], but yours is \[0, 2\]"),
        ((encoded, BASE, [2]), r"layers .* is \[2, 0\], but yours is \[2\]"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            LMStates.open(tmp_path, *arguments)
    for options in ({"layers": [0, 2]}, {"base_fingerprint": "c" * 64}, {"dtype": "bfloat16"}):
        with pytest.raises(ValueError, match="but yours is"):
            cached(tmp_path, **options)
    with pytest.raises(ValueError, match="but yours is"):
        LMStates.open(tmp_path, encoded, BASE, LAYERS).dataset(other)
    monkeypatch.setattr(lm_states, "FORMAT", 2)
    with pytest.raises(ValueError, match=r"format .* is 1, but yours is 2"):
        LMStates.open(tmp_path, encoded, BASE, LAYERS)


def test_the_base_is_known_by_its_weights(tmp_path):
    lm = frozen_lm()
    cached(tmp_path, lm, base_fingerprint=None)
    LMStates.open(tmp_path, sequences(), fingerprint(lm), LAYERS)
    with pytest.raises(ValueError, match="base's fingerprint"):
        cached(tmp_path, frozen_lm(seed=1), base_fingerprint=None)


def test_strange_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"index\.json is missing"):
        LMStates.open(tmp_path, sequences(), BASE, LAYERS)
    cached(tmp_path / "a")
    cached(tmp_path / "b", frozen_lm(), layers=[1, 0])
    shard = tmp_path / "a" / "shard-00001.safetensors"
    whole = shard.read_bytes()
    shutil.copy(tmp_path / "b" / shard.name, shard)
    for call in (
        lambda: cached(tmp_path / "a"),
        lambda: LMStates.open(tmp_path / "a", sequences(), BASE, LAYERS),
    ):
        with pytest.raises(ValueError, match=r"shard-00001\.safetensors belongs to another index"):
            call()
    shard.write_bytes(whole[:-7])
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is damaged"):
        cached(tmp_path / "a")
    shard.write_bytes(whole)
    index = tmp_path / "a" / "index.json"
    record = json.loads(index.read_text())
    record["sequences"][0], record["sequences"][1] = record["sequences"][1], record["sequences"][0]
    index.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"index\.json places the sequences in another way"):
        cached(tmp_path / "a")
    index.write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is not JSON"):
        cached(tmp_path / "a")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [4]}, "layers names 4, but LlamaForCausalLM has 0 to 3"),
        ({"layers": [-1]}, "layers names -1"),
        ({"dtype": torch.int8}, "dtype is int8"),
        ({"batch_tokens": 0}, "batch_tokens is 0"),
        ({"shard_tokens": 0}, "shard_tokens is 0"),
        ({"lm": frozen_lm(max_position_embeddings=11)}, "sequence 11 has 12 tokens, .* positions for 11"),
        ({"lm": frozen_lm().train()}, "training mode"),
    ],
)
def test_refuses_before_it_writes(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        cached(tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("ids", [None, []])
def test_nothing_to_run_is_refused(tmp_path, ids):
    items = [] if ids is None else [{"input_ids": [1]}, {"input_ids": ids}]
    with pytest.raises(ValueError, match=r"encoded is empty|input_ids of item 1 are empty"):
        cache_lm_states(frozen_lm(), items, tmp_path, layers=[], base_fingerprint=BASE)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_batches_with_states(tmp_path, workers):
    encoded = sequences()
    states = cached(tmp_path)
    states[0]  # opened here already, before the loader forks
    loader = DataLoader(states.dataset(encoded), batch_size=7, collate_fn=AuxCollator(0), num_workers=workers)
    seen = 0
    for batch in loader:
        for ids, mask, row in zip(
            batch["input_ids"], batch["attention_mask"], batch["lm_states"], strict=True
        ):
            length = int(mask.sum())
            assert ids[:length].tolist() == encoded[seen]["input_ids"]
            assert torch.equal(row[:length], states[seen])
            assert not row[length:].any()
            seen += 1
    assert seen == len(encoded)


def test_states_travel_and_belong_to_the_reader(tmp_path):
    states = cached(tmp_path)
    before = states[11].clone()
    states[11].zero_()
    assert torch.equal(states[11], before)
    assert states[11].untyped_storage().nbytes() == before.numel() * 2
    sent = pickle.loads(pickle.dumps(states.dataset(sequences())))
    assert torch.equal(sent[11]["lm_states"], before)
    assert len(sent) == len(states)


def test_folders_differ_where_states_do(tmp_path):
    a, b = "a" * 64, "b" * 64
    asked = [(a, b, [1, 2]), (b, b, [1, 2]), (a, a, [1, 2]), (a, b, [2, 1]), (a, b, [12]), (a, b, [])]
    folders = {states_folder(tmp_path, *arguments) for arguments in asked}
    folders.add(states_folder(tmp_path, a, b, [], torch.bfloat16))
    folders.add(states_folder(tmp_path, a, b, [], compute="int8"))
    assert len(folders) == 8
    assert {folder.parent for folder in folders} == {tmp_path}
    assert states_folder(tmp_path, a, b, [], "float16") == states_folder(tmp_path, a, b, [])


def test_a_head_that_is_not_understood_is_refused(tmp_path):
    lm = frozen_lm()
    check_output_head(lm)
    lm.config.logit_scale = 2.0  # says what Llama does not do
    with pytest.raises(ValueError, match="is not its logits"):
        cached(tmp_path, lm)


def test_states_are_as_wide_as_the_head_takes_them(tmp_path: Path) -> None:
    """OPT-350M projects its final states from its hidden size to that of its embeddings."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 1}
    config = OPTConfig(vocab_size=97, **sizes, num_attention_heads=2, do_layer_norm_before=False)
    lm = freeze(OPTForCausalLM(config))
    states = cached(tmp_path, lm, layers=[])
    row = sequences()[7]["input_ids"]
    logits = lm(torch.tensor([row])).logits[0]
    found = states[7][:, 0].float()
    assert found.shape == (len(row), 16)
    torch.testing.assert_close(found @ lm.lm_head.weight.T, logits, rtol=0, atol=1e-2)
