"""Cached outputs of auxiliaries held frozen: right, computed once, trained on as if computed, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from auxkern.model import AuxTunedForCausalLM
from auxkern.model.text import Example
from auxkern.training import frozen_outputs
from auxkern.training.collator import AuxCollator
from auxkern.training.frozen_outputs import cache_frozen_outputs, outputs_folder, outputs_size
from auxkern.training.lm_states import LMStates, cache_lm_states
from auxkern.training.loop import ExampleSet, train
from auxkern.training.settings import LoopSettings
from auxkern.training.state_shards import StoredSequences
from tests.support.on_top import KINDS, POINTER, SETTINGS, batch_of, examples, on_top, save_auxiliaries
from tests.support.stand_in import bits, log
from tests.support.tiny import PAD, tiny_lm

SMALL = {"shard_tokens": 30}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with the auxiliaries that are held frozen."""
    return save_auxiliaries(tmp_path)


def cached(
    model: AuxTunedForCausalLM, encoded: Any, root: Path, dtype: torch.dtype = torch.float32
) -> tuple[LMStates, Any]:
    """The base's states and the dataset with everything that is frozen."""
    states = cache_lm_states(
        model.lm, encoded, root / "base", layers=model.config.lm_layers, dtype=dtype, batch_tokens=40
    )
    frozen = {
        name: cache_frozen_outputs(
            model, name, encoded, outputs_folder(root, model, name, encoded, dtype), dtype=dtype, **SMALL
        )
        for name in KINDS
    }
    return states, states.dataset(encoded, frozen)


