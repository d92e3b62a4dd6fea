"""Python on the pages runs as it stands there, from top to bottom of each page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.docs.pages import MADE, PAGES, fences, prose
from tests.docs.stages import SHORTER, STAGES, Names

LANGUAGES = {"python", "sh", "json", "yaml", "text"}
WITH_PYTHON = [name for name, path in PAGES.items() if any(one.language == "python" for one in fences(path))]


@contextmanager
def stage(name: str, folder: Path) -> Iterator[Names]:
    """What the names on a page stand for, in a folder of its own."""
    with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield STAGES[name](stack) if name in STAGES else {}


@pytest.mark.parametrize("name", WITH_PYTHON)
def test_python_on_a_page_runs(name: str, tmp_path: Path) -> None:
    with stage(name, tmp_path) as names:
        for one in fences(PAGES[name]):
            if one.language != "python":
                continue
            # Lines before it, so that a traceback names the page's.
            code = "\n" * (one.line - 1) + one.code
            for long, short in SHORTER.get(name, {}).items():
                code = code.replace(long, short)
            exec(compile(code, str(PAGES[name]), "exec"), names)


@pytest.mark.parametrize("name", sorted(PAGES.keys() - set(MADE)))
def test_code_says_its_language(name: str) -> None:
    """So none that is Python passes for something that nothing runs."""
    assert {one.language for one in fences(PAGES[name])} <= LANGUAGES
    before = ""
    for line in prose(PAGES[name]).splitlines():
        assert before or not line.startswith("    "), f"code without a fence: {line}"
        before = line
