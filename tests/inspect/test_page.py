"""``python -m auxkern.inspect.page``: records of the model, and the page of two of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")

from auxkern.inspect import page
from auxkern.inspect.page import Operation, Record


def cost(kernel: str, target: str = "sm_90", **numbers: Any) -> dict[str, Any]:
    given = {"issue_us": 40.0, "mufu_us": 5.0, "memory_us": 10.0, "tensor_us": 0.0, **numbers}
    sizes = {"registers": 40, "spill_bytes": 0, "instructions": 154.2, "barriers": 15, "passes": 1}
    return {"target": target, "kernel": kernel, "case": "bf16", "unit": "column", **sizes, **given}


def record(path: Path, *costs: dict[str, Any]) -> Path:
    facts = {"command": "made", "date": "2026-11-26T00:00:00", "model": "Llama-3"}
    path.write_text(json.dumps({**facts, "machine": {"triton": "3.7.1"}, "costs": costs}))
    return path


@pytest.fixture
def sides(tmp_path) -> tuple[Record, Record]:
    old = [cost(kernel, target) for kernel in ("draw", "old") for target in ("sm_90", "sm_100")]
    new = [
        cost(kernel, target, issue_us=12.5, instructions=31.0, barriers=2)
        for kernel in ("draw", "new")
        for target in ("sm_90", "sm_100")
    ]
    return Record.read(record(tmp_path / "old.json", *old)), Record.read(record(tmp_path / "new.json", *new))


def test_a_kernel_has_what_it_cost_before_and_after(sides):
    rows = page.page(*sides, ()).splitlines()
    (row,) = [line for line in rows if line.startswith("| `draw`")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:5] == ["`draw`, bf16", "column", "154 → 31", "15 → 2", "1"]
    assert cells[5:] == ["40.0 → 12.5", "5.0", "10.0", "0.0", "25% → 80%", "40.0 → 12.5"]


def test_a_kernel_of_one_side_has_a_dash_on_the_other(sides):
    rows = page.page(*sides, ()).splitlines()
    assert any(line.startswith("| `old`, bf16 | column | 154 → - |") for line in rows)
    assert any(line.startswith("| `new`, bf16 | column | - → 31 |") for line in rows)


def test_a_call_adds_up_its_launches(sides):
    call = Operation("a call", (("draw", "bf16"), ("old", "bf16")), (("draw", "bf16"),))
    rows = page.page(*sides, (call,)).splitlines()
    assert "| a call | 2 → 1 | 2 → 1 | 80 → 12 | 25% → 80% | 80 → 12 | 25% → 80% |" in rows


def test_a_call_that_a_record_has_not_is_an_error(sides):
    call = Operation("a call", (("new", "bf16"),), ())
    with pytest.raises(ValueError, match=r"has no new \[bf16\] for sm_90"):
        page.page(*sides, (call,))


@pytest.mark.parametrize("content", ["{", "[]", '{"costs": [{"target": "sm_90"}]}'])
def test_what_is_no_record_is_named(content, tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        page.main([str(path), str(path), "--output", str(tmp_path / "page.md")])
    assert stopped.value.code == 2
    assert "auxkern.inspect --record" in capsys.readouterr().err
    assert not (tmp_path / "page.md").exists()
