"""A decoding step as one graph: what it writes, what the host does beside it, and when it looks."""

import functools
import random

import pytest
import torch

from auxkern.generation import Engine, Request, drawing
from auxkern.generation.drawing import RECORDED_ACTS, Acts
from auxkern.generation.rows import BIASES, Rows
from auxkern.model import TextFormat
from auxkern.ops.sampling_params import SamplingParams
from tests.support.replaying import Outside, Recorded
from tests.support.tiny import KIND, PAIRS, byte_tokenizer, tiny_lm_for, tiny_pair, with_two_more

TOKENIZER = byte_tokenizer()
TEXT = TextFormat(TOKENIZER)
ROOM = {"slots": 5, "max_length": 48, "max_condition": 8}
KINDS = [kind for kind in PAIRS if PAIRS[kind].get("lm_term") != "logits"]
PARAMS = [
    {},
    {"temperature": 0.7},
    {"top_k": 5, "top_p": 0.9},
    {"min_p": 0.1, "temperature": 1.3},
    {"repetition_penalty": 1.3, "presence_penalty": 0.5},
    {"frequency_penalty": 0.4, "top_k": 9},
    {"temperature": 0.0, "repetition_penalty": 1.5},
    {"logit_bias": {65: 2.0, 70: -float("inf")}},
    {"logit_bias": {id: -0.1 - 0.01 * id for id in range(BIASES + 1)}},
]


@pytest.fixture(autouse=True)
def seen_operations(monkeypatch):
    """Draws in torch's own operations: a native kernel would not be seen, and so not be done again."""
    monkeypatch.setattr(drawing, "sample", functools.partial(drawing.sample, backend="reference"))


@pytest.fixture(scope="module")
def model():
    return tiny_pair(KIND, tiny_lm_for(TOKENIZER))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return with_two_more(tiny_lm_for(TOKENIZER), tmp_path_factory.mktemp("auxiliaries"))


