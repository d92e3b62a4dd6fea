"""Texts for the rows of a table, batch by batch; under a real local Ray too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from auxkern.generation import BatchMapper, Engine, Request
from auxkern.model import open_pair
from tests.support.launching import ROOT
from tests.support.tiny import save_tiny_pair

DEFAULTS = {"max_new_tokens": 12, "seed": 3}
SHAPE: dict[str, Any] = {"slots": 4, "max_length": 40, "max_condition": 8, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_pair(tmp_path_factory.mktemp("pair"), pointer=True))


@pytest.fixture(scope="module")
def mapper(folder: str) -> BatchMapper:
    return BatchMapper(folder, defaults=DEFAULTS, carry=["source"], **SHAPE)


def records(count: int) -> list[dict[str, Any]]:
    return [
        {
            "id": f"r{i}",
            "condition": f"w{i % 90}",
            "prompt": "w1 w2" if i % 3 == 0 else "",
            "max_new_tokens": 1 + i % 14,
        }
        for i in range(count)
    ]


def columns(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """As Ray gives them."""
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def alone(folder: str, rows: list[dict[str, Any]]) -> dict[tuple[Any, int], dict[str, Any]]:
    """What the engine writes for all of them."""
    model, text_format = open_pair(folder, device="cpu")
    engine = Engine(model, text_format, slots=7, max_length=40, max_condition=8)
    defaults = Request.from_record(DEFAULTS, id="defaults")
    done = engine.generate([Request.from_record(row, defaults) for row in rows])
    return {(one.id, one.sample): one.as_record() for one in done}


def found(batches: list[dict[str, Any]]) -> dict[tuple[Any, int], dict[str, Any]]:
    rows = [
        dict(zip(batch, values, strict=True))
        for batch in batches
        for values in zip(*batch.values(), strict=True)
    ]
    return {(row["id"], row["sample"]): row for row in rows}


@pytest.mark.parametrize("size", [1, 7, 40])
def test_texts_are_the_engines_however_rows_are_cut(folder: str, mapper: BatchMapper, size: int) -> None:
    rows = [{**row, "source": f"file {i}"} for i, row in enumerate(records(40))]
    batches = [mapper(columns(rows[first : first + size])) for first in range(0, len(rows), size)]
    expected = alone(folder, records(40))
    given = found(batches)
    assert given.keys() == expected.keys()
    for i, key in enumerate(expected):
        assert given[key].pop("source") == f"file {i}"
        assert given[key].pop("error") is None
        assert given[key] == expected[key]


def test_rows_may_ask_for_several_texts_and_share_an_id(folder: str, mapper: BatchMapper) -> None:
    rows = [
        {"id": 5, "condition": "w1", "samples": 3, "source": 0},
        {"id": 5, "condition": "w1", "samples": 1, "source": 1},
    ]
    batch = mapper(columns(rows))
    assert batch["source"].tolist() == [0, 0, 0, 1]
    assert batch["sample"].tolist() == [0, 1, 2, 0]
    assert batch["text"][0] == batch["text"][3]
    assert len({batch["seed"][i] for i in range(3)}) == 3


def test_a_bad_row_costs_no_other(mapper: BatchMapper, folder: str) -> None:
    rows = [{**row, "source": ""} for row in records(6)]
    rows[2]["max_new_tokens"] = -1
    rows[4]["prompt"] = " ".join(["w1"] * 60)
    batch = mapper(columns(rows))
    assert batch["finish_reason"].tolist().count("error") == 2
    assert "max_new_tokens" in batch["error"][2]
    assert "max_length" in batch["error"][4] or "40" in batch["error"][4]
    expected = alone(folder, [records(6)[i] for i in (0, 1, 3, 5)])
    assert [batch["text"][i] for i in (0, 1, 3, 5)] == [one["text"] for one in expected.values()]


def test_batches_that_make_no_sense_are_refused(mapper: BatchMapper) -> None:
    rows = {"id": ["a"], "condition": ["w1"], "source": [""]}
    with pytest.raises(ValueError, match="no column 'id', only condition"):
        mapper({"condition": ["w1"], "source": [""]})
    with pytest.raises(ValueError, match="carry names 'source', but the batch has id, condition"):
        mapper({"id": ["a"], "condition": ["w1"]})
    with pytest.raises(ValueError, match="no field 'topk'; drop the column, or name it in carry"):
        mapper({**rows, "topk": [3]})
    with pytest.raises(ValueError, match="differ in length"):
        mapper({**rows, "prompt": ["", ""]})


def test_a_mapper_that_makes_no_sense_is_refused(folder: str) -> None:
    with pytest.raises(ValueError, match="carry names 'text', which is a field"):
        BatchMapper(folder, carry=["text"], **SHAPE)
    with pytest.raises(ValueError, match="no field 'max_tokens'; did you mean 'max_new_tokens'"):
        BatchMapper(folder, defaults={"max_tokens": 3}, **SHAPE)
    with pytest.raises(TypeError, match="colour"):
        BatchMapper(folder, colour="red", **SHAPE)


@pytest.mark.slow
def test_a_local_ray_writes_what_the_engine_writes(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="pip install auxkern[ray]")

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    rows = records(500)
    here = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # Two more than the mappers hold: what cuts the table up needs some too.
    ray.init(num_cpus=4, include_dashboard=False, runtime_env={"env_vars": here})
    try:
        written = (
            ray.data.from_items(rows)
            .repartition(10)
            .map_batches(
                BatchMapper,
                fn_constructor_kwargs={"pair": folder, "defaults": DEFAULTS, **SHAPE},
                batch_size=50,
                concurrency=2,
                num_cpus=1,
            )
            .take_all()
        )
    finally:
        ray.shutdown()
    expected = alone(folder, rows)
    given = {(row["id"], row["sample"]): row for row in written}
    assert len(written) == 500
    assert given.keys() == expected.keys()
    for key, record in expected.items():
        assert given[key].pop("error") is None
        assert {**given[key], "token_ids": list(given[key]["token_ids"])} == record
