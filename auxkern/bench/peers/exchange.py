"""What the bench asks of a peer's script, and what the script answers.

    PYTHON with_NAME.py ASKED.json ANSWER.json

The scripts run in the peer's own Python, which has no auxkern: this file and they import the standard library
and the peer's packages only.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WARM_UP = 4  # tokens of each text that nobody times


@dataclass(frozen=True)
class Asked:
    """What a peer is to do.

    Attributes:
        task: "check" its packages, "write" texts, or "score" sentences.
        precision: in which to compute, one of the peer's own list.
        threads: to compute with.
        model: folder of the LM's checkpoint, as transformers reads it.
        gguf: the LM's file for llama.cpp.
        cache: folder for what is converted once.
        batch: most texts at a time.
        prompts: token ids of each request, at least one.
        lengths: tokens that are wanted of each request, no fewer and no more.
        filters: temperature, top_k and top_p of every request.
        sentences: token ids of each, at least two; the first one is not scored.
    """

    task: str
    precision: str
    threads: int
    model: str
    gguf: str
    cache: str
    batch: int
    prompts: list[list[int]]
    lengths: list[int]
    filters: dict[str, Any]
    sentences: list[list[int]]


Writer = Callable[[list[list[int]], list[int]], list[list[int]]]  # (prompts, lengths) -> new tokens
Scorer = Callable[
    [list[int]], float
]  # ids of a sentence -> sum of the log-probabilities of all but the first


@dataclass(frozen=True)
class Program:
    """A peer, as its script knows it.

    Attributes:
        modules: that it imports.
        distributions: whose versions are told.
        writer: loads the LM to write texts.
        scorer: loads it to score sentences.
    """

    modules: Sequence[str]
    distributions: Sequence[str]
    writer: Callable[[Asked], Writer]
    scorer: Callable[[Asked], Scorer]


def main(program: Program) -> None:
    """Reads what is asked, does it, and writes the answer; errors go the way of any program.

    The answer is an object: "missing", the modules that are not installed, alone; or "versions" with "counts"
    (new tokens of each request) and "seconds" of texts, or "nll" (nats a token) of sentences.
    """
    asked = Asked(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    missing = [name for name in program.modules if not _installed(name)]
    answer: dict[str, Any] = {"missing": missing}
    if not missing:
        answer = {"versions": {name: importlib.metadata.version(name) for name in program.distributions}}
        if asked.task == "write":
            answer |= _written(program.writer(asked), asked)
        elif asked.task == "score":
            answer["nll"] = _nll(program.scorer(asked), asked.sentences)
    Path(sys.argv[2]).write_text(json.dumps(answer), encoding="utf-8")


def converted(folder: Path, convert: Callable[[Path], None]) -> Path:
    """``folder``, which ``convert`` fills if it is not there; whole or not at all."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            convert(unfinished / "model")
            if not folder.is_dir():  # another process may have been faster
                (unfinished / "model").rename(folder)
        finally:
            shutil.rmtree(unfinished)
    return folder


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def _written(write: Writer, asked: Asked) -> dict[str, Any]:
    # Libraries compile and allocate at their first texts.
    few = slice(0, asked.batch)
    write(asked.prompts[few], [_WARM_UP] * len(asked.prompts[few]))
    began = time.perf_counter()
    texts = write(asked.prompts, asked.lengths)
    seconds = time.perf_counter() - began
    return {"counts": [len(text) for text in texts], "seconds": seconds}


def _nll(score: Scorer, sentences: list[list[int]]) -> float:
    return -sum(map(score, sentences)) / sum(len(ids) - 1 for ids in sentences)
