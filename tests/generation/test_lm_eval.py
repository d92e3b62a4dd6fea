"""lm-evaluation-harness takes a mixture as it takes any model of transformers."""

from __future__ import annotations

import pytest
import torch

from auxkern.generation import Member, Mixture, MixtureForCausalLM, guidance
from auxkern.model import TextFormat
from tests.support.tiny import KIND, byte_tokenizer, tiny_lm_for, tiny_pair

TOKENIZER = byte_tokenizer()
TEXT = TextFormat(TOKENIZER)
MIXTURES = {
    "guidance": guidance("x y", "n", 1.5),
    "pair": Mixture((Member(), Member("default", condition="cd"))),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_the_harness_scores_and_generates_with_a_mixture(name):
    models = pytest.importorskip("lm_eval.models.huggingface", reason="lm-eval is not installed")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    model = MixtureForCausalLM(tiny_pair(KIND, tiny_lm_for(TOKENIZER)), TEXT, MIXTURES[name])
    harness = models.HFLM(pretrained=model, tokenizer=TOKENIZER, batch_size=2)
    pairs = [("hello", " world"), ("a", "bc"), ("", "defg")]
    asked = [instance("loglikelihood", {}, one, i) for i, one in enumerate(pairs)]
    for (context, text), (total, _) in zip(
        pairs, harness.loglikelihood(asked, disable_tqdm=True), strict=True
    ):
        ids = TOKENIZER(context + text, add_special_tokens=False)["input_ids"]
        ids = ids if context else [TEXT.start_id, *ids]
        with torch.no_grad():
            logprobs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        begin = len(ids) - len(text)
        want = sum(logprobs[place - 1, ids[place]].item() for place in range(begin, len(ids)))
        assert total == pytest.approx(want, abs=1e-3)  # float32 sums in batches of other widths
    until = [
        instance("generate_until", {}, (prompt, {"until": ["\n"], "max_gen_toks": 6}), i)
        for i, prompt in enumerate(("hello", "a"))
    ]
    for prompt, text in zip(("hello", "a"), harness.generate_until(until, disable_tqdm=True), strict=True):
        ids = TOKENIZER([prompt], add_special_tokens=False, return_tensors="pt")
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": TEXT.end_id}
        new = model.generate(ids["input_ids"], **options, pad_token_id=TEXT.pad_id)[0, len(prompt) :]
        assert text == TEXT.decode(new).split("\n")[0]
