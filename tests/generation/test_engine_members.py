"""Mixtures in the engine: each text is what a plain loop over its members writes, whatever runs beside it."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import auxkern
from auxkern.generation import Engine, Request, runner
from auxkern.generation.members import Member, context, contrast, experts, guidance
from auxkern.model import TextFormat, base, use_native_kernels
from auxkern.ops.sampling_params import SamplingParams
from tests.support.tiny import DECODER, KIND, PADDING, byte_tokenizer, tiny_lm_for, tiny_pair

TOKENIZER = byte_tokenizer()
TEXT = TextFormat(TOKENIZER)
ROOM: dict[str, Any] = {"max_length": 48, "max_condition": 8}
FILTERED = SamplingParams(0.8, top_k=20, top_p=0.95, repetition_penalty=1.2)
MIXTURES: dict[str, tuple[Member, ...]] = {
    "guidance": guidance("abc", "gh", 1.7).members,
    "guidance from nothing": guidance("abcdefgh").members,
    "one context of its own": (Member(prompt="hello"),),
    "half a base": (Member(prompt="hello", weight=0.5),),
    "three contexts": (
        Member(prompt="a"),
        Member(prompt="bcd", weight=-0.25),
        Member(prompt="ef", weight=0.5),
    ),
    "the same context twice": (Member(prompt="abc"), Member(prompt="abc", weight=0.5)),
    "experts": experts("dx", "expert", "anti", 0.75).members,
    "context": context("ab", "fgh", 0.5).members,
    "an expert's own context": (Member(prompt="ab"), Member("expert", prompt="ba ", weight=0.3)),
    "pair": (Member(), Member("default", condition="cd")),
    "two auxiliaries": (
        Member(prompt="abc"),
        Member("default", condition="cd", weight=0.7),
        Member("second", condition="efg"),
    ),
    "one auxiliary, two conditions": (
        Member(),
        Member("default", condition="cd"),
        Member("default", condition="", weight=-0.5),
    ),
    "everything": (
        Member("expert", weight=0.5),
        Member(prompt="ab"),
        Member("second", condition="a", weight=1.5),
        Member(prompt="", weight=-0.5),
        Member("default", condition="bc"),
        Member("anti", prompt="c", weight=-0.25),
    ),
}


def pair(folder: Path, kind: str = KIND) -> Any:
    """A base with two auxiliaries, "default" of a kind, and "second" of another."""
    lm = tiny_lm_for(TOKENIZER, num_attention_heads=2)
    one_head = {**DECODER, "num_attention_heads": 1}  # 16 wide, which the kernels take
    second = "own head" if kind == KIND else KIND
    tiny_pair(second, lm, auxiliary_config=one_head).save_pretrained(folder / "second")
    model = tiny_pair(kind, lm, auxiliary_config=one_head)
    model.load_auxiliary("second", folder / "second")
    return model


def others() -> dict[str, Any]:
    return {
        "expert": tiny_lm_for(TOKENIZER, seed=7, num_attention_heads=2).eval(),
        "anti": tiny_lm_for(TOKENIZER, seed=8, num_attention_heads=2, num_hidden_layers=2).eval(),
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Any:
    return pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return others()


def requests(**fields: Any) -> list[Request]:
    return [
        Request(name, prompt="dx", seed=100 + i, max_new_tokens=9 + i % 5, members=members, **fields)
        for i, (name, members) in enumerate(MIXTURES.items())
    ]


def logits_of(member: Member, prompt: str, first: str, drawn: list[int], model: Any, models: Any) -> Tensor:
    """(1, V) float64, as the member's model alone gives them."""
    V = model.config.vocab_size

    def ids(text: str) -> Tensor:
        start = TEXT.prompts([""], [text])["input_ids"]
        return torch.cat([start, torch.tensor([drawn], dtype=torch.int64)], 1)

    if member.model == "base" or member.model in models:
        lm = models.get(member.model, model.lm)
        read = ids(prompt if member.prompt is None else member.prompt)
        return lm(input_ids=read).logits[:, -1, :V].double()
    condition = TEXT.prompts([member.condition or ""], [""])
    names = [member.model]
    batch = {"input_ids": ids(first), "condition_ids": condition["condition_ids"]}
    index = torch.tensor([model.auxiliary_names.index(name) for name in names])
    whole, alone = (
        model(**batch, auxiliary_ids=index, aux_scale=scale).logits[:, -1].double() for scale in (1.0, 0.0)
    )
    return whole - alone


