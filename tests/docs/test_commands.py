"""Commands on the pages have the options that they name."""

from __future__ import annotations

import argparse
import functools
import os
import shlex
import shutil
import subprocess
import sys

import pytest

from auxkern.cli import COMMANDS
from tests.docs.pages import PAGES, fences
from tests.support.launching import ROOT

sys.path.append(str(ROOT / "docs" / "_ext"))
from parsers import BENCH_GENERATE, parsers


@functools.cache
def parser_of(command: str) -> argparse.ArgumentParser:
    return dict(parsers())[command]


def options_of(command: str) -> set[str]:
    return set(parser_of(command)._option_string_actions)


def commands(name: str) -> list[list[str]]:
    """The words of each line of a page's shell code; lines that go on are one."""
    code = "".join(one.code for one in fences(PAGES[name]) if one.language == "sh")
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def of_auxkern(words: list[str]) -> tuple[str, list[str]] | None:
    """The command of auxkern that a line runs, and its arguments."""
    for i, word in enumerate(words):
        if word in ("auxkern", ".venv/bin/auxkern"):
            return words[i + 1], words[i + 2 :]
        if word in ("auxkern.bench", "auxkern.env", "auxkern.inspect"):
            return word.partition(".")[2], words[i + 1 :]
    return None


@pytest.mark.parametrize("name", PAGES)
def test_options_exist(name: str) -> None:
    for words in commands(name):
        found = of_auxkern(words)
        if found is None:
            continue
        command, arguments = found
        if arguments[:2] == ["--op", "generate"]:
            command, arguments = BENCH_GENERATE, arguments[2:]
        known = options_of(command)
        for argument in arguments:
            flag = argument.partition("=")[0]
            assert not flag.startswith("--") or flag in known, f"{shlex.join(words)}: no {flag}"


@pytest.mark.parametrize("command", [*COMMANDS, BENCH_GENERATE])
def test_a_command_s_help_ends_with_its_exit_statuses(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parser_of(command).parse_args(["--help"])
    assert ended.value.code == 0
    statuses = capsys.readouterr().out.rpartition("\nExit status: 0; ")[2].replace("\n", " ")
    assert "2 for bad options" in statuses
    assert "130 after Ctrl-C" in statuses


def test_the_page_s_targets_of_make_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = next(line for line in makefile.splitlines() if line.startswith(".PHONY")).split()[1:]
    for name in PAGES:
        for words in commands(name):
            if words[0] == "make":
                assert words[1] in phony, f"{name}: make {words[1]}"


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize(
    ("named", "folder"), [([], ".venv"), (["PYTHON=/opt/bin/python3.12"], ".venv-python3.12")]
)
def test_a_python_that_is_named_has_a_virtual_environment_of_its_own(named: list[str], folder: str) -> None:
    told = ("PYTHON", "MAKEFLAGS")  # by a make that runs this test
    environment = {name: value for name, value in os.environ.items() if name not in told}
    command = ["make", "--dry-run", "--always-make", "lint", *named]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    python = named[0].removeprefix("PYTHON=") if named else "python3"
    assert f"{python} -m venv {folder}\n" in done.stdout
    assert f"\n{folder}/bin/ruff check .\n" in done.stdout
