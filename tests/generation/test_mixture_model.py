"""A mixture as one model of transformers: logits, loss and texts are those of a plain sum of its members."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from auxkern.generation import Engine, Member, Mixture, MixtureForCausalLM, Request, contrast, guidance
from auxkern.model import TextFormat
from auxkern.ops.sampling_params import SamplingParams
from tests.support.tiny import PAIRS, byte_tokenizer, tiny_lm_for, tiny_pair, with_two_more

TOKENIZER = byte_tokenizer()
TEXT = TextFormat(TOKENIZER)
MIXTURES: dict[str, Mixture] = {
    "base alone": Mixture((Member(),)),
    "guidance": guidance("abc", "gh", 1.7),
    "guidance from nothing": guidance("abcdefgh"),
    "contrast": contrast("ab", "anti", 0.8, 0.2),
    "experts on the text as it is": Mixture(
        (Member(), Member("expert", weight=0.7), Member("anti", weight=-0.7))
    ),
    "pair": Mixture((Member(), Member("default", condition="cd"))),
    "everything": Mixture(
        (
            Member("expert", weight=0.5),
            Member(prompt="ab"),
            Member("own", condition="a", weight=1.5),
            Member(prompt="", weight=-0.5),
            Member("t5", condition="bcd", weight=0.5),
            Member("own", condition="", weight=-0.5),
            Member("anti", prompt="c", weight=-0.25),
        ),
    ),
    "two bases, of which the first judges": Mixture(
        (Member(prompt="ab"), Member(prompt="x", weight=-0.5)), 0.2
    ),
    "one context twice": Mixture((Member(prompt="abc"), Member(prompt="abc", weight=0.5))),
}
TEXTS = ["hello", "", "a", "xyzxyz"]


def lms() -> dict[str, Any]:
    return {
        "expert": tiny_lm_for(TOKENIZER, seed=7, num_attention_heads=2),
        "anti": tiny_lm_for(TOKENIZER, seed=8, num_attention_heads=2, num_hidden_layers=2),
    }


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Any:
    return with_two_more(tiny_lm_for(TOKENIZER, num_attention_heads=2), tmp_path_factory.mktemp("three"))


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return lms()


def read(prompt: str | None, text: list[int]) -> Tensor:
    """(1, S) that a language model reads, and the text's T tokens are its last, or predicted there."""
    if prompt is None:
        return torch.tensor([text])
    before = TEXT.prompts([""], [prompt])["input_ids"][0].tolist()
    return torch.tensor([before + (text[1:] if text[:1] == [TEXT.start_id] else text)])


@torch.no_grad()
def exact(mixture: Mixture, pair: Any, models: dict[str, Any], text: list[int]) -> Tensor:
    """(T, V) float64 logits of one text, each member by itself."""
    first = next(one for one in mixture.members if one.model == "base")
    T, V = len(text), pair.config.vocab_size
    z = torch.zeros(T, V, dtype=torch.float64)
    judge = None
    for member in mixture.members:
        weight = member.weight
        if member.model in pair.auxiliary_names:
            ids = read(first.prompt, text)
            condition = TEXT.prompts([member.condition or ""])["condition_ids"]
            index = torch.tensor([pair.auxiliary_names.index(member.model)])
            chosen = {"condition_ids": condition, "auxiliary_ids": index}
            whole, none = (pair(ids, **chosen, aux_scale=scale).logits[0].double() for scale in (1.0, 0.0))
            own = whole - none
            weight = pair.auxiliary_scale(member.model) if weight is None else weight
        else:
            lm = models.get(member.model, pair.lm)
            own = lm(input_ids=read(member.prompt, text)).logits[0, :, :V].double()
            judge = own[-T:] if member is first else judge
        z += (1.0 if weight is None else weight) * own[-T:]
    if mixture.plausibility:
        p = judge.softmax(-1)
        z = z.masked_fill(p < mixture.plausibility * p.amax(-1, keepdim=True), -torch.inf)
    return z


def batch(side: str, start: bool = True) -> tuple[dict[str, Tensor], list[list[int]]]:
    """Texts of different lengths, padded, and each by itself."""
    rows = [TEXT.prompts([""], [text])["input_ids"][0].tolist() for text in TEXTS]
    if not start:
        # Some have the start token, some have not.
        rows = [row[1:] if len(row) > 2 else row for row in rows]
    T = max(map(len, rows))
    ids, mask = torch.full((len(rows), T), TEXT.pad_id), torch.zeros(len(rows), T, dtype=torch.int64)
    for row, real in enumerate(rows):
        place = slice(T - len(real), T) if side == "left" else slice(0, len(real))
        ids[row, place], mask[row, place] = torch.tensor(real), 1
    return {"input_ids": ids, "attention_mask": mask}, rows


