"""Requests from a file of any length, and their answers into another one, line by line.

A run that is killed at any moment and started again goes on where it was: no line is lost, none comes
twice, and the lines are those of a run that was not interrupted, in an order of their own.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from auxkern.core.files import lock_file, replace_file, write_whole
from auxkern.generation.completion import Completion
from auxkern.generation.request import Request, check_id

LONGEST_LINE = 64 * 2**20  # bytes; a file without line ends would be read as a whole
_BLOCK = 2**20
_LONGEST_NUMBER = 100  # digits; whole numbers of more than 308 are no float, of more than 4300 no text
_SAMPLES = 1024  # of a request at a time, for a line may ask for any number of them
_BOM = b"\xef\xbb\xbf"


class BadLine(NamedTuple):
    """A line of the input that is no request.

    Attributes:
        line: its number, from 1.
        error: what is wrong with it.
    """

    line: int
    error: str


def file_fingerprint(path: Path) -> str:
    """64 hexadecimal digits that name the content of a file (SHA-256).

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def read_requests(
    path: Path, defaults: Request | None = None, on_error: Callable[[BadLine], None] | None = None
) -> Iterator[Request]:
    """The requests in a file with one JSON object a line, read as they are asked for.

    A line without an id has its number, from 1, as its id. Empty lines count for nothing. Memory does
    not grow with the file, but for ids that lines bring along: about 150 MB for a million of them.

    Args:
        path: the file, UTF-8.
        defaults: what fields are that a line leaves out; see ``Request.from_record``.
        on_error: is called with each line that is no request, which is then left out; None raises.

    Raises:
        OSError: there is no such file.
        ValueError: without on_error: a line is no JSON object, is no valid request, is longer than 64 MiB,
            has a whole number of more than 100 digits, or the id of an earlier line; the message names file
            and line.
    """
    ids = _Ids()
    with path.open("rb") as file:
        for number, line in _numbered_lines(file):
            try:
                if line is None:
                    raise ValueError(f"it is longer than {LONGEST_LINE} bytes; is the file one JSON array?")
                if not line.strip():
                    continue
                record = _parsed(line)
                request = Request.from_record(record, defaults, number)
                if not ids.add(request.id, number, given=record.get("id") is not None):
                    first = _line_of(path, request.id, number, defaults)
                    raise ValueError(f"its id {request.id!r} is that of line {first}; ids must differ")
            except (ValueError, TypeError) as error:
                if on_error is None:
                    raise ValueError(f"{path}, line {number}: {error}") from error
                on_error(BadLine(number, str(error)))
                continue
            yield request


