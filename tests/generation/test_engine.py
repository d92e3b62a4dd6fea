"""The engine: what it writes is what ``model.generate`` writes for each request alone."""

import random

import pytest
import torch

from auxkern.generation import Engine, Request
from auxkern.generation.scheduler import closing_moves
from auxkern.generation.slots import SlotTable
from auxkern.model import TextFormat
from auxkern.ops.sampling_params import SamplingParams
from tests.support.replaying import Repeated
from tests.support.tiny import DECODER, PAIRS, byte_tokenizer, tiny_lm_for, tiny_pair, with_two_more

KINDS = [kind for kind in PAIRS if PAIRS[kind].get("lm_term") != "logits"]
TOKENIZER = byte_tokenizer()
TEXT = TextFormat(TOKENIZER)


def _lm(**options):
    return tiny_lm_for(TOKENIZER, **options)


def _requests(count, seed=0, **fixed):
    """Requests of different lengths, filters, penalties and numbers of samples."""
    chosen = random.Random(seed)

    def letters(least, most):
        return "".join(chosen.choice("abcdefgh ") for _ in range(chosen.randint(least, most)))

    requests = []
    for number in range(count):
        params = SamplingParams(
            top_k=chosen.choice([0, 5]),
            top_p=chosen.choice([1.0, 0.9]),
            temperature=chosen.choice([1.0, 0.7]),
            repetition_penalty=chosen.choice([1.0, 1.3]),
        )
        fields = {
            "condition": letters(1, 6),
            "prompt": letters(0, 9),
            "seed": 100 + number,
            "max_new_tokens": chosen.randint(1, 30),
            "samples": chosen.choice([1, 1, 3]),
            "params": params,
            **fixed,
        }
        requests.append(Request(number, **fields))
    return requests


def _alone(model, request, seed):
    """What generate writes for one request."""
    batch = TEXT.prompts([request.condition], [request.prompt])
    params = request.params
    drawn = params.temperature > 0
    options = (
        {"temperature": params.temperature, "top_k": params.top_k, "top_p": params.top_p} if drawn else {}
    )
    ids = model.generate(
        **batch,
        do_sample=drawn,
        max_new_tokens=request.max_new_tokens,
        seeds=[seed],
        repetition_penalty=params.repetition_penalty,
        auxiliary=request.auxiliary,
        aux_scale=request.aux_scale,
        **options,
    )
    return ids[0, batch["input_ids"].shape[1] :].tolist()


def _check(model, requests, **options):
    engine = Engine(model, TEXT, **{"slots": 4, "max_length": 48, "max_condition": 8, **options})
    by_id = {request.id: request for request in requests}
    completions = engine.generate(requests)
    assert len(completions) == sum(request.samples for request in requests)
    for done in completions:
        assert list(done.token_ids) == _alone(model, by_id[done.id], done.seed), done
    return engine, completions


@pytest.mark.parametrize("kind", KINDS)
def test_many_requests_through_few_slots_are_each_what_they_are_alone(kind):
    """Two caches per text, places taken over, columns moved back: 48 columns of 60 are soon used up."""
    engine, completions = _check(tiny_pair(kind, _lm()), _requests(16))
    assert engine.stats.steps > 64, "the table's columns were never moved back"
    assert engine.stats.new_tokens == sum(done.new_tokens for done in completions)
    reasons = {done.finish_reason for done in completions}
    assert reasons >= {"length"}


def test_order_and_slots_do_not_change_a_text():
    model, requests = tiny_pair("shared head, features, pointer", _lm()), _requests(12)
    engine = {"max_length": 48, "max_condition": 8}
    known = {(d.id, d.sample): d for d in Engine(model, TEXT, slots=1, **engine).generate(requests)}
    for slots, order in ((3, requests), (8, requests[::-1])):
        for done in Engine(model, TEXT, slots=slots, **engine).generate(order):
            assert done == known[done.id, done.sample]


