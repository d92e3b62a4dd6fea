"""Several auxiliaries of one text: logits are added up, each with a condition and a weight of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import auxkern
from auxkern.generation import Engine, Member, Request
from auxkern.model import TextFormat
from auxkern.ops.sampling_params import SamplingParams
from tests.support.tiny import byte_tokenizer, tiny_lm_for, with_two_more

TOKENIZER = byte_tokenizer()
TEXT = TextFormat(TOKENIZER)
PROMPTS = ["abc", "", "de", "xyz", "q"]
AUXILIARIES = [["default", "t5"], ["own"], None, ["own", "default", "t5"], ["t5"]]
CONDITIONS = [["cd", "efghi"], ["c"], [], ["k", "lmn", "op"], ["rst"]]
SCALES = [[0.7, 1.2], [0.5], None, [1.0, -0.5, 0.25], [2.0]]
NEW = 9


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Any:
    return with_two_more(tiny_lm_for(TOKENIZER, num_attention_heads=2), tmp_path_factory.mktemp("three"))


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    return TEXT.prompts(CONDITIONS, PROMPTS)


def logits_of(model: Any, row: int, drawn: list[int], scales: Any = SCALES) -> Tensor:
    """(T, V) float64 sum of one text, each auxiliary alone on the base."""
    names, conditions = AUXILIARIES[row] or [], CONDITIONS[row]
    prompt = TEXT.prompts([""], [PROMPTS[row]])["input_ids"]
    ids = torch.cat([prompt, torch.tensor([drawn], dtype=torch.int64)], 1)
    base = model.lm(input_ids=ids).logits[0].double()
    z = base.clone()
    weights = [model.auxiliary_scale(name) for name in names] if scales is None else scales[row] or []
    for name, condition, weight in zip(names, conditions, weights, strict=True):
        index = torch.tensor([model.auxiliary_names.index(name)])
        own = TEXT.prompts([condition])["condition_ids"]
        z += weight * (model(ids, condition_ids=own, auxiliary_ids=index, aux_scale=1.0).logits[0] - base)
    return z


@torch.no_grad()
def looped(model: Any, row: int, params: SamplingParams, scales: Any = SCALES) -> list[int]:
    """Token by token, every model over the whole text each time."""
    drawn: list[int] = []
    prompt = TEXT.prompts([""], [PROMPTS[row]])["input_ids"]
    while len(drawn) < NEW and TEXT.end_id not in drawn:
        drawn += auxkern.sample(
            [logits_of(model, row, drawn, scales)[-1:].float()],
            params,
            seed=50 + row,
            position=prompt.shape[1] + len(drawn),
            prompt=prompt,
            history=torch.tensor([drawn], dtype=torch.int64),
            backend="reference",
        ).tokens.tolist()
    return drawn


def written(model: Any, inputs: dict[str, Tensor], **options: Any) -> list[list[int]]:
    """New tokens of each text, up to its end."""
    settings = {"auxiliary": AUXILIARIES, "aux_scale": SCALES, "max_new_tokens": NEW, **options}
    ids = model.generate(**inputs, **settings, eos_token_id=TEXT.end_id, pad_token_id=TEXT.pad_id)
    rows = ids[:, inputs["input_ids"].shape[1] :].tolist()
    return [row[: row.index(TEXT.end_id) + 1] if TEXT.end_id in row else row for row in rows]


SEEDS = {"do_sample": True, "top_k": 0, "seeds": range(50, 55)}


@pytest.mark.parametrize(
    ("options", "params"),
    [
        ({"do_sample": False}, SamplingParams(0.0)),
        (SEEDS, SamplingParams()),
        (
            {**SEEDS, "temperature": 0.8, "repetition_penalty": 1.3},
            SamplingParams(0.8, repetition_penalty=1.3),
        ),
        ({**SEEDS, "use_cache": False}, SamplingParams()),
    ],
    ids=["greedy", "seeded", "penalised", "without a cache"],
)
def test_texts_are_those_of_a_plain_loop_over_the_sum(model, inputs, options, params):
    for row, tokens in enumerate(written(model, inputs, **options)):
        assert tokens == looped(model, row, params), row


def test_without_weights_each_has_the_one_that_it_was_trained_with(model, inputs):
    for row, tokens in enumerate(written(model, inputs, aux_scale=None, **SEEDS)):
        assert tokens == looped(model, row, SamplingParams(), None), row


def test_one_weight_of_an_input_is_of_all_its_auxiliaries(model, inputs):
    flat = [0.5, 1.5, 1.0, -0.5, 2.0]
    each = [[weight] * len(names or []) for weight, names in zip(flat, AUXILIARIES, strict=True)]
    assert written(model, inputs, aux_scale=flat, **SEEDS) == written(model, inputs, aux_scale=each, **SEEDS)
    half = [[0.5] * len(names or []) for names in AUXILIARIES]
    assert written(model, inputs, aux_scale=0.5, **SEEDS) == written(model, inputs, aux_scale=half, **SEEDS)


def test_texts_are_the_engines_with_the_same_members(model, inputs):
    requests = []
    for row, prompt in enumerate(PROMPTS):
        each = zip(AUXILIARIES[row] or [], CONDITIONS[row], SCALES[row] or [], strict=True)
        members = (Member(), *(Member(name, condition=c, weight=weight) for name, c, weight in each))
        requests.append(Request(row, prompt=prompt, members=members, seed=50 + row, max_new_tokens=NEW))
    done = Engine(model, TEXT, slots=7, max_length=32, max_condition=8).generate(requests)
    assert written(model, inputs, **SEEDS) == [list(one.token_ids) for one in done]


def test_beams_keep_their_auxiliaries(model, inputs):
    together = written(model, inputs, num_beams=3, do_sample=False)
    assert together == written(model, inputs, num_beams=3, do_sample=False, use_cache=False)
    assert together != written(model, inputs, do_sample=False)


def test_lists_of_one_are_one_auxiliary(model):
    single = TEXT.prompts(["ab", "c", "d", "ef", "g"], PROMPTS)
    names = ["t5", "default", None, "own", "t5"]
    expected = written(model, single, auxiliary=names, aux_scale=None, **SEEDS)
    lists = [None if name is None else [name] for name in names]
    assert written(model, single, auxiliary=lists, aux_scale=None, **SEEDS) == expected


def _ids(model: Any) -> Tensor:
    rows = [[model.auxiliary_names.index(name) for name in names or []] for names in AUXILIARIES]
    return torch.tensor([row + [-1] * (3 - len(row)) for row in rows])


def _batch(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    scales = torch.tensor([[*(row or []), 0.0, 0.0, 0.0][:3] for row in SCALES])
    return {**inputs, "auxiliary_ids": _ids(model), "aux_scale": scales}


@torch.no_grad()
def test_logits_and_loss_of_the_sum(model, inputs):
    batch = _batch(model, inputs)
    logits = model(**batch).logits
    losses = []
    for row in range(len(PROMPTS)):
        real = inputs["attention_mask"][row] != 0
        exact = logits_of(model, row, [])
        # float32 logits of about 30, added in another order
        torch.testing.assert_close(logits[row, real].double(), exact, rtol=0, atol=1e-4)
        target = inputs["input_ids"][row, real][1:]
        losses.append(-exact[:-1].log_softmax(-1).gather(-1, target[:, None])[:, 0])
    # Padding stands before the start token, which nothing predicts.
    ids = inputs["input_ids"]
    labels = ids.masked_fill((inputs["attention_mask"] == 0) | (ids == TEXT.start_id), -100)
    loss = model(**batch, labels=labels).loss
    assert loss.item() == pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)


@torch.no_grad()
def test_steps_with_a_cache_give_the_same_logits(model, inputs):
    batch, T = _batch(model, inputs), 2
    first = model(
        **{**batch, "input_ids": batch["input_ids"][:, :T], "attention_mask": batch["attention_mask"][:, :T]},
        use_cache=True,
    )
    cache = first.get("past_key_values", first.get("cache"))
    rest = model(**{**batch, "input_ids": batch["input_ids"][:, T:]}, past_key_values=cache)
    real = inputs["attention_mask"][:, T:] != 0
    # float32 attention over other shapes
    torch.testing.assert_close(rest.logits[real], model(**batch).logits[:, T:][real], rtol=0, atol=1e-4)


def test_the_loss_of_a_sum_reaches_every_auxiliary_that_it_has(model, inputs):
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    batch = _batch(model, inputs)
    chosen = {name: tensor[:1] for name, tensor in batch.items()}  # default and t5
    model(**chosen, labels=labels[:1]).loss.backward()
    own = {name: model._named(name).head.weight.grad for name in model.auxiliary_names}
    assert own["default"].abs().sum() > 0
    assert own["t5"].abs().sum() > 0
    assert own["own"] is None
    model.zero_grad()
    model._named("t5").zero_grad()


def test_what_is_saved_is_the_models_own_auxiliary(model, inputs, tmp_path):
    before = set(model.state_dict())
    written(model, inputs, **SEEDS)
    assert set(model.state_dict()) == before
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, lm=model.lm)
    single = TEXT.prompts(["cd"], ["abc"])
    assert torch.equal(again(**single).logits, model(**single).logits)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"auxiliary": AUXILIARIES[:2]}, ValueError, "auxiliary has 2 names but there are 5"),
        ({"auxiliary": [["nobody"], None, None, None, None]}, ValueError, "no auxiliary 'nobody'"),
        ({"auxiliary": [["t5", None], None, None, None, None]}, ValueError, "no auxiliary None"),
        ({"auxiliary": [["t5", "t5"], None, None, None, None]}, ValueError, r"auxiliary\[0\] .* once"),
        ({"aux_scale": SCALES[:2]}, ValueError, "aux_scale has 2 entries but there are 5"),
        ({"aux_scale": [[1.0], *SCALES[1:]]}, ValueError, r"aux_scale\[0\] is \[1.0\] but .* names 2"),
        ({"aux_scale": [None, *SCALES[1:]]}, ValueError, r"aux_scale\[0\] is None but .* names 2"),
        ({"aux_scale": [[1.0, float("nan")], *SCALES[1:]]}, ValueError, "each must be finite"),
        ({"aux_scale": float("inf")}, ValueError, "aux_scale is inf; it must be finite"),
        ({"aux_scale": "1"}, TypeError, "aux_scale must be a number"),
        ({"aux_scale": torch.ones(5, 2)}, ValueError, r"aux_scale has shape \(5, 2\)"),
        ({"auxiliary": "t5"}, ValueError, "aux_scale has lists, but auxiliary has none"),
        ({"auxiliary": "t5", "aux_scale": 1.0}, ValueError, r"auxiliary_ids \(B, A\)"),
        (
            {"auxiliary": [["t5"], ["t5"], None, None, None], "aux_scale": None},
            ValueError,
            "give each auxiliary of a sequence its condition",
        ),
    ],
)
def test_bad_input_is_told(model, inputs, options, error, words):
    with pytest.raises(error, match=words):
        written(model, inputs, **options)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"auxiliary_ids": torch.tensor([[0, 0]] * 5)}, "'default' twice for a sequence"),
        ({"auxiliary_ids": torch.tensor([[0, 3]] * 5)}, "auxiliary_ids is .* -1 for the base"),
        ({"auxiliary_ids": torch.zeros(4, 2).long()}, r"shape \(4, 2\) but there are 5"),
        ({"auxiliary_ids": None}, r"auxiliary_ids \(B, A\)"),
        ({"aux_scale": torch.tensor([torch.nan] * 5)}, "each must be finite"),
        ({"condition_ids": torch.zeros(5).long(), "condition_mask": None}, r"\(B, A, K\)"),
    ],
)
def test_tensors_that_do_not_fit_are_told(model, changed, words):
    two = TEXT.prompts([["a", "b"]] * 5, PROMPTS)
    with pytest.raises(ValueError, match=words):
        model(**{**two, "auxiliary_ids": torch.tensor([[0, 1]] * 5), **changed})


def test_conditions_of_lists_are_those_of_each_alone():
    inputs = TEXT.prompts(CONDITIONS, PROMPTS)
    assert inputs["condition_ids"].shape == inputs["condition_mask"].shape == (5, 3, 5)
    for row, conditions in enumerate(CONDITIONS):
        for place in range(3):
            ids = inputs["condition_ids"][row, place][inputs["condition_mask"][row, place] != 0]
            assert TEXT.decode(ids) == (conditions[place] if place < len(conditions) else "")
    assert TEXT.prompts([[], []])["condition_ids"].shape == (2, 0, 0)
    with pytest.raises(TypeError, match="conditions mix str and lists"):
        TEXT.prompts(["a", ["b"]])
