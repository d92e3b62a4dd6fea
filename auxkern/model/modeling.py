"""A frozen language model and its auxiliary as one transformers model."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from auxkern.core.terms import Term
from auxkern.model import base, fitting, refusals
from auxkern.model.auxiliary import build_auxiliary
from auxkern.model.caches import CACHE_NAME, PairCache
from auxkern.model.card import write_model_card
from auxkern.model.config import AuxTunedConfig, trained_on_top_of
from auxkern.model.fingerprints import fingerprint
from auxkern.model.first_layers import FirstLayers
from auxkern.model.frozen import Frozen, frozen_terms
from auxkern.model.generation import PairGeneration
from auxkern.model.inputs import PairInputs, checked_weights
from auxkern.model.interface import traits_of
from auxkern.model.last_layers import LastLayers
from auxkern.model.layers import ZeroLinear
from auxkern.model.mixing import with_frozen
from auxkern.model.native import compute_of, use_native_kernels
from auxkern.model.pair_terms import DEFAULT, PairSum, label_loss
from auxkern.model.prefix import BasePrefix
from auxkern.model.saving import check_complete, pair_config, tied_weights
from auxkern.ops.dense import dense_logits

# A causal LM of transformers, by the name of its class.
_KNOWN_CAUSAL_LM = "GPT2LMHeadModel"


class AuxTunedForCausalLM(PairGeneration, PairSum, PreTrainedModel, GenerationMixin):
    """softmax(logits_LM + aux_scale * logits_aux), the LM frozen (Zeldes et al. 2020, eq. 1).

    ``parameters()``, ``state_dict()`` and a checkpoint hold the auxiliary alone. The LM, ``model.lm``,
    is held by reference: it gets no gradient, is never saved, and moves to a device with the model,
    but keeps its dtype.

    Args:
        config: what the auxiliary is, and which base it was made for.
        lm: the base, loaded; read from where the config says if None.
        auxiliary: with ``architecture="custom"``, the module (see ``AuxiliaryModule``).
        allow_other_base: whether a base with another fingerprint is taken.
        lm_fingerprint: of the lm, where it is known already; taking it reads every weight.

    Raises:
        ValueError: the base is not the one in the config, or does not fit it.
    """

    config_class = AuxTunedConfig
    base_model_prefix = "auxiliary"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _supports_sdpa = True
    _keys_to_ignore_at_inference = ("past_key_values",)
    lm: Any

    def __init__(
        self,
        config: AuxTunedConfig,
        lm: Any = None,
        auxiliary: nn.Module | None = None,
        *,
        allow_other_base: bool = False,
        lm_fingerprint: str | None = None,
    ) -> None:
        config = copy.deepcopy(config)
        lm = lm if lm is not None else fitting.base_of(config)
        refusals.check_kind(lm)
        base.freeze(lm)
        lm_fingerprint = lm_fingerprint or fingerprint(lm)
        fitting.fit(config, lm, lm_fingerprint, allow_other_base)
        custom = config.architecture == "custom"
        if custom != (auxiliary is not None):
            raise ValueError(
                f"architecture is {config.architecture!r} and auxiliary a {type(auxiliary).__name__}; a "
                'module goes with "custom", and only with it'
            )
        # Where weights are loaded into a model without memory, from_pretrained has tried both.
        if torch.empty(0).device.type != "meta":
            refusals.check_base(lm, config)
            refusals.check_auxiliary(config, auxiliary)
        super().__init__(config)
        self.lm_fingerprint = lm_fingerprint
        # Past nn.Module's registration: the base is no part of the parameters, nor of what is saved.
        object.__setattr__(self, "lm", lm)
        object.__setattr__(self, "_others", {})
        self.base_prefix = BasePrefix(lm, config.base_prefix_ids)
        self.auxiliary = build_auxiliary(config) if auxiliary is None else auxiliary
        self.head: Any = None
        if isinstance(self.auxiliary, LastLayers):
            object.__setattr__(self, "_first", FirstLayers(lm, config.lm_layers[0]))
            self.auxiliary.share_weights(lm)
        else:
            out = config.lm_hidden_size if config.head == "shared" else config.vocab_size
            width: Any = self.auxiliary.hidden_size
            self.head = ZeroLinear(width, int(out or 0), bias=False)
        self._tied_weights_keys = tied_weights(self)
        self.post_init()

    # ----------------------------------------------------------------- made, loaded, saved, moved

    @classmethod
    def from_lm(
        cls,
        lm: Any,
        auxiliary: nn.Module | None = None,
        *,
        base_options: dict[str, Any] | None = None,
        **fields: Any,
    ) -> AuxTunedForCausalLM:
        """A new pair; its auxiliary is untrained, so it is the LM.

        Args:
            lm: a causal LM of transformers, or a name or path for ``load_base``.
            auxiliary: a module, with ``architecture="custom"``.
            base_options: for ``load_base``, such as device or dtype.
            fields: of ``AuxTunedConfig``.

        Raises:
            ValueError: a field is unknown or does not fit the LM.
        """
        options = dict(base_options or {})
        if isinstance(lm, str):
            source = {"base_revision": options.get("revision"), "base_gguf_file": options.get("gguf_file")}
            fields = {"base_model_name_or_path": lm, **source, **fields}
            lm = base.load_base(lm, **options)
        elif options:
            raise ValueError(
                "base_options are for a base that is loaded by name; the lm given is loaded already"
            )
        if auxiliary is not None:
            fields.setdefault("architecture", "custom")
        config = AuxTunedConfig(**fields)
        refusals.check_kind(lm)
        if config.from_lm_layers:
            config.auxiliary_config = fitting.some_layers(lm, slice(config.from_lm_layers))
        if config.last_layers:
            config.auxiliary_config = fitting.some_layers(lm, slice(-config.last_layers, None))
        model = cls(config, lm=lm, auxiliary=auxiliary)
        if config.from_lm_layers:
            fitting.copy_layers(model.auxiliary.body, lm)
        model.to(base.output_device(lm))
        if isinstance(model.auxiliary, LastLayers):
            model.auxiliary.copy_weights(lm)
            refusals.check_last_layers(model)
        return model.train()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        lm: Any = None,
        auxiliary: nn.Module | None = None,
        base_options: dict[str, Any] | None = None,
        allow_other_base: bool = False,
        config: Any = None,
        **kwargs: Any,
    ) -> AuxTunedForCausalLM:
        """A trained pair: the auxiliary from a checkpoint, the base from where its config says.

        Args:
            pretrained_model_name_or_path: folder or Hub name.
            lm: the base, if it is loaded already, or its name or path, if it has moved.
            auxiliary: with ``architecture="custom"``, the module that the weights go into.
            base_options: for ``load_base``, such as device or dtype.
            allow_other_base: whether a base with another fingerprint is taken.
            config, kwargs: as in transformers.

        Raises:
            ValueError: the base has another fingerprint than the one that the auxiliary was made for, or
                weights are missing or left over, or the folder holds no auxiliary.
            OSError: there is no such checkpoint; the message says how one is trained.
        """
        if not isinstance(config, AuxTunedConfig):
            asked = ("revision", "token", "cache_dir", "local_files_only")
            hub = {name: kwargs[name] for name in asked if name in kwargs}
            config = pair_config(pretrained_model_name_or_path, **hub)
        if lm is None or isinstance(lm, str):
            lm = fitting.base_of(config, lm, base_options)
        refusals.check_kind(lm)
        refusals.check_base(base.freeze(lm), config)
        if config.architecture != "custom" or auxiliary is not None:
            refusals.check_auxiliary(config, auxiliary)
        buffers = fitting.unsaved_buffers(config, auxiliary)
        wants_report = kwargs.pop("output_loading_info", False)
        model, report = super().from_pretrained(
            pretrained_model_name_or_path,
            *model_args,
            config=config,
            lm=lm,
            auxiliary=auxiliary,
            allow_other_base=allow_other_base,
            output_loading_info=True,
            **kwargs,
        )
        check_complete(pretrained_model_name_or_path, report)
        for name, value in buffers.items():
            model.auxiliary.get_buffer(name).copy_(value)
        if config.on_top_of:
            warnings.warn(
                f"{pretrained_model_name_or_path} was trained in a sum with other auxiliaries, without which "
                f"it is another mixture: {trained_on_top_of(config.on_top_of)}",
                stacklevel=2,
            )
        if "device_map" not in kwargs:
            model = model.to(base.output_device(lm))
        return (model, report) if wants_report else model  # type: ignore[return-value]

    def save_pretrained(self, save_directory: Any, **kwargs: Any) -> None:
        """Writes the auxiliary's weights (safetensors), its config and a model card.

        Args:
            save_directory: folder; made if it is not there.
            kwargs: as in transformers, ``push_to_hub`` among them.
        """
        if kwargs.get("is_main_process", True):
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            write_model_card(Path(save_directory), self.config, sum(p.numel() for p in self.parameters()))
        super().save_pretrained(save_directory, **kwargs)

    def load_auxiliary(self, name: str, path: Any, *, allow_other_base: bool = False, **kwargs: Any) -> None:
        """Another auxiliary on the same base, for ``generate(auxiliary=...)``.

        Args:
            name: what it is called; "default" is the one that the model was made with.
            path: folder or Hub name of its checkpoint.
            allow_other_base, kwargs: as in ``from_pretrained``.

        Raises:
            ValueError: the name is taken, or the auxiliary was made for another base.
        """
        if name == DEFAULT or name in self._others:
            raise ValueError(f"there is an auxiliary {name!r} already; choose another name")
        known = {"lm": self.lm, "lm_fingerprint": self.lm_fingerprint}
        other = type(self).from_pretrained(path, **known, allow_other_base=allow_other_base, **kwargs)
        if other.config.vocab_size != self.config.vocab_size:
            raise ValueError(
                f"auxiliary {name!r} has {other.config.vocab_size} ids but the model "
                f"{self.config.vocab_size}; make both with one vocab_size"
            )
        for field in ("base_prompt", "base_prefix_ids"):
            own, trained = getattr(self.config, field), getattr(other.config, field)
            if own != trained:
                raise ValueError(
                    f"auxiliary {name!r} was trained on a base with {field}={trained!r:.60}, but this "
                    f"model's has {own!r:.60}; auxiliaries of one model share what its base reads"
                )
        self._others[name] = other.to(self.device).eval()

    def use_native_kernels(self, compute: str | None = None) -> AuxTunedForCausalLM:
        """Runs the base and all auxiliaries in auxkern's CPU kernels.

        See ``auxkern.model.use_native_kernels``. It is for texts and scores; layers that are trained run
        as before. ``load_base`` has done it to the base already, where it can.

        Args:
            compute: "float32", "bfloat16" or "int8"; None: that of the base, float32 if it has none.

        Raises:
            ValueError: there is no such compute.
            RuntimeError: there are no kernels for this machine.
        """
        compute = compute or compute_of(self.lm) or "float32"
        for module in (self.lm, self, *self._others.values()):
            use_native_kernels(module, compute)
            if module is not self.lm and isinstance(module.auxiliary, LastLayers):
                module.auxiliary.merge(compute)
        return self

    def _get_name(self) -> str:
        # The Trainer's label smoothing asks for it, and shifts the labels of names that transformers lists.
        return _KNOWN_CAUSAL_LM

    def __repr__(self) -> str:
        return super().__repr__().replace(_KNOWN_CAUSAL_LM, type(self).__name__, 1)

    def unload_auxiliary(self, name: str) -> None:
        """Forgets an auxiliary of ``load_auxiliary``; those after it move up in ``auxiliary_names``.

        An engine keeps the auxiliaries that it was made with: make another one.

        Args:
            name: what it was called when it was loaded.

        Raises:
            ValueError: there is none of that name, or it is the one that the model was made with.
        """
        if name not in self._others:
            can = ", ".join(map(repr, self._others)) or "none is loaded"
            raise ValueError(f"there is no auxiliary {name!r} to unload; those that can be: {can}")
        del self._others[name]

    def get_input_embeddings(self) -> nn.Module | None:
        """What the auxiliary's input vectors pass through, for hooks such as NEFTune's; None if custom.

        It has no weights: tables of ids are the base's, or a part of the auxiliary like others, and tools
        that shard or resize what they find here leave them alone.
        """
        return traits_of(self.auxiliary).input_vectors

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Weights that a custom auxiliary holds under two names, saved under the first; for transformers."""
        inner = super().get_expanded_tied_weights_keys(all_submodels) if all_submodels else {}
        return {**inner, **(self._tied_weights_keys or {})}

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"a pair has the {self.config.vocab_size:,} ids of its base, which stays as it is; resize "
            "the base, and make a new pair with AuxTunedForCausalLM.from_lm"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        # The device only: a cast is for the auxiliary, the base keeps the dtype that it was loaded in.
        device = next(self.parameters()).device
        mapped = getattr(self.__dict__.get("lm"), "hf_device_map", None) is not None
        if "lm" in self.__dict__ and device.type != "meta" and not mapped:
            if base.output_device(self.lm) != device:
                self.lm.to(device)
            for other in self._others.values():
                other.to(device)
            if isinstance(self.auxiliary, LastLayers):
                self.auxiliary.share_weights(self.lm)
        return self

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ZeroLinear):
            super()._init_weights(module)
            nn.init.zeros_(module.weight)
        elif self.config.architecture != "custom":  # a module that was passed keeps its own weights
            super()._init_weights(module)

    # ----------------------------------------------------------------------------- what it computes

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        condition_ids: Tensor | None = None,
        condition_mask: Tensor | None = None,
        lm_states: Tensor | None = None,
        past_key_values: PairCache | None = None,
        use_cache: bool = False,
        auxiliary_ids: Tensor | None = None,
        aux_scale: float | Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        logits_to_keep: int = 0,
        return_logits: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: PairCache | None = None,
        frozen: Frozen | None = None,
        told: Tensor | None = None,
    ) -> Any:
        """The loss of the pair, or its logits.

        Args:
            input_ids: (B, T) int64; new tokens, if there is a cache.
            attention_mask: (B, P + T) int64, 1 for real tokens; padding on either side.
            labels: (B, T) int64: the ids at the same positions, -100 where nothing is to be learnt;
                position t is scored against label t + 1.
            condition_ids, condition_mask: (B, K) int64, or (B, A, K) where each of a sequence's auxiliaries
                has its own; no condition if None.
            lm_states: (B, T, 1 + L, D_lm) what the base computes for these ids, from a cache of LM
                states: the final hidden states, then those of ``config.lm_layers``.
            past_key_values, cache: what an earlier call returned, under either of transformers' names.
            use_cache: whether to return caches.
            auxiliary_ids: (B,) int64 indices into ``auxiliary_names``, -1 for the base alone; or (B, A),
                several that are added up, with -1 where a sequence has fewer.
            aux_scale: mixing weight instead of those of the configs; a float, (B,), or (B, A).
            num_items_in_batch: what divides the summed loss, instead of the number of labels.
            logits_to_keep: how many of the last positions' logits are wanted; 0 for all.
            return_logits: whether logits are wanted. By default without labels, and beside the loss where
                the model is in evaluation mode and no gradient is recorded: the Trainer measures them.
            output_hidden_states: whether the base's hidden states are wanted too.
            return_dict: False for a tuple.
            frozen: other auxiliaries that are held frozen, with their conditions, for training and scoring:
                their terms, without gradients, stand in the sum with the weights of ``config.on_top_of``.
            told: (B,) int64, how many of a sequence's first tokens are the base prompt.

        Returns:
            ``CausalLMOutputWithPast``: ``loss`` 0-d float32 in nats, ``logits`` (B, T, V) float32,
            ``hidden_states`` of the base, (B, T, D_lm) each, the embeddings' first.

        Raises:
            ValueError: arguments do not fit each other.
        """
        if past_key_values is not None and cache is not None:
            raise ValueError("cache and past_key_values are two names of one argument; pass one of them")
        past_key_values = cache if past_key_values is None else past_key_values
        cache_wanted = use_cache and labels is None
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        batch = PairInputs(input_ids, attention_mask, condition_ids, condition_mask, told, past=past)
        if aux_scale is not None:
            shape = batch.input_ids.shape[:1] if auxiliary_ids is None else auxiliary_ids.shape
            aux_scale = checked_weights(aux_scale, shape, input_ids.device)
        added: list[list[Term]] = []
        if frozen:
            if cache_wanted or past or output_hidden_states or auxiliary_ids is not None:
                raise ValueError(
                    "frozen is for training and scoring the model's own auxiliary; leave out caches, "
                    "auxiliary_ids and output_hidden_states"
                )
            lm_states, added = frozen_terms(self, batch, frozen, lm_states)
        known: Tensor | base.LmOutput | None = lm_states
        hidden_states = None
        if output_hidden_states:
            if lm_states is not None:
                raise ValueError("output_hidden_states asks the base, which lm_states stand for; pass one")
            every = list(range(self.lm.config.get_text_config().num_hidden_layers + 1))
            known = self.run_lm(batch, every, past_key_values, use_cache=cache_wanted)
            hidden_states = known.states[:, :, 1:].unbind(2)
        terms, new_cache, _ = self.terms(
            batch,
            lm_states=known,
            cache=past_key_values,
            use_cache=cache_wanted,
            auxiliary_ids=auxiliary_ids,
            aux_scale=aux_scale,
            keep=0 if labels is not None else logits_to_keep,
        )
        if added:
            terms = with_frozen(terms, added)
        loss = (
            None if labels is None else label_loss(terms, labels, self.config.vocab_size, num_items_in_batch)
        )
        if return_logits is None:
            return_logits = labels is None or not (self.training or torch.is_grad_enabled())
        logits = dense_logits(terms, vocab_size=self.config.vocab_size) if return_logits else None
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=hidden_states, **{CACHE_NAME: new_cache}
        )
        return output.to_tuple() if return_dict is False else output
