"""From checked tensors to the launches that draw tokens, run by the backend or compiled ahead of time."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from auxkern.backends.triton.configs import ADJACENT, PART, SEEN_MOST
from auxkern.backends.triton.filters import launches as filters
from auxkern.backends.triton.gpu import Gpu
from auxkern.backends.triton.launch import (
    VECTOR_BYTES,
    Launch,
    as_arguments,
    encode,
    splits,
    term_constants,
)
from auxkern.backends.triton.logits_draw.kernels import (
    adjust_kernel,
    choose_kernel,
    draw_kernel,
    seen_kernel,
    sum_kernel,
)
from auxkern.backends.triton.running import TritonKernels
from auxkern.core.draws import Draws, RowTokens
from auxkern.core.sums import Sum
from auxkern.core.terms import Logits, Sparse, unchecked

NOISE_FLOPS = 40  # ten rounds of Philox for four ids, two logarithms: per id


class NoiseArgument(NamedTuple):
    """What the noise of a draw depends on; a number of all rows, or (N,)."""

    temperature: float | Tensor
    seed: Tensor
    position: Tensor


class PenaltiesArgument(NamedTuple):
    """Penalties, likewise."""

    repetition: float | Tensor
    presence: float | Tensor
    frequency: float | Tensor


class Bounds(NamedTuple):
    """What ``draw_kernel`` leaves for ``choose_kernel``, float32."""

    bounds: Tensor  # (N, groups): of scores
    parts: Tensor  # (N, parts, 2): largest logit and sum of exp((z - largest) / temperature), if wanted


class Listed(NamedTuple):
    """Ids at which a row's written logits are changed; those outside of the vocabulary stand for nothing."""

    added_ids: Tensor  # (N, A) int64, of sparse terms and biases
    added: Tensor  # (N, A) float32
    seen: Tensor  # (N, S) int64, of the prompt and the history, each once
    generated: Tensor  # (N, S) int64: how often the history has it


