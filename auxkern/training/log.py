"""The log of a run, which is its lock too: no second run writes to the same folder."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from auxkern.core.files import is_open_at, lock_file, write_whole

LOG = "log.jsonl"


class RunLog:
    """``log.jsonl``, a line of JSON for a record; locked from when it is made until it is closed.

    The system lets the lock go with the process, however that ends.

    Args:
        output: folder of the run, which is there.

    Raises:
        OSError: it cannot be written.
        ValueError: another process holds it.
    """

    def __init__(self, output: Path) -> None:
        self.path = output / LOG
        self._file = lock_file(self.path)

    def cut(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Drops all from the first record on that ``keep`` does not want, and a last line cut short.

        A run is logged in order: what is of the past stands first.

        Raises:
            ValueError: a line is not JSON.
        """
        size = 0
        for number, line in enumerate(self.path.read_bytes().splitlines(keepends=True), start=1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{self.path}, line {number} is not JSON ({error}); remove it") from error
            if not keep(record):
                break
            size += len(line)
        os.truncate(self._file, size)

    def write(self, record: dict[str, Any]) -> None:
        """Adds a line."""
        write_whole(self._file, json.dumps(record).encode() + b"\n")

    def is_in_place(self) -> bool:
        """Whether the folder still has this log, and not another one or none."""
        return is_open_at(self._file, self.path)

    def close(self) -> None:
        """Lets the lock go."""
        os.close(self._file)


def check_unused(output: Path) -> None:
    """Looks whether another process writes to a folder of a run.

    Raises:
        OSError: its log cannot be opened.
        ValueError: one does.
    """
    if (output / LOG).is_file():
        os.close(lock_file(output / LOG))
