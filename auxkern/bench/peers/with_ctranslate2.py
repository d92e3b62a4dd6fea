"""CTranslate2: batches in the order of arrival; a finished text leaves, and no other takes its place."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import exchange


def _opened(asked: exchange.Asked) -> tuple[Any, list[str]]:
    """The LM, and the token of each id."""
    import ctranslate2

    def convert(folder: Path) -> None:
        tool = Path(sys.executable).with_name("ct2-transformers-converter")
        options = ["--quantization", asked.precision, "--output_dir", folder]
        subprocess.run([tool, "--model", asked.model, *options], check=True)

    name = f"ctranslate2-{ctranslate2.__version__}-{asked.precision}"
    folder = exchange.converted(Path(asked.cache) / name, convert)
    threads = {"inter_threads": 1, "intra_threads": asked.threads}
    model = ctranslate2.Generator(str(folder), "cpu", compute_type=asked.precision, **threads)
    return model, json.loads((folder / "vocabulary.json").read_text(encoding="utf-8"))


def writer(asked: exchange.Asked) -> exchange.Writer:
    """A call takes no length of each text, so each is stopped by the function that is told of every token."""
    model, tokens = _opened(asked)
    filters = {f"sampling_{name.replace('_', '')}": value for name, value in asked.filters.items()}

    def written(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        # Told apart from the library's count of steps, which counts what a prompt has more than the shortest.
        left = list(lengths)

        def is_done(one: Any) -> bool:
            left[one.batch_id] -= 1
            return left[one.batch_id] <= 0

        # Below the least length no end token is drawn.
        beyond = max(lengths) + max(map(len, prompts))
        results = model.generate_batch(
            [[tokens[id] for id in prompt] for prompt in prompts],
            include_prompt_in_result=False,
            max_length=beyond,
            min_length=beyond,
            callback=is_done,
            **filters,
        )
        return [result.sequences_ids[0] for result in results]

    def write(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        batches = [slice(first, first + asked.batch) for first in range(0, len(prompts), asked.batch)]
        return [text for batch in batches for text in written(prompts[batch], lengths[batch])]

    return write


def scorer(asked: exchange.Asked) -> exchange.Scorer:
    """The library's own scores."""
    model, tokens = _opened(asked)

    def score(ids: list[int]) -> float:
        (result,) = model.score_batch([[tokens[id] for id in ids]])
        if len(result.log_probs) != len(ids) - 1:
            raise RuntimeError(
                f"it scored {len(result.log_probs)} of {len(ids)} tokens, not all but the first"
            )
        return sum(result.log_probs)

    return score


if __name__ == "__main__":
    modules = ("ctranslate2", "transformers", "torch")  # the last two to convert the checkpoint
    exchange.main(exchange.Program(modules, ("ctranslate2",), writer, scorer))
