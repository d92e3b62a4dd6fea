"""Which bases and auxiliaries make no pair, seen when one is made: see ``trials``."""

from __future__ import annotations

import copy
import json
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedModel

from auxkern.model import base, twins
from auxkern.model.auxiliary import build_auxiliary
from auxkern.model.caches import AuxiliaryRows
from auxkern.model.config import LAST_LAYERS, AuxTunedConfig
from auxkern.model.fingerprints import computing_fields
from auxkern.model.frozen import base_side
from auxkern.model.inputs import PairInputs
from auxkern.model.interface import AuxiliaryInputs
from auxkern.model.pair_terms import DEFAULT
from auxkern.model.trials import EXACT, LENGTH, PADDING, ROUNDED, Reading, Trial, trial_ids

_log = logging.getLogger(__name__)
_OTHER = "use a decoder-only language model with a mask for padding, such as a Llama, Qwen or GPT-2"
_flaws: dict[str, str | None] = {}  # what twins have shown


def check_base(lm: Any, config: AuxTunedConfig) -> None:
    """Tries a base on a few tokens, and once for each kind of base a twin of it.

    Args:
        lm: the base.
        config: of the pair.

    Raises:
        ValueError: later tokens or padding reach its output, a cache changes it, or it computes something
            else than the pair reads.
    """
    room = _room(lm.config.get_text_config())
    ids = trial_ids(base.vocabulary(lm), base.output_device(lm), _special(lm), room)
    try:
        base.check_logits(lm, ids)
        if config.lm_term == "head":
            base.check_output_head(lm)
        flaw = _remembered(lm, config) or _base_trial(lm, config, ids).flaw()
    except base.UnfitBaseError:
        raise
    except Exception as error:
        reason = f"it does not run on tokens, a mask and a cache alone ({type(error).__name__}: {error})"
        raise _no_base(lm, reason) from error
    if flaw is not None:
        raise _no_base(lm, flaw)


def check_auxiliary(config: AuxTunedConfig, auxiliary: nn.Module | None = None) -> None:
    """Tries an auxiliary: a twin of what the config describes, or a custom module itself.

    Args:
        config: of the pair, with the sizes of its base.
        auxiliary: with ``architecture="custom"``, the module.

    Raises:
        ValueError: later tokens or padding reach its output, or a cache changes it.
    """
    if config.architecture == LAST_LAYERS:
        return  # see ``check_last_layers``
    if auxiliary is not None:
        name, instead = type(auxiliary).__name__, "see AuxiliaryModule for what it has to do"
    else:
        kind = (config.auxiliary_config or {}).get("model_type", config.body_config().model_type)
        name, instead = f"a {kind!r} (auxiliary_config)", 'use another "model_type", such as "llama"'
    try:
        flaw = _auxiliary_flaw(config, auxiliary)
    except Exception as error:
        raise ValueError(
            f"{name} cannot be an auxiliary: it does not run on input vectors, a mask and a cache "
            f"({type(error).__name__}: {error}); {instead}"
        ) from error
    if flaw is not None:
        raise ValueError(f"{name} cannot be an auxiliary: {flaw}; {instead}")


@torch.no_grad()
def check_last_layers(model: Any) -> None:
    """Runs the base's last layers, untrained, on its own states, and sees whether they make its final ones.

    Args:
        model: a pair with ``architecture="last-layers"``, new.

    Raises:
        ValueError: they do not: the base does something else between its layers.
    """
    lm = model.lm
    ids = trial_ids(
        base.vocabulary(lm), base.output_device(lm), _special(lm), _room(lm.config.get_text_config())
    )
    batch = PairInputs(ids)
    side = base_side(model, batch, model.config.lm_layers)
    added = model.auxiliary_output(AuxiliaryRows(DEFAULT, None, None), batch, side, use_cache=False).hidden
    difference = float(added.abs().max() / side.states[:, :, 0].float().abs().max().clamp_min(1e-6))
    if not difference <= _tolerance(lm):
        raise ValueError(
            f"the last {model.config.last_layers} layers of {type(lm).__name__} on its hidden states give "
            f"other final states than it has (relative difference {difference:.1e}); use another "
            'architecture than "last-layers"'
        )


