"""A base is known again by its weights and by what of its configuration changes its logits."""

import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from auxkern.model import AuxTunedForCausalLM, fingerprint
from auxkern.model.fingerprints import weights_fingerprint
from tests.support.tiny import DECODER, tiny_lm, tiny_pair


def with_settings(**settings):
    """The same weights under another configuration."""
    lm, other = tiny_lm(), tiny_lm(**settings)
    other.load_state_dict(lm.state_dict())
    return lm, other


@pytest.mark.parametrize(
    "settings",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"rms_norm_eps": 1e-2},
        {"hidden_act": "gelu"},
    ],
)
def test_a_setting_that_changes_logits_makes_another_base(settings, tmp_path):
    lm, other = with_settings(**settings)
    ids = torch.tensor([[1, 5, 9, 11]])
    assert not torch.equal(lm(ids).logits, other(ids).logits)
    AuxTunedForCausalLM.from_lm(lm, auxiliary_config=DECODER).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"fingerprint .* configuration differ"):
        AuxTunedForCausalLM.from_pretrained(tmp_path, lm=other)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_cache": False},
        {"attention_dropout": 0.5},
        {"initializer_range": 0.1},
        {"eos_token_id": 5},
        {"max_position_embeddings": 4096},
        {"attn_implementation": "eager"},
        {"architectures": ["Other"], "dtype": torch.float16},
    ],
)
def test_a_setting_that_changes_no_logit_does_not(settings):
    lm, other = with_settings(**settings)
    assert fingerprint(lm) == fingerprint(other)


@pytest.mark.parametrize(
    "changed", [{"sliding_window": 5}, {"final_logit_softcapping": 5.0}, {"query_pre_attn_scalar": 5}]
)
def test_windows_and_soft_caps_count(changed):
    settings = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings |= {"num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64}
    one, two = (
        AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **settings, **more))
        for more in ({}, changed)
    )
    two.load_state_dict(one.state_dict())
    assert fingerprint(one) != fingerprint(two)


def test_saved_loaded_run_and_cast_it_stays_the_same(tmp_path):
    lm = tiny_lm().half().float()  # so that float16 holds it
    known = fingerprint(lm)
    lm.save_pretrained(tmp_path)
    for options in ({}, {"dtype": torch.float16}, {"attn_implementation": "eager"}):
        again = LlamaForCausalLM.from_pretrained(tmp_path, **options)
        again(torch.tensor([[1, 5, 9]]))
        assert fingerprint(again) == known


def test_buffers_that_are_saved_count():
    lm = tiny_lm()
    lm.register_buffer("codes", torch.arange(4))
    known = fingerprint(lm)
    lm.codes[1] = 7
    assert fingerprint(lm) != known


def test_a_pair_of_an_earlier_version_finds_its_base(tmp_path):
    """It names the base's weights alone."""
    model = tiny_pair("own head")
    model.config.base_fingerprint = weights_fingerprint(model.lm)
    model.save_pretrained(tmp_path)
    again = AuxTunedForCausalLM.from_pretrained(tmp_path, lm=model.lm)
    assert again.config.base_fingerprint == fingerprint(model.lm)
    with pytest.raises(ValueError, match="fingerprint"):
        AuxTunedForCausalLM.from_pretrained(tmp_path, lm=tiny_lm(seed=5))


class Wrapped(torch.Tensor):
    """A weight of two tensors, as torchao has them: no view of bytes, no conversion."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner, context, size, stride):
        return Wrapped(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(func)


def test_a_weight_of_several_tensors_is_named_by_all_of_them():
    def name(codes, scale):
        module = nn.Module()
        module.weight = nn.Parameter(Wrapped(codes, scale), requires_grad=False)
        return fingerprint(module)

    codes, scale = torch.arange(6, dtype=torch.int8).view(2, 3), torch.ones(2)
    known = name(codes, scale)
    with torch.device("meta"):  # as transformers does while it makes a pair
        assert name(codes, scale) == known
    assert name(codes.clone(), scale.clone()) == known
    assert name(codes, 2 * scale) != known
    assert name(codes + 1, scale) != known


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_four_bits_stay_the_same_after_a_forward_pass(kind, nested, tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    tiny_lm(hidden_size=64).save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=nested
    )
    lm = LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=settings)
    known = fingerprint(lm)
    lm(torch.tensor([[1, 5, 9]]))
    assert fingerprint(lm) == known
    assert known != fingerprint(LlamaForCausalLM.from_pretrained(tmp_path))


def test_torchaos_weights_have_a_name():
    torchao = pytest.importorskip("torchao.quantization")
    lm = tiny_lm(hidden_size=64)
    quantised = copy.deepcopy(lm)
    torchao.quantize_(quantised, torchao.Int8WeightOnlyConfig())
    known = fingerprint(quantised)
    quantised(torch.tensor([[1, 5, 9]]))
    assert fingerprint(quantised) == known != fingerprint(lm)
