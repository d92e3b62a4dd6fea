"""``python -m auxkern.inspect.compare``: what two surveys differ in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("rich")

from auxkern.inspect import compare


def finding(
    kernel: str, registers: int = 40, spill: int = 0, problems: tuple[str, ...] = ()
) -> dict[str, Any]:
    made = {"registers": registers, "spill_bytes": spill, "shared_bytes": 1024, "instructions": 200}
    return {"target": "sm_90", "kernel": kernel, "case": "fp16", "made": made, "problems": list(problems)}


def survey(folder: Path, version: str, *findings: dict[str, Any]) -> Path:
    path = folder / f"{version}.json"
    path.write_text(json.dumps({"machine": {"triton": version}, "findings": findings}))
    return path


def test_binaries_that_differ_are_shown_with_what_they_break(tmp_path, capsys):
    failed = {**finding("draw_kernel"), "made": None, "problems": ["does not compile"]}
    old = survey(tmp_path, "3.6.0", finding("sum_kernel"), finding("filter_kernel"), finding("draw_kernel"))
    broken = finding("filter_kernel", 255, 16, ("spills 16 bytes per thread",))
    new = survey(tmp_path, "3.9.0", finding("sum_kernel"), broken, failed)
    assert compare.main([str(old), str(new)]) == 0
    printed = capsys.readouterr().out
    assert "Triton 3.6.0 -> 3.9.0" in printed
    assert "sum_kernel" not in printed
    row = next(line for line in printed.splitlines() if "filter_kernel [fp16]" in line)
    assert row.split()[3:] == ["40", "->", "255", "0", "->", "16", "1024", "200"]
    assert "spills 16 bytes per thread" in printed
    assert "does not compile" in printed
    assert "2 of 3 binaries differ" in printed


def test_a_binary_of_one_survey_alone_is_a_difference():
    both = [{"findings": [finding("sum_kernel")]}, {"findings": []}]
    (gone,) = compare.differences(*both)
    assert (gone.kernel, gone.old, gone.new) == ("sum_kernel", (40, 0, 1024, 200), None)
    (come,) = compare.differences(*both[::-1])
    assert (come.old, come.new) == (None, (40, 0, 1024, 200))


@pytest.mark.parametrize(
    ("content", "message"), [(None, "No such file"), ("{", "Expecting"), ("[]", "auxkern.inspect --json")]
)
def test_what_is_no_survey_is_named(content, message, tmp_path, capsys):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        compare.main([str(path), str(path)])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert str(path) in said
    assert message in said
