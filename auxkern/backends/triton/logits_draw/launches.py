"""From checked tensors to the launches that draw tokens, run by the backend or compiled ahead of time."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from auxkern.backends.triton import configs
from auxkern.backends.triton.filters import launches as filters
from auxkern.backends.triton.launch import (
    VECTOR_BYTES,
    Launch,
    as_arguments,
    splits,
    term_constants,
)
from auxkern.backends.triton.logits_draw.kernels import (
    adjust_kernel,
    choose_kernel,
    draw_kernel,
    sum_kernel,
)
from auxkern.backends.triton.running import TritonKernels
from auxkern.core.draws import ROW_NUMBERS, Draws, RowTokens
from auxkern.core.sums import Sum
from auxkern.core.terms import Logits, unchecked

NOISE_FLOPS = 40  # ten rounds of Philox for four ids, two logarithms: per id

_PER_ROW = ("seed", "position", "added_ids", "added", "bias_ids", "bias")
# What a draw is given, as kernels take it.
RowDraws: Any = cast(Any, namedtuple)("RowDraws", [*(number.name for number in ROW_NUMBERS), *_PER_ROW])


class Bounds(NamedTuple):
    """What ``draw_kernel`` leaves for ``choose_kernel``, float32."""

    bounds: Tensor  # (N, groups): of scores
    parts: Tensor  # (N, parts, 2): largest logit and sum of exp((z - largest) / temperature), if wanted


class _Seen(NamedTuple):
    """Ids of each row's prompt and history, each once; the rest are -1."""

    ids: Tensor  # (N, S) int64
    generated: Tensor  # (N, S) int64: how often it is in the history