@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])
def test_loss_and_gradients_on_cached_outputs_are_those_without(
    saved: Path, tmp_path: Path, dtype: torch.dtype, off: float
) -> None:
    model, encoded_of = on_top(saved, POINTER)
    encoded = encoded_of(examples())
    dataset = cached(model, encoded, tmp_path / "cache", dtype)[1]
    results = []
    for some in (encoded, dataset):
        model.zero_grad()
        loss = model(**batch_of(some)).loss
        loss.backward()
        results.append((loss.item(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    (plain, expected), (stored, gradients) = results
    # Other batches sum in another order, and float16 rounds the states by 2 ** -11 at most.
    assert stored == pytest.approx(plain, rel=off)
    assert expected.keys() == gradients.keys()
    for name, gradient in expected.items():
        distance, size = (gradients[name] - gradient).norm(), gradient.norm()
        assert distance <= off * size, name


@pytest.mark.parametrize("name", KINDS)
def test_outputs_are_those_of_each_sequence_alone(saved: Path, tmp_path: Path, name: str) -> None:
    model, encoded_of = on_top(saved, POINTER)
    some = [*examples(), Example("w1", "w2 w3", conditions={"keyword": "", "t5": "w1", "own": "w4"})]
    encoded = encoded_of(some)
    outputs = cache_frozen_outputs(model, name, encoded, tmp_path / "a", dtype="float32", **SMALL)
    other = model._named(name)
    kept: list[Any] = []
    other.auxiliary.register_forward_hook(lambda module, given, output: kept.append(output))
    assert len(outputs) == len(encoded)
    for i in range(len(encoded)):
        ids = torch.tensor([encoded[i]["input_ids"]])
        condition = torch.tensor([encoded[i]["frozen"][name]["condition_ids"]], dtype=torch.int64)
        with torch.no_grad():
            other(input_ids=ids, condition_ids=condition)
        expected = {"hidden": kept[-1].hidden[0]}
        if other.config.pointer:
            expected |= {"pointer": kept[-1].pointer[0], "end": kept[-1].end[0]}
        assert outputs[i].keys() == expected.keys()
        for part, value in expected.items():
            # Batched products sum in another order.
            torch.testing.assert_close(outputs[i][part], value, rtol=1e-5, atol=1e-4)


def test_equal_texts_of_equal_conditions_run_once_and_a_lost_shard_alone_runs_again(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, encoded_of = on_top(saved)
    some = examples()
    # Equal to the first but for what others see, and equal but for what this one sees.
    conditions = some[0].conditions
    others = [{**conditions, "own": "w5"}, {**conditions, "keyword": "w5"}]
    encoded = encoded_of([*some, *(Example("w9", some[0].text, conditions=one) for one in others)])
    rows: list[int] = []
    run = frozen_outputs.frozen_output

    def counted(model: Any, name: str, batch: Any, side: Any) -> Any:
        rows.append(len(batch.input_ids))
        return run(model, name, batch, side)

    monkeypatch.setattr(frozen_outputs, "frozen_output", counted)
    folder, told = tmp_path / "keyword", []
    options = {"dtype": "float32", **SMALL}
    first = cache_frozen_outputs(
        model, "keyword", encoded, folder, **options, progress=lambda *done: told.append(done)
    )
    assert sum(rows) == len(some) + 1
    assert told[-1][0] == told[-1][1] == sum(len(encoded[i]["input_ids"]) for i in (*range(10), 11))
    before = [first[i] for i in range(len(encoded))]
    rows.clear()
    shards = sorted(folder.glob("shard-*"))
    assert len(shards) > 1
    content = shards[1].read_bytes()
    shards[1].unlink()
    again = cache_frozen_outputs(model, "keyword", encoded, folder, **options)
    assert 0 < sum(rows) < len(some)
    assert shards[1].read_bytes() == content
    assert all(torch.equal(again[i]["hidden"], before[i]["hidden"]) for i in range(len(encoded)))
    size = sum(path.stat().st_size for path in shards)
    # Beside the tensors a file has a header.
    assert 0 < size - outputs_size(model, "keyword", encoded, "float32") < 500 * len(shards)


def test_no_condition_at_all_is_stored_too(saved: Path, tmp_path: Path) -> None:
    model, encoded_of = on_top(saved)
    conditions = {"keyword": "", "t5": "w1", "own": ""}
    encoded = encoded_of([Example("w1", "w2 w3", conditions=conditions)])
    outputs = cache_frozen_outputs(model, "keyword", encoded, tmp_path / "a")
    assert outputs[0]["pointer"].shape == (len(encoded[0]["input_ids"]), 0)


def test_outputs_of_others_are_refused(saved: Path, tmp_path: Path) -> None:
    model, encoded_of = on_top(saved)
    some = examples()
    encoded, folder = encoded_of(some), tmp_path / "own"
    outputs = cache_frozen_outputs(model, "own", encoded, folder)
    conditions = {**some[3].conditions, "own": "w7"}
    changed = encoded_of([*some[:3], Example("w1", some[3].text, conditions=conditions), *some[4:]])
    with pytest.raises(ValueError, match="the data set of the states in"):
        cache_frozen_outputs(model, "own", changed, folder)
    states = cache_lm_states(model.lm, encoded, tmp_path / "base", layers=[])
    with pytest.raises(ValueError, match="the data set of the states in"):
        states.dataset(changed, {"own": outputs})
    with pytest.raises(ValueError, match="the dtype of the states in"):
        cache_frozen_outputs(model, "own", encoded, folder, dtype="float32")

    weaker = AuxTunedForCausalLM.from_pretrained(saved / "own", lm=tiny_lm())
    with torch.no_grad():
        weaker.head.weight.mul_(0.5)
    weaker.save_pretrained(saved / "own")
    other, _ = on_top(saved)
    with pytest.raises(ValueError, match="the auxiliary's fingerprint of the states in"):
        cache_frozen_outputs(other, "own", encoded, folder)
    folders = {
        outputs_folder(tmp_path, m, "own", e, "float16") for m in (model, other) for e in (encoded, changed)
    }
    assert len(folders) == 4


def test_outputs_that_a_dtype_cannot_hold_are_refused(saved: Path, tmp_path: Path) -> None:
    model, encoded_of = on_top(saved)
    with torch.no_grad():
        model._named("own").auxiliary.body.norm.weight.mul_(1e6)
    with pytest.raises(
        ValueError, match=r"hidden states of the auxiliary 'own' reached .* pass dtype=.bfloat16"
    ):
        cache_frozen_outputs(model, "own", encoded_of(examples()), tmp_path / "a")


def test_states_of_the_base_alone_do_not_serve_auxiliaries_of_other_layers(
    saved: Path, tmp_path: Path
) -> None:
    model, encoded_of = on_top(saved)
    encoded = encoded_of(examples())
    dataset = cache_lm_states(model.lm, encoded, tmp_path / "base", layers=[]).dataset(encoded)
    with pytest.raises(ValueError, match=r"lm_states are for lm_layers \[\], but .* read \[1, 2, 3\]; cache"):
        model(**batch_of(dataset))


def test_a_run_on_cached_outputs_is_the_run_without_and_reads_what_it_saved(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(output: Path, store: Path | None) -> list[dict[str, Any]]:
        model, encoded_of = on_top(saved, POINTER)
        sets = []
        for name, some in (("training", examples()), ("validation", examples(5, seed=1))):
            encoded = encoded_of(some)
            if store is None:
                sets.append(ExampleSet(encoded))
            else:
                states, dataset = cached(model, encoded, store / name)
                sets.append(ExampleSet(dataset, lm_nll=states.lm_nll))
        settings = LoopSettings(output=str(output), **SETTINGS, log_every=1)
        train(model, sets[0], settings, collate=AuxCollator(PAD), validation=sets[1])
        return log(output)

    plain, stored = run(tmp_path / "plain", None), run(tmp_path / "stored", tmp_path / "store")
    for a, b in zip(plain, stored, strict=True):
        for name in ("nll", "lm_nll") if a.get("evaluation") else ("loss", "lm_loss"):
            # Batches of other shapes sum in another order, through four steps of AdamW.
            assert b[name] == pytest.approx(a[name], rel=1e-3)
    read: list[str] = []
    reading = StoredSequences._read
    monkeypatch.setattr(
        StoredSequences, "_read", lambda self, name, i: read.append(name) or reading(self, name, i)
    )
    run(tmp_path / "again", tmp_path / "store")
    assert {"hidden", "pointer", "end", "states", "lm_nll"} == set(read)
    assert bits(tmp_path / "again") == bits(tmp_path / "stored")
