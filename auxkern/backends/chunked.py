"""Any sum of terms on a backend whose kernels take rows of logits: chunks of rows over a buffer.

For C rows the heads' products are added up in one float32 buffer (C, V), a backend's row kernel turns
the buffer into the rows' losses and into their gradient, and two products per head bring that back to
hidden states and weights. Nothing else has V columns.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from auxkern.core.backend import Backend, Route
from auxkern.core.draws import Draws, RowTokens
from auxkern.core.loss import Loss, RowLosses, RowSlopes
from auxkern.core.sums import Rows, Sum, Wanted, chunks_of_rows, clear, empty
from auxkern.core.terms import Head, Logits, Sparse, Term, unchecked

_CHUNK_BYTES = {"cpu": 48 << 20, "cuda": 512 << 20}
_CONVERTED_IDS = 8192  # rows of a half-precision weight that are converted at a time on a CPU


def default_chunk_rows(V: int, device: torch.device) -> int:
    """Rows of a (C, V) float32 buffer of about 48 MiB on a CPU and 512 MiB on a GPU, 16 at least.

    Large enough for the products to run near their full rate: a library repacks the weight for every
    chunk, and every chunk reads and writes the weight's gradient once.
    """
    budget = _CHUNK_BYTES.get(device.type, _CHUNK_BYTES["cuda"])
    return max(16, budget // (4 * V) // 16 * 16)


class RowKernels(Backend):
    """A backend with kernels for rows of logits.

    Attributes:
        fuses: whether its kernels make gradients of logits with their losses, in place where asked.
        heads_way: name of the faster way that it has for sums of nothing but heads; "" for none.
        heads_way_adds: whether that way makes losses of heads beside sparse terms, too.
    """

    fuses = False
    heads_way = ""
    heads_way_adds = False

    @abstractmethod
    def logits_losses(
        self, sum: Sum, target: Tensor, loss: Loss, weight: Tensor | None, wanted: Wanted
    ) -> RowLosses:
        """``losses`` of a sum whose logits exist; with a weight only if ``logits_route`` is fused.

        Memory in ``wanted`` may be the term's own values if it ``fuses``.
        """

    @abstractmethod
    def logits_gradients(self, sum: Sum, target: Tensor, slopes: RowSlopes, wanted: Wanted) -> None:
        """The gradients of a sum whose logits exist: ``dz * scale * (1 - tanh(values / softcap)**2)``."""

    @abstractmethod
    def logits_draw(self, sum: Sum, draws: Draws, want_logprob: bool) -> RowTokens:
        """``draw`` of a sum whose logits exist, beside sparse terms."""

    def logits_route(self, sum: Sum, loss: Loss) -> Route:
        """The way of a sum whose logits exist."""
        return Route("logits", fused=self.fuses)

    def heads_refusal(self, sum: Sum) -> str | None:
        """Why ``heads_way`` does not take a sum of nothing but heads; None if it does."""
        return "it has no kernels for heads"

    def heads_losses(
        self, sum: Sum, target: Tensor, loss: Loss, weight: Tensor | None, wanted: Wanted
    ) -> RowLosses:
        """``losses`` of heads that ``heads_refusal`` takes, beside sparse terms if ``heads_way_adds``."""
        raise NotImplementedError(self.heads_refusal(sum))

    def heads_gradients(self, sum: Sum, target: Tensor, slopes: RowSlopes, wanted: Wanted) -> None:
        """``gradients`` of such a sum."""
        raise NotImplementedError(self.heads_refusal(sum))

    def heads_draw(self, sum: Sum, draws: Draws, want_logprob: bool) -> RowTokens:
        """``draw`` from heads that ``heads_refusal`` takes, beside sparse terms."""
        raise NotImplementedError(self.heads_refusal(sum))

    def route(self, sum: Sum, loss: Loss) -> Route:
        if sum.is_logits:
            return self.logits_route(sum, loss)
        reason = self._heads_refusal(sum)
        if reason is None:
            return Route(self.heads_way, fused=True, rescales=True)
        refusals = {self.heads_way: reason} if self.heads_way else {}
        return Route("chunks of logits", fused=sum.device.type == "cpu", refusals=refusals)

    def _heads_refusal(self, sum: Sum) -> str | None:
        taken = (Head, Sparse) if self.heads_way_adds else Head
        if not sum.heads or not all(isinstance(term, taken) for term in sum.terms):
            return "there are other terms beside the heads"
        return self.heads_refusal(sum)

    def losses(
        self, sum: Sum, target: Tensor, loss: Loss, weight: Tensor | None, wanted: Wanted
    ) -> RowLosses:
        if sum.is_logits:
            return self._with_gradients(sum, target, loss, weight, wanted)
        if self._heads_refusal(sum) is None:
            return self.heads_losses(sum, target, loss, weight, wanted)
        result = RowLosses.empty(target, sum.dtype, len(sum.terms), loss).cleared()
        clear(wanted)
        chunks = _Chunks(
            self, sum, chunks_of_rows(target != loss.ignore_index, self._rows_of(sum)), loss.stats
        )
        asking = () if weight is None else chunks.asking(wanted)
        for rows in chunks.rows:
            logits = chunks.logits(rows)
            dz = chunks.memory(logits, asking, in_place=self.fuses)
            factor = weight[rows] if weight is not None and asking else None
            result.store(rows, self._with_gradients(logits, target[rows], loss, factor, dz))
            chunks.add(rows, dz, wanted)
        return result

    def gradients(self, sum: Sum, target: Tensor, slopes: RowSlopes, wanted: Wanted) -> None:
        if self._heads_refusal(sum) is None:
            self.heads_gradients(sum, target, slopes, wanted)
            return
        if sum.is_logits:
            self.logits_gradients(sum, target, slopes, wanted)
            return
        clear(wanted)
        chunks = _Chunks(self, sum, chunks_of_rows(slopes.counts, self._rows_of(sum)), False)
        asking = chunks.asking(wanted)
        for rows in chunks.rows:
            logits = chunks.logits(rows)
            dz = chunks.memory(logits, asking, in_place=False)
            some = slopes.rows(rows, slopes.counts[rows])
            self.logits_gradients(logits, target[rows].contiguous(), some, dz)
            chunks.add(rows, dz, wanted)

    def _with_gradients(
        self, sum: Sum, target: Tensor, loss: Loss, weight: Tensor | None, wanted: Wanted
    ) -> RowLosses:
        if weight is None or self.logits_route(sum, loss).fused:
            return self.logits_losses(sum, target, loss, weight, wanted)
        rows = self.logits_losses(sum, target, loss, None, ())
        slopes = RowSlopes(weight, rows.sums, target != loss.ignore_index, loss, sum.V)
        self.logits_gradients(sum, target, slopes, wanted)
        return rows

    def draw(self, sum: Sum, draws: Draws, want_logprob: bool) -> RowTokens:
        if not sum.heads:
            return self.logits_draw(sum, draws, want_logprob)
        if not sum.logits and self.heads_refusal(sum) is None:
            return self.heads_draw(sum, draws, want_logprob)
        C = self._rows_of(sum)
        slices = [slice(n, min(n + C, sum.N)) for n in range(0, sum.N, C)]
        chunks = _Chunks(self, sum, slices, False, draws=True)
        if len(slices) == 1:
            return self.logits_draw(chunks.logits(slices[0]), draws, want_logprob)
        parts = [self.logits_draw(chunks.logits(rows), draws.rows(rows), want_logprob) for rows in slices]
        return RowTokens(*map(torch.cat, zip(*parts, strict=True)))

    def _rows_of(self, sum: Sum) -> int:
        """Rows of a chunk."""
        return sum.chunk_rows or default_chunk_rows(sum.V, sum.device)


@dataclass(frozen=True, eq=False)
class _Buffer:
    """Terms that are added up in one buffer: ``scale * softcap(sum of factor * term)``.

    Attributes:
        z: (C, V) for the longest chunk.
        parts: place in the sum and factor of each term.
        scale, softcap: as in ``Logits``.
    """

    z: Tensor
    parts: list[tuple[int, float]]
    scale: float | Tensor = 1.0
    softcap: float | None = None


class _Chunks:
    """The logits of a sum, for a chunk of its rows at a time.

    Args:
        backend: that makes products of heads, if it takes them.
        sum: of all rows.
        rows: of each chunk.
        separate: whether the logits of each term are wanted apart.
        draws: whether sparse terms are left to the row kernel, as in a draw.
    """

    def __init__(
        self, backend: Backend, sum: Sum, rows: Sequence[Rows], separate: bool, *, draws: bool = False
    ) -> None:
        self.backend, self.sum, self.rows = backend, sum, rows
        self._left = sum.sparse if draws else []
        # Logits that exist stand as their place in the sum.
        self._summands: list[int | _Buffer] = []
        longest = max((r.stop - r.start if isinstance(r, slice) else len(r) for r in rows), default=0)
        shape = torch.Size((longest, sum.V))

        def memory() -> Tensor:
            # A draw comes again and again: what the allocator keeps for it has no page faults.
            if draws:
                return torch.empty(shape, dtype=sum.dtype, device=sum.device)
            return empty(shape, sum.dtype, sum.device)

        added: list[tuple[int, float]] = []
        for place, term in enumerate(sum.terms):
            if isinstance(term, Logits):
                self._summands.append(place)
            elif isinstance(term, Sparse) and draws:
                continue
            elif isinstance(term, Head) and (separate or term.softcap or isinstance(term.scale, Tensor)):
                self._summands.append(_Buffer(memory(), [(place, 1.0)], term.scale, term.softcap))
            elif separate or not added:
                added = [(place, 1.0 if isinstance(term, Sparse) else float(term.scale))]
                self._summands.append(_Buffer(memory(), added))
            else:
                added.append((place, 1.0 if isinstance(term, Sparse) else float(term.scale)))

    def logits(self, rows: Rows) -> Sum:
        """The sum of a chunk's rows, written."""
        terms: list[Term] = []
        for summand in self._summands:
            if isinstance(summand, int):
                terms.append(self.sum.terms[summand].rows(rows))
                continue
            scale = summand.scale[rows] if isinstance(summand.scale, Tensor) else summand.scale
            z = self._filled(summand, rows)
            terms.append(unchecked(Logits, values=z[None], scale=scale, softcap=summand.softcap))
        return Sum((*terms, *[term.rows(rows) for term in self._left]), self.sum.V)

    def _filled(self, buffer: _Buffer, rows: Rows) -> Tensor:
        """(C, V) the buffer's sum for these rows."""
        listed = [(self.sum.terms[place].rows(rows), factor) for place, factor in buffer.parts]
        z = buffer.z[: listed[0][0].leading[0]]
        heads = [(term, factor) for term, factor in listed if isinstance(term, Head)]
        for number, (head, factor) in enumerate(heads):
            add_head(self.backend, z, head, factor, keep=number > 0)
        if not heads:
            z.zero_()
        for term, _ in listed:
            if isinstance(term, Sparse):
                z.scatter_add_(1, term.ids.long(), term.values.to(z.dtype))
        return z

    def asking(self, wanted: Wanted) -> list[int]:
        """The summands that have a tensor whose gradient is wanted."""
        return [i for i, s in enumerate(self._summands) if any(wanted[place] for place in _places(s))]

    def memory(self, logits: Sum, asking: Sequence[int], *, in_place: bool) -> list[dict[str, Tensor]]:
        """Where a row kernel writes the gradients of a chunk's logits; in place those of buffers."""
        memory: list[dict[str, Tensor]] = [{} for _ in logits.terms]
        for i in asking:
            values = logits.logits[i].values
            own = in_place and isinstance(self._summands[i], _Buffer)
            memory[i]["values"] = values if own else values.new_empty(values.shape)
        return memory

    def add(self, rows: Rows, dz: Wanted, wanted: Wanted) -> None:
        """Bring the gradients of a chunk's logits to the inputs that want one."""
        for summand, gradient in zip(self._summands, dz, strict=False):
            if not gradient:
                continue
            d = gradient["values"][0]
            if isinstance(summand, int):
                wanted[summand]["values"].view(-1, d.shape[1])[rows] = d
                continue
            for place, factor in summand.parts:
                term, its = self.sum.terms[place].rows(rows), wanted[place]
                if isinstance(term, Head):
                    _add_head_gradients(d, term, factor, rows, its)
                elif isinstance(term, Sparse) and its:
                    its["values"][rows] = d.gather(1, term.ids.long()).to(its["values"].dtype)


