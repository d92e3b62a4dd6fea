"""Bases that torchao or bitsandbytes has quantised: run by transformers, in pairs and in the engine."""

from __future__ import annotations

import pytest
import torch

from auxkern.generation import Engine, Request
from auxkern.model import TextFormat, load_base
from auxkern.model.base import run_base
from auxkern.model.native import compute_of, explain
from auxkern.ops.sampling_params import SamplingParams
from tests.support.tiny import KIND, byte_tokenizer, tiny_lm_for, tiny_pair

TEXT = TextFormat(byte_tokenizer())
METHODS = ["torchao", "bitsandbytes, 8 bits", "bitsandbytes, 4 bits"]


def settings(method):
    """For transformers; skips the test where the package is missing."""
    if method == "torchao":
        torchao = pytest.importorskip("torchao.quantization")
        from transformers import TorchAoConfig

        return TorchAoConfig(torchao.Int8WeightOnlyConfig())
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_8bit="8" in method, load_in_4bit="4" in method)


def base(method, folder, **options):
    lm = tiny_lm_for(
        byte_tokenizer(), hidden_size=64, intermediate_size=128
    )  # bitsandbytes' blocks are of 64
    lm.save_pretrained(folder)
    return load_base(str(folder), quantization_config=settings(method), **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("native", [None, True])
def test_transformers_multiplies_and_explain_says_so(method, native, tmp_path):
    lm = base(method, tmp_path, native=native)
    assert compute_of(lm) is None
    name = method.partition(",")[0]
    assert explain(lm) == (
        f"1 as they were, the model: LlamaForCausalLM: its weights are quantised ({name}) "
        "and are multiplied by transformers"
    )


@pytest.mark.parametrize("method", METHODS)
def test_texts_of_the_engine_and_generate_are_the_bases(method, tmp_path):
    model = tiny_pair(KIND, base(method, tmp_path))
    params = SamplingParams(temperature=0.0)
    asked = [Request(0, "abc", "hello", params, auxiliary=None, max_new_tokens=5, logprobs=True)]
    (done,) = Engine(model, TEXT, slots=2, max_length=32, max_condition=8).generate(asked)
    ids = [TEXT.start_id, *byte_tokenizer()("hello")["input_ids"]]
    assert done.token_ids
    for token in done.token_ids:
        logits = run_base(model.lm, torch.tensor([ids]), want_logits=True).logits[0, -1]
        assert token == logits.argmax()
        ids.append(token)
    batch = TEXT.prompts(["abc", "de"], ["hello", "x"])
    texts = model.generate(**batch, max_new_tokens=4, do_sample=False, use_cache=True)
    again = model.generate(**batch, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(texts, again)


@pytest.mark.parametrize("method", METHODS)
def test_a_narrow_compute_is_refused(method, tmp_path):
    name = method.partition(",")[0]
    with pytest.raises(
        ValueError, match=rf"are quantised already \({name}\) and are multiplied by transformers"
    ):
        base(method, tmp_path, compute="int8")