@torch.no_grad()
@pytest.mark.parametrize("start", [True, False], ids=["started", "ragged starts"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MIXTURES)
def test_logits_are_the_plain_sum(pair, models, name, side, start):
    mixture = MIXTURES[name]
    model = MixtureForCausalLM(pair, TEXT, mixture, models)
    inputs, rows = batch(side, start)
    logits = model(**inputs).logits
    for row, text in enumerate(rows):
        z = exact(mixture, pair, models, text)
        # float32 logits of about 30, added in another order
        torch.testing.assert_close(
            logits[row, inputs["attention_mask"][row] != 0].double(), z, rtol=0, atol=2e-4
        )
    last = model(**inputs, logits_to_keep=1).logits
    if side == "left":
        torch.testing.assert_close(last, logits[:, -1:], rtol=0, atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["the LM's own logits", "first layers of the LM"])
def test_pairs_of_other_kinds(models, kind):
    assert kind in PAIRS
    pair = tiny_pair(kind, tiny_lm_for(TOKENIZER))
    mixture = Mixture((Member(prompt="ab"), Member("default", condition="cd"), Member("anti", weight=-0.5)))
    inputs, rows = batch("left")
    logits = MixtureForCausalLM(pair, TEXT, mixture, models)(**inputs).logits
    for row, text in enumerate(rows):
        z = exact(mixture, pair, models, text)
        torch.testing.assert_close(logits[row, -len(text) :].double(), z, rtol=0, atol=2e-4)


@torch.no_grad()
def test_the_loss_is_of_the_plain_sum(pair, models):
    mixture = MIXTURES["everything"]
    inputs, rows = batch("right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    loss = MixtureForCausalLM(pair, TEXT, mixture, models)(**inputs, labels=labels).loss
    each = [
        -exact(mixture, pair, models, row)[:-1].log_softmax(-1).gather(-1, torch.tensor(row)[1:, None])
        for row in rows
    ]
    assert loss.item() == pytest.approx(torch.cat(each).mean().item(), rel=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["guidance", "everything"])
def test_steps_with_a_cache_whose_rows_change_places_give_the_same_logits(pair, models, name):
    model = MixtureForCausalLM(pair, TEXT, MIXTURES[name], models)
    inputs, _ = batch("left")
    whole, ids, mask = model(**inputs).logits, inputs["input_ids"], inputs["attention_mask"]
    cache, T, order = None, ids.shape[1], torch.tensor([2, 0, 3, 3])
    for begin, end in ((0, 3), (3, 4), (4, T)):
        if begin:
            cache.reorder_cache(order)
            ids, mask, whole = ids[order], mask[order], whole[order]
        output = model(ids[:, begin:end], mask[:, :end], past_key_values=cache, use_cache=True)
        cache = output.get("past_key_values", output.get("cache"))
        real = mask[:, begin:end] != 0
        # Rows whose text has not begun yet are read with the columns that follow.
        begun = real & (mask[:, :begin].sum(1, keepdim=True) > 0) if begin else real
        torch.testing.assert_close(output.logits[begun], whole[:, begin:end][begun], rtol=0, atol=2e-4)


def written(model: Any, prompts: list[str], **options: Any) -> list[list[int]]:
    inputs = TEXT.prompts([""] * len(prompts), prompts)
    chosen = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    ids = model.generate(
        **chosen, max_new_tokens=9, eos_token_id=TEXT.end_id, pad_token_id=TEXT.pad_id, **options
    )
    rows = ids[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(TEXT.end_id) + 1] if TEXT.end_id in row else row for row in rows]


@pytest.mark.parametrize(
    ("options", "params"),
    [
        ({"do_sample": False}, SamplingParams(0.0)),
        ({"do_sample": True, "top_k": 0, "seeds": [3, 4]}, SamplingParams()),
        (
            {"do_sample": True, "top_k": 0, "seeds": [3, 4], "repetition_penalty": 1.4},
            SamplingParams(repetition_penalty=1.4),
        ),
    ],
    ids=["greedy", "seeded", "penalised"],
)
def test_texts_are_the_engines(pair, models, options, params):
    """Which reads the members' own prompts and then what is written, where the text is empty yet."""
    engine = Engine(pair, TEXT, models=models, slots=12, max_length=48, max_condition=8)
    asked = [
        Request(f"{name} {seed}", seed=seed, max_new_tokens=9, params=params, **mixture._asdict())
        for name, mixture in MIXTURES.items()
        for seed in (3, 4)
    ]
    done = {one.id: list(one.token_ids) for one in engine.generate(asked)}
    for name, mixture in MIXTURES.items():
        model = MixtureForCausalLM(pair, TEXT, mixture, models)
        texts = written(model, ["", ""], **options)
        assert texts == [done[f"{name} {seed}"] for seed in (3, 4)], name


def test_prompts_go_on_from_those_of_the_members(pair, models):
    """Of different lengths, in one batch; the engine is told the joined prompts."""
    prompts, engine = ["a", "bcd", ""], Engine(pair, TEXT, models=models, slots=6, max_length=48)
    requests = [
        Request(i, seed=i, max_new_tokens=9, **guidance("x y" + prompt, "n" + prompt, 1.6)._asdict())
        for i, prompt in enumerate(prompts)
    ]
    model = MixtureForCausalLM(pair, TEXT, guidance("x y", "n", 1.6))
    texts = written(model, prompts, do_sample=True, top_k=0, seeds=range(3))
    assert texts == [list(one.token_ids) for one in engine.generate(requests)]
    beams = written(model, prompts, do_sample=False, num_beams=3)
    assert beams == written(model, prompts, do_sample=False, num_beams=3, use_cache=False)
    assert beams != written(model, prompts, do_sample=False)


@torch.no_grad()
def test_a_plain_language_model_is_a_base(models):
    lm = tiny_lm_for(TOKENIZER)
    before = {name: tensor.clone() for name, tensor in lm.state_dict().items()}
    mixture = MixtureForCausalLM(lm, TEXT, Mixture((Member(), Member("anti", weight=-0.5))), models)
    inputs, _ = batch("left")
    z = lm(**inputs).logits.double() - 0.5 * models["anti"](**inputs).logits.double()
    real = inputs["attention_mask"] != 0
    torch.testing.assert_close(mixture(**inputs).logits[real].double(), z[real], rtol=0, atol=2e-4)
    for name, tensor in lm.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    with pytest.raises(NotImplementedError, match="save its models"):
        mixture.save_pretrained("nowhere")


def test_a_mixture_says_how_long_a_text_may_be():
    lm = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(TOKENIZER), n_positions=24, n_embd=16, n_layer=1, n_head=2)
    )
    model = MixtureForCausalLM(lm.eval(), TEXT, guidance("abcdefgh", "a"))
    assert model.config.max_position_embeddings == 24 - 9
    assert len(written(model, ["abc"], do_sample=False)[0]) > 0
    with pytest.raises(ValueError, match="take 26 positions, but model 'base' has 24"):
        written(model, ["abcdefg"], do_sample=False)