@pytest.mark.parametrize("kind", ["own head", "shared head, features, pointer"])
def test_with_native_kernels_a_batch_changes_nothing_to_the_last_bit(kind, threads):
    """Slots, order, other requests and threads: tokens and every log-probability are equal."""
    one_head = {**DECODER, "num_attention_heads": 1}  # 16 wide, which the kernels take
    model = tiny_pair(kind, _lm(num_attention_heads=2), auxiliary_config=one_head).use_native_kernels()
    requests = _requests(12, seed=5, logprobs=True)

    def written(slots, order, count):
        torch.set_num_threads(count)
        engine = Engine(model, TEXT, slots=slots, max_length=48, max_condition=8)
        return {(done.id, done.sample): done for done in engine.generate(requests[i] for i in order)}

    alone = written(1, range(12), 1)
    for slots in (3, 20):
        assert written(slots, reversed(range(12)), 2) == alone
    few = written(5, [7, 2], 2)
    assert few == {key: alone[key] for key in few}


def test_greedy_texts_and_samples_of_one_prompt():
    model = tiny_pair("shared head, features, pointer", _lm())
    greedy = _requests(5, params=SamplingParams(temperature=0.0), samples=1)
    _check(model, greedy)
    _, completions = _check(model, [Request("one", condition="ab", seed=3, max_new_tokens=12, samples=6)])
    assert len({done.token_ids for done in completions}) > 1


@pytest.fixture
def three(tmp_path):
    return with_two_more(_lm(), tmp_path)


def test_auxiliaries_and_mixing_weights_by_request(three):
    requests = []
    for number, name in enumerate(["t5", None, "own", "default", "own", "t5", None, "default", "t5"]):
        scale = None if name is None or number % 2 else 0.5
        (request,) = _requests(1, seed=number, auxiliary=name, aux_scale=scale, samples=1)
        requests.append(Request(**{**vars(request), "id": number}))
    _check(three, requests, slots=3)


def test_stop_strings_end_a_text_and_are_not_part_of_it():
    model = tiny_pair("own head", _lm())
    (whole,) = Engine(model, TEXT, slots=1, max_length=64).generate(
        [Request(0, condition="x", seed=1, max_new_tokens=40, ignore_eos=True)]
    )
    stop = whole.text[6:8]
    pieces = []
    engine = Engine(model, TEXT, slots=1, max_length=64, on_text=lambda *piece: pieces.append(piece))
    request = Request("r", condition="x", seed=1, max_new_tokens=40, stop=(stop,), ignore_eos=True)
    (done,) = engine.generate([request])
    assert done.finish_reason == "stop"
    assert done.text == whole.text[: whole.text.index(stop)]
    assert "".join(piece for _, _, piece in pieces) == done.text
    assert {(id, sample) for id, sample, _ in pieces} == {("r", 0)}


def test_logprobs_are_those_of_each_model(three):
    requests = [
        Request(
            number,
            condition="abc"[: number + 1],
            seed=number,
            max_new_tokens=6,
            auxiliary=name,
            logprobs=True,
        )
        for number, name in enumerate(["default", "own", None])
    ]
    for request in requests:
        (done,) = Engine(three, TEXT, slots=2, max_length=32).generate([request])
        batch = TEXT.prompts([request.condition], [""])
        ids = torch.cat([batch["input_ids"], torch.tensor([done.token_ids])], 1)
        first = batch["input_ids"].shape[1] - 1
        picked = torch.tensor(done.token_ids)[:, None]

        def logprobs(logits, first=first, picked=picked):
            return logits[0, first:-1].log_softmax(-1).gather(1, picked)[:, 0]

        lm = three.lm(ids).logits
        torch.testing.assert_close(torch.tensor(done.logprobs.lm), logprobs(lm), rtol=1e-4, atol=1e-5)
        if request.auxiliary is None:
            assert done.logprobs.auxiliary is None
            continue
        names = three.auxiliary_names
        pair = three(
            ids,
            condition_ids=batch["condition_ids"],
            condition_mask=batch["condition_mask"],
            auxiliary_ids=torch.tensor([names.index(request.auxiliary)]),
        ).logits
        torch.testing.assert_close(torch.tensor(done.logprobs.raw), logprobs(pair), rtol=1e-4, atol=1e-4)
        auxiliary = logprobs(pair - lm)
        torch.testing.assert_close(torch.tensor(done.logprobs.auxiliary), auxiliary, rtol=1e-4, atol=1e-4)