@dataclass(frozen=True)
class Drawing:
    """A draw of N tokens from V ids, whatever their logits are made of.

    Attributes:
        draws: as the backend is given them.
        V: ids.
        want_logprob: whether log-probabilities are filled.
        rows: ``draws`` as kernels take them.
        tokens: what the last kernel fills.
        processors: of the device; they decide over how many programs a row is split.
    """

    draws: Draws
    V: int
    want_logprob: bool
    rows: Any
    tokens: RowTokens
    processors: int

    @classmethod
    def of(cls, sum: Sum, draws: Draws, want_logprob: bool, processors: int) -> Drawing:
        """A draw from this sum, of which it takes the sparse terms."""
        N = draws.seed.shape[0]
        per_row = (draws.seed, draws.position, *sum.entries(), draws.bias_ids, draws.bias)
        rows = RowDraws(*[draws[number.name] for number in ROW_NUMBERS], *per_row)
        tokens = RowTokens(
            draws.seed.new_empty(N),
            draws.seed.new_empty(N, dtype=torch.int32),
            draws.seed.new_empty(N if want_logprob else 0, dtype=torch.float32),
        )
        return cls(draws, sum.V, want_logprob, rows, tokens, processors)

    @property
    def N(self) -> int:
        return self.draws.seed.shape[0]

    @property
    def padded(self) -> int:
        """Columns of written logits: whole tiles, filled with -inf, so that no reader needs a mask."""
        return -(-self.V // configs.SAMPLE.block) * configs.SAMPLE.block

    @property
    def rewrites(self) -> bool:
        """Whether filters or penalties follow, which read written logits."""
        return not self.draws.plain or bool(self.draws.prompt.shape[1] or self.draws.history.shape[1])

    @property
    def writes(self) -> bool:
        """Whether those follow, or entries, which row kernels add to written logits."""
        return self.rewrites or self._adds

    @property
    def _adds(self) -> bool:
        return bool(self.rows.added_ids.shape[1] or self.rows.bias_ids.shape[1])

    def floats(self, columns: int) -> Tensor:
        """Uninitialised (N, columns) float32."""
        return self.draws.seed.new_empty((self.N, columns), dtype=torch.float32)

    def parts(self, count: int) -> Tensor:
        """Uninitialised (N, count, 2): largest logit and sum of each part of a row, for log-probabilities."""
        return self.floats(2 * count if self.want_logprob else 0)

    def logits(self) -> Tensor:
        """Uninitialised (N, padded) float32."""
        return self.floats(self.padded)

    def from_written(self, z: Tensor) -> list[Launch]:
        """Penalties, filters and the draw from (N, padded) float32 logits, -inf from V on."""
        seen = self.draws.prompt.shape[1] or self.draws.history.shape[1]
        adjusted = [self._adjust(z)] if seen or self._adds else []
        if not self.draws.plain:
            written = filters.Written(z, self.V, self.rows, self.tokens, self.want_logprob)
            return [*adjusted, *filters.plan(written, self.processors)]
        term = unchecked(Logits, values=z[None], scale=1.0, softcap=None)
        return [*adjusted, *self.drawn(RowsOfTerms.of([term], self))]

    def summed(self, logits: RowsOfTerms, z: Tensor) -> Launch:
        """The sum of terms, written."""
        config = configs.SAMPLE
        return Launch(
            sum_kernel,
            (self.N, logits.programs),
            {**logits.arguments, "z_out": z, "stride": z.shape[1]},
            logits.constants,
            config.warps,
            bytes_moved=logits.bytes_read + 4 * self.N * self.V,
            flops=2 * self.N * self.V * logits.count,
        )

    def drawn(self, logits: RowsOfTerms) -> list[Launch]:
        """The draw from a sum of terms."""
        N, V, config, programs = self.N, self.V, configs.SAMPLE, logits.programs
        groups = programs * config.block // configs.ADJACENT
        parts = self.padded // configs.PART
        partial = Bounds(self.floats(groups), self.parts(parts))
        arguments = {**logits.arguments, "draws": self.rows, "partial": partial, "parts": parts}
        bounded = Launch(
            draw_kernel,
            (N, programs),
            arguments,
            {**logits.constants, "LOGPROB": self.want_logprob, "TOGETHER": logits.together},
            config.warps,
            bytes_moved=logits.bytes_read,
            flops=N * V * (NOISE_FLOPS + 2 * logits.count),
        )
        chosen = Launch(
            choose_kernel,
            (N,),
            {**arguments, "out": self.tokens},
            {
                **logits.constants,
                # It reads few columns: no binary of its own for rows whose vectors are aligned.
                "ALIGNED": (False,) * logits.count,
                "LOGPROB": self.want_logprob,
                "LANES": configs.CHOOSE.block,
                "TILES": configs.CHOOSE_TILES,
            },
            configs.CHOOSE.warps,
            bytes_moved=4 * N * (groups + 2 * parts * self.want_logprob),
            flops=8 * N * groups,
        )
        return [bounded, chosen]

    def _adjust(self, z: Tensor) -> Launch:
        seen = _seen(self.draws.prompt, self.draws.history)
        widths = {
            "added_width": self.rows.added_ids.shape[1],
            "bias_width": self.rows.bias_ids.shape[1],
            "seen_width": seen.ids.shape[1],
        }
        entries = self.N * sum(widths.values())
        return Launch(
            adjust_kernel,
            (self.N,),
            {"z_out": z, "draws": self.rows, "seen": seen, "V": self.V, "stride": z.shape[1], **widths},
            {"BLOCK": configs.ADJUST.block},
            configs.ADJUST.warps,
            bytes_moved=20 * entries,
            flops=6 * entries,
        )


class LogitsDraw(TritonKernels):
    """Tokens from logits that exist, beside sparse terms."""

    def logits_draw(self, sum: Sum, draws: Draws, want_logprob: bool) -> RowTokens:
        processors = self.multiprocessors(draws.seed.device)
        # What a plan fills on the device would not be filled when its launches are made again.
        draws = draws.filled()
        scales = [t.scale for t in sum.logits]
        facts = (
            tuple([None if isinstance(scale, Tensor) else scale for scale in scales]),
            tuple([t.softcap for t in sum.logits]),
            len(sum.sparse),
            sum.V,
            draws.plain,
            want_logprob,
            processors,
        )
        per_row = [scale for scale in scales if isinstance(scale, Tensor)]
        return self.run_plan(
            lambda: plan(sum, draws, want_logprob, processors),
            [*sum.tensors, *per_row, *draws.tensors],
            facts,
        )


@dataclass(frozen=True)
class RowsOfTerms:
    """Logits that are read row by row, as the kernels take them.

    Attributes:
        arguments, constants: of every kernel that reads them.
        programs: that share a row.
        bytes_read: of all rows.
        together: adjacent columns that a thread reads in one vector.
        count: terms.
    """

    arguments: dict[str, object]
    constants: dict[str, object]
    programs: int
    bytes_read: int
    together: int
    count: int

    @classmethod
    def of(cls, terms: Sequence[Logits], drawing: Drawing) -> RowsOfTerms:
        """Terms of a sum."""
        values, scales, config = [t.values for t in terms], [t.scale for t in terms], configs.SAMPLE
        N, V = drawing.N, drawing.V
        programs = splits(N, -(-V // config.block), drawing.processors, config.programs)
        unused = drawing.draws["temperature"]
        return cls(
            arguments={
                "terms": as_arguments(terms),
                "row_scales": tuple(scale if isinstance(scale, Tensor) else unused for scale in scales),
                "V": V,
                "splits": programs,
            },
            constants=term_constants(terms)
            | {
                "ALIGNED": tuple(map(_is_aligned, values)),
                "SCALED": tuple(isinstance(scale, Tensor) for scale in scales),
                "BLOCK": config.block,
            },
            programs=programs,
            bytes_read=N * V * sum(x.element_size() for x in values),
            together=VECTOR_BYTES // min(x.element_size() for x in values),
            count=len(terms),
        )


def plan(logits: Sum, draws: Draws, want_logprob: bool, processors: int) -> tuple[RowTokens, list[Launch]]:
    """Tokens, statuses and log-probabilities, and the launches that fill them, in order.

    Args:
        processors: of the device; they decide over how many programs a row is split.
    """
    drawing = Drawing.of(logits, draws, want_logprob, processors)
    terms = RowsOfTerms.of(logits.logits, drawing)
    if not drawing.writes:
        return drawing.tokens, drawing.drawn(terms)
    z = drawing.logits()
    return drawing.tokens, [drawing.summed(terms, z), *drawing.from_written(z)]


def _is_aligned(x: Tensor) -> bool:
    """Whether every row begins at a 16-byte boundary."""
    starts = [x.data_ptr()]
    starts += [x.stride(i) * x.element_size() for i in (0, 1) if x.shape[i] > 1]
    return x.stride(2) == 1 and all(start % VECTOR_BYTES == 0 for start in starts)


def _seen(prompt: Tensor, history: Tensor) -> _Seen:
    """Each id once, and how often it was generated, by sorting; nothing here looks at the numbers."""
    ids = torch.cat([prompt, history], 1).sort(dim=1).values
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[:, 1:] = ids[:, 1:] == ids[:, :-1]
    generated = history.sort(dim=1).values
    last = torch.searchsorted(generated, ids, right=True)
    times = last - torch.searchsorted(generated, ids)
    return _Seen(torch.where(again, -1, ids).contiguous(), times.contiguous())