def _places(summand: int | _Buffer) -> list[int]:
    return [summand] if isinstance(summand, int) else [place for place, _ in summand.parts]


def add_head(backend: Backend, z: Tensor, head: Head, factor: float, *, keep: bool) -> None:
    """z (C, V) = factor * (hidden @ weight.T + bias), plus what z held if ``keep``.

    It is rounded to z's dtype only. The backend makes the product if it takes it.
    """
    V = z.shape[1]
    a, b, beta = head.hidden, head.weight[:V], 1 if keep else 0
    scaled = factor
    if factor == 0:
        # A library skips what is multiplied by 0; elsewhere 0 * inf is NaN.
        a, scaled = a * 0.0, 1.0
    if head.packed is not None and z.dtype == torch.float32 and backend.pack_refusal() is None:
        a = a.to(z.dtype)
        backend.packed_linear(a if scaled == 1.0 else a * scaled, head.packed, None, z, keep)
    elif backend.linear_refusal(z, b) is None:
        a = a.to(z.dtype)
        backend.linear(a if scaled == 1.0 else a * scaled, b, None, z, keep)
    elif a.dtype == b.dtype == z.dtype:
        z.addmm_(a, b.T, beta=beta, alpha=scaled)
    elif a.is_cuda and a.dtype == b.dtype:
        product = torch.mm(a, b.T, out_dtype=z.dtype)
        torch.add(z if keep else 0, product, alpha=scaled, out=z)
    else:
        a = a.to(z.dtype)
        for v in range(0, V, _CONVERTED_IDS):
            block = b[v : v + _CONVERTED_IDS].to(z.dtype)
            z[:, v : v + _CONVERTED_IDS].addmm_(a, block.T, beta=beta, alpha=scaled)
    if head.bias is not None:
        z.add_(head.bias[:V], alpha=factor)


