"""The pair as a model: what it computes, what it trains, what it saves, what it refuses."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM

from auxkern.model import AuxiliaryOutput, AuxTunedConfig, AuxTunedForCausalLM, fingerprint
from auxkern.model.base import check_output_head, output_head, run_base
from auxkern.model.native import use_native_kernels
from auxkern.ops.dense import dense_logits
from tests.support.batches import ragged_batch
from tests.support.launching import environment
from tests.support.tiny import DECODER, PAIRS, V, tiny_lm, tiny_pair, with_two_more


def _without_labels(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("kind", PAIRS)
def test_an_untrained_pair_is_the_lm(kind, native):
    lm, batch = tiny_lm(), ragged_batch()
    lm = use_native_kernels(lm) if native else lm
    model = tiny_pair(kind, lm, trained=False)
    with torch.no_grad():
        logits = model(**_without_labels(batch)).logits
        plain = lm(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    real = batch["attention_mask"] != 0
    # To the bit, unless torch makes the LM's logits and a native kernel the pair's.
    tolerance = 0.0 if native or kind == "the LM's own logits" else 1e-5
    torch.testing.assert_close(logits[real], plain[real], rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", PAIRS)
def test_the_loss_is_torchs_on_the_summed_logits(kind):
    model, batch = tiny_pair(kind), ragged_batch()
    model.requires_grad_(True)
    logits = model(**_without_labels(batch)).logits
    exact = F.cross_entropy(logits[:, :-1].flatten(0, 1).double(), batch["labels"][:, 1:].flatten())
    exact_gradients = torch.autograd.grad(exact, list(model.parameters()))
    output = model(**batch)
    gradients = torch.autograd.grad(output.loss, list(model.parameters()))
    assert output.logits is None
    # float32 arithmetic in another order
    torch.testing.assert_close(output.loss.double(), exact, rtol=2e-6, atol=0)
    for name, ours, theirs in zip(dict(model.named_parameters()), gradients, exact_gradients, strict=True):
        largest = max(theirs.abs().max().item(), 1e-6)
        torch.testing.assert_close(
            ours, theirs, rtol=0, atol=2e-5 * largest, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind", PAIRS)
def test_padding_and_neighbours_do_not_matter(kind):
    """Two caches with prefixes of different lengths: a batch gives what each sequence gives alone."""
    model, batch = tiny_pair(kind), ragged_batch()
    logits = model(**_without_labels(batch)).logits
    for row in range(4):
        text, condition = batch["attention_mask"][row] != 0, batch["condition_mask"][row] != 0
        alone = model(
            batch["input_ids"][row, text][None], condition_ids=batch["condition_ids"][row, condition][None]
        ).logits
        torch.testing.assert_close(logits[row, text], alone[0], rtol=1e-4, atol=1e-4)


def test_the_condition_and_the_scale_reach_the_logits():
    model, batch = tiny_pair("own head"), _without_labels(ragged_batch())
    lm = model.lm(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    pair, half = model(**batch).logits, model(**batch, aux_scale=0.5).logits
    real = batch["attention_mask"] != 0
    torch.testing.assert_close((half - lm)[real], (pair - lm)[real] / 2, rtol=1e-4, atol=1e-5)
    other = model(**{**batch, "condition_ids": batch["condition_ids"].flip(0)}).logits
    assert (other - pair).abs().max() > 1e-2
    none = model(batch["input_ids"], batch["attention_mask"]).logits
    assert none.isfinite().all()
    assert (none - pair).abs().max() > 1e-2


def test_no_position_sees_what_comes_after_it():
    for kind in PAIRS:
        model, batch = tiny_pair(kind), _without_labels(ragged_batch())
        before = model(**batch).logits
        changed = batch["input_ids"].clone()
        changed[0, 5] = changed[0, 5] % (V - 4) + 3
        after = model(**{**batch, "input_ids": changed}).logits
        assert torch.equal(before[0, :5], after[0, :5]), kind
        assert (before[0, 5:] - after[0, 5:]).abs().max() > 1e-3, kind


def test_states_from_a_cache_stand_in_for_the_lm(monkeypatch):
    model, batch = tiny_pair("shared head, features, pointer"), ragged_batch()
    states = run_base(model.lm, batch["input_ids"], batch["attention_mask"], layers=[1, 2]).states
    expected = model(**batch).loss
    calls = []
    monkeypatch.setattr(model.lm.base_model, "forward", lambda *a, **k: calls.append(1))
    torch.testing.assert_close(model(**batch, lm_states=states).loss, expected)
    half = model(**batch, lm_states=states.half()).loss
    torch.testing.assert_close(half, expected, rtol=2e-3, atol=0)  # states rounded to 11 bits
    assert not calls
    with pytest.raises(ValueError, match=r"lm_states has shape .* but it must be \(4, 9, 3, 32\)"):
        model(**batch, lm_states=states[:, :, :2])


def test_the_normaliser_is_the_trainers():
    model, batch = tiny_pair("own head"), ragged_batch()
    count = (batch["labels"] != -100).sum()
    mean = model(**batch).loss
    torch.testing.assert_close(model(**batch, num_items_in_batch=count * 2).loss, mean / 2)
    nothing = {**batch, "labels": torch.full_like(batch["labels"], -100)}
    loss = model(**nothing).loss
    loss.backward()
    assert loss.item() == 0


def test_training_leaves_the_lm_bitwise_and_gives_it_no_gradient():
    lm = tiny_lm()
    before = copy.deepcopy(lm.state_dict())
    model = tiny_pair("shared head, features, pointer", lm, trained=False).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    first = None
    for _ in range(30):
        loss = model(**ragged_batch()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first = first or loss.item()
    assert loss.item() < 0.5 * first
    assert all(torch.equal(value, before[name]) for name, value in lm.state_dict().items())
    assert all(p.grad is None and not p.requires_grad for p in lm.parameters())
    assert not lm.training
    ours = {id(p) for p in model.parameters()}
    assert not ours & {id(p) for p in lm.parameters()}
    assert all(p.grad is not None for p in model.parameters()), "a parameter takes no part"


_LOAD = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
import auxkern.model
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder + "/aux")
    with torch.no_grad():
        save_file({"logits": model(**load_file(sys.argv[1])).logits}, folder + "/logits")
"""


