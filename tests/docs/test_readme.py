"""The front page is short, leads somewhere, and says no figure of times that scatter."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks import front, pages
from tests.docs.pages import README, fences, prose
from tests.support.launching import ROOT

_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")


def test_it_has_two_hundred_lines_at_most() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


def test_its_links_lead_to_files() -> None:
    links = [link for link in _LINK.findall(prose(README)) if "://" not in link]
    assert len(links) > 20
    assert [link for link in links if not (ROOT / link).is_file()] == []


def test_its_snippets_are_few_and_its_table_short(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len([one for one in fences(README) if one.language == "python"]) == 4
    monkeypatch.chdir(ROOT)
    assert len(front.figures()) <= 10


@pytest.mark.parametrize(
    "note",
    [
        "Noisy: quartiles lie far apart for floor (forward), eager (fwd + bwd).",
        "Noisy: quartiles lie far apart for auxkern cpu, memory kept (fwd + bwd).",
        "Busy: other programs kept a core.",
    ],
)
def test_a_record_of_a_restless_machine_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, note: str, capsys: pytest.CaptureFixture[str]
) -> None:
    record = json.loads((ROOT / pages.RESULTS / "cpu.json").read_text(encoding="utf-8"))
    for case in record["cases"]:
        case["notes"] = [note]
    (tmp_path / "cpu.json").write_text(json.dumps(record))
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    monkeypatch.setattr(front, "PICTURE", tmp_path / "front.png")
    with pytest.raises(SystemExit) as ended:
        front.main([])
    assert ended.value.code == 2
    assert f"{note} Run it again" in capsys.readouterr().err
    assert not (tmp_path / "front.png").exists()
