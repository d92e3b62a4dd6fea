"""Texts for the rows of a table, batch by batch; under a real local Ray too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from auxkern.generation import BatchMapper, Engine, Request
from auxkern.model import open_models, open_pair
from tests.support.launching import ROOT
from tests.support.tiny import save_tiny_pair, word_lm, word_tokenizer

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


def alone(
    folder: str, rows: list[dict[str, Any]], models: dict[str, str] | None = None
) -> dict[tuple[Any, int], dict[str, Any]]:
    """What the engine writes for all of them."""
    model, text_format = open_pair(folder, device="cpu")
    others = open_models(models or {}, model, text_format.tokenizer)
    engine = Engine(model, text_format, models=others, slots=7, max_length=40, max_condition=8)
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


MEMBERS: list[list[dict[str, Any]]] = [
    [{"model": "base", "prompt": "w1 w2"}, {"model": "base", "prompt": "", "weight": -0.5}],
    [{"model": "small", "prompt": "w5", "weight": 0.5}, {"prompt": "w3"}],
    [{"model": "base"}, {"model": "default", "condition": "w4"}, {"model": "small", "weight": -0.25}],
]


def mixtures(count: int) -> list[dict[str, Any]]:
    """Mixtures and guidance among pairs."""
    rows = records(count)
    for i, row in enumerate(rows):
        if i % 4 < 3:
            row |= {"members": MEMBERS[i % 4], "condition": None}
        elif i % 8 == 3:
            row |= {"guidance": {"negative_prompt": "w9"}, "condition": None}
    return rows


def filled(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """With every field in every row."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


def in_a_table(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """As Ray gives them: every row has every field, null where it says nothing, and lists are arrays."""
    names = dict.fromkeys(name for row in rows for name in row)
    fields = dict.fromkeys(name for row in rows for one in row.get("members", ()) for name in one)
    table: dict[str, Any] = {name: np.empty(len(rows), object) for name in names}
    for i, row in enumerate(rows):
        for name in names:
            table[name][i] = row.get(name)
        if "members" in row:
            listed = [{name: one.get(name) for name in fields} for one in row["members"]]
            table["members"][i] = np.array(listed, object)
        if "guidance" in row:
            table["guidance"][i] = {**row["guidance"], "scale": None}
    return table


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("small")
    word_lm(seed=5).save_pretrained(place)
    word_tokenizer().save_pretrained(place)
    return str(place)


def test_rows_of_members_are_the_engines(folder: str, small: str) -> None:
    rows = mixtures(24)
    models = {"small": small}
    mapper = BatchMapper(folder, defaults=DEFAULTS, models=models, **SHAPE)
    given = found([mapper(in_a_table(rows[first : first + 5])) for first in range(0, 24, 5)])
    assert given == {key: {**one, "error": None} for key, one in alone(folder, rows, models).items()}
    assert len(given) == 24


def test_a_row_whose_member_is_not_there_costs_no_other(mapper: BatchMapper) -> None:
    rows = [{**row, "source": ""} for row in mixtures(4)]
    batch = mapper(in_a_table(rows))
    errors = ["no model 'small'" in str(error) for error in batch["error"]]
    assert errors == [False, True, True, False]


def test_models_that_cannot_be_members_are_named(folder: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model 'gone' \(.*nowhere\) cannot be a member"):
        BatchMapper(folder, models={"gone": str(tmp_path / "nowhere")}, **SHAPE)
    word_lm().save_pretrained(tmp_path)
    word_tokenizer(("a", "b")).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"model 'other'.* another tokenizer than the base \(6 and 97 tokens"
    ):
        BatchMapper(folder, models={"other": str(tmp_path)}, **SHAPE)


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
@pytest.mark.parametrize("make", [records, mixtures])
def test_a_local_ray_writes_what_the_engine_writes(
    folder: str, small: str, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray", reason="pip install auxkern[ray]")

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    rows, models = make(500), {"small": small}
    here = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # Two more than the mappers hold: what cuts the table up needs some too.
    ray.init(num_cpus=4, include_dashboard=False, runtime_env={"env_vars": here})
    try:
        written = (
            ray.data.from_items(filled(rows))
            .repartition(10)
            .map_batches(
                BatchMapper,
                fn_constructor_kwargs={"pair": folder, "models": models, "defaults": DEFAULTS, **SHAPE},
                batch_size=50,
                concurrency=2,
                num_cpus=1,
            )
            .take_all()
        )
    finally:
        ray.shutdown()
    expected = alone(folder, rows, models)
    given = {(row["id"], row["sample"]): row for row in written}
    assert len(written) == 500
    assert given.keys() == expected.keys()
    for key, record in expected.items():
        assert given[key].pop("error") is None
        assert {**given[key], "token_ids": list(given[key]["token_ids"])} == record