def test_saved_and_loaded_in_a_new_process_the_logits_are_the_same(tmp_path):
    from safetensors.torch import load_file, save_file

    lm = tiny_lm()
    lm.save_pretrained(tmp_path / "lm")
    batch = _without_labels(ragged_batch())
    save_file(batch, tmp_path / "batch")
    models = {
        tmp_path / str(number): tiny_pair(kind, str(tmp_path / "lm")) for number, kind in enumerate(PAIRS)
    }
    for folder, model in models.items():
        model.save_pretrained(folder / "aux")
        assert {p.name for p in (folder / "aux").iterdir()} == {
            "README.md",
            "config.json",
            "generation_config.json",
            "model.safetensors",
        }
        size = (folder / "aux" / "model.safetensors").stat().st_size
        weights = sum(p.numel() * p.element_size() for p in model.parameters())
        assert weights <= size < weights + 20_000  # names and shapes

    # Processes take seconds to start: one loads them all.
    command = [sys.executable, "-c", _LOAD, tmp_path / "batch", *models]
    subprocess.run(command, check=True, env=environment(), capture_output=True)
    for folder, model in models.items():
        with torch.no_grad():
            assert torch.equal(load_file(folder / "logits")["logits"], model(**batch).logits)


def test_another_base_is_refused_unless_told_otherwise(tmp_path):
    model = tiny_pair("own head")
    model.save_pretrained(tmp_path)
    other = tiny_lm(seed=5)
    with pytest.raises(ValueError, match=r"fingerprint .* allow_other_base=True"):
        AuxTunedForCausalLM.from_pretrained(tmp_path, lm=other)
    taken = AuxTunedForCausalLM.from_pretrained(tmp_path, lm=other, allow_other_base=True)
    assert torch.equal(taken.head.weight, model.head.weight)
    with pytest.raises(ValueError, match="names no base"):
        AuxTunedForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "none",
            FileNotFoundError,
            "there is no folder .*none; name the one .*; to train one: auxkern train",
        ),
        ("empty", FileNotFoundError, "empty holds no config.json, so no model; to train one: auxkern train"),
        ("lm", ValueError, "lm holds a model of type 'llama', not an auxiliary; to train one: auxkern train"),
    ],
)
def test_a_folder_without_an_auxiliary_is_answered_with_how_to_train_one(name, error, message, tmp_path):
    (tmp_path / "empty").mkdir()
    tiny_lm().save_pretrained(tmp_path / "lm")
    with pytest.raises(error, match=message):
        AuxTunedForCausalLM.from_pretrained(tmp_path / name)


