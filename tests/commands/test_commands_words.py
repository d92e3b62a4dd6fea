"""What the commands say: one line for a mistake, nothing of other libraries, no file beside a device."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import auxkern
from auxkern import cli
from auxkern.commands import evaluate, generate, train
from auxkern.core.files import replace_file
from tests.support.tiny import save_tiny_pair

LINES = [{"condition": f"w{i}", "text": f"w{i} w{i + 1} w{i + 2}"} for i in range(6)]
COMMANDS = {"train": train.main, "evaluate": evaluate.main, "generate": generate.main}
MARK = b"\xef\xbb\xbf"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_pair(tmp_path_factory.mktemp("pair")))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return written(tmp_path / "data.jsonl", *LINES)


def written(path: Path, *records: Any, start: bytes = b"") -> Path:
    path.write_bytes(start + b"".join(json.dumps(record).encode() + b"\n" for record in records))
    return path


def refusal(main: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The only line that a command says when it ends with status 2."""
    capsys.readouterr()
    try:
        status = main(arguments)
    except SystemExit as exit:
        status = exit.code
    assert status == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert said.out == ""
    return line


# ------------------------------------------------------------------------------------ flags and names


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_flag_is_named_before_what_is_missing(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refusal(COMMANDS[command], ["--devise", "cpu"], capsys)
    assert "unrecognized arguments: --devise; did you mean --device?" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_an_argument_that_is_no_text_is_one_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(COMMANDS[command], ["--device", os.fsdecode(b"cp\xff")], capsys)
    assert "an argument has half a character, '\\udcff', at 2" in said


def test_an_unknown_command_is_answered_with_a_near_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    assert "there is no command 'trian'; did you mean train?" in capsys.readouterr().err


def test_public_names_are_there_without_torch_until_they_are_asked_for() -> None:
    assert all(getattr(auxkern, name) is not None for name in auxkern.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'cross_entropie'"):
        auxkern.cross_entropie  # noqa: B018
    code = (
        "import sys, auxkern.cli; assert auxkern.cli.main(['--help']) == 0; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_ctrl_c_while_a_command_is_imported_is_one_line(tmp_path: Path) -> None:
    """An import may make another error of it; here it does."""
    (tmp_path / "interrupted.py").write_text(
        "import os, signal\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "except BaseException as error:\n"
        "    raise ImportError('numpy cannot be imported') from error\n"
    )
    code = (
        "import sys; sys.argv = ['auxkern', 'slow']; from auxkern import cli\n"
        "cli.COMMANDS['slow'] = ('interrupted', '')\n"
        "raise SystemExit(cli.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
    )
    assert done.returncode == 130
    assert done.stderr == "auxkern: interrupted\n"


def test_ctrl_c_in_a_command_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: Any) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        return 0

    monkeypatch.setattr("auxkern.env.main", interrupted)
    assert cli.main(["env"]) == 130
    assert capsys.readouterr().err == "auxkern env: interrupted\n"


# --------------------------------------------------------------------------------------------- input


@pytest.mark.parametrize("how", ["mark", "pipe", "stdin", "plain"])
def test_evaluate_reads_files_pipes_and_marks(
    how: str, pair: str, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name, feeding = str(data), None
    if how == "mark":
        name = str(written(tmp_path / "marked.jsonl", *LINES, start=MARK))
    if how == "pipe":
        name = str(tmp_path / "pipe")
        os.mkfifo(name)
        feeding = threading.Thread(target=lambda: written(Path(name), *LINES))
        feeding.start()
    if how == "stdin":
        command = [sys.executable, "-m", "auxkern", "evaluate", pair, "--file", "-"]
        with data.open() as lines:
            done = subprocess.run(command, stdin=lines, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "6 sequences" in done.stdout
        assert "Loading" not in done.stderr
        return
    assert evaluate.main([pair, "--file", name]) == 0
    said = capfd.readouterr()
    assert "6 sequences" in said.out
    assert said.err == ""
    if feeding is not None:
        feeding.join()


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"condition": "w1", "text": "w1 " * 70}, "line 7: 72 tokens, but the base has positions for 64"),
        ({"condition": "w1", "text": "\udc80"}, "line 7: text has half a character"),
        ({"condition": "w1", "text": 3}, "line 7: text must be a str, got int: 3"),
        ({"condition": "w1", "text": "w1", "label": 1}, "line 7: the field 'label' is unknown"),
    ],
)
def test_evaluate_names_the_line(
    record: dict[str, Any], message: str, pair: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written(data, *LINES, record)
    assert message in refusal(evaluate.main, [pair, "--file", str(data)], capsys)


def test_evaluate_refuses_files_that_are_none(pair: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "argument --file: the name is empty; name a file" in refusal(
        evaluate.main, [pair, "--file", ""], capsys
    )
    assert "/dev/null has no examples" in refusal(evaluate.main, [pair, "--file", "/dev/null"], capsys)


# -------------------------------------------------------------------------------------------- output


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "the name is empty"),
        ("-", "- is no file; /dev/stdout is standard output"),
        (".", ". is a folder"),
        ("none/a.json", "none does not exist; make it first"),
        ("pipe", "is a pipe, which may have no reader"),
    ],
)
def test_a_json_file_that_is_none_is_refused_at_once(
    name: str,
    message: str,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    said = refusal(evaluate.main, ["nowhere", "--file", str(data), "--json", name], capsys)
    assert "--json" in said
    assert message in said


def test_devices_are_written_to_and_stay(tmp_path: Path) -> None:
    before = set(os.listdir("/dev"))
    replace_file(Path("/dev/null"), "{}")
    assert Path("/dev/null").is_char_device()
    code = (
        "from pathlib import Path; from auxkern.core.files import replace_file\n"
        "print('first', flush=True); replace_file(Path('/dev/stdout'), 'second')"
    )
    with (tmp_path / "out").open("w") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert (tmp_path / "out").read_text() == "first\nsecond"
    piped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert piped.stdout == "first\nsecond"
    assert set(os.listdir("/dev")) == before


def test_a_file_that_cannot_be_written_is_named_itself(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        replace_file(tmp_path / "none" / "a.json", "")
    assert caught.value.filename == str(tmp_path / "none" / "a.json")


def test_standard_error_holds_nothing_of_transformers(
    pair: str, data: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    json_file = tmp_path / "a.json"
    assert evaluate.main([pair, "--file", str(data), "--samples", "2", "--json", str(json_file)]) == 0
    assert capfd.readouterr().err == f"wrote {json_file}\n"
    assert generate.main([pair, "--condition", "w1", "--max-new-tokens", "3"]) == 0
    assert capfd.readouterr().err == ""