def test_an_auxiliary_has_room_for_its_condition_too():
    body = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 20}
    pair = tiny_pair("own head", tiny_lm_for(TOKENIZER), auxiliary_config=body)
    members = (Member(prompt="abc"), Member("default", condition="de"))
    model = MixtureForCausalLM(pair, TEXT, Mixture(members))
    assert model.config.max_position_embeddings == 20 - 4 - 2
    with pytest.raises(ValueError, match="take 21 positions, but auxiliary 'default' has 20"):
        written(model, ["abcde"], do_sample=False)


def test_texts_end_where_the_bases_do():
    lm = tiny_lm_for(TOKENIZER)
    lm.generation_config.eos_token_id = [7, TEXT.end_id]
    model = MixtureForCausalLM(lm, TEXT, Mixture((Member(),)))
    assert TEXT.end_ids(model) == [7, TEXT.end_id]
    assert model.generation_config.pad_token_id == TEXT.pad_id


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ((), "no members"),
        ((Member("expert"),), "without the base"),
        ((Member(), Member("nobody")), "no model 'nobody'.*base, expert, anti, default, t5, own"),
        ((Member(), Member("expert", condition="x")), "reads no condition"),
        ((Member(), Member("default", prompt="x")), "leave its prompt out"),
        ((Member(), Member("t5")), "needs a condition"),
        ((Member(weight=0.0),), "every member's weight is 0"),
    ],
)
def test_members_that_do_not_fit_are_told(pair, models, members, words):
    with pytest.raises(ValueError, match=words):
        MixtureForCausalLM(pair, TEXT, Mixture(members), models)


def test_models_that_do_not_fit_are_told(pair):
    small = tiny_lm_for(TOKENIZER, vocab_size=20, pad_token_id=0)
    with pytest.raises(ValueError, match=r"model 'small'.*20 ids.*share one vocabulary"):
        MixtureForCausalLM(pair, TEXT, Mixture((Member(),)), {"small": small})
    with pytest.raises(ValueError, match="names a model of the pair"):
        MixtureForCausalLM(pair, TEXT, Mixture((Member(),)), {"t5": pair.lm})
    model = MixtureForCausalLM(pair, TEXT, Mixture((Member(),)))
    with pytest.raises(ValueError, match="does not take condition_ids"):
        model.generate(torch.tensor([[1]]), condition_ids=torch.tensor([[1]]), max_new_tokens=2)
