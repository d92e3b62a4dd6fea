"""Tables on the pages are drawn from the committed records."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import page_tables, pages
from benchmarks.pages import committed_run
from tests.docs.pages import PAGES
from tests.support.launching import ROOT

WITH_TABLES = [name for name, path in PAGES.items() if "<!-- bench:" in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("name", WITH_TABLES)
def test_tables_are_what_their_records_say(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    text = PAGES[name].read_text(encoding="utf-8")
    assert page_tables.updated(text) == text, "run python -m benchmarks.page_tables"


def test_every_record_s_table_and_picture_is_on_a_page() -> None:
    pages = "".join(path.read_text(encoding="utf-8") for path in PAGES.values())
    assert set(re.findall("<!-- bench:(.*) -->", pages)) == set(page_tables.TABLES)
    pictures = {path.name for path in (ROOT / "benchmarks" / "results").glob("*.png")}
    assert pictures == set(re.findall(r"benchmarks/results/([a-z0-9_]+\.png)\)", pages))


@pytest.mark.parametrize("word", ["Noisy", "Busy"])
@pytest.mark.parametrize("where", ["case", "run"])
def test_a_disturbed_run_on_a_cpu_is_refused(
    word: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = committed_run("linear_cpu")
    (run.cases[-1] if where == "case" else run).notes.append(f"{word}: by the test.")
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    (tmp_path / "linear_cpu.json").write_text(run.to_json(), encoding="utf-8")
    with pytest.raises(
        ValueError, match=f"linear_cpu.json is not for a page: {word}: by the test. Run it again"
    ):
        page_tables.TABLES["linear"]()


def test_only_what_has_changed_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(page_tables, "DOCS", tmp_path)
    monkeypatch.setattr(page_tables, "README", tmp_path / "plain.md")
    (tmp_path / "plain.md").write_text("no table\n")
    (tmp_path / "page.md").write_text("<!-- bench:computes -->\n1 typed by hand\n<!-- /bench:computes -->\n")
    page_tables.main([])
    assert (tmp_path / "plain.md").read_text() == "no table\n"
    assert "float32" in (tmp_path / "page.md").read_text()
    assert "by hand" not in (tmp_path / "page.md").read_text()
    (tmp_path / "page.md").write_text("<!-- bench:nothing -->\n<!-- /bench:nothing -->\n")
    with pytest.raises(SystemExit) as ended:
        page_tables.main([])
    assert ended.value.code == 2