@torch.no_grad()
def looped(request: Request, model: Any, models: Any) -> list[int]:
    """Token by token, every model over the whole text each time."""
    first = next(one for one in request.members if one.model == "base")
    first_prompt = request.prompt if first.prompt is None else first.prompt
    prompt_ids = TEXT.prompts([""], [first_prompt])["input_ids"]
    drawn: list[int] = []
    ends = set(TEXT.end_ids(model))
    while len(drawn) < request.max_new_tokens and not ends & set(drawn):
        z, judge = 0.0, logits_of(first, request.prompt, first_prompt, drawn, model, models)
        for member in request.members:
            weight = member.weight
            if weight is None:
                auxiliary = member.model in model.auxiliary_names
                weight = model.auxiliary_scale(member.model) if auxiliary else 1.0
            z = z + weight * logits_of(member, request.prompt, first_prompt, drawn, model, models)
        if request.plausibility:
            p = judge.softmax(-1)
            z = z.masked_fill(p < request.plausibility * p.amax(), -torch.inf)
        token = auxkern.sample(
            [z.float()],
            request.params,
            seed=request.seed,
            position=prompt_ids.shape[1] + len(drawn),
            history=torch.tensor([drawn], dtype=torch.int64),
            prompt=prompt_ids,
            backend="reference",
        ).tokens
        drawn.append(int(token))
    return drawn


@pytest.mark.parametrize("params", [SamplingParams(), FILTERED], ids=["plain", "filtered"])
def test_every_mixture_is_what_a_plain_loop_writes(model, models, params):
    asked = requests(params=params)
    engine = Engine(model, TEXT, models=models, slots=7, **ROOM)
    for request, done in zip(asked, engine.generate(asked), strict=True):
        assert done.error is None
        assert list(done.token_ids) == looped(request, model, models), request.id


def test_contrast_draws_what_the_base_finds_plausible(model, models):
    """Beside a pair, whose text does not change by it."""
    asked = [
        Request(
            i, seed=i, max_new_tokens=12, logprobs=i % 2 == 0, **contrast("ab", "anti", 0.8, share)._asdict()
        )
        for i, share in enumerate((0.05, 0.3, 1.0, 0.0))
    ]
    beside = Request("pair", prompt="ab", condition="c", seed=5, max_new_tokens=12)
    (known,) = Engine(model, TEXT, models=models, slots=9, **ROOM).generate([beside])
    *done, pair = Engine(model, TEXT, models=models, slots=9, **ROOM).generate([*asked, beside])
    assert pair.token_ids == known.token_ids
    for request, text in zip(asked, done, strict=True):
        assert list(text.token_ids) == looped(request, model, models), request.plausibility
    raw, drawn = done[0].logprobs.raw, []
    for place, token in enumerate(done[0].token_ids):
        z = [logits_of(one, "ab", "ab", drawn, model, models) * one.weight for one in asked[0].members]
        assert raw[place] == pytest.approx(sum(z).log_softmax(-1)[0, token].item(), abs=1e-4)
        drawn.append(token)


def test_a_pair_written_as_members_is_the_pair(model, models):
    members = (Member(prompt="ab"), Member("default", condition="cd"))
    asked = [
        Request(0, prompt="ab", condition="cd", seed=3, max_new_tokens=12),
        Request(1, seed=3, max_new_tokens=12, members=members),
    ]
    pair, mixture = Engine(model, TEXT, models=models, slots=4, **ROOM).generate(asked)
    assert pair.token_ids == mixture.token_ids


def mixed(**fields: Any) -> list[Request]:
    """Mixtures among pairs of several auxiliaries and texts of the base alone."""
    pairs = [
        Request(
            f"pair {i}", prompt="ab" * i, condition="cde"[: 1 + i % 3], seed=i, max_new_tokens=14, **fields
        )
        for i in range(3)
    ]
    scaled = [
        Request("scaled", prompt="a", condition="b", aux_scale=0.5, seed=9, max_new_tokens=10, **fields),
        Request("second", prompt="a", condition="b", auxiliary="second", seed=9, max_new_tokens=10, **fields),
        Request("alone", prompt="xyz", auxiliary=None, seed=2, max_new_tokens=11, **fields),
    ]
    return [*pairs, *requests(**fields), *scaled]


