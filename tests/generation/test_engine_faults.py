"""The engine after callbacks that misbehave, Ctrl-C at any line, and requests that no model can read."""

import random
import sys

import pytest
import torch

import auxkern.generation
from auxkern.generation import Engine, Request
from auxkern.model import TextFormat
from auxkern.ops.sampling_params import SamplingParams
from tests.support.replaying import Repeated
from tests.support.tiny import DECODER, byte_tokenizer, tiny_lm_for, tiny_pair, with_two_more

TEXT = TextFormat(byte_tokenizer())
HERE = auxkern.generation.__path__[0]
REQUESTS = [
    Request(i, "cond"[: 1 + i % 4], "p" * i, seed=i, max_new_tokens=6 + i, ignore_eos=True) for i in range(5)
]


@pytest.fixture(scope="module")
def model():
    return tiny_pair("shared head, features, pointer", tiny_lm_for(TEXT.tokenizer))


@pytest.fixture(scope="module")
def want(model):
    return {done.id: done for done in _engine(model).generate(REQUESTS)}


@pytest.fixture(params=[Engine, Repeated], ids=["single steps", "recorded steps"])
def kind(request):
    """Of an engine: with recorded steps tokens are on their way when things go wrong."""
    return request.param


def _engine(model, kind=Engine, **options):
    return kind(model, TEXT, **{"slots": 3, "max_length": 32, "max_condition": 8, **options})


def _drained(engine):
    found = []
    while not engine.scheduler.idle:
        found += engine.step()
    return found


@pytest.mark.parametrize("at", [1, 4, 7, 20, "last", "always"])
def test_a_callback_that_raises_changes_no_text(model, want, at, kind):
    told, calls = dict.fromkeys(want, ""), 0
    total = sum(map(len, (done.text for done in want.values())))

    def tell(id, sample, piece):
        nonlocal calls
        calls += 1
        told[id] += piece
        if at == "always" or calls == at or (at == "last" and sum(map(len, told.values())) == total):
            raise RuntimeError("the client is gone")

    engine, found, errors = _engine(model, kind, on_text=tell), {}, 0
    for request in REQUESTS:
        engine.submit(request)
    while not engine.scheduler.idle:
        try:
            found |= {done.id: done for done in engine.step()}
        except RuntimeError:
            errors += 1
    assert errors == (calls if at == "always" else 1)
    assert found == want
    assert told == {id: done.text for id, done in want.items()}


def test_an_error_of_a_callback_comes_out_of_generate(model, want, kind):
    def tell(*piece):
        raise RuntimeError("the client is gone")

    engine = _engine(model, kind, on_text=tell)
    with pytest.raises(RuntimeError, match="client is gone"):
        engine.generate(REQUESTS)
    assert engine.scheduler.idle
    engine.on_text = None
    assert {done.id: done for done in engine.generate(REQUESTS)} == want


def test_a_callback_may_cancel(model, want, kind):
    def tell(id, sample, piece):
        engine.cancel(2)
        engine.cancel(3)

    engine = _engine(model, kind, on_text=tell)
    done = {one.id: one for one in engine.generate(REQUESTS)}
    assert {id: done[id] for id in (0, 1, 4)} == {id: want[id] for id in (0, 1, 4)}
    assert done[2].error == done[3].error == "it was cancelled"


def test_a_callback_may_submit_and_its_texts_are_kept(model, want, kind):
    def tell(id, sample, piece):
        if not submitted:
            submitted.append(id)
            engine.submit(REQUESTS[4])

    submitted = []
    engine = _engine(model, kind, on_text=tell)
    first = engine.generate(REQUESTS[:3])
    assert [*first, *_drained(engine)] == [want[id] for id in (0, 1, 2, 4)]


def test_a_callback_may_generate(model, want, kind):
    def tell(id, sample, piece):
        if not inner:
            inner.append(None)
            inner[0] = engine.generate(REQUESTS[3:])

    inner = []
    engine = _engine(model, kind, on_text=tell)
    outer = engine.generate(REQUESTS[:3])
    assert [*outer, *inner[0]] == [want[id] for id in range(5)]


def test_what_was_submitted_before_goes_on_beside_generate(model, want, kind):
    engine = _engine(model, kind)
    engine.submit(REQUESTS[0])
    engine.step()
    assert engine.generate(REQUESTS[1:3]) == [want[1], want[2]]
    assert _drained(engine) == [want[0]]


