"""Bases of GGUF files, whose weights are multiplied as they are stored."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from auxkern.core.packed import STORED_COMPUTES, StoredRows
from auxkern.model import fingerprint, load_base, use_native_kernels
from auxkern.model.base import output_head
from auxkern.model.native import explain, native_refusal
from auxkern.model.stored import StoredWeights
from auxkern.nn import JoinedLinears
from auxkern.ops.packed import pack_stored, packed_linear
from tests.support.gguf_files import damaged, llama_file
from tests.support.tiny import tiny_lm

pytestmark = pytest.mark.skipif(native_refusal() is not None, reason=str(native_refusal()))

LM = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
KINDS = {"token_embd": "Q8_0", "ffn_down": "Q4_0"}
PACKED = 3 * 4 + 1  # of each layer, and the head


@pytest.fixture
def file(tmp_path):
    return llama_file(tmp_path / "tiny.gguf", tiny_lm(**LM, tie_word_embeddings=True), KINDS)


def base(file, **options):
    return load_base(str(file.parent), gguf_file=file.name, **options)


def logits(lm):
    ids = torch.randint(3, 97, (4, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return lm(ids).logits


def error(lm, plain):
    expected = logits(plain)
    return float((logits(lm) - expected).abs().max() / expected.abs().max())


def test_int8_multiplies_what_the_file_holds(file):
    lm, plain = base(file, compute="int8"), base(file, native=False)
    requantised = use_native_kernels(copy.deepcopy(plain), "int8")
    assert error(lm, plain) < error(requantised, plain)
    assert "packed weights are as stored" not in explain(requantised)
    text = explain(lm)
    assert "3 decoder layers run as one native step each, in int8" in text
    assert f"{PACKED} packed weights are as stored in the file (1 Q8_0, 3 Q4_0, 9 Q4_1)" in text
    assert "widened" not in text


def test_float32_reads_what_the_file_holds(file):
    lm, plain = base(file), base(file, native=False)
    # Both sum the same products in float32, in different orders.
    assert error(lm, plain) < 1e-5
    text = explain(lm)
    assert "3 decoder layers run as one native step each, in float32" in text
    assert f"{PACKED} packed weights are as stored in the file (1 Q8_0, 3 Q4_0, 9 Q4_1)" in text
    steps = sum(layer.native_step.nbytes for layer in lm.model.layers)
    assert steps < sum(p.nbytes for layer in lm.model.layers for p in layer.parameters()) / 5


def test_the_head_has_the_files_integers(file):
    gguf = pytest.importorskip("gguf")
    tensor = next(one for one in gguf.GGUFReader(file).tensors if one.name == "token_embd.weight")
    blocks = StoredRows("Q8_0", torch.from_numpy(tensor.data.copy()))
    packed = output_head(base(file, compute="int8")).packed
    assert packed is not None
    assert packed.kind == "Q8_0"
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(packed_linear(x, packed), packed_linear(x, pack_stored(blocks, "int8")))


def test_rows_are_told_in_any_order(file):
    lm, stored = base(file, native=False), StoredWeights(file)
    assert len(stored) == 3 * 7 + 1
    for name, weight in lm.named_parameters():
        rows = stored.rows_of(weight)
        assert (rows is None) == (weight.dim() < 2), name
        if rows is not None:
            assert torch.equal(rows.widened(), weight)
    weight = lm.model.layers[1].mlp.up_proj.weight.detach()
    backwards = stored.rows_of(weight.flip(0))
    assert backwards is not None
    assert torch.equal(backwards.widened(), weight.flip(0))
    other = weight.clone()
    other[3, 5] += 1e-6
    for changed in (other, weight.flip(1), weight.half(), weight[:8]):
        assert stored.rows_of(changed) is None


@pytest.mark.parametrize("compute", STORED_COMPUTES)
def test_a_row_does_not_depend_on_its_batch(file, compute):
    lm = base(file, compute=compute)
    ids = torch.randint(3, 97, (9, 6), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        together = lm(ids).logits
        assert torch.equal(torch.cat([lm(row[None]).logits for row in ids]), together)


def test_products_of_several_kinds_and_other_kinds_are_of_widened_numbers(tmp_path):
    kinds = {"attn_v": "Q8_0", "ffn_down": "Q5_0"}
    file = llama_file(tmp_path / "tiny.gguf", tiny_lm(**LM), kinds)
    lm = base(file, compute="int8")
    logits(lm)
    text = explain(lm)
    assert "7 packed weights are as stored in the file (7 Q4_1)" in text
    assert "6 packed weights are of widened numbers" in text
    assert error(lm, base(file, native=False)) < 0.1  # steps of 1/127 of a group's largest, in three layers


def test_weights_that_change_are_no_longer_stored(file):
    lm, plain = base(file, compute="int8"), base(file, native=False)
    before = logits(lm)
    with torch.no_grad():
        for model in (lm, plain):
            model.model.layers[0].mlp.down_proj.weight.mul_(3)
    assert error(lm, plain) < 0.1
    assert not torch.equal(logits(lm), before)
    assert f"{PACKED - 1} packed weights are as stored" in explain(lm)


def test_copies_and_changes_of_arithmetic_come_back_to_it(file):
    lm = base(file, compute="int8")
    expected = logits(lm)
    assert torch.equal(logits(copy.deepcopy(lm)), expected)
    assert torch.equal(logits(pickle.loads(pickle.dumps(lm))), expected)
    use_native_kernels(lm, "bfloat16")
    assert not torch.equal(logits(lm), expected)
    assert f"{PACKED} packed weights are of widened numbers: compute is not" in explain(lm)
    use_native_kernels(lm, "int8")
    assert torch.equal(logits(lm), expected)


@pytest.mark.parametrize("compute", ["float32", "bfloat16", "int8"])
def test_the_fingerprint_is_that_of_its_numbers(file, compute):
    plain = base(file, native=False)
    lm = base(file.rename(file.with_name("other.gguf")), compute=compute)
    assert fingerprint(lm) == fingerprint(plain)
    assert list(lm.state_dict()) == list(plain.state_dict())
    # The same model as a checkpoint of its own, which names no file.
    config = copy.deepcopy(plain.config)
    vars(config).pop("quantization_config", None)  # transformers before 5.24 has none
    copied = type(plain)(config)
    copied.load_state_dict(plain.state_dict())
    assert fingerprint(copied) == fingerprint(plain)


def test_small_layers_of_a_file_are_not_joined(file):
    mlp = base(file, compute="int8").model.layers[0].mlp
    layers = [mlp.gate_proj, mlp.up_proj]
    for layer in layers:
        layer.bias = torch.nn.Parameter(torch.ones(96), requires_grad=False)  # without one none is joined
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    for layer, y in zip(layers, JoinedLinears().of(layers, x), strict=True):
        assert torch.equal(layer(x), y)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # transformers widens it first
def test_a_damaged_file_is_refused(file):
    broken = damaged(file, "broken.gguf", "blk.1.ffn_up.weight")
    with pytest.raises(ValueError, match=r"the Q4_1 tensor blk\.1\.ffn_up\.weight has scales or minima"):
        base(broken, compute="int8")