@pytest.mark.parametrize("kind", ["own head", KIND])
def test_with_native_kernels_a_text_is_the_same_to_the_last_bit_beside_anything(kind, threads, tmp_path):
    model = pair(tmp_path, kind).use_native_kernels()
    models = {name: use_native_kernels(lm) for name, lm in others().items()}
    asked = mixed(logprobs=True)

    def written(slots: int, chosen: list[Request], count: int) -> dict[Any, Any]:
        torch.set_num_threads(count)
        return {
            done.id: done for done in Engine(model, TEXT, models=models, slots=slots, **ROOM).generate(chosen)
        }

    known = written(5, asked, 1)
    assert all(done.error is None for done in known.values())
    assert written(32, asked[::-1], 2) == known
    for one in asked:
        assert written(3, [one], 1) == {one.id: known[one.id]}


def test_log_probabilities_of_a_mixture(model, models):
    """raw is of the sum, lm of the first member of the base, auxiliary of all auxiliaries together."""
    (request,) = [one for one in requests(logprobs=True) if one.id == "two auxiliaries"]
    (done,) = Engine(model, TEXT, models=models, slots=4, **ROOM).generate([request])
    drawn: list[int] = []
    for place, token in enumerate(done.token_ids):
        z = [logits_of(one, "dx", "abc", drawn, model, models) for one in request.members]
        sums = {
            "raw": z[0] + 0.7 * z[1] + model.auxiliary_scale("second") * z[2],
            "lm": z[0],
            "auxiliary": 0.7 * z[1] + model.auxiliary_scale("second") * z[2],
        }
        for name, logits in sums.items():
            want = logits.log_softmax(-1)[0, token].item()
            assert getattr(done.logprobs, name)[place] == pytest.approx(want, abs=1e-4)
        drawn.append(token)


@torch.no_grad()
def test_each_member_has_log_probabilities_of_its_own(model, models):
    """Those of its model's logits, computed in float64; beside texts that ask for none."""
    weightless = (
        Member(prompt="ab"),
        Member("expert", weight=0.0),
        Member("second", condition="a", weight=0.0),
    )
    asked = [
        *requests(logprobs=True),
        Request("weightless", prompt="dx", seed=1, members=weightless, max_new_tokens=5, logprobs=True),
    ]
    beside = [*requests()[3:6], Request("pair", prompt="a", condition="b", max_new_tokens=9, logprobs=True)]
    beside = [replace(one, id=f"beside {one.id}") for one in beside]
    *done, pair = Engine(model, TEXT, models=models, slots=9, **ROOM).generate([*asked, *beside])
    assert pair.logprobs.members is None
    exact = copy.deepcopy(model).double()
    exact.lm.double()
    wide = {name: copy.deepcopy(lm).double() for name, lm in models.items()}
    for request, text in zip(asked, done, strict=False):
        assert len(text.logprobs.members) == len(request.members)
        first = next(one for one in request.members if one.model == "base")
        first_prompt = request.prompt if first.prompt is None else first.prompt
        for member, own in zip(request.members, text.logprobs.members, strict=True):
            assert len(own) == len(text.token_ids)
            for place, token in enumerate(text.token_ids):
                drawn = list(text.token_ids[:place])
                z = logits_of(member, request.prompt, first_prompt, drawn, exact, wide)
                # float32's models against float64's; their logits are around 10.
                assert own[place] == pytest.approx(z.log_softmax(-1)[0, token].item(), abs=1e-4)


