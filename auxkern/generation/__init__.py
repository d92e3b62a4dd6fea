"""Batch generation: requests in, texts out, two models behind them."""

from auxkern.generation.batch_mapper import BatchMapper
from auxkern.generation.engine import Engine
from auxkern.generation.request import Completion, Request, Sequence, TokenLogprobs
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
    "Move",
    "Plan",
    "Request",
    "Scheduler",
    "Sequence",
    "TextStream",
    "TokenLogprobs",
    "file_fingerprint",
    "read_requests",
]
