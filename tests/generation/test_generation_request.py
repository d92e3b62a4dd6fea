"""Requests and their answers: fields, defaults, records, refusals."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from auxkern.generation.completion import Completion, TokenLogprobs
from auxkern.generation.request import Request, Sequence
from auxkern.ops.sampling_params import SamplingParams

DEFAULTS = Request(
    "defaults",
    condition="a cat",
    params=SamplingParams(temperature=0.5, top_k=10, logit_bias={3: -1.0}),
    seed=7,
    max_new_tokens=20,
    stop=("\n",),
    aux_scale=0.5,
)
LOGPROBS = TokenLogprobs((-1.0, -2.0), (0.0, -0.5), (-3.0, -math.inf), (-0.25, -4.0))
COMPLETION = Completion("a", 1, "good evening", (5, 6), "stop", 3, seed=9, logprobs=LOGPROBS)


def test_absent_fields_have_the_defaults() -> None:
    request = Request.from_record({"id": "r", "prompt": "So", "top_p": 0.9, "stop": None}, DEFAULTS)
    assert (request.id, request.condition, request.prompt) == ("r", "a cat", "So")
    assert (request.max_new_tokens, request.stop, request.aux_scale) == (20, ("\n",), 0.5)
    params = request.params
    assert (params.temperature, params.top_k, params.top_p, params.logit_bias) == (0.5, 10, 0.9, {3: -1.0})


def test_a_record_has_the_last_word() -> None:
    record = {"id": 1, "condition": "", "stop": ["a", "b"], "logit_bias": {"12": 2}, "seed": 3, "samples": 4}
    request = Request.from_record(record, DEFAULTS, id=99)
    assert (request.id, request.condition, request.stop, request.seed) == (1, "", ("a", "b"), 3)
    assert request.params.logit_bias == {12: 2}
    assert Request.from_record({"stop": "end"}, id=1).stop == ("end",)
    assert Request.from_record({"stop_token_ids": [0, 7]}, id=1).stop_token_ids == (0, 7)
    assert Request.from_record({"stop_token_ids": 7}, id=1).as_record()["stop_token_ids"] == [7]


def test_greedy_drops_the_filters_of_the_defaults_only() -> None:
    request = Request.from_record({"id": 1, "temperature": 0}, DEFAULTS)
    assert (request.params.temperature, request.params.top_k) == (0, 0)
    own = Request.from_record({"id": 1, "temperature": 0, "top_k": 5}, DEFAULTS)
    assert (own.params.temperature, own.params.top_k) == (0, 5)


def test_no_auxiliary_has_no_scale() -> None:
    request = Request.from_record({"id": 1, "auxiliary": None}, DEFAULTS)
    assert request.auxiliary is None
    assert request.aux_scale is None
    with pytest.raises(ValueError, match=r"aux_scale is 2.0 but auxiliary is None"):
        Request.from_record({"id": 1, "auxiliary": None, "aux_scale": 2.0}, DEFAULTS)


def test_a_line_of_training_data_is_a_request() -> None:
    request = Request.from_record({"condition": "dog", "text": "The dog barks.", "prompt": None}, id=5)
    assert (request.id, request.condition, request.prompt) == (5, "dog", "")


def test_seeds_come_from_the_ids() -> None:
    seeds = [Request.from_record({"id": id}, DEFAULTS).seed for id in (1, 2, "1", "a")]
    assert len(set(seeds)) == 4
    assert seeds[1] == Request.from_record({"id": 2, "prompt": "another"}, DEFAULTS).seed
    assert seeds[1] != Request.from_record({"id": 2}, Request(0, seed=8)).seed
    assert Request.from_record({"id": 2, "seed": 2**63 - 1}, DEFAULTS).seed == 2**63 - 1


def test_samples_have_seeds_of_their_own() -> None:
    request = Request("a", seed=5, samples=3)
    seeds = [one.seed for one in request.sequences([0], [])]
    assert seeds[0] == 5
    assert len(set(seeds)) == 3
    assert [one.seed for one in request.sequences([0], [], samples=[2])] == seeds[2:]
    # A sample is what a request of its own with its seed would be.
    assert Request("b", seed=seeds[2]).sequences([0], [])[0].seed == seeds[2]


def test_a_sequence_knows_its_length() -> None:
    (one,) = Request("a", max_new_tokens=9).sequences([0, 4], [7])
    one.generated.append(3)
    assert (one.key, one.length, one.max_new_tokens, one.condition_ids) == (("a", 0), 3, 9, (7,))
    with pytest.raises(ValueError, match="'a': prompt_ids is empty"):
        Sequence(Request("a"), 0, ())
    with pytest.raises(ValueError, match="has 1 samples, none with number 1"):
        Sequence(Request("a"), 1, (0,))


def test_a_request_survives_json() -> None:
    record = json.loads(json.dumps(DEFAULTS.as_record()))
    again = Request.from_record(record)
    assert again.as_record() == DEFAULTS.as_record()
    assert again.params.logit_bias == {3: -1.0}
    assert (again.seed, again.stop) == (7, ("\n",))


@pytest.mark.parametrize(
    ("record", "error", "message"),
    [
        ([], TypeError, "a request must be an object with named fields, got list"),
        ({"temprature": 1}, ValueError, "no field 'temprature'; did you mean 'temperature'"),
        ({"params": {}}, ValueError, "no field 'params'"),
        ({"qqq": 1}, ValueError, "no field 'qqq'; known are id, condition"),
        ({"id": ""}, ValueError, "id is empty"),
        ({"id": True}, TypeError, "id must be a str or an int, got bool"),
        ({"id": 1.5}, TypeError, "id must be a str or an int, got float"),
        ({"prompt": 3}, TypeError, "prompt must be a str, got int"),
        ({"prompt": "ab\ud800"}, ValueError, "prompt has half a character, .*, at 2"),
        ({"seed": -1}, ValueError, r"seed is -1; it must be in \[0, "),
        ({"seed": 2**63}, ValueError, r"seed is 9223372036854775808; it must be in \[0, "),
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens is 0; it must be 1 or more"),
        ({"max_new_tokens": 3.0}, TypeError, "max_new_tokens must be an int, got float"),
        ({"samples": 2, "temperature": 0}, ValueError, "samples is 2 but temperature is 0"),
        ({"logprobs": 1}, TypeError, "logprobs must be true or false, got 1"),
        ({"stop": ["a", ""]}, ValueError, "stop holds an empty str"),
        ({"stop": [1]}, TypeError, "stop must be a str, got int"),
        ({"stop": 1}, TypeError, "stop must be a str or a list"),
        ({"stop_token_ids": "7"}, TypeError, "stop_token_ids must be an int or a list"),
        ({"stop_token_ids": [True]}, TypeError, "stop_token_ids must be an int, got bool"),
        ({"stop_token_ids": [-1]}, ValueError, "stop_token_ids is -1; it must be 0 or more"),
        ({"auxiliary": ""}, ValueError, "auxiliary is empty"),
        ({"aux_scale": "1"}, TypeError, "aux_scale must be a number or None, got str"),
        ({"aux_scale": math.inf}, ValueError, "aux_scale is inf; it must be finite"),
        ({"temperature": -1}, ValueError, "temperature is -1"),
        ({"top_k": 1.5}, TypeError, "top_k must be an int"),
        ({"temperature": math.nan}, ValueError, "temperature is nan"),
        ({"logit_bias": {"x": 1}}, ValueError, "logit_bias has the key 'x'"),
        ({"logit_bias": {"01": 1}}, ValueError, "logit_bias has the key '01'"),
        ({"logit_bias": [1]}, TypeError, "logit_bias must be a dict"),
    ],
)
def test_bad_records_are_refused(record: Any, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        Request.from_record(record, id=1)


def test_a_record_without_any_id_is_refused() -> None:
    with pytest.raises(ValueError, match="the request has no id"):
        Request.from_record({"prompt": "a"})


def test_parameters_are_of_one_row() -> None:
    with pytest.raises(TypeError, match=r"params.temperature is of many rows"):
        Request(1, params=SamplingParams(temperature=torch.ones(2)))
    with pytest.raises(TypeError, match="params must be SamplingParams, got dict"):
        Request(1, params={"temperature": 1})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="stop must be a tuple of str, got str"):
        Request(1, stop="end")  # type: ignore[arg-type]


def test_a_completion_survives_json() -> None:
    assert "members" not in LOGPROBS.as_record()
    mixture = replace(LOGPROBS, members=((-1.0, -math.inf), (-0.5, 0.0)))
    for one in (COMPLETION, replace(COMPLETION, logprobs=mixture)):
        written = json.dumps(one.as_record(), allow_nan=False)
        assert Completion.from_record(json.loads(written)) == one
    failed = Completion.failed(Request("b"), 0, "too long")
    assert Completion.from_record(json.loads(json.dumps(failed.as_record()))) == failed
    assert (failed.finish_reason, failed.error, failed.new_tokens) == ("error", "too long", 0)


def test_fields_of_a_record() -> None:
    assert Completion(3, 0, "x", (8,), "end", 2, seed=1).as_record() == {
        "id": 3,
        "sample": 0,
        "text": "x",
        "finish_reason": "end",
        "prompt_tokens": 2,
        "new_tokens": 1,
        "seed": 1,
        "token_ids": [8],
    }


def test_what_is_no_log_probability_is_refused() -> None:
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match=r"logprobs.lm holds (nan|inf)"):
            TokenLogprobs((0.0,), (0.0,), (value,)).as_record()
        with pytest.raises(ValueError, match=r"logprobs.members\[1\] holds (nan|inf)"):
            TokenLogprobs((0.0,), (0.0,), (0.0,), members=((0.0,), (value,))).as_record()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"finish_reason": "eos"}, "finish_reason is 'eos'; it is one of end, stop, length, error"),
        ({"finish_reason": "error"}, "finish_reason is 'error' but error is None"),
        ({"error": "bad"}, "finish_reason is 'stop' but error is 'bad'"),
        ({"new_tokens": 3}, "new_tokens is 3 but there are 2 token_ids"),
        ({"extra": 3}, "the completion has an unknown field 'extra'"),
        ({"sample": -1}, "sample is -1"),
        ({"logprobs": {"raw": []}}, "logprobs has no field 'processed'"),
    ],
)
def test_bad_completions_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Completion.from_record({**COMPLETION.as_record(), **change})


def test_a_completion_has_all_fields() -> None:
    record = COMPLETION.as_record()
    del record["prompt_tokens"]
    with pytest.raises(ValueError, match="the completion has no field 'prompt_tokens'"):
        Completion.from_record(record)


def test_numpy_numbers_are_numbers() -> None:
    record = {
        "id": np.int64(7),
        "seed": np.uint64(2**62),
        "max_new_tokens": np.int32(5),
        "aux_scale": np.float32(0.5),
        "temperature": np.array(0.25),
        "top_k": np.int16(-1),
        "logit_bias": {np.int64(3): np.float32(-2)},
    }
    request = Request.from_record(record, Request(0, samples=np.array(2)))  # type: ignore[arg-type]
    assert json.loads(json.dumps(request.as_record()))["logit_bias"] == {"3": -2.0}
    assert (request.params.temperature, request.params.top_k) == (0.25, -1)
    assert (request.id, request.seed, request.samples, request.aux_scale) == (7, 2**62, 2, 0.5)


@pytest.mark.parametrize("name", ["seed", "max_new_tokens", "samples", "aux_scale"])
@pytest.mark.parametrize("value", [True, np.bool_(True), "1", np.array([1, 2]), 1j], ids=repr)
def test_what_is_no_number_is_named(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=name):
        Request(1, **{name: value})  # type: ignore[arg-type]