def test_a_checkpoint_with_other_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model = tiny_pair("shared head, features, pointer")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    left = {name: value for name, value in weights.items() if name != "auxiliary.pointer.query.weight"}
    for changed, message in (
        (left, r"missing keys auxiliary\.pointer\.query\.weight"),
        ({**weights, "auxiliary.gate": torch.zeros(2)}, r"unexpected keys auxiliary\.gate"),
    ):
        save_file(changed, file, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=message):
            AuxTunedForCausalLM.from_pretrained(tmp_path, lm=model.lm)


def test_a_fingerprint_knows_the_weights_and_not_their_dtype():
    lm = tiny_lm()
    known = fingerprint(lm)
    assert fingerprint(copy.deepcopy(lm).half()) == known
    changed = copy.deepcopy(lm)
    with torch.no_grad():
        changed.model.layers[1].mlp.up_proj.weight[3, 4] += 0.01
    assert fingerprint(changed) != known


def test_half_precision_base_beside_a_float32_auxiliary():
    lm, batch = tiny_lm(), ragged_batch()
    exact = tiny_pair("shared head, features, pointer", lm)(**batch).loss
    model = tiny_pair("shared head, features, pointer", copy.deepcopy(lm).to(torch.bfloat16))
    assert model.lm.dtype == torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    torch.testing.assert_close(model(**batch).loss, exact, rtol=2e-2, atol=0)  # bfloat16 has 8 bits
    cast = copy.deepcopy(model)
    cast.double()
    assert cast.lm.dtype == torch.bfloat16


def test_a_float16_base_under_bfloat16_autocast():
    """The base keeps its precision; what is made of its states is autocast's."""
    model, batch = tiny_pair("shared head, features, pointer", tiny_lm().half()), ragged_batch()
    exact = model(**batch).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    torch.testing.assert_close(loss, exact, rtol=2e-2, atol=0)  # bfloat16 has 8 bits


def test_the_first_layers_are_the_lms():
    lm = tiny_lm()
    model = tiny_pair("first layers of the LM", lm, trained=False)
    ids = ragged_batch()["input_ids"]
    ours = model.auxiliary.body(inputs_embeds=lm.get_input_embeddings()(ids)).last_hidden_state
    short = copy.deepcopy(lm.model)
    short.layers = short.layers[:2]
    assert torch.equal(ours, short(input_ids=ids).last_hidden_state)


class Bag(torch.nn.Module):
    """A module of its own kind: the mean of the condition's embeddings, at every position."""

    def __init__(self):
        super().__init__()
        self.hidden_size = 8
        self.embedding = torch.nn.Embedding(V, 8)
        torch.nn.init.constant_(self.embedding.weight, 0.5)

    def forward(self, inputs):
        mask = inputs.condition_mask[..., None]
        mean = (self.embedding(inputs.condition_ids) * mask).sum(1) / mask.sum(1).clamp_min(1)
        hidden = mean[:, None].expand(-1, inputs.input_ids.shape[1], -1)
        return AuxiliaryOutput(hidden, cache=inputs.cache or NoCache() if inputs.use_cache else None)


class NoCache:
    def reorder_cache(self, rows):
        pass


