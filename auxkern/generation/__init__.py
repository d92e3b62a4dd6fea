"""Batch generation: requests in, texts out, two models or a mixture of more behind them."""

from auxkern.generation.batch_mapper import BatchMapper
from auxkern.generation.completion import Completion, TokenLogprobs
from auxkern.generation.engine import Engine
from auxkern.generation.members import Member, Mixture, context, contrast, experts, guidance
from auxkern.generation.mixture_model import MixtureForCausalLM
from auxkern.generation.request import Request, Sequence
from auxkern.generation.scheduler import Move, Plan, Scheduler
from auxkern.generation.stats import EngineStats
from auxkern.generation.stops import TextStream
from auxkern.generation.stream import BadLine, CompletionWriter, file_fingerprint, read_requests

__all__ = [
    "BadLine",
    "BatchMapper",
    "Completion",
    "CompletionWriter",
    "Engine",
    "EngineStats",
    "Member",
    "Mixture",
    "MixtureForCausalLM",
    "Move",
    "Plan",
    "Request",
    "Scheduler",
    "Sequence",
    "TextStream",
    "TokenLogprobs",
    "context",
    "contrast",
    "experts",
    "file_fingerprint",
    "guidance",
    "read_requests",
]