class CompletionWriter:
    """Appends completions to a file, a JSON object a line, and knows which are there already.

    Every line is in the operating system's hands when ``write`` returns, so a killed process loses none
    of them; the disk has all but those of the last ``sync_seconds``. Beside the output lies
    ``OUTPUT.run.json``, which says what run the lines are of. For every million lines that it finds it
    takes about 150 MB of memory.

    A completion with an error counts as there, so what failed is skipped as what is done, but for
    ``retry_errors``. Use it in a with statement; one process at a time.

    Args:
        path: the output; its lines are ``Completion.as_record``.
        errors_path: where bad lines of the input go, objects with line and error; None if ``report``
            is never called.
        run: whatever makes another output if it changes: fingerprints of input and model, settings;
            values that JSON has.
        sync_seconds: how often the disk is waited for.
        retry_errors: whether completions with an error are taken out of the output, so that they are
            pending again. They go all at once, by a copy beside the output that takes its name; a process
            killed before that leaves them in, one killed after it leaves them pending.
        besides: an output of the same run that another process writes; what it holds now is not pending
            here either.

    Attributes:
        done: completions that were there when it was opened.
        failed: those of them that are errors.

    Raises:
        OSError: the files cannot be opened or written.
        ValueError: the output is of another run, or no output of this class, a line in it is damaged
            or comes twice, or another process writes to it.
    """

    def __init__(
        self,
        path: Path,
        errors_path: Path | None = None,
        *,
        run: Mapping[str, Any],
        sync_seconds: float = 5.0,
        retry_errors: bool = False,
        besides: Path | None = None,
    ) -> None:
        if errors_path is not None and errors_path.absolute() == path.absolute():
            raise ValueError(f"path and errors_path are both {path}; the errors need a file of their own")
        self.run_path = path.with_name(path.name + ".run.json")
        self._out = _Appender(path, sync_seconds)
        self._errors: _Appender | None = None
        # Generators and loops below, no comprehensions: see tests/test_interrupts.py.
        try:
            if errors_path is not None:
                self._errors = _Appender(errors_path, sync_seconds)
            self._run = json.loads(json.dumps(dict(run)))
            self._claim()
            self._done: set[int | bytes] = set()
            failed: set[int | bytes] = set()
            for number, record in self._out.recover():
                key = _record_key(path, number, record)
                if key in self._done:
                    raise ValueError(
                        f"{path}, line {number}: sample {record['sample']} of request {record['id']!r} is "
                        "there twice; remove one line"
                    )
                self._done.add(key)
                if _is_failed(record):
                    failed.add(key)
            if retry_errors and failed:
                self._out.drop(_is_failed)
                self._done -= failed
                failed.clear()
            if besides is not None:
                self._done.update(_record_key(besides, n, record) for n, _, record in _whole_lines(besides))
            self.done, self.failed = len(self._done), len(failed)
            self._reported: set[int | str] = set()
            if self._errors is not None:
                self._reported.update(
                    _id_field(errors_path, n, record, "line") for n, record in self._errors.recover()
                )
        except BaseException:
            for file in (self._out, self._errors):
                if file is not None:
                    file.withdraw()
            self.close()
            raise

    @property
    def takes_bad_lines(self) -> bool:
        """Whether there is an errors_path, so that ``report`` may be called."""
        return self._errors is not None

    def pending(self, requests: Iterable[Request]) -> Iterator[tuple[Request, tuple[int, ...]]]:
        """The requests that were not answered in full when it was opened.

        Yields:
            A request, and the numbers of its samples that are wanted; one with more than 1024 samples
            comes several times.
        """
        for request in requests:
            for first in range(0, request.samples, _SAMPLES):
                some = range(first, min(first + _SAMPLES, request.samples))
                wanted = tuple(i for i in some if _sample_key(request.id, i) not in self._done)
                if wanted:
                    yield request, wanted

    def write(self, completion: Completion) -> None:
        """Appends a completion.

        Raises:
            OSError: it cannot be written, for want of room or another reason; what was written of the line
                is taken back, and nothing more can be written.
            ValueError: a log-probability is NaN.
        """
        self._out.append(completion.as_record())

    def report(self, bad: BadLine) -> None:
        """Appends a bad line of the input to the errors, unless it is there.

        Raises:
            OSError: as ``write``.
            ValueError: there is no errors_path.
        """
        if self._errors is None:
            raise ValueError(f"line {bad.line} is bad but there is no errors_path; pass one")
        if bad.line not in self._reported:
            self._errors.append(bad._asdict())

    def absorb(self, path: Path, *, errors: bool = True) -> tuple[int, int]:
        """Takes over the completions that another writer of the same run wrote to ``path``.

        They are on the disk here before its files are removed, and those that are here already are left
        out: it may be killed at any moment and done again.

        Args:
            path: of the other writer; there is none any more.
            errors: whether completions with an error are taken over too; else they are pending again.

        Returns:
            How many it took over, and how many of them are errors.

        Raises:
            OSError: they cannot be read, written or removed.
            ValueError: they are of another run, or damaged, or another process writes to ``path``.
        """
        taken = failed = 0
        with CompletionWriter(path, run=self._run) as other:
            for number, _, record in _whole_lines(path):
                key = _record_key(path, number, record)
                if key not in self._done and (errors or not _is_failed(record)):
                    self._out.append(record)
                    self._done.add(key)
                    taken += 1
                    failed += _is_failed(record)
            self._out.sync()
            with _naming_file(path):
                path.unlink()
                other.run_path.unlink()
        return taken, failed

    def close(self) -> None:
        """Waits for the disk and closes the files."""
        try:
            self._out.close()
        finally:
            if self._errors is not None:
                self._errors.close()

    def __enter__(self) -> CompletionWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _claim(self) -> None:
        """Makes sure that the lines that are there are of this run, or that there are none."""
        if not (self._out.size or (self._errors is not None and self._errors.size)):
            with _naming_file(self.run_path):
                replace_file(self.run_path, json.dumps(self._run, indent=1, ensure_ascii=False) + "\n")
            return
        if not self.run_path.is_file():
            raise ValueError(
                f"{self._out.path} or its errors hold lines but {self.run_path.name} is missing, so they "
                "may be of another run; choose another output, or remove them"
            )
        try:
            saved = json.loads(self.run_path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{self.run_path} is not JSON: {error}; choose another output") from error
        difference = _first_difference(saved, self._run)
        if difference is not None:
            name, before, now = difference
            raise ValueError(
                f"{self._out.path} was begun with {name} {before!r:.200}, but this run has "
                f"{now!r:.200}; choose another output, or go on with the former"
            )


def _first_difference(one: Any, other: Any) -> tuple[str, Any, Any] | None:
    """The name of the first field in which two objects differ, and its two values."""
    if not isinstance(one, dict) or not isinstance(other, dict):
        return None if one == other else ("", one, other)
    for name in sorted({*one, *other}):
        inner = _first_difference(one.get(name), other.get(name))
        if inner is not None:
            return f"{name}.{inner[0]}".rstrip("."), inner[1], inner[2]
    return None


class _Appender:
    """A file of JSON lines that grows by whole lines, and loses some only all at once."""

    def __init__(self, path: Path, sync_seconds: float) -> None:
        self.path = path
        self._sync_seconds = sync_seconds
        # Beside the file itself, not beside a link to it, for it will have its name.
        target = path.resolve()
        self._copy = target.with_name(f".{target.name}.retried")
        self._made = not path.exists()
        self._file: int | None = lock_file(path)
        # Of a process that was killed as it wrote it; nobody else does while the lock is ours.
        self._copy.unlink(missing_ok=True)
        self._synced = time.monotonic()

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return os.fstat(self._open()).st_size

    def withdraw(self) -> None:
        """Removes the file if it was made here and holds nothing."""
        if self._made and not self.size:
            self.path.unlink()

    def recover(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Numbers and objects of the lines that are there; cuts off a last one that is not whole."""
        whole = 0
        for number, line, record in _whole_lines(self.path):
            whole += len(line)
            yield number, record
        os.ftruncate(self._open(), whole)

    def drop(self, unwanted: Callable[[dict[str, Any]], bool]) -> None:
        """Takes out the lines whose objects are unwanted.

        Raises:
            OSError: there is no room for a copy, or another reason; the file is as it was.
        """
        file = self._open()
        with _naming_file(self._copy):
            copy = lock_file(self._copy)  # who opens the file under its new name finds it locked
            try:
                os.fchmod(copy, os.fstat(file).st_mode & 0o777)
                lines = (line for _, line, record in _whole_lines(self.path) if not unwanted(record))
                with open(copy, "wb", closefd=False) as kept:
                    kept.writelines(lines)
                os.fsync(copy)
                os.replace(self._copy, self.path.resolve())
            except BaseException:
                os.close(copy)
                self._copy.unlink(missing_ok=True)
                raise
        self._file = copy
        os.close(file)

    def append(self, record: dict[str, Any]) -> None:
        # Half a surrogate pair, as a bad line may hold, is written as JSON's own escape.
        text = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        line = text.encode(errors="backslashreplace")
        file, size = self._open(), self.size
        try:
            write_whole(file, line)
            if time.monotonic() - self._synced >= self._sync_seconds:
                self.sync()
        except OSError as error:
            self._file = None
            # Should this fail too, the next run cuts the line off.
            try:
                os.ftruncate(file, size)
            finally:
                os.close(file)
            raise OSError(
                error.errno,
                f"{error.strerror}; all lines before are whole: make room and start the same run again",
                str(self.path),
            ) from error

    def sync(self) -> None:
        """Waits for the disk."""
        os.fsync(self._open())
        self._synced = time.monotonic()

    def close(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            try:
                with _naming_file(self.path):
                    os.fsync(file)
            finally:
                os.close(file)

    def _open(self) -> int:
        if self._file is None:
            raise ValueError(f"{self.path} is closed; open another CompletionWriter")
        return self._file


def _whole_lines(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
    """Numbers, bytes and objects of the lines that are whole; a last one without its end is none."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number} is damaged: {error}; remove it") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}, line {number} is no object; remove it")
            yield number, line, record


