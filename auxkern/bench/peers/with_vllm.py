"""vLLM on a CPU: its own scheduler with ``batch`` running sequences."""

from __future__ import annotations

import os
from typing import Any

import exchange

_CACHE_GB = "2"  # for keys and values of all texts
_MOST = 512  # tokens of a text with its prompt


def _opened(asked: exchange.Asked) -> Any:
    # It reads them when it is imported.
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = _CACHE_GB
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{asked.threads - 1}"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    import vllm

    most: dict[str, Any] = {"max_num_seqs": asked.batch, "max_model_len": _MOST}
    return vllm.LLM(asked.model, dtype=asked.precision, **most)


def writer(asked: exchange.Asked) -> exchange.Writer:
    """All requests are handed over at once."""
    model = _opened(asked)
    from vllm import SamplingParams

    def params(seed: int, length: int) -> Any:
        lengths = {"min_tokens": length, "max_tokens": length, "ignore_eos": True}
        return SamplingParams(**lengths, seed=seed, detokenize=False, **asked.filters)

    def write(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        every = [params(seed, length) for seed, length in enumerate(lengths)]
        return [list(one.outputs[0].token_ids) for one in model.generate(given, every, use_tqdm=False)]

    return write


def scorer(asked: exchange.Asked) -> exchange.Scorer:
    """Log-probabilities of a prompt's tokens."""
    model = _opened(asked)
    from vllm import SamplingParams

    def score(ids: list[int]) -> float:
        params = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        (done,) = model.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        listed = done.prompt_logprobs[1:]
        return float(sum(each[id].logprob for each, id in zip(listed, ids[1:], strict=True)))

    return score


if __name__ == "__main__":
    # The name of the package that is installed for CPUs; the module is vLLM's.
    exchange.main(exchange.Program(("vllm",), ("vllm-cpu",), writer, scorer))
