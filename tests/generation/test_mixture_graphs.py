"""A decoding step of mixtures as one graph: what it writes, when it is taken, what the host does then."""

import functools
import random

import pytest
import torch

from auxkern.generation import Engine, Request, drawing
from auxkern.generation.drawing import Acts
from auxkern.generation.members import Member
from auxkern.model import TextFormat
from auxkern.ops.sampling_params import SamplingParams
from tests.support.replaying import Outside, Recorded
from tests.support.tiny import byte_tokenizer, tiny_lm_for, with_two_more

TOKENIZER = byte_tokenizer()
TEXT = TextFormat(TOKENIZER)
ROOM = {"slots": 4, "max_length": 48, "max_condition": 8}
GUIDANCE, EXPERTS = ("base", "base"), ("base", "one", "two")
COMPOSED, AGAINST = ("base", "default", "own"), ("base", "default", "default")
TWICE = ("base", "base", "default", "default")  # an auxiliary reads the first member of the base
SHAPES = [GUIDANCE, EXPERTS, COMPOSED, AGAINST, TWICE]
PARAMS = [
    {},
    {"temperature": 0.7},
    {"top_k": 5, "top_p": 0.9},
    {"frequency_penalty": 0.4, "logit_bias": {66: 1.0}},
]


@pytest.fixture(autouse=True)
def seen_operations(monkeypatch):
    """Draws in torch's own operations: a native kernel would not be seen, and so not be done again."""
    monkeypatch.setattr(drawing, "sample", functools.partial(drawing.sample, backend="reference"))
    # Of pairs, which have tests of their own, as few as there may be.
    monkeypatch.setattr("auxkern.generation.graphs.RECORDED_ACTS", (Acts(),))


@pytest.fixture(scope="module")
def models():
    torch.manual_seed(5)
    return {name: tiny_lm_for(TOKENIZER) for name in ("one", "two")}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return with_two_more(tiny_lm_for(TOKENIZER), tmp_path_factory.mktemp("auxiliaries"))


def asked(count, shapes, seed=0, **fixed):
    """Requests of some shapes, with contexts and weights of their own, some left to their default."""
    chosen = random.Random(seed)

    def letters(least, most):
        return "".join(chosen.choice("abcdefgh ") for _ in range(chosen.randint(least, most)))

    def member(name):
        weight = chosen.choice([None, 0.5, 1.0, 1.5, -0.4])
        if name in ("default", "own"):
            return Member(name, condition=letters(1, 6), weight=weight)
        return Member(name, letters(0, 9), weight=weight)

    return [
        Request(
            number,
            members=tuple(member(name) for name in chosen.sample(shape, len(shape))),
            seed=100 * seed + number,
            **{
                "max_new_tokens": chosen.randint(1, 30),
                "ignore_eos": chosen.random() < 0.5,
                "params": SamplingParams(**chosen.choice(PARAMS)),
                **fixed,
            },
        )
        for number, shape in enumerate(chosen.choice(shapes) for _ in range(count))
    ]


def engines(pair, models, shapes=SHAPES):
    plain = Engine(pair, TEXT, models=models, **ROOM)
    return plain, Recorded(pair, TEXT, models=models, graphs=shapes, **ROOM)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_that_is_replayed_writes_the_same_texts(pair, models, shape):
    """Columns are moved back (48 of 60 are soon used up), slots are left and taken, draws of every kind."""
    plain, engine = engines(pair, models, [shape])
    known = engine.replays.recorded
    requests = asked(9, [shape])
    expected, completions = plain.generate(requests), engine.generate(requests)
    assert completions == expected
    assert engine.stats.new_tokens == plain.stats.new_tokens
    assert engine.replays.recorded == known, "a step was recorded while texts were written"
    assert engine.replays.replayed >= 0.9 * (engine.stats.steps - 9)


def test_steps_of_several_kinds_mix_with_replays(pair, models):
    """Steps that are not recorded stand between replays, and hand over to each other."""
    plain, engine = engines(pair, models)
    replayed = []
    for seed, shapes in enumerate(
        [[GUIDANCE], [GUIDANCE, COMPOSED], [EXPERTS], [("base", "one")], [AGAINST]]
    ):
        requests = asked(6, shapes, seed)
        requests += [Request("pair", "ab", "cd", seed=seed, max_new_tokens=9)] if seed == 1 else []
        before = engine.replays.replayed
        ours, theirs = engine.generate(requests), plain.generate(requests)
        assert [one.token_ids for one in ours] == [one.token_ids for one in theirs]
        replayed.append(engine.replays.replayed > before)
    assert replayed == [True, True, True, False, True]


@pytest.mark.parametrize("fixed", [{"logprobs": True}, {"plausibility": 0.1}], ids=str)
def test_what_a_recorded_step_does_not_know_runs_without(pair, models, fixed):
    plain, engine = engines(pair, models, [GUIDANCE])
    requests = asked(4, [GUIDANCE], **fixed)
    theirs, ours = plain.generate(requests), engine.generate(requests)
    assert [one.token_ids for one in ours] == [one.token_ids for one in theirs]
    assert engine.replays.replayed == 0


def test_a_steady_step_is_one_replay_and_one_copy_to_the_host(pair, models):
    _, engine = engines(pair, models, [COMPOSED])
    for request in asked(2, [COMPOSED], max_new_tokens=30, ignore_eos=True, params=SamplingParams()):
        engine.submit(request)
    for _ in range(4):
        engine.step()
    with Outside(engine.replays) as outside:
        before = engine.replays.replayed
        engine.step()
    assert engine.replays.replayed == before + 1
    assert outside.names == ["empty", "copy_"]


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        ([("base", "three")], "there is no model 'three'; choose from"),
        ([("one", "two")], "without 'base', which every text has; add it"),
        ([("base",) * 5], "there are 4 slots of 'base'; make slots larger"),
        ([("base", "t5")], "steps of 't5' tell positions by columns of a cache; leave it out"),
    ],
    ids=str,
)
def test_shapes_that_cannot_be_recorded_are_refused(pair, models, shapes, told):
    with pytest.raises(ValueError, match=told):
        engines(pair, models, shapes)


def test_without_a_gpu_shapes_are_refused(pair):
    with pytest.raises(ValueError, match="graphs cannot be recorded: they need a GPU"):
        Engine(pair, TEXT, graphs=[GUIDANCE], **ROOM)