def _id_field(path: Path | None, number: int, record: dict[str, Any], name: str) -> Any:
    value = record.get(name)
    try:
        check_id(value)  # whole numbers, too, may be ids
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}, line {number}, field {name!r}: {error}; remove the line") from error
    return value


def _record_key(path: Path, number: int, record: dict[str, Any]) -> int | bytes:
    """What stands for the sample that a line holds."""
    return _sample_key(_id_field(path, number, record, "id"), _id_field(path, number, record, "sample"))


@contextmanager
def _naming_file(path: Path) -> Iterator[None]:
    """Puts the file's name into errors of calls that know none."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _is_failed(record: dict[str, Any]) -> bool:
    return record.get("finish_reason") == "error"


class _Ids:
    """Which ids were there.

    Lines without an id are kept as ranges of numbers, for a file of nothing else is one range.
    """

    def __init__(self) -> None:
        self._given: set[int | bytes] = set()
        self._first: list[int] = []  # first and last numbers of runs of lines without an id
        self._last: list[int] = []

    def add(self, id: str | int, number: int, *, given: bool) -> bool:
        """Whether the id of line ``number`` is new; ``given`` says whether the line brought it along."""
        key = _sample_key(id, 0)
        if key in self._given or (isinstance(id, int) and self._is_number(id)):
            return False
        if given:
            self._given.add(key)
        elif self._last and self._last[-1] == number - 1:
            self._last[-1] = number
        else:
            self._first.append(number)
            self._last.append(number)
        return True

    def _is_number(self, id: int) -> bool:
        place = bisect_right(self._first, id) - 1
        return place >= 0 and id <= self._last[place]


def _sample_key(id: str | int, sample: int) -> int | bytes:
    """What stands for a sample in a set: small, and different for different ones."""
    if sample == 0 and isinstance(id, int):
        return id
    return hashlib.blake2b(json.dumps([id, sample]).encode(), digest_size=16).digest()


def _numbered_lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Numbers and bytes of the lines; None for one that is too long."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            while line and not line.endswith(b"\n"):
                line = file.readline(_BLOCK)
            yield number, None
        else:
            yield number, line.removeprefix(_BOM) if number == 1 else line


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8"), object_pairs_hook=_object, parse_int=_integer)
    except RecursionError as error:
        raise ValueError("its objects or lists are nested too deeply") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"it is a JSON {type(record).__name__}; write an object in braces")
    return record


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {twice!r} is there twice; write it once")
    return record


def _integer(digits: str) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise ValueError(f"a whole number has {len(digits)} digits, at most {_LONGEST_NUMBER} are read")
    return int(digits)


def _line_of(path: Path, id: str | int, before: int, defaults: Request | None) -> int:
    """The line before line ``before`` whose request has the id; this reads the file again."""
    with path.open("rb") as file:
        for number, line in _numbered_lines(file):
            if number >= before:
                break
            try:
                request = Request.from_record(_parsed(line or b""), defaults, number)
            except (ValueError, TypeError):
                continue  # it was reported when it was read
            if request.id == id:
                return number
    raise ValueError(f"{path} changed while it was read; start again")