def test_any_module_can_be_the_auxiliary(tmp_path):
    lm, batch = tiny_lm(), ragged_batch()
    model = AuxTunedForCausalLM.from_lm(lm, Bag())
    assert torch.all(model.auxiliary.embedding.weight == 0.5), "a module that is passed keeps its weights"
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    model.save_pretrained(tmp_path)
    loaded = AuxTunedForCausalLM.from_pretrained(tmp_path, lm=lm, auxiliary=Bag())
    assert torch.equal(loaded(**batch).loss, model(**batch).loss)
    with pytest.raises(ValueError, match="module goes with"):
        AuxTunedForCausalLM.from_pretrained(tmp_path, lm=lm)
    with pytest.raises(ValueError, match="module goes with"):
        AuxTunedForCausalLM.from_lm(lm, Bag(), architecture="decoder")


def test_the_lms_head_is_checked_not_assumed():
    lm = tiny_lm()
    check_output_head(lm)

    class Odd(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits.square()
            return output

    odd = Odd(lm.config)
    odd.load_state_dict(lm.state_dict())
    with pytest.raises(ValueError, match='lm_term="logits"'):
        AuxTunedForCausalLM.from_lm(odd, auxiliary_config=DECODER)
    model = AuxTunedForCausalLM.from_lm(odd, auxiliary_config=DECODER, lm_term="logits")
    ids = ragged_batch()["input_ids"]
    torch.testing.assert_close(model(ids).logits, odd(ids).logits)


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite", "gpt2", "gpt_neox", "qwen2", "opt", "bloom"])
def test_bases_of_other_families_fit(kind):
    """Soft caps, logit scales, learned positions, alibi: an untrained pair is the LM, left-padded too."""
    settings = {
        "vocab_size": V,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    settings |= {"intermediate_size": 64} if kind not in ("gpt2", "opt", "bloom") else {}
    settings |= {"num_key_value_heads": 2} if kind in ("gemma2", "cohere", "granite", "qwen2") else {}
    settings |= {"head_dim": 16, "final_logit_softcapping": 3.0} if kind == "gemma2" else {}
    settings |= {"logit_scale": 0.25} if kind == "cohere" else {}
    settings |= {"logits_scaling": 8.0} if kind == "granite" else {}
    settings |= {"ffn_dim": 64, "word_embed_proj_dim": 32} if kind == "opt" else {}
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()
    head = output_head(lm)
    assert (head.softcap, head.scale) == {
        "gemma2": (3.0, 1.0),
        "cohere": (None, 0.25),
        "granite": (None, 0.125),
    }.get(kind, (None, 1.0))
    model = AuxTunedForCausalLM.from_lm(lm, auxiliary_config=DECODER, head="shared", lm_layers=[1]).eval()
    ids = torch.randint(3, V, (2, 6))
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    logits = model(ids, mask).logits
    torch.testing.assert_close(logits[0], lm(ids[:1]).logits[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[1, 2:], lm(ids[1:, 2:]).logits[0], rtol=1e-4, atol=1e-5)
    loss = model(ids, mask, labels=ids.masked_fill(mask == 0, -100)).loss
    loss.backward()
    assert model.head.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lm_layer": [1]}, "no field 'lm_layer'; did you mean 'lm_layers'"),
        ({"head": "both"}, "head is 'both'; choose one of own, shared"),
        ({"lm_layers": [4]}, "lm_layers asks for 4, but the base has 3"),
        ({"lm_layers": [2, 1]}, "rising order"),
        ({"lm_layers": [-1]}, "0 or more"),
        ({"vocab_size": 128}, "vocab_size asks for 128, but the base has 97"),
        ({"from_lm_layers": 9, "input_embedding": "shared"}, "from_lm_layers asks for 9"),
        ({"from_lm_layers": 1}, 'needs architecture="decoder"'),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": "0.1"}, "dropout is .0.1.; it must be a finite number"),
        ({"aux_scale": "x"}, "aux_scale is .x.; it must be a finite number"),
        ({"aux_scale": float("inf")}, "aux_scale is inf"),
        ({"from_lm_layers": 1.5}, "from_lm_layers is 1.5; it must be a whole number"),
        ({"pointer": "yes"}, "pointer is 'yes'"),
        ({"auxiliary_config": {"model_type": "llama", "hiden_size": 3}}, "hiden_size"),
        ({"auxiliary_config": {"hidden_size": 3}}, "model_type"),
        ({"auxiliary_config": {"model_type": "t5"}}, "not decoder-only"),
        ({"architecture": "encoder-decoder", "auxiliary_config": {"model_type": "bart"}}, "T5 family"),
        ({"lm_term": "logits", "head": "shared"}, "output embedding"),
        ({"base_fingerprint": "0" * 64}, "fingerprint"),
    ],
)
def test_a_config_that_does_not_fit_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        AuxTunedForCausalLM.from_lm(tiny_lm(), **fields)


def test_arguments_that_do_not_fit_are_refused():
    model, batch = tiny_pair("own head"), ragged_batch()
    with pytest.raises(ValueError, match="condition_mask is given without condition_ids"):
        model(batch["input_ids"], condition_mask=batch["condition_mask"])
    with pytest.raises(ValueError, match=r"condition_ids has shape \(3, 5\)"):
        model(batch["input_ids"], condition_ids=batch["condition_ids"][:3])
    with pytest.raises(ValueError, match="attention_mask"):
        model(batch["input_ids"], batch["attention_mask"][:, :2])
    with pytest.raises(TypeError, match="conditon_ids"):
        model(batch["input_ids"], conditon_ids=batch["condition_ids"])


def test_shared_ids_of_a_padded_vocabulary():
    lm = tiny_lm(vocab_size=104)  # padded to a multiple of 8
    model = tiny_pair("own head", lm, vocab_size=V)
    batch = ragged_batch()
    assert model.head.weight.shape[0] == V
    logits = model(**_without_labels(batch)).logits
    assert logits.shape[-1] == V
    exact = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(model(**batch).loss, exact)


def test_the_config_holds_no_default_twice(tmp_path):
    config = AuxTunedConfig(lm_layers=[2], head="shared")
    config.save_pretrained(tmp_path)
    again = AuxTunedConfig.from_pretrained(tmp_path)
    # What older versions of transformers add on the way.
    assert AuxTunedConfig(
        _commit_hash=None, _name_or_path="x", torch_dtype="float32", lm_layers=[2]
    ).lm_layers == [2]
    assert again.lm_layers == [2]
    assert again.head == "shared"
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "aux_tuned"


def test_dense_logits_are_the_sum_of_the_terms():
    model, batch = tiny_pair("shared head, features, pointer"), _without_labels(ragged_batch())
    from auxkern.model.inputs import PairInputs

    terms, *_ = model.terms(PairInputs(**batch))
    with torch.no_grad():
        assert torch.allclose(dense_logits(terms), model(**batch).logits, atol=1e-5)


def test_a_pair_keeps_the_ids_of_its_base():
    model = tiny_pair("own head", trained=False)
    assert not list(model.get_input_embeddings().parameters())
    with pytest.raises(NotImplementedError, match=r"the 97 ids of its base.*resize the base"):
        model.resize_token_embeddings(128)


@pytest.mark.parametrize("ids", [0, [0, 2], 5])
def test_the_end_of_a_base_may_have_the_id_0(ids):
    lm = tiny_lm()
    lm.generation_config.eos_token_id = ids
    lm.generation_config.pad_token_id = lm.generation_config.bos_token_id = 0
    config = AuxTunedForCausalLM.from_lm(lm, auxiliary_config=DECODER).config
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == (ids, 0, 0)


class Tied(torch.nn.Module):
    """Ties its output to its embedding; has buffers that are saved, that are not, and that are integers."""

    hidden_size = 8

    def __init__(self, shape="tied"):
        super().__init__()
        self.embedding = torch.nn.Embedding(V, 8)
        self.output = torch.nn.Linear(8, V, bias=False)
        weight = self.embedding.weight
        self.output.weight = weight if shape == "tied" else torch.nn.Parameter(weight.detach())
        self.register_buffer("steps", torch.arange(4))
        self.register_buffer("factor", torch.full((8,), 3.0), persistent=False)

    def forward(self, inputs):
        scores = self.output(self.embedding(inputs.input_ids)).softmax(-1)
        return AuxiliaryOutput(scores @ self.output.weight * self.factor + self.steps[3])


def test_a_custom_module_with_tied_weights_and_buffers_is_saved(tmp_path):
    lm, ids = tiny_lm(), ragged_batch()["input_ids"]
    model = AuxTunedForCausalLM.from_lm(lm, Tied())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    loaded = AuxTunedForCausalLM.from_pretrained(tmp_path, lm=lm, auxiliary=Tied())
    assert loaded.auxiliary.output.weight is loaded.auxiliary.embedding.weight
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_weights_that_cannot_be_saved_are_refused_before_training():
    with pytest.raises(ValueError, match=r"auxiliary\.output\.weight and .* share memory"):
        AuxTunedForCausalLM.from_lm(tiny_lm(), Tied(shape="a view"))


def test_buffers_that_no_checkpoint_holds_come_back(tmp_path):
    lm, ids = tiny_lm(), ragged_batch()["input_ids"]
    body = {"model_type": "falcon_h1", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    body |= {"num_attention_heads": 4, "num_key_value_heads": 2, "mamba_d_ssm": 64, "mamba_n_heads": 8}
    body |= {"mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 4, "mamba_chunk_size": 8}
    model = AuxTunedForCausalLM.from_lm(lm, auxiliary_config=body)
    torch.nn.init.normal_(model.head.weight)
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            assert buffer.isfinite().all(), name
    model.save_pretrained(tmp_path)
    loaded = AuxTunedForCausalLM.from_pretrained(tmp_path, lm=lm)
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_an_auxiliary_is_unloaded_by_its_name(tmp_path):
    model, batch = with_two_more(tiny_lm(), tmp_path), _without_labels(ragged_batch())
    expected = model(**batch, auxiliary_ids=torch.full((4,), 2)).logits
    model.unload_auxiliary("t5")
    assert model.auxiliary_names == ["default", "own"]
    assert torch.equal(model(**batch, auxiliary_ids=torch.full((4,), 1)).logits, expected)
    model.load_auxiliary("t5", tmp_path / "t5")
    for name in ("default", "other"):
        with pytest.raises(
            ValueError, match=f"no auxiliary '{name}' to unload; those that can be: 'own', 't5'"
        ):
            model.unload_auxiliary(name)


@pytest.mark.parametrize("kind", PAIRS)
def test_what_is_hooked_on_input_embeddings_reaches_the_auxiliary_alone(kind):
    """NEFTune adds its noise there."""
    model, batch = tiny_pair(kind), _without_labels(ragged_batch())
    before = model(**batch).logits
    hook = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: 2 * output)
    assert not torch.equal(model(**batch).logits, before)
    base_alone = model(**batch, auxiliary_ids=torch.full((4,), -1)).logits
    hook.remove()
    assert torch.equal(model(**batch, auxiliary_ids=torch.full((4,), -1)).logits, base_alone)
    assert torch.equal(model(**batch).logits, before)


@pytest.mark.parametrize("kind", PAIRS)
def test_hidden_states_are_the_bases(kind):
    model, batch = tiny_pair(kind), _without_labels(ragged_batch())
    output = model(**batch, output_hidden_states=True)
    # Last layers otherwise do without the base's, which they add to and take away.
    rounding = 1e-4 if kind == "last layers of the LM" else 0
    torch.testing.assert_close(output.logits, model(**batch).logits, rtol=rounding, atol=rounding)
    expected = run_base(model.lm, batch["input_ids"], batch["attention_mask"], layers=range(4)).states
    assert torch.equal(torch.stack(output.hidden_states, 2), expected[:, :, 1:])
    with pytest.raises(ValueError, match="output_hidden_states asks the base"):
        model(**batch, output_hidden_states=True, lm_states=expected)