@pytest.mark.parametrize("twice", [[0, 1, 0], [0, 4]])
def test_an_id_that_is_taken_begins_nothing(model, want, twice):
    engine = _engine(model)
    engine.submit(REQUESTS[4])
    with pytest.raises(ValueError, match="ids must differ"):
        engine.generate([REQUESTS[i] for i in twice])
    assert [one.request.id for one in engine.scheduler.sequences] == [4]
    assert _drained(engine) == [want[4]]
    assert engine.generate(REQUESTS) == list(want.values())


class Interrupted:
    """Raises KeyboardInterrupt at the n-th line of the package's generation that runs."""

    def __init__(self, line):
        self.left, self.where = line, None

    def __enter__(self):
        sys.settrace(self._call)
        return self

    def __exit__(self, *exception):
        sys.settrace(None)

    def _call(self, frame, event, argument):
        return self._line if frame.f_code.co_filename.startswith(HERE) else None

    def _line(self, frame, event, argument):
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
                raise KeyboardInterrupt
        return self._line


def _lines(call):
    counting = Interrupted(10**9)
    with counting:
        call()
    return 10**9 - counting.left


BLOCKS = [(Engine, 0), (Engine, 1), (Engine, 2), (Repeated, 3), (Repeated, 4)]


@pytest.fixture(scope="module")
def small():
    """One layer, for many runs."""
    config = {**DECODER, "num_hidden_layers": 1}
    return tiny_pair("own head", tiny_lm_for(TEXT.tokenizer, num_hidden_layers=1), auxiliary_config=config)


@pytest.mark.parametrize(("kind", "block"), BLOCKS)
def test_after_ctrl_c_at_any_line_of_generate_the_engine_is_as_new(small, kind, block):
    requests = [Request(i, "ab", "p" * i, seed=i, max_new_tokens=2 + i, stop=("zq",)) for i in range(3)]
    engine = _engine(small, kind, slots=2, on_text=lambda *piece: None)
    want = engine.generate(requests)
    lines = _lines(lambda: engine.generate(requests))
    for line in random.Random(block).sample(range(1, lines), 40):
        with Interrupted(line) as stop, pytest.raises(KeyboardInterrupt):
            engine.generate(requests)
        assert engine.generate(requests) == want, stop.where
        assert engine.scheduler.idle


@pytest.mark.parametrize(("kind", "block"), BLOCKS)
def test_after_ctrl_c_at_any_line_of_a_step_every_text_goes_on(small, kind, block):
    requests = [Request(i, "ab", "p" * i, seed=i, max_new_tokens=3 + i, logprobs=True) for i in range(4)]
    told = {}
    engine = _engine(
        small, kind, slots=2, on_text=lambda id, sample, piece: told.__setitem__(id, told.get(id, "") + piece)
    )
    want = {done.id: done for done in engine.generate(requests)}
    texts = dict(told)

    def run():
        found = {}
        for request in requests:
            engine.submit(request)
        while not engine.scheduler.idle:
            found |= {done.id: done for done in engine.step()}
        return found

    lines = _lines(run)
    for line in random.Random(100 + block).sample(range(1, lines), 40):
        told.clear()
        found, submitted = {}, 0
        with Interrupted(line) as stop:
            while True:
                try:
                    if submitted < len(requests):
                        engine.submit(requests[submitted])
                        submitted += 1
                        continue
                    if engine.scheduler.idle:
                        break
                    found |= {done.id: done for done in engine.step()}
                except KeyboardInterrupt:
                    known = {one.request.id for one in engine.scheduler.sequences}
                    submitted += submitted < len(requests) and submitted in known
        assert found.keys() == want.keys(), stop.where
        for id, done in found.items():
            assert done.token_ids == want[id].token_ids, stop.where
            assert done.logprobs.raw == pytest.approx(want[id].logprobs.raw, abs=1e-4)
        assert {id: len(text) for id, text in told.items()} == {id: len(text) for id, text in texts.items()}


