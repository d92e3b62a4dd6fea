"""A base and a pair in float32, bfloat16 and int8: how it is chosen, what changes, and what does not."""

from __future__ import annotations

import copy
import random
from dataclasses import replace

import pytest
import torch

import auxkern
from auxkern.core.packed import COMPUTES
from auxkern.generation import Engine, Request
from auxkern.model import AuxTunedForCausalLM, TextFormat, fingerprint, load_base, use_native_kernels
from auxkern.model.base import output_head, run_base
from auxkern.model.caches import CACHE_NAME
from auxkern.model.native import NativeLayer, compute_of, native_refusal, stack_of
from auxkern.nn import FrozenLinear
from auxkern.ops.dense import dense_logits
from auxkern.ops.packed import pack, packed_linear
from auxkern.ops.sampling_params import SamplingParams
from tests.support.tiny import byte_tokenizer, tiny_lm, tiny_lm_for, tiny_pair

pytestmark = pytest.mark.skipif(native_refusal() is not None, reason=str(native_refusal()))

NARROW = [compute for compute in COMPUTES if compute != "float32"]
# Of logits, relative to the largest: 8 bits of a bfloat16, and steps of 1/127 of a group's largest.
ERROR = {"float32": 1e-5, "bfloat16": 0.03, "int8": 0.08}
LM = {"num_attention_heads": 2, "num_key_value_heads": 1}  # heads of 16, which the kernels take
TEXT = TextFormat(byte_tokenizer())


def base(folder):
    tiny_lm(**LM).save_pretrained(folder)
    return str(folder)


