"""llama.cpp by its C functions: a text is a sequence of its cache; a place that is left is taken at once."""

from __future__ import annotations

import ctypes
import math
from pathlib import Path
from typing import Any

import exchange

_MOST = 512  # tokens of a text with its prompt
_BF16 = 32  # LLAMA_FTYPE_MOSTLY_BF16


def _file(asked: exchange.Asked) -> Path:
    """The packaged file, or the same weights in bfloat16."""
    import llama_cpp

    given = Path(asked.gguf)
    if asked.precision != "bfloat16":
        return given

    def widen(folder: Path) -> None:
        folder.mkdir()
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype, options.allow_requantize, options.nthread = _BF16, True, asked.threads
        written = str(folder / "model.gguf").encode()
        if llama_cpp.llama_model_quantize(asked.gguf.encode(), written, ctypes.byref(options)):
            raise RuntimeError(f"llama.cpp did not convert {asked.gguf} to bfloat16")

    name = f"llama.cpp-{llama_cpp.__version__}-{given.stem}-bf16"
    return exchange.converted(Path(asked.cache) / name, widen) / "model.gguf"


class _Context:
    """A model with room for some sequences."""

    def __init__(self, asked: exchange.Asked, sequences: int) -> None:
        import llama_cpp

        self.api = llama_cpp
        llama_cpp.llama_backend_init()
        model = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(_file(asked)).encode(), model)
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_seq_max = _MOST * sequences, sequences
        context.n_batch = context.n_ubatch = max(_MOST, sequences)
        context.n_threads = context.n_threads_batch = asked.threads
        self.context = llama_cpp.llama_init_from_model(self.model, context)
        if not self.context:
            raise RuntimeError("llama.cpp made no context; its log says why")
        self._batch = llama_cpp.llama_batch_init(context.n_batch, 0, 1)
        self._most = int(context.n_batch)

    def decode(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """Reads (id, position, sequence, whether its logits are wanted), all in one step."""
        if len(tokens) > self._most:
            raise RuntimeError(f"a step of {len(tokens)} tokens does not fit {self._most}")
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, (id, position, sequence, wanted) in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = id, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if status := self.api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode gave {status}")

    def forget(self, sequence: int) -> None:
        """Its place can be taken by another."""
        self.api.llama_memory_seq_rm(self.api.llama_get_memory(self.context), sequence, -1, -1)

    def sampler(self, seed: int, filters: dict[str, Any]) -> Any:
        """llama.cpp's own filters; few tokens are left for those after the first."""
        api = self.api
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        api.llama_sampler_chain_add(chain, api.llama_sampler_init_top_k(filters["top_k"]))
        api.llama_sampler_chain_add(chain, api.llama_sampler_init_temp(filters["temperature"]))
        api.llama_sampler_chain_add(chain, api.llama_sampler_init_top_p(filters["top_p"], 1))
        api.llama_sampler_chain_add(chain, api.llama_sampler_init_dist(seed))
        return chain


def writer(asked: exchange.Asked) -> exchange.Writer:
    """Every step reads one token of each running text, and as many whole prompts as fit."""
    context = _Context(asked, asked.batch)

    def write(prompts: list[list[int]], lengths: list[int]) -> list[list[int]]:
        texts: list[list[int]] = [[] for _ in prompts]
        samplers = [context.sampler(seed, asked.filters) for seed in range(len(prompts))]
        waiting, running = list(range(len(prompts))), dict[int, int]()  # sequence -> text
        while waiting or running:
            tokens = [
                (texts[text][-1], len(prompts[text]) + len(texts[text]) - 1, sequence, True)
                for sequence, text in running.items()
            ]
            free = [sequence for sequence in range(asked.batch) if sequence not in running]
            while free and waiting and len(tokens) + len(prompts[waiting[0]]) <= _MOST:
                sequence, text = free.pop(0), waiting.pop(0)
                running[sequence], last = text, len(prompts[text]) - 1
                tokens += [(id, at, sequence, at == last) for at, id in enumerate(prompts[text])]
            context.decode(tokens)
            for row, (_, _, sequence, wanted) in enumerate(tokens):
                if not wanted:
                    continue
                text = running[sequence]
                drawn = context.api.llama_sampler_sample(samplers[text], context.context, row)
                texts[text].append(drawn)
                if len(texts[text]) == lengths[text]:
                    del running[sequence]
                    context.forget(sequence)
        for sampler in samplers:
            context.api.llama_sampler_free(sampler)
        return texts

    return write


def scorer(asked: exchange.Asked) -> exchange.Scorer:
    """Logits of every position."""
    context = _Context(asked, 1)
    V = context.api.llama_vocab_n_tokens(context.api.llama_model_get_vocab(context.model))

    def score(ids: list[int]) -> float:
        context.forget(0)
        context.decode([(id, at, 0, True) for at, id in enumerate(ids[:-1])])
        total = 0.0
        for row, id in enumerate(ids[1:]):
            logits = context.api.llama_get_logits_ith(context.context, row)[:V]
            top = max(logits)
            total += logits[id] - top - math.log(sum(math.exp(z - top) for z in logits))
        return total

    return score


if __name__ == "__main__":
    exchange.main(exchange.Program(("llama_cpp",), ("llama-cpp-python",), writer, scorer))