@dataclass(frozen=True)
class RowDraws:
    """What a draw is given, ready for kernels; all that has to be computed for it has been.

    Attributes:
        draws: with a tensor for top-p where that is not 1: float32, as kernels get numbers, is too coarse.
        added: sparse terms and biases.
        listed: these; and ids that were seen, where these are so many that they are sorted.
    """

    draws: Draws
    added: list[Sparse]
    listed: Listed

    @classmethod
    def of(cls, sum: Sum, draws: Draws) -> RowDraws:
        """For a draw from this sum."""
        top_p = draws.numbers["top_p"]
        if not isinstance(top_p, Tensor) and top_p < 1:
            draws = draws.filled("top_p")
        added = [term for term in sum.sparse if term.ids.shape[1]]
        if draws.bias_ids.shape[1]:
            added.append(unchecked(Sparse, ids=draws.bias_ids, values=draws.bias))
        ids, values = Sum(tuple(added), sum.V).entries() if added else (draws.bias_ids, draws.bias)
        seen = generated = draws.history[:, :0] if draws.history.shape[1] else draws.history
        if draws.prompt.shape[1] + draws.history.shape[1] > SEEN_MOST:
            seen, generated = _seen(draws.prompt, draws.history)
        return cls(draws, added, Listed(ids, values, seen, generated))

    @property
    def width(self) -> int:
        """Ids of prompt and history."""
        return self.draws.prompt.shape[1] + self.draws.history.shape[1]

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor that holds anything."""
        return [x for x in (*self.draws.tensors, *self.listed) if x.numel()]

    @property
    def facts(self) -> Hashable:
        """All else."""
        return self.draws.facts, self.draws.prompt.shape[1], self.draws.history.shape[1], len(self.added)

    def number(self, name: str) -> float | Tensor:
        """As kernels take it: (N,), or one number of all rows, an integer coded."""
        number = self.draws.numbers[name]
        return encode(number) if isinstance(number, int) and name == "top_k" else number


@dataclass(frozen=True)
class Drawing:
    """A draw of N tokens from V ids, whatever their logits are made of.

    Attributes:
        given: for each row.
        V: ids.
        want_logprob: whether log-probabilities are filled.
        tokens: what the last kernel fills.
        gpu: that draws.
    """

    given: RowDraws
    V: int
    want_logprob: bool
    tokens: RowTokens
    gpu: Gpu

    @classmethod
    def of(cls, V: int, given: RowDraws, want_logprob: bool, gpu: Gpu) -> Drawing:
        """A draw from V ids."""
        seed = given.draws.seed
        N = seed.shape[0]
        tokens = RowTokens(
            seed.new_empty(N),
            seed.new_empty(N, dtype=torch.int32),
            seed.new_empty(N if want_logprob else 0, dtype=torch.float32),
        )
        return cls(given, V, want_logprob, tokens, gpu)

    @property
    def noise(self) -> NoiseArgument:
        """As kernels take it."""
        draws = self.given.draws
        return NoiseArgument(self.given.number("temperature"), draws.seed, draws.position)

    @property
    def N(self) -> int:
        return self.given.draws.seed.shape[0]

    @property
    def padded(self) -> int:
        """Columns of written logits: whole tiles, filled with -inf, so that no reader needs a mask."""
        block = self.gpu.configs.sample.block
        return -(-self.V // block) * block

    @property
    def rewrites(self) -> bool:
        """Whether filters or penalties follow, which read written logits."""
        return not self.given.draws.plain or bool(self.given.width)

    @property
    def writes(self) -> bool:
        """Whether those follow, or entries, which row kernels add to written logits."""
        return self.rewrites or self._adds

    @property
    def _adds(self) -> bool:
        return bool(self.given.listed.added_ids.shape[1])

    def floats(self, columns: int) -> Tensor:
        """Uninitialised (N, columns) float32."""
        return self.given.draws.seed.new_empty((self.N, columns), dtype=torch.float32)

    def parts(self, count: int) -> Tensor:
        """Uninitialised (N, count, 2): largest logit and sum of each part of a row, for log-probabilities."""
        return self.floats(2 * count if self.want_logprob else 0)

    def logits(self) -> Tensor:
        """Uninitialised (N, padded) float32."""
        return self.floats(self.padded)

    def from_written(self, z: Tensor) -> list[Launch]:
        """Penalties, filters and the draw from (N, padded) float32 logits, -inf from V on."""
        adjusted = self._adjusted(z) if self.given.width or self._adds else []
        if not self.given.draws.plain:
            written = filters.Written(z, self.V, self._filters, self.tokens, self.want_logprob)
            return [*adjusted, *filters.plan(written, self.gpu)]
        term = unchecked(Logits, values=z[None], scale=1.0, softcap=None)
        return [*adjusted, *self.drawn(RowsOfTerms.of([term], self))]

    def summed(self, logits: RowsOfTerms, z: Tensor) -> Launch:
        """The sum of terms, written."""
        config = self.gpu.configs.sample
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
        N, V, config, programs = self.N, self.V, self.gpu.configs.sample, logits.programs
        groups = programs * config.block // ADJACENT
        parts = self.padded // PART
        partial = Bounds(self.floats(groups), self.parts(parts))
        arguments = {**logits.arguments, "draws": self.noise, "partial": partial, "parts": parts}
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
                "LANES": self.gpu.configs.choose.block,
                "TILES": self.gpu.configs.choose_tiles,
            },
            self.gpu.configs.choose.warps,
            bytes_moved=4 * N * (groups + 2 * parts * self.want_logprob),
            flops=8 * N * groups,
        )
        return [bounded, chosen]

    @property
    def _filters(self) -> filters.FiltersArgument:
        names = ("top_k", "top_p", "log_min_p")
        return filters.FiltersArgument(*self.noise, *[self.given.number(name) for name in names])

    def _adjusted(self, z: Tensor) -> list[Launch]:
        listed, launches = self.given.listed, []
        if listed.seen.shape[1] < self.given.width:
            listed, seen = self._seen()
            launches = [seen]
        penalties = PenaltiesArgument(*map(self.given.number, PenaltiesArgument._fields))
        widths = {"added_width": listed.added_ids.shape[1], "seen_width": self.given.width}
        entries = self.N * sum(widths.values())
        adjust = Launch(
            adjust_kernel,
            (self.N,),
            {
                "z_out": z,
                "penalties": penalties,
                "listed": listed,
                "V": self.V,
                "stride": z.shape[1],
                **widths,
            },
            {"BLOCK": self.gpu.configs.adjust.block},
            self.gpu.configs.adjust.warps,
            bytes_moved=20 * entries,
            flops=6 * entries,
        )
        return [*launches, adjust]

    def _seen(self) -> tuple[Listed, Launch]:
        """The same list with seen ids, and the launch that fills them in."""
        draws, width, config = self.given.draws, self.given.width, self.gpu.configs.seen
        seen, generated = (draws.seed.new_empty((self.N, width)) for _ in range(2))
        listed = self.given.listed._replace(seen=seen, generated=generated)
        return listed, Launch(
            seen_kernel,
            (self.N, -(-width // config.taken)),
            {
                "prompt": draws.prompt,
                "history": draws.history,
                "listed": listed,
                "P": draws.prompt.shape[1],
                "H": draws.history.shape[1],
            },
            {"LANES": config.taken, "STEP": config.step},
            config.warps,
            bytes_moved=24 * self.N * width,
            flops=4 * self.N * width**2,
        )


class LogitsDraw(TritonKernels):
    """Tokens from logits that exist, beside sparse terms."""

    def logits_draw(self, sum: Sum, draws: Draws, want_logprob: bool) -> RowTokens:
        gpu = self.gpu(draws.seed.device)
        given = RowDraws.of(sum, draws)
        return self.run_plan(
            lambda: plan(sum, given, want_logprob, gpu),
            [*sum.every_tensor, *given.tensors],
            (sum.facts, given.facts, want_logprob, gpu),
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
        values, scales = [t.values for t in terms], [t.scale for t in terms]
        config = drawing.gpu.configs.sample
        N, V = drawing.N, drawing.V
        programs = splits(N, -(-V // config.block), drawing.gpu.multiprocessors, config.programs)
        unused = drawing.given.draws.seed
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


def plan(logits: Sum, given: RowDraws, want_logprob: bool, gpu: Gpu) -> tuple[RowTokens, list[Launch]]:
    """Tokens, statuses and log-probabilities, and the launches that fill them, in order.

    Args:
        given: for a draw from this sum.
    """
    drawing = Drawing.of(logits.V, given, want_logprob, gpu)
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


def _seen(prompt: Tensor, history: Tensor) -> tuple[Tensor, Tensor]:
    """Each id once, and how often it was generated, by sorting; nothing here looks at the numbers."""
    ids = torch.cat([prompt, history], 1).sort(dim=1).values
    again = torch.zeros_like(ids, dtype=torch.bool)
    again[:, 1:] = ids[:, 1:] == ids[:, :-1]
    generated = history.sort(dim=1).values
    last = torch.searchsorted(generated, ids, right=True)
    times = last - torch.searchsorted(generated, ids)
    return torch.where(again, -1, ids).contiguous(), times.contiguous()