def ids():
    return torch.randint(3, 97, (4, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("compute", COMPUTES)
def test_a_base_is_the_same_but_for_rounding(compute, tmp_path):
    name = base(tmp_path)
    plain, lm = load_base(name, native=False), load_base(name, compute=compute)
    assert compute_of(lm) == compute
    assert all(isinstance(layer, NativeLayer) for layer in lm.model.layers)
    expected, got = plain(ids()).logits, lm(ids()).logits
    error = (got - expected).abs().max() / expected.abs().max()
    assert error <= ERROR[compute]
    if compute != "float32":
        assert error > ERROR["float32"]  # it is the arithmetic that was asked for
    assert fingerprint(lm) == fingerprint(plain)
    assert list(lm.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("compute", COMPUTES)
def test_a_pair_takes_its_bases_compute(compute, tmp_path):
    options = {"auxiliary_config": {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 2,
               "num_hidden_layers": 1, "intermediate_size": 32}}  # fmt: skip
    model = AuxTunedForCausalLM.from_lm(base(tmp_path), base_options={"compute": compute}, **options).eval()
    model.use_native_kernels()
    assert compute_of(model.lm) == compute_of(model) == compute
    model.use_native_kernels("float32")
    assert compute_of(model.lm) == compute_of(model) == "float32"


def test_another_compute_is_the_one_that_was_asked_for_last():
    lm = use_native_kernels(tiny_lm(**LM), "int8")
    narrow = lm(ids()).logits
    use_native_kernels(lm, "float32")
    assert torch.equal(lm(ids()).logits, use_native_kernels(tiny_lm(**LM))(ids()).logits)
    use_native_kernels(lm, "int8")
    assert torch.equal(lm(ids()).logits, narrow)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute": "int4"}, "compute is 'int4'; choose one of 'float32', 'bfloat16', 'int8'"),
        ({"compute": "int8", "native": False}, "needs the native kernels; leave native=False out"),
        ({"compute": "bfloat16", "device_map": "cpu"}, "leave compute out and choose a dtype"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(options, message):
    with pytest.raises(ValueError, match=message):
        load_base("no such base", **options)


def test_without_kernels_a_narrow_compute_says_so(monkeypatch):
    monkeypatch.setattr("auxkern.model.base.native_refusal", lambda: "there are none here")
    with pytest.raises(RuntimeError, match="compute='int8' cannot run: there are none here"):
        load_base("no such base", compute="int8")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_int8_keeps_no_weights_that_are_not_finite(value):
    lm = tiny_lm(**LM)
    with torch.no_grad():
        lm.lm_head.weight[3, 5] = value
    use_native_kernels(lm, "int8")
    with torch.no_grad(), pytest.raises(ValueError, match="weight holds NaN or infinite values"):
        lm(ids())


def test_a_layer_follows_its_weight():
    layer = FrozenLinear.of(torch.nn.Linear(20, 9).requires_grad_(False))
    layer.compute = "int8"
    x = torch.randn(5, 20)
    before = layer(x)
    assert torch.equal(before, packed_linear(x, pack(layer.weight, "int8"), layer.bias))
    assert layer.packed() is layer.packed()
    layer.weight.mul_(2)
    assert torch.equal(layer(x), packed_linear(x, pack(layer.weight, "int8"), layer.bias))
    assert not torch.equal(layer(x), before)
    twin = copy.deepcopy(layer)
    twin.weight.zero_()
    assert torch.equal(twin(x), layer.bias.expand(5, -1))
    assert not torch.equal(layer(x), twin(x))


@pytest.mark.parametrize("compute", COMPUTES)
def test_narrow_keys_and_values_take_half_the_memory(compute, tmp_path):
    lm = load_base(base(tmp_path), compute=compute)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        whole = lm(input_ids=ids, use_cache=True)
        first = lm(input_ids=ids[:, :5], use_cache=True)
        more = lm(input_ids=ids[:, 5:], use_cache=True, **{CACHE_NAME: first[CACHE_NAME]})
    for layer in more[CACHE_NAME].layers:
        assert (
            layer.keys.dtype
            == layer.values.dtype
            == (torch.float32 if compute == "float32" else torch.bfloat16)
        )
    assert torch.equal(more.logits[:, -1], whole.logits[:, -1])


@pytest.mark.parametrize("compute", NARROW)
def test_gradients_are_those_of_the_weight(compute):
    layer = FrozenLinear.of(torch.nn.Linear(20, 9))
    layer.compute = compute
    x = torch.randn(5, 20, requires_grad=True)
    y = layer(x)
    assert torch.equal(y, torch.nn.functional.linear(x, layer.weight, layer.bias))
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(5, -1))


@pytest.mark.parametrize("compute", COMPUTES)
def test_a_head_is_multiplied_as_packed_where_no_gradient_is_wanted(compute):
    hidden, weight, bias = torch.randn(6, 40), torch.randn(70, 40), torch.randn(70)
    packed = pack(weight, compute)
    z = packed_linear(hidden, packed) + bias
    head = auxkern.Head(hidden, weight, bias, packed=packed)
    assert torch.equal(dense_logits(head), z)
    assert torch.equal(dense_logits(head, vocab_size=33), z[:, :33])
    drawn = auxkern.sample(head, seed=torch.arange(6), position=0, return_logprobs=True)
    expected = auxkern.sample(z, seed=torch.arange(6), position=0, return_logprobs=True)
    assert torch.equal(drawn.tokens, expected.tokens)
    assert torch.equal(drawn.logprob, expected.logprob)
    target = torch.randint(70, (6,))
    assert torch.equal(auxkern.cross_entropy(head, target), auxkern.cross_entropy(z, target))
    wanted = replace(head, hidden=hidden.clone().requires_grad_())
    exact = auxkern.cross_entropy(replace(wanted, packed=None), target)
    assert torch.equal(auxkern.cross_entropy(wanted, target), exact)


def test_a_packed_weight_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"Head.packed is \(7, 40\) but Head.weight has shape \(70, 40\)"):
        auxkern.Head(torch.ones(2, 40), torch.ones(70, 40), packed=pack(torch.ones(7, 40)))


def test_an_output_head_is_packed_once(tmp_path):
    lm = load_base(base(tmp_path), compute="int8")
    head = output_head(lm)
    assert head.packed is not None
    assert head.packed.compute == "int8"
    assert output_head(lm).packed is head.packed


# ---- all layers in one call -----------------------------------------------------------------


def test_layers_run_ahead_only_where_nobody_reads_between_them(monkeypatch):
    lm = use_native_kernels(tiny_lm(**LM))
    stack = stack_of(lm.model)
    assert stack is not None
    ran = []
    monkeypatch.setattr(
        stack, "through", lambda *args, through=stack.through: ran.append(through(*args)) or ran[-1]
    )
    with torch.no_grad():
        alone = lm.model(ids()).last_hidden_state
        assert not ran
        ahead = run_base(lm, ids()).states[:, :, 0]
        assert len(ran) == 1
        assert ran[0] is not None
        between = run_base(lm, ids(), layers=(1,)).states
        assert len(ran) == 1
    assert torch.equal(ahead, alone)
    assert torch.equal(between[:, :, 0], alone)


def test_a_model_that_works_between_its_layers_is_run_layer_by_layer():
    lm = use_native_kernels(tiny_lm(**LM))
    expected = run_base(lm, ids()).states
    own = type(lm.model.layers[1]).forward

    class Shifted(type(lm.model.layers[1])):
        def forward(self, hidden_states, *args, **options):
            return own(self, hidden_states + 0.5, *args, **options)

    lm.model.layers[1].__class__ = Shifted
    stack = stack_of(lm.model)
    shifted = run_base(lm, ids()).states
    assert not torch.equal(shifted, expected)
    assert "between its layers" in stack.refusal
    with torch.no_grad():
        assert torch.equal(shifted[:, :, 0], lm.model(ids()).last_hidden_state)


def test_a_hook_on_a_layer_is_called_with_what_it_gave():
    lm, seen = use_native_kernels(tiny_lm(**LM)), []
    expected = run_base(lm, ids(), layers=(1, 2)).states
    handles = [
        layer.register_forward_hook(lambda *call: seen.append(call[2])) for layer in lm.model.layers[:2]
    ]
    run_base(lm, ids())
    assert [torch.equal(one, expected[:, :, i]) for i, one in enumerate(seen, 1)] == [True, True]
    for handle in handles:
        handle.remove()


# ---- texts depend on their request alone ----------------------------------------------------


def mixed_requests(count):
    chosen = random.Random(0)
    params = [
        SamplingParams(),
        SamplingParams(temperature=0.0),
        SamplingParams(top_k=20, top_p=0.9),
        SamplingParams(min_p=0.05, temperature=1.3),
        SamplingParams(repetition_penalty=1.2, frequency_penalty=0.1),
    ]
    return [
        Request(
            i,
            "x" * chosen.randint(1, 6),
            "".join(chosen.choices("abcdefgh ", k=chosen.randint(0, 9))),
            chosen.choice(params),
            seed=i,
            max_new_tokens=chosen.randint(1, 9),
            **chosen.choice([{"auxiliary": None}, {}, {"aux_scale": 0.5}]),
            logprobs=chosen.random() < 0.3,
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("compute", COMPUTES)
def test_200_mixed_requests_say_the_same_in_any_batch(compute):
    model = tiny_pair(
        "shared head, features, pointer", tiny_lm_for(byte_tokenizer(), **LM),
        auxiliary_config={"model_type": "llama", "hidden_size": 32, "intermediate_size": 32,
                          "num_hidden_layers": 2, "num_attention_heads": 2},
    ).use_native_kernels(compute)  # fmt: skip
    asked = mixed_requests(200)
    texts = []
    for slots in (1, 7, 64):
        order = asked[:]
        random.Random(slots).shuffle(order)
        engine = Engine(model, TEXT, slots=slots, max_length=32, max_condition=8)
        done = {one.id: (one.token_ids, one.logprobs) for one in engine.generate(order)}
        texts.append([done[i] for i in range(200)])
    assert texts[0] == texts[1] == texts[2]
    assert len({tokens for tokens, _ in texts[0]}) > 100