def test_a_request_that_cannot_be_served_fails_alone():
    model = tiny_pair("own head", _lm())
    engine = Engine(model, TEXT, slots=2, max_length=24, max_condition=4)
    good = Request("good", condition="a", seed=1, max_new_tokens=4)
    bad = [
        Request("long", condition="a", prompt="b" * 40, max_new_tokens=4),
        Request("condition", condition="abcdefgh", max_new_tokens=4),
        Request("nobody", condition="a", auxiliary="nobody", max_new_tokens=4, samples=2),
    ]
    completions = engine.generate([bad[0], good, *bad[1:]])
    assert [done.id for done in completions] == ["long", "good", "condition", "nobody", "nobody"]
    assert [done.finish_reason == "error" for done in completions] == [True, False, True, True, True]
    assert "shorten the prompt" in completions[0].error
    assert "room for 4" in completions[2].error
    assert "no auxiliary 'nobody'" in completions[3].error
    assert completions[1].new_tokens > 0


def test_a_cancelled_request_leaves_the_others_alone():
    model, requests = tiny_pair("shared head, features, pointer", _lm()), _requests(6, max_new_tokens=20)
    engine = Engine(model, TEXT, slots=3, max_length=48, max_condition=8)
    for request in requests:
        engine.submit(request)
    found = []
    for _ in range(5):
        found += engine.step()
    gone = engine.scheduler.running[0].request
    assert engine.cancel(gone.id) >= 1
    assert engine.cancel("nobody") == 0
    while not engine.scheduler.idle:
        found += engine.step()
    assert gone.id not in {done.id for done in found if done.finish_reason == "length"}
    for done in found:
        assert list(done.token_ids) == _alone(model, requests[done.id], done.seed)


def test_broken_logits_are_an_error_of_their_request(three, monkeypatch):
    with torch.no_grad():
        three._named("own").head.weight.fill_(float("nan"))
    requests = [
        Request("broken", condition="a", auxiliary="own", seed=1, max_new_tokens=5),
        Request("sound", condition="a", auxiliary="default", seed=2, max_new_tokens=5),
    ]
    broken, sound = Engine(three, TEXT, slots=2, max_length=24).generate(requests)
    assert broken.finish_reason == "error"
    assert "NaN" in broken.error
    assert list(sound.token_ids) == _alone(three, requests[1], sound.seed)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_that_are_recorded_write_the_same_texts(kind):
    model, requests = tiny_pair(kind, _lm()), _requests(14, seed=3)
    plain = Engine(model, TEXT, slots=5, max_length=48, max_condition=8).generate(requests)
    engine = Repeated(model, TEXT, slots=5, max_length=48, max_condition=8)
    # With the auxiliary, if its steps can be recorded, and without; 1, 2, 4 and 5 slots; 3 kinds of draws.
    expected = 12 if kind == "encoder-decoder" else 24
    assert engine.recorded == expected
    assert [done.token_ids for done in engine.generate(requests)] == [done.token_ids for done in plain]
    assert engine.recorded == expected