def _requests(count, seed=0, **fixed):
    """Requests of all kinds, at first those of few, so that every recorded draw has its turn."""
    chosen = random.Random(seed)

    def letters(least, most):
        return "".join(chosen.choice("abcdefgh ") for _ in range(chosen.randint(least, most)))

    return [
        Request(
            number,
            **{
                "condition": letters(1, 6),
                "prompt": letters(0, 9),
                "seed": 100 * seed + number,
                "max_new_tokens": chosen.randint(1, 30),
                "stop": tuple("abcdefghijklmnopqrst") if chosen.random() < 0.5 else (),
                "ignore_eos": chosen.random() < 0.5,
                "aux_scale": None if "auxiliary" in fixed else chosen.choice([None, 0.3, 1.7]),
                "params": SamplingParams(**chosen.choice(PARAMS[: 1 + number * len(PARAMS) // count])),
                **fixed,
            },
        )
        for number in range(count)
    ]


def _check(model, requests):
    """Both engines write the same; the recorded one."""
    plain, engine = Engine(model, TEXT, **ROOM), Recorded(model, TEXT, **ROOM)
    known = engine.replays.recorded
    expected, completions = plain.generate(requests), engine.generate(requests)
    assert completions == expected
    assert engine.stats.new_tokens == plain.stats.new_tokens
    assert engine.replays.recorded == known, "a step was recorded while texts were written"
    assert engine.replays.replayed > 0
    return engine, completions


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_is_replayed_writes_the_same_texts(kind):
    """Columns are moved back (48 of 60 are soon used up), slots are left and taken, draws of every kind."""
    model = tiny_pair(kind, tiny_lm_for(TOKENIZER))
    # The encoder-decoder's steps are not recorded: it compares columns. Those of the base alone are.
    fixed = {"auxiliary": None} if kind == "encoder-decoder" else {}
    engine, completions = _check(model, _requests(30, **fixed))
    assert engine.stats.steps > 70
    assert {done.finish_reason for done in completions} >= {"length", "stop"}


@pytest.mark.parametrize("acts", RECORDED_ACTS)
def test_every_kind_of_draw_is_replayed(model, acts, monkeypatch):
    """Alone in the table of kinds, and so the one that is used."""
    monkeypatch.setattr("auxkern.generation.graphs.RECORDED_ACTS", (acts,))
    asked = {"top_p": 0.9} if acts.filters else {}
    asked |= {"frequency_penalty": 0.5, "logit_bias": {66: 1.0}} if acts.penalties else {}
    requests = _requests(8, params=SamplingParams(**asked))
    assert Acts.of([one for request in requests for one in request.sequences([1], [])]).within(acts)
    engine, _ = _check(model, requests)
    assert engine.replays.replayed >= 0.7 * engine.stats.steps


def test_auxiliaries_weights_and_log_probabilities_mix_with_replays(three):
    """Steps that are not recorded stand between replays, and hand over to each other."""
    plain, engine = Engine(three, TEXT, **ROOM), Recorded(three, TEXT, **ROOM)
    for seed, names in enumerate((["default", "t5", "own", None], ["own"], [None, "default"], ["default"])):
        requests = []
        for number, request in enumerate(_requests(8, seed=seed)):
            name = names[number % len(names)]
            scale = None if name is None else request.aux_scale
            fields = {"auxiliary": name, "aux_scale": scale, "logprobs": number == 3}
            requests.append(Request(**{**vars(request), **fields}))
        for theirs, ours in zip(plain.generate(requests), engine.generate(requests), strict=True):
            assert ours.token_ids == theirs.token_ids
            assert ours.finish_reason == theirs.finish_reason
            if theirs.logprobs is not None:
                assert ours.logprobs.raw == pytest.approx(
                    theirs.logprobs.raw, abs=1e-4
                )  # sums of other widths
    assert 0.1 * engine.stats.steps < engine.replays.replayed < 0.9 * engine.stats.steps


def test_nothing_but_one_replay_and_one_copy_to_the_host_is_done_in_a_steady_step(model):
    engine = Recorded(model, TEXT, **ROOM)
    for request in _requests(5, max_new_tokens=30, ignore_eos=True, stop=()):
        engine.submit(request)
    engine.step()
    engine.step()
    for _ in range(8):
        before = engine.replays.replayed
        with Outside(engine.replays) as outside:
            engine.step()
        assert engine.replays.replayed == before + 1
        # Memory for the copy, and the copy; no number is sent, and none of a device's tensor is asked for.
        assert outside.names == ["empty", "copy_"]


def test_the_host_looks_at_tokens_after_the_next_step_has_begun(model, monkeypatch):
    engine, events = Recorded(model, TEXT, **ROOM), []
    result = drawing.Pending.result
    monkeypatch.setattr(
        drawing.Pending, "result", lambda pending: events.append(engine.replays.replayed) or result(pending)
    )
    for request in _requests(5, max_new_tokens=9, ignore_eos=True, stop=()):
        engine.submit(request)
    for number in range(6):
        engine.step()
        # The prefill's tokens are looked at behind the first replay, its tokens behind the second, ...
        assert events == list(range(1, number + 1))
        assert all(len(one.generated) == number for one in engine.scheduler.running)


def test_a_length_that_is_known_takes_no_step_too_many(model):
    requests = [Request(i, "ab", seed=i, max_new_tokens=4, ignore_eos=True) for i in range(3)]
    engine = Recorded(model, TEXT, **{**ROOM, "slots": 1})
    engine.generate(requests)
    assert engine.stats.steps == 12
    assert engine.stats.new_tokens == 12


def test_a_text_that_ends_otherwise_takes_one_and_leaves_then(model):
    (whole,) = Engine(model, TEXT, **ROOM).generate(
        [Request(0, "ab", seed=1, max_new_tokens=30, ignore_eos=True)]
    )
    token = whole.token_ids[5]
    first = whole.token_ids.index(token)
    requests = [
        Request(i, "ab", seed=1, max_new_tokens=30, ignore_eos=True, stop_token_ids=(token,))
        for i in range(2)
    ]
    engine = Recorded(model, TEXT, **{**ROOM, "slots": 1})
    for done in engine.generate(requests):
        assert done.token_ids == whole.token_ids[: first + 1]
    assert engine.stats.steps == 2 * (first + 2)
    assert engine.stats.new_tokens == 2 * (first + 1)


def test_a_text_of_nan_fails_alone_and_its_row_goes_on_harmlessly(three, tmp_path):
    broken = with_two_more(tiny_lm_for(TOKENIZER), tmp_path)
    with torch.no_grad():
        broken._named("own").head.weight.fill_(float("nan"))
    requests = [Request(i, "ab", seed=i, max_new_tokens=9, auxiliary="own") for i in range(3)]
    sound = [Request(10 + i, "ab", seed=i, max_new_tokens=9) for i in range(3)]
    engine = Recorded(broken, TEXT, **ROOM)
    assert all("NaN" in done.error for done in engine.generate(requests))
    assert engine.generate(sound) == Engine(three, TEXT, **ROOM).generate(sound)


def test_a_request_that_is_cancelled_while_its_token_is_on_its_way_is_gone(model):
    requests = _requests(7, seed=3, max_new_tokens=12, ignore_eos=True, stop=())
    want = {done.id: done for done in Engine(model, TEXT, **ROOM).generate(requests)}
    engine, done = Recorded(model, TEXT, **ROOM), []
    for request in requests:
        engine.submit(request)
    for _ in range(4):
        done += engine.step()
    assert engine.cancel(1) == 1
    while not engine.scheduler.idle:
        done += engine.step()
    assert {one.id: one for one in done} == {id: one for id, one in want.items() if id != 1}


def test_rows_move_with_their_sequences_and_newcomers_leave_nothing_of_others():
    """Against what a plain list of sequences says, through 200 changes."""
    chosen, rows, running = random.Random(0), Rows(4, 16, torch.device("cpu")), []
    for number in range(200):
        if running and chosen.random() < 0.4:
            gone = chosen.randrange(len(running))
            last = len(running) - 1
            rows.leave([] if gone == last else [(last, gone)], last)
            running[gone] = running[last]
            running.pop()
        if len(running) < 4 and chosen.random() < 0.7:
            params = SamplingParams(**chosen.choice(PARAMS))
            request = Request(number, seed=number, params=params, max_new_tokens=8)
            (new,) = request.sequences(range(1, chosen.randint(2, 6)), [])
            new.generated += [5] * chosen.randint(0, 2)
            rows.join(len(running), [new], [0.5 * number])
            running.append(new)
        if running:
            tokens = [chosen.randrange(200) for _ in running]
            rows.feed(slice(0, len(running)), torch.tensor(tokens))
            for one, token in zip(running, tokens, strict=True):
                one.generated.append(token)
        assert rows["live"].tolist() == [1] * len(running) + [0] * (4 - len(running))
        for slot, one in enumerate(running):
            assert rows["last"][slot] == one.generated[-1]
            assert rows["position"][slot] == one.length
            history = rows["history"][slot].tolist()
            assert history == one.generated + [-1] * (16 - len(one.generated))
            assert rows["prompt"][slot].tolist() == [*one.prompt_ids] + [-1] * (16 - len(one.prompt_ids))
            assert rows["seed"][slot] == one.request.id
            assert rows["scale"][slot] == 0.5 * one.request.id
            assert rows["top_k"][slot] == one.request.params.top_k
            assert rows["frequency_penalty"][slot] == one.request.params.frequency_penalty
            bias = rows["bias"][slot][rows["bias"][slot] != 0]
            assert len(bias) == min(
                BIASES, sum(x != 0 for x in (one.request.params.logit_bias or {}).values())
            )
        for one in [one for one in running if len(one.generated) >= 8]:
            slot, last = running.index(one), len(running) - 1
            rows.leave([] if slot == last else [(last, slot)], last)
            running[slot] = running[last]
            running.pop()