def test_a_text_of_many_members_takes_as_many_slots(model, models):
    asked = [
        Request(i, prompt="a", seed=i, max_new_tokens=6, members=guidance("ab", "c").members)
        for i in range(5)
    ]
    engine = Engine(model, TEXT, models=models, slots=3, **ROOM)
    for request in asked:
        engine.submit(request)
    most, done = 0, []
    while not engine.scheduler.idle:
        done += engine.step()
        most = max(most, len(engine.scheduler.running))
    assert len(done) == 5
    assert most == 1
    too_many = Request("x", members=tuple(Member(prompt="a") for _ in range(4)))
    (failed,) = Engine(model, TEXT, models=models, slots=3, **ROOM).generate([too_many])
    assert "4 members of model 'base', and there are 3 slots" in failed.error


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ((Member(), Member("nobody")), "no model 'nobody'.*base, expert, anti, default"),
        ((Member(), Member("expert", condition="x")), "reads no condition"),
        ((Member(), Member("default", prompt="x")), "leave its prompt out"),
        (
            (Member(), Member("anti"), Member("anti", prompt="a" * 60)),
            r"members\[2\] \('anti'\) has 6. tokens",
        ),
        (
            (Member(), Member("default", condition="a"), Member("second", condition="a" * 9)),
            r"condition of members\[2\] \('second'\) has 9 tokens",
        ),
        ((Member(),) + (Member("expert"),) * 5, "5 members of model 'expert', and there are 4 slots"),
        ((Member(), Member("expert", weight=1e39)), r"weight of members\[1\] \('expert'\) is 1e\+39"),
        ((Member(), Member("anti", weight=-1e-40)), r"weight of members\[1\] \('anti'\) is -1e-40"),
    ],
)
def test_a_mixture_that_cannot_be_written_fails_alone(model, models, members, words):
    engine = Engine(model, TEXT, models=models, slots=4, **ROOM)
    bad, good = (
        Request("bad", max_new_tokens=9, members=members),
        Request("good", members=guidance("a").members, max_new_tokens=3),
    )
    failed, done = engine.generate([bad, good])
    assert done.error is None
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(failed.error)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"members": (Member("expert"),)}, ValueError, "without the base"),
        ({"members": (Member(weight=0.0), Member("expert", weight=0))}, ValueError, "every member's weight"),
        ({"members": [Member()]}, TypeError, "tuple of Member"),
        ({"members": (Member(),), "condition": "x"}, ValueError, "condition is of a pair"),
        ({"members": (Member(),), "aux_scale": 2.0}, ValueError, "aux_scale is of a pair"),
        ({"members": (Member(),), "auxiliary": "other"}, ValueError, "'other' beside members"),
    ],
)
def test_a_contradictory_request_is_told(fields, error, words):
    with pytest.raises(error, match=words):
        Request(0, **fields)


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"weight": float("nan")}, ValueError, "weight of member 'base' is nan"),
        ({"weight": True}, TypeError, "bool"),
        ({"model": ""}, ValueError, "empty"),
        ({"prompt": 3}, TypeError, "prompt must be a str"),
    ],
)
def test_a_bad_member_is_told(fields, error, words):
    with pytest.raises(error, match=words):
        Member(**fields)


def test_records_of_members_come_back():
    request = Request("a", members=MIXTURES["everything"], prompt="p")
    record = request.as_record()
    assert Request.from_record(record).as_record() == record
    assert "members" not in Request("b").as_record()
    with pytest.raises(ValueError, match="no field 'promt'"):
        Request.from_record({"id": 1, "members": [{"model": "base", "promt": "x"}]})
    with pytest.raises(TypeError, match="list of objects"):
        Request.from_record({"id": 1, "members": "base"})


def test_shorthands_in_json_are_their_members():
    lines = {
        "guidance": ({"scale": 2.0, "negative_prompt": "n"}, guidance("p", "n", 2.0)),
        "contrast": ({"amateur": "small", "beta": 1, "alpha": 0.2}, contrast("p", "small", 1, 0.2)),
        "experts": ({"expert": "e", "anti_expert": "a"}, experts("p", "e", "a")),
        "context": ({"text": "c "}, context("p", "c ")),
    }
    for name, (options, mixture) in lines.items():
        request = Request.from_record({"id": name, "prompt": "p", name: options})
        assert (request.members, request.plausibility) == mixture
        assert Request.from_record(request.as_record()).members == request.members
    for line, error, words in (
        ({"guidance": {"scael": 2}}, ValueError, "no field 'scael'"),
        ({"guidance": {"scale": "2"}}, TypeError, "scale must be a number"),
        ({"guidance": 2}, TypeError, "must be an object"),
        ({"experts": {"expert": "e"}}, ValueError, "no anti_expert"),
        ({"guidance": {}, "context": {"text": "a"}}, ValueError, "context"),
        ({"contrast": {"amateur": "a", "alpha": 2}}, ValueError, "plausibility is 2"),
        ({"plausibility": 0.5}, ValueError, "no members"),
    ):
        with pytest.raises(error, match=words):
            Request.from_record({"id": 1, **line})