def test_steps_that_are_recorded_serve_every_mix(three):
    chosen = [
        {"auxiliary": None},
        {"auxiliary": "t5"},
        {"auxiliary": "own", "aux_scale": 0.3},
        {"logprobs": True},
    ]
    requests = [
        Request(
            i, "ab", **{"auxiliary": "default", **chosen[i // 3 % 4]}, seed=i, max_new_tokens=4 + 3 * (i % 5)
        )
        for i in range(24)
    ]
    plain = Engine(three, TEXT, slots=3, max_length=32, max_condition=8).generate(requests)
    engine = Repeated(three, TEXT, slots=3, max_length=32, max_condition=8)
    found = engine.generate(requests)
    assert [done.token_ids for done in found] == [done.token_ids for done in plain]
    for ours, theirs in zip(found, plain, strict=True):
        if ours.logprobs is not None:
            assert ours.logprobs.raw == pytest.approx(theirs.logprobs.raw, abs=1e-4)


def test_an_engine_that_cannot_work_says_so():
    model = tiny_pair("own head", _lm(max_position_embeddings=64))
    with pytest.raises(ValueError, match="max_length is 65, but the base has positions for 64"):
        Engine(model, TEXT, max_length=65)
    with pytest.raises(
        ValueError, match="graphs cannot be recorded: they need a GPU, and the model is on cpu"
    ):
        Engine(model, TEXT, max_length=32, graphs=True)
    with pytest.raises(ValueError, match=r"Use model\.generate"):
        Engine(tiny_pair("the LM's own logits", _lm()), TEXT, max_length=32)


@pytest.mark.parametrize("fixed", [False, True])
def test_a_table_keeps_each_sequence_through_moves(fixed):
    """Against a plain list of columns for each sequence."""
    from transformers import DynamicCache

    generator = torch.Generator().manual_seed(0)
    table, plain = SlotTable(4, 12, torch.device("cpu"), fixed=fixed), []
    first = DynamicCache()
    first.update(torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 3), 0)
    table.reserve(first)
    chosen = random.Random(0)
    for _ in range(300):
        if plain:
            new = torch.randn(len(plain), 2, 1, 3, generator=generator)
            keys, values = table.cache.update(new, -new, 0)
            if fixed:
                assert torch.equal(keys[:, :, -1], new[:, :, 0])
                keys, values = keys[:, :, :-1], values[:, :, :-1]
            table.advance()
            window = table.window
            for row, columns in enumerate(plain):
                columns.append(new[row, :, 0])
                real = window[row] != 0
                assert int(real.sum()) == len(columns)
                assert torch.equal(keys[row][:, real], torch.stack(columns, 1))
                assert torch.equal(values[row][:, real], -torch.stack(columns, 1))
        ended = [row for row, columns in enumerate(plain) if len(columns) >= 11 or chosen.random() < 0.2]
        if ended:
            moves = closing_moves(len(plain), ended)
            table.leave(moves, len(plain) - len(ended))
            for source, destination in moves:
                plain[destination] = plain[source]
            del plain[len(plain) - len(ended) :]
        joining = min(4 - len(plain), chosen.randint(0, 2))
        if joining:
            width = chosen.randint(1, 6)
            lengths = [chosen.randint(1, width) for _ in range(joining)]
            mask = torch.tensor([[0] * (width - n) + [1] * n for n in lengths])
            cache = DynamicCache()
            keys = torch.randn(joining, 2, width, 3, generator=generator)
            cache.update(keys, -keys, 0)
            table.join(cache, mask)
            plain += [list(keys[row, :, width - n :].unbind(1)) for row, n in enumerate(lengths)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_condition_is_for_those_who_can_read_it(kind):
    model = tiny_pair(kind, _lm())
    empty, other = Request(0, max_new_tokens=12), Request(1, "abcdefgh", max_new_tokens=12)
    engine = Engine(model, TEXT, slots=4, max_length=48, max_condition=8)
    (alone,), among = engine.generate([empty]), engine.generate([empty, other])
    assert alone == among[0]
    assert among[1].finish_reason != "error"
    if kind == "encoder-decoder":
        assert "the condition has no tokens, but the encoder of auxiliary 'default'" in alone.error
    else:
        assert list(alone.token_ids) == _alone(model, empty, alone.seed)
