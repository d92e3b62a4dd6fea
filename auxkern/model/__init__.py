"""The pair: a frozen language model and its auxiliary, as transformers knows models.

Importing it registers ``AuxTunedForCausalLM`` with transformers' Auto classes, and does nothing else.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from auxkern.model.base import load_base, load_tokenizer
from auxkern.model.config import AuxTunedConfig
from auxkern.model.fingerprints import fingerprint
from auxkern.model.interface import AuxiliaryInputs, AuxiliaryModule, AuxiliaryOutput
from auxkern.model.modeling import AuxTunedForCausalLM
from auxkern.model.native import use_native_kernels
from auxkern.model.opening import open_models, open_pair
from auxkern.model.sharding import shard_auxiliary, shard_base
from auxkern.model.text import Example, TextFormat

AutoConfig.register(AuxTunedConfig.model_type, AuxTunedConfig)
AutoModelForCausalLM.register(AuxTunedConfig, AuxTunedForCausalLM)

__all__ = [
    "AuxTunedConfig",
    "AuxTunedForCausalLM",
    "AuxiliaryInputs",
    "AuxiliaryModule",
    "AuxiliaryOutput",
    "Example",
    "TextFormat",
    "fingerprint",
    "load_base",
    "load_tokenizer",
    "open_models",
    "open_pair",
    "shard_auxiliary",
    "shard_base",
    "use_native_kernels",
]