def test_a_model_that_fails_once_costs_no_text(model, want, monkeypatch, kind):
    engine, calls = _engine(model, kind), []
    terms = type(model).terms

    def sometimes(self, *inputs, **options):
        calls.append(None)
        if len(calls) % 3 == 0:
            raise RuntimeError("out of memory")
        return terms(self, *inputs, **options)

    monkeypatch.setattr(type(model), "terms", sometimes)
    for request in REQUESTS:
        engine.submit(request)
    found = {}
    while not engine.scheduler.idle:
        try:
            found |= {done.id: done for done in engine.step()}
        except RuntimeError:
            continue
    assert {id: done.token_ids for id, done in found.items()} == {
        id: done.token_ids for id, done in want.items()
    }


def _alone(model, bad, **options):
    """The error of a request, which costs another one nothing."""
    good = Request("good", "a", seed=1, max_new_tokens=4)
    engine = _engine(model, **options)
    (expected,) = engine.generate([good])
    failed, done = engine.generate([bad, good])
    assert done == expected
    assert failed.finish_reason == "error"
    assert engine.scheduler.idle
    return failed.error


def test_a_text_beyond_an_auxiliarys_positions_fails_alone():
    learned = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 24}
    model = tiny_pair("own head", tiny_lm_for(TEXT.tokenizer), auxiliary_config=learned)
    error = _alone(model, Request("long", "abc", "b" * 10, max_new_tokens=12, ignore_eos=True))
    assert "take 26 positions, but auxiliary 'default' has 24" in error
    (fits,) = _engine(model).generate([Request("fits", "abc", "b" * 10, max_new_tokens=10, ignore_eos=True)])
    assert fits.new_tokens == 10


@pytest.mark.parametrize(
    "request_", [Request("bad", "a", "é"), Request("bad", "é", "a")], ids=["prompt", "condition"]
)
def test_ids_that_the_models_lack_fail_alone(request_):
    text_ids = TEXT.tokenizer("é")["input_ids"]
    V = min(text_ids)
    lm = tiny_lm_for(TEXT.tokenizer)
    lm.resize_token_embeddings(V)
    lm.config.bos_token_id = lm.generation_config.bos_token_id = None
    model = tiny_pair("own head", lm)
    letters = TextFormat(byte_tokenizer(start=None, end="a", padding=None))
    engine = Engine(model, letters, slots=2, max_length=32, max_condition=8)
    (failed,) = engine.generate([Request(**{**vars(request_), "max_new_tokens": 4})])
    assert f"but the models have {V} ids" in failed.error
    assert engine.scheduler.idle


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"condition": "a" * 9}, "room for 8"),
        ({"max_new_tokens": 10**18}, "lower max_new_tokens"),
        ({"prompt": "a" * 40}, "shorten the prompt"),
        ({"auxiliary": "nobody"}, "no auxiliary 'nobody'"),
        ({"stop_token_ids": (10**6,)}, "stop_token_ids has the id 1000000"),
        ({"params": SamplingParams(logit_bias={10**6: 1.0})}, "logit_bias has the id 1000000"),
    ],
)
def test_what_cannot_be_served_fails_alone(model, fields, message):
    assert message in _alone(model, Request("bad", **{"condition": "a", "max_new_tokens": 4, **fields}))


def test_a_text_of_nan_fails_alone(tmp_path):
    three = with_two_more(tiny_lm_for(TEXT.tokenizer), tmp_path)
    with torch.no_grad():
        three._named("own").head.weight.fill_(float("nan"))
    assert "NaN" in _alone(three, Request("bad", "a", auxiliary="own", max_new_tokens=4))


@pytest.mark.parametrize("begun", [False, True])
def test_an_auxiliary_that_is_gone_is_an_error_of_its_requests(tmp_path, begun, kind):
    three = with_two_more(tiny_lm_for(TEXT.tokenizer), tmp_path)
    engine = _engine(three, kind, slots=4)
    asked = [
        Request(name, "ab", seed=1, max_new_tokens=6, auxiliary=name) for name in ("own", "default", "t5")
    ]
    (expected,) = engine.generate(asked[2:])
    if begun:
        for request in asked:
            engine.submit(request)
        engine.step()
    del three._others["own"]
    found = {done.id: done for done in (_drained(engine) if begun else engine.generate(asked))}
    assert "has been unloaded" in found["own"].error
    assert found["t5"] == expected
    assert found["default"].error is None