def check_kind(lm: Any) -> None:
    """Sees whether a base is a model that can be asked for what a pair needs.

    Raises:
        TypeError: it is no model of transformers, or one inside another module.
        ValueError: it has an encoder, or no transformer or output embedding of its own.
    """
    if hasattr(lm, "get_base_model") and hasattr(lm, "peft_config"):
        raise TypeError(
            f"the base is a {type(lm).__name__} of PEFT, which hides the model inside; pass "
            "lm.get_base_model(), adapters and all, or lm.merge_and_unload()"
        )
    if not isinstance(lm, PreTrainedModel):
        inner = " pass the model inside, lm._orig_mod" if hasattr(lm, "_orig_mod") else ""
        raise TypeError(
            f"the base is a {type(lm).__name__}; it must be a causal language model of transformers.{inner}"
        )
    if lm.config.is_encoder_decoder:
        raise _no_base(lm, "it is an encoder-decoder")
    if lm.get_input_embeddings() is None or base.transformer(lm) is lm:
        raise _no_base(lm, "it has no transformer and output embedding of its own")


def _no_base(lm: Any, reason: str) -> ValueError:
    """Says what to use in place of it: the language model in one of several parts, or another one."""
    instead = _OTHER
    for name, part in lm.named_modules():
        inner = isinstance(part, PreTrainedModel) and part is not lm
        if inner and not part.config.is_encoder_decoder and part.get_output_embeddings() is not None:
            instead = f"pass the language model in it, model.{name}"
            break
    kind = f"{type(lm).__name__} (model_type {lm.config.model_type!r})"
    return ValueError(f"{kind} cannot be a base: {reason}; {instead}")


