"""How the records of benchmarks look."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from auxkern.commands.pair import versions
from auxkern.core.files import replace_file
from auxkern.machine import now


def record_head(kind: str, prog: str, arguments: Sequence[str], device: torch.device) -> dict[str, Any]:
    """What a record begins with: kind, command, date, and the machine with its versions.

    Args:
        kind: of the record.
        prog, arguments: the command.
        device: that was measured.
    """
    command = shlex.join([*prog.split(), *arguments])
    return {"kind": kind, "command": command, "date": now(), "machine": versions(device)}


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Whole or not at all."""
    replace_file(path, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
