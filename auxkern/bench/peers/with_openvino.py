"""OpenVINO GenAI: its continuous batching for texts, a plain inference of the same model for scores."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import exchange

# Weights that are exported, and the precision of the arithmetic; None: what OpenVINO chooses for this
# machine, which is bfloat16 beside int8 products where there are instructions for it.
_PRECISIONS = {"int8": ("int8", None), "bfloat16": ("fp32", "bf16"), "float32": ("fp32", "f32")}
_CACHE_GB = 2  # for keys and values of all texts


def _folder(asked: exchange.Asked) -> Path:
    import openvino

    weights, _ = _PRECISIONS[asked.precision]

    def export(folder: Path) -> None:
        tool = Path(sys.executable).with_name("optimum-cli")
        options = ["--task", "text-generation-with-past", "--weight-format", weights]
        subprocess.run([tool, "export", "openvino", "--model", asked.model, *options, folder], check=True)

    version = openvino.__version__.split("-")[0]
    return exchange.converted(Path(asked.cache) / f"openvino-{version}-{weights}", export)


def _properties(asked: exchange.Asked) -> dict[str, Any]:
    _, hint = _PRECISIONS[asked.precision]
    properties: dict[str, Any] = {"INFERENCE_NUM_THREADS": asked.threads}
    return properties if hint is None else {**properties, "INFERENCE_PRECISION_HINT": hint}


def writer(asked: exchange.Asked) -> exchange.Writer:
    """A request is handed over when one of ``batch`` places is free.

    ``max_num_seqs`` bounds the requests whose prompts are read in a step, not those that are running.
    """
    import numpy as np
    import openvino
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.max_num_seqs, scheduler.cache_size = asked.batch, _CACHE_GB
    pipeline = genai.ContinuousBatchingPipeline(str(_folder(asked)), scheduler, "CPU", _properties(asked))

    def config(seed: int, length: int) -> Any:
        one = genai.GenerationConfig()
        one.do_sample, one.ignore_eos, one.rng_seed = True, True, seed
        one.min_new_tokens = one.max_new_tokens = length
        for name, value in asked.filters.items():
            setattr(one, name, value)
        return one

    def write(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        waiting = list(range(len(prompts)))[::-1]
        running: dict[int, Any] = {}
        texts: list[list[int]] = [[] for _ in prompts]
        while waiting or running:
            while waiting and len(running) < asked.batch:
                i = waiting.pop()
                ids = openvino.Tensor(np.array([prompts[i]], np.int64))
                running[i] = pipeline.add_request(i, ids, config(i, lengths[i]))
            pipeline.step()
            for i, handle in list(running.items()):
                if handle.get_status() != genai.GenerationStatus.RUNNING:
                    (texts[i],) = (list(output.generated_ids) for output in handle.read_all())
                    del running[i]
        return texts

    return write


def scorer(asked: exchange.Asked) -> exchange.Scorer:
    """Logits of the exported model, at the same precision."""
    import numpy as np
    import openvino

    model = openvino.Core().compile_model(_folder(asked) / "openvino_model.xml", "CPU", _properties(asked))
    request = model.create_infer_request()

    def score(ids: list[int]) -> float:
        request.reset_state()
        given = np.array([ids[:-1]], np.int64)
        inputs = {
            "input_ids": given,
            "attention_mask": np.ones_like(given),
            "beam_idx": np.zeros(1, np.int32),
        }
        request.infer({**inputs, "position_ids": np.arange(given.shape[1])[None]})
        logits = request.get_tensor("logits").data[0].astype(np.float64)
        top = logits.max(-1)
        logsumexp = np.log(np.exp(logits - top[:, None]).sum(-1)) + top
        return float((logits[np.arange(len(logits)), ids[1:]] - logsumexp).sum())

    return score


if __name__ == "__main__":
    exchange.main(
        exchange.Program(
            ("openvino", "openvino_genai", "optimum.intel", "numpy"),
            ("openvino-genai", "openvino", "optimum-intel"),
            writer,
            scorer,
        )
    )