def _special(lm: Any) -> tuple[int, ...]:
    config = lm.config.get_text_config()
    ids = [getattr(config, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad")]
    return tuple(i for one in ids if one is not None for i in (one if isinstance(one, list) else [one]))


def _room(config: Any) -> int:
    """Tokens of a trial that a model has positions for."""
    positions = getattr(config, "max_position_embeddings", None)
    return LENGTH if not isinstance(positions, int) or positions <= 0 else min(LENGTH, positions - PADDING)


def _base_trial(lm: Any, config: AuxTunedConfig, ids: Tensor, layers: tuple[int, ...] | None = None) -> Trial:
    layers = tuple(config.lm_layers) if layers is None else layers
    logits = config.lm_term == "logits"

    def read(ids: Tensor, mask: Tensor, cache: Any, use_cache: bool) -> Reading:
        output = base.run_base(
            lm, ids, mask, layers=layers, cache=cache, use_cache=use_cache, want_logits=logits
        )
        values = output.states.flatten(2) if output.logits is None else output.logits
        return Reading(values, output.cache)

    return Trial(read, ids, _tolerance(lm))


def _tolerance(module: nn.Module) -> float:
    exact = all(p.dtype in (torch.float32, torch.float64) for p in module.parameters())
    return EXACT if exact else ROUNDED


def _remembered(lm: Any, config: AuxTunedConfig) -> str | None:
    """What a twin shows, once for each class and configuration; None too where there can be no twin."""
    fields = json.dumps(computing_fields(lm), sort_keys=True, default=str)
    key = f"{type(lm).__module__}.{type(lm).__qualname__} {id(type(lm))} {config.lm_term} {fields}"
    if key not in _flaws:
        try:
            twin = twins.tiny_copy(lm)
            ids = trial_ids(base.vocabulary(twin), avoid=_special(twin))
            with torch.random.fork_rng(devices=[]), torch.device("cpu"):
                _flaws[key] = _base_trial(twin, config, ids, ()).flaw()
        except Exception as error:
            # Nothing is known of what a class asks of its config; the base itself is tried in any case.
            _log.info("no small twin of %s: %s", type(lm).__name__, error)
            _flaws[key] = None
    return _flaws[key]


def _auxiliary_flaw(config: AuxTunedConfig, module: nn.Module | None) -> str | None:
    if module is not None:
        trained = [part for part in module.modules() if part.training]
        try:
            return _auxiliary_trial(config, module.eval()).flaw()
        finally:
            for part in trained:
                part.training = True
    key = json.dumps(["auxiliary", config.architecture, config.to_dict()], sort_keys=True, default=str)
    if key not in _flaws:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.manual_seed(0)
            try:
                _flaws[key] = _auxiliary_trial(*_twin_auxiliary(config, small=True)).flaw()
            except Exception as error:
                # As for a base: its family may have no small ones of this shape.
                _log.info("no small twin of an auxiliary: %s", error)
                _flaws[key] = _auxiliary_trial(*_twin_auxiliary(config, small=False)).flaw()
    return _flaws[key]


def _twin_auxiliary(config: AuxTunedConfig, *, small: bool) -> tuple[AuxTunedConfig, nn.Module]:
    """An auxiliary of the same kind with random weights, small or with a transformer of its own size."""
    twin = copy.deepcopy(config)
    twin.vocab_size, twin.pointer_size, twin.dropout = twins.V, 8, 0.0
    if not config.from_lm_layers:
        twin.lm_hidden_size = twin.lm_embedding_size = 16
    if small:
        body = config.body_config()
        tiny = twins.tiny_config(body)
        known = {*type(body)().to_dict(), *body.attribute_map}
        settings = {name: value for name, value in tiny.to_diff_dict().items() if name in known}
        twin.auxiliary_config = {**settings, "model_type": body.model_type}
        if config.from_lm_layers:  # it reads the base's embedding as it is
            twin.lm_embedding_size = tiny.hidden_size
    module = build_auxiliary(twin)
    twins.randomise(module)
    return twin, module.eval()


def _auxiliary_trial(config: AuxTunedConfig, module: nn.Module) -> Trial:
    """The text is what ``trials`` pads; the condition is padded where the text is."""
    parameters = list(module.parameters())
    device = parameters[0].device if parameters else torch.device("cpu")
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(device)

    V = min(config.vocab_size or twins.V, twins.V)
    D, D_lm, L = config.lm_embedding_size or 1, config.lm_hidden_size or 1, len(config.lm_layers)
    embedding, states = random(V, D), random(V, L, D_lm)
    # Whatever starts at zero hides what it lets through.
    loud = {
        name: p + 0.1 * random(*p.shape).to(p.dtype)
        for name, p in module.named_parameters()
        if p.is_floating_point()
    }

    def read(ids: Tensor, mask: Tensor, cache: Any, use_cache: bool) -> Reading:
        inputs = _trial_inputs(ids, mask, cache, use_cache)
        inputs.lm_embedding, inputs.lm_states = embedding, states[ids]
        if config.pointer and config.pointer_reads_lm:
            inputs.lm_scores = ((ids[:, :, None] + inputs.condition_ids[:, None]) % 7).float()
        output = functional_call(module, loud, (inputs,))
        parts = [output.hidden]
        if output.pointer is not None:
            # Padding is masked later, and its columns are another number.
            real = inputs.condition_mask[:, None] != 0
            parts.append(torch.where(real, output.pointer, 0.0).sum(-1, keepdim=True))
        return Reading(torch.cat(parts, -1), output.cache)

    return Trial(read, trial_ids(V, device), _tolerance(module))


def _trial_inputs(ids: Tensor, mask: Tensor, cache: Any, use_cache: bool) -> AuxiliaryInputs:
    """A text and a condition of two tokens; behind padding of the text the condition is padded too."""
    condition = ids.new_tensor([[5, 7]]).expand(len(ids), 2)
    padded = torch.cat([condition, ids.new_full((len(ids), 2 * PADDING), 3)], 1)
    real = torch.cat([torch.ones_like(condition), torch.zeros_like(padded[:, 2:])], 1)
    if bool((mask != 0).all()):
        padded, real = condition, torch.ones_like(condition)
    empty = torch.empty(0, device=ids.device)
    return AuxiliaryInputs(ids, mask, padded, real, empty, empty, None, cache, use_cache)
