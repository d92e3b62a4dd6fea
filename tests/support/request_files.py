"""Requests in files for a tiny pair, and their answers."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any


def write_requests(path: Path, count: int) -> Path:
    """Requests of different lengths; every fifth has a prompt, and wants two texts."""
    chosen = random.Random(0)
    lines = []
    for number in range(count):
        record: dict[str, Any] = {
            "id": f"r{number}",
            "condition": f"w{chosen.randint(0, 92)}",
            "max_new_tokens": chosen.randint(1, 24),
        }
        if number % 5 == 0:
            record |= {"prompt": "w1 w2", "top_k": 7, "samples": 2}
        lines.append(json.dumps(record) + "\n")
    path.write_text("".join(lines))
    return path


def request_options(folder: Path, source: Path, output: Path, *more: str) -> list[str]:
    """Of ``auxkern generate`` for a tiny pair."""
    shape = ["--max-length", "40", "--batch-size", "4"]
    return [str(folder), "--input", str(source), "--output", str(output), "--seed", "3", *shape, *more]


def ordered(path: Path) -> list[str]:
    """The lines of an output, by id and sample."""
    lines = path.read_text().splitlines()
    return sorted(lines, key=lambda line: (json.loads(line)["id"], json.loads(line)["sample"]))
