"""``model.generate`` and the engine write the same tokens for the same request."""

import pytest
import torch

from auxkern.generation import Engine, Request
from auxkern.model import TextFormat
from auxkern.ops.sampling_params import SamplingParams
from tests.support.tiny import byte_tokenizer, tiny_lm_for, tiny_pair

TOKENIZER = byte_tokenizer()
TOKENIZER.add_special_tokens({"extra_special_tokens": ["<|im_end|>", "<|eot|>"]})
TOKENIZER.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
TEXT = TextFormat(TOKENIZER)
TURN, EOT = TOKENIZER.convert_tokens_to_ids(["<|im_end|>", "<|eot|>"])
CHAT = TOKENIZER.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)


def _likely(*ids):
    """A bias under which these ids come often, among others."""
    return {"params": SamplingParams(logit_bias=dict.fromkeys(ids, 9.0))}


# End tokens of the model beside the tokenizer's, and a request.
CASES = {
    "one end token": (None, {}),
    "several end tokens": ([TEXT.end_id, *range(60, 90)], {}),
    "end tokens that are not the tokenizer's": ([*range(60, 75)], {}),
    "end token 0": (0, {}),
    "end token 0 among others": ([0, 7], _likely(7)),
    "end tokens ignored": ([0, 7], {**_likely(7), "ignore_eos": True}),
    "stop tokens": (None, {"stop_token_ids": tuple(range(60, 80))}),
    "stop token 0": (None, {"stop_token_ids": (0,)}),
    "stop tokens where end tokens are ignored": (
        5,
        {"stop_token_ids": (EOT,), "ignore_eos": True, **_likely(5, EOT)},
    ),
    "a special token as a stop string": (None, {"stop": ("<|im_end|>",), **_likely(TURN)}),
    "a part of a special token": (None, {"stop": ("im_en",), **_likely(TURN)}),
    "a stop string that begins before a special token": (
        None,
        {"stop": ("a<|im_end|>",), **_likely(TURN, *TOKENIZER("a")["input_ids"])},
    ),
    "a stop string that goes on after a special token": (
        None,
        {"stop": ("end|>a",), **_likely(TURN, *TOKENIZER("a")["input_ids"])},
    ),
    "a stop string over two special tokens": (None, {"stop": ("<|im_end|><|eot|>",), **_likely(TURN, EOT)}),
    "a stop string does not match across a special token": (
        None,
        {"stop": ("ab",), **_likely(TURN, *TOKENIZER("ab")["input_ids"])},
    ),
    "a stop string": (None, {"stop": ("aa", *"etuio")}),
    "a chat": (None, {"prompt": CHAT}),
    "a filter": (None, {"params": SamplingParams(top_p=0.8, temperature=0.9)}),
    "a penalty": (None, {"params": SamplingParams(repetition_penalty=1.5)}),
    "greedy": ([5, 6], {"params": SamplingParams(temperature=0.0)}),
    "the base alone": (None, {"auxiliary": None}),
    "half the auxiliary": (None, {"aux_scale": 0.5}),
}


def _model(ends):
    lm = tiny_lm_for(TOKENIZER)
    with torch.no_grad():
        lm.lm_head.weight[0] *= 4  # so that id 0 comes often; old transformers have no bias for it
    model = tiny_pair("own head", lm)
    model.generation_config.eos_token_id = ends
    return model


def _generated(model, request):
    """What ``generate`` writes for one request."""
    batch, params = TEXT.prompts([request.condition], [request.prompt]), request.params
    ends = [] if request.ignore_eos else TEXT.end_ids(model)
    drawn = {"top_k": params.top_k, "top_p": params.top_p, "temperature": params.temperature}
    ids = model.generate(
        **batch,
        do_sample=params.temperature > 0,
        max_new_tokens=request.max_new_tokens,
        repetition_penalty=params.repetition_penalty,
        sequence_bias=[[[id], bias] for id, bias in (params.logit_bias or {}).items()] or None,
        eos_token_id=[*ends, *request.stop_token_ids] or None,
        stop_strings=list(request.stop) or None,
        tokenizer=TOKENIZER,
        seeds=[request.seed],
        auxiliary=request.auxiliary,
        aux_scale=request.aux_scale,
        **(drawn if params.temperature > 0 else {}),
    )
    return ids[0, batch["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("name", CASES)
def test_both_write_the_same_tokens(name):
    ends, fields = CASES[name]
    model = _model(ends)
    requests = [
        Request(
            seed, **{"condition": "rain", "prompt": "It is", "seed": seed, "max_new_tokens": 40, **fields}
        )
        for seed in range(4)
    ]
    done = Engine(model, TEXT, slots=3, max_length=64).generate(requests)
    assert [list(one.token_ids) for one in done] == [_generated(model, request) for request in requests]


ENDING = [name for name in CASES if "stop" in name or "end token" in name]
ENDING = [
    name for name in ENDING if "ignored" not in name and "across" not in name and name != "one end token"
]


@pytest.mark.parametrize("name", ENDING)
def test_the_cases_end_as_they_say(name):
    """So that none of them is about a text that only ended with its length."""
    ends, fields = CASES[name]
    model = _model(ends)
    requests = [
        Request(seed, **{"condition": "rain", "seed": seed, "max_new_tokens": 40, **fields})
        for seed in range(4)
    ]
    reasons = {one.finish_reason for one in Engine(model, TEXT, slots=4, max_length=64).generate(requests)}
    assert reasons & {"stop" if "stop" in name else "end"}