def test_tokens_that_a_member_lacks_are_its_own_error(models):
    """Of padded vocabularies the tokenizer may have more ids than a model has embeddings."""
    small = tiny_lm_for(TOKENIZER, vocab_size=258, pad_token_id=0)
    model = tiny_pair("own head", tiny_lm_for(TOKENIZER), vocab_size=258)
    engine = Engine(model, TEXT, models={"small": small}, **ROOM)
    members = (Member(prompt=PADDING), Member("small", prompt=PADDING))
    bad, good = (Request(count, members=members[:count], max_new_tokens=3) for count in (2, 1))
    failed, done = engine.generate([bad, good])
    assert re.search(r"prompt of members\[1\] \('small'\) has the id 258, .* have 258 ids", failed.error)
    assert done.error is None


def test_vocabularies_may_be_padded_each_to_a_size_of_its_own(models):
    lm = tiny_lm_for(TOKENIZER, vocab_size=320, num_attention_heads=2)
    padded = {
        "expert": tiny_lm_for(TOKENIZER, vocab_size=288, seed=7).eval(),
        "anti": tiny_lm_for(TOKENIZER, vocab_size=352, seed=8).eval(),
    }
    wide = tiny_pair("own head", lm)
    with pytest.raises(ValueError, match=r"'expert'.* 288 ids.* draws from 320.*vocab_size=288"):
        Engine(wide, TEXT, models=padded, **ROOM)
    model = tiny_pair("own head", lm, vocab_size=len(TOKENIZER))
    asked = [one for one in requests(logprobs=True) if one.id in ("guidance", "experts")]
    for request, done in zip(asked, Engine(model, TEXT, models=padded, **ROOM).generate(asked), strict=True):
        assert list(done.token_ids) == looped(request, model, padded)


def test_a_mixture_beyond_the_memory_is_told_before_it_begins(model, models, monkeypatch):
    monkeypatch.setattr(runner, "available_bytes", lambda device: 10**6)
    with pytest.raises(RuntimeError, match=r"of 'base' .* of 'anti' .* of 'second' .* leave a model out"):
        Engine(model, TEXT, models=models, **ROOM)


def test_the_prompts_of_all_members_count_for_a_step(model, models):
    """Five contexts of 11 tokens each: two texts are 110, three would be more than a step takes."""
    prompts = ["abcdefghi" + end for end in "jklm"]
    asked = [
        Request(
            end,
            members=(
                Member(prompt=end),
                Member(prompt=end[::-1]),
                Member(prompt=end[1:] + "x"),
                Member("expert", prompt=end),
                Member("anti", prompt=end),
            ),
            max_new_tokens=2,
        )
        for end in prompts
    ]
    engine = Engine(model, TEXT, models=models, slots=12, prefill_tokens=120, **ROOM)
    for request in asked:
        engine.submit(request)
    engine.step()
    assert engine.stats.prefill_tokens == 2 * 5 * 11


def test_models_of_other_vocabularies_or_taken_names_are_refused(model):
    small = tiny_lm_for(TOKENIZER, vocab_size=20, pad_token_id=0)
    with pytest.raises(ValueError, match=r"model 'small'.*20 ids.*share one vocabulary"):
        Engine(model, TEXT, models={"small": small}, **ROOM)
    for name in ("base", "default"):
        with pytest.raises(ValueError, match="names a model of the pair"):
            Engine(model, TEXT, models={name: model.lm}, **ROOM)
    short = tiny_lm_for(TOKENIZER, max_position_embeddings=8)
    with pytest.raises(ValueError, match="model 'short' has positions for 8"):
        Engine(model, TEXT, models={"short": short}, **ROOM)


def test_an_interrupted_step_loses_nothing(model, models, monkeypatch):
    asked = mixed()
    want = Engine(model, TEXT, models=models, slots=6, **ROOM).generate(asked)
    engine = Engine(model, TEXT, models=models, slots=6, **ROOM)
    for request in asked:
        engine.submit(request)
    calls, done = [0], {}
    run_base = base.run_base

    def torn(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        if calls[0] % 9 == 0:
            raise KeyboardInterrupt
        return run_base(*args, **options)

    monkeypatch.setattr(base, "run_base", torn)
    while not engine.scheduler.idle:
        try:
            done |= {one.id: one for one in engine.step()}
        except KeyboardInterrupt:
            continue
    assert [done[one.id].token_ids for one in want] == [one.token_ids for one in want]