def _add_head_gradients(
    dz: Tensor, head: Head, factor: float, rows: Rows, gradients: Mapping[str, Tensor]
) -> None:
    """Bring dz (C, V), of logits that the head's were added to with this factor, to its tensors."""
    V = dz.shape[1]
    if "hidden" in gradients:
        d_hidden = gradients["hidden"]
        d_hidden[rows] = _product_back(dz, head.weight[:V], factor).to(d_hidden.dtype)
    if "weight" in gradients:
        gradients["weight"][:V].addmm_(dz.T, head.hidden.to(dz.dtype), alpha=factor)
    if "bias" in gradients:
        gradients["bias"][:V].add_(dz.sum(0), alpha=factor)


def _product_back(dz: Tensor, weight: Tensor, factor: float) -> Tensor:
    """(C, D) = factor * dz (C, V) @ weight (V, D), in float32 whatever the weight's dtype."""
    if weight.dtype == dz.dtype:
        return torch.mm(dz, weight).mul_(factor)
    back = torch.zeros((dz.shape[0], weight.shape[1]), dtype=dz.dtype, device=dz.device)
    for v in range(0, weight.shape[0], _CONVERTED_IDS):
        block = weight[v : v + _CONVERTED_IDS].to(dz.dtype)
        back.addmm_(dz[:, v : v + _CONVERTED_IDS], block, alpha=factor)
    return back
