"""The engine: one ``step`` schedules, runs both models, and draws."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Several
from dataclasses import dataclass, field
from typing import Any

import torch

from auxkern.generation.drawing import Drawer, check_drawable
from auxkern.generation.graphs import CudaRecorder, DecodeGraphs, Record
from auxkern.generation.lanes import Lane
from auxkern.generation.request import Completion, Request, Sequence, TokenLogprobs
from auxkern.generation.scheduler import Scheduler
from auxkern.generation.slots import SlotTable
from auxkern.generation.stops import TextStream
from auxkern.model.base import counts_positions
from auxkern.model.caches import AuxiliaryRows, PairCache
from auxkern.model.inputs import PairInputs
from auxkern.model.text import TextFormat
from auxkern.terms import Term, rows_of


@dataclass
class EngineStats:
    """What an engine has done.

    Attributes:
        steps: calls of ``step`` that ran a model.
        prefill_tokens: tokens of prompts and conditions that were read, without padding.
        new_tokens: tokens drawn.
        seconds: time by what it went to: "models", "sampling", "rest". On a GPU kernels run on after
            the call that started them, and the time is counted where the result is waited for.
    """

    steps: int = 0
    prefill_tokens: int = 0
    new_tokens: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("models", "sampling", "rest"), 0.0)
    )


@dataclass
class _Text:
    """What has been written of a running sequence."""

    stream: TextStream
    logprobs: list[tuple[float, float, float, float | None]] = field(default_factory=list)


class Engine:
    """Texts for many requests at once, by continuous batching.

    A place that a finished text leaves is taken at the next step. The models stay transformers
    models; the engine gives them caches of fixed size (see ``SlotTable``). A text depends on its own
    request and seed. On a CPU with native kernels (``model.use_native_kernels()``), decoders with heads
    of a multiple of 16 and full-precision activations, it is the same to the last bit whatever it is
    written with. Elsewhere the batch reaches it through the rounding of the models' own products, whose
    order of additions may change with the batch's size; where even that must not be, use ``slots=1``.

    Args:
        model: an ``AuxTunedForCausalLM``; auxiliaries are loaded with ``load_auxiliary``. Decoders
            and encoder-decoders of the package; the base has full attention in every layer.
        text_format: makes ids of requests and text of ids.
        slots: most texts that are written at a time.
        max_length: most tokens of a text with its prompt.
        max_condition: most tokens of a condition.
        prefill_tokens: most padded tokens of newcomers in one step.
        graphs: whether steps are recorded as CUDA graphs when the engine is made (see ``DecodeGraphs``);
            on a GPU they are unless it is False. Steps with log-probabilities or of several auxiliaries
            at once run without.
        on_text: called with (request id, sample, new text) as soon as the text is certain.

    Raises:
        ValueError: the base has fewer positions than ``max_length``, a model does not fit, or graphs are
            asked for without a GPU.
        RuntimeError: the caches do not fit the GPU's free memory.
    """

    def __init__(
        self,
        model: Any,
        text_format: TextFormat,
        *,
        slots: int = 32,
        max_length: int = 512,
        max_condition: int = 64,
        prefill_tokens: int = 2048,
        graphs: bool | None = None,
        on_text: Callable[[str | int, int, str], None] | None = None,
    ) -> None:
        self.scheduler = Scheduler(slots, max_length, prefill_tokens, max_condition=max_condition)
        positions = getattr(model.lm.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and max_length > positions:
            raise ValueError(f"max_length is {max_length}, but the base has positions for {positions} tokens")
        if model.config.lm_term == "logits":
            raise ValueError(
                'lm_term is "logits"; the engine draws from output embeddings. Use model.generate'
            )
        self.model, self.text_format, self.on_text = model, text_format, on_text
        self.stats = EngineStats()
        self._texts: dict[tuple[str | int, int], _Text] = {}
        record = self._recorder(graphs)

        def table(columns: int, recordable: bool) -> SlotTable:
            return SlotTable(slots, columns, model.device, fixed=recordable and record is not None)

        self._table = table(max_length, True)
        self._lanes = {
            name: Lane(name, table(max_length + max_condition, model.counts_positions(name)), max_condition)
            for name in model.auxiliary_names
        }
        self._condition = torch.zeros(2, slots, max_condition, dtype=torch.int64, device=model.device)
        self._drawer = Drawer(model)
        model.eval()
        self._reserve()
        self._graphs: DecodeGraphs | None = None
        if record is not None:
            with torch.no_grad():
                lanes = {name: lane for name, lane in self._lanes.items() if lane.table.fixed}
                self._graphs = DecodeGraphs(model, self._table, lanes, self._condition, record)

    # ------------------------------------------------------------------------------------- asking

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """The texts of all requests, in the order of requests and samples."""
        listed = list(requests)
        found: dict[tuple[str | int, int], Completion] = {}
        for request in listed:
            for done in self.submit(request):
                found[done.id, done.sample] = done
        while not self.scheduler.idle:
            for done in self.step():
                found[done.id, done.sample] = done
        return [found[request.id, sample] for request in listed for sample in range(request.samples)]

    def submit(self, request: Request, samples: Iterable[int] | None = None) -> list[Completion]:
        """Puts a request's samples (all of them if None) into the queue.

        Returns:
            A failed completion for each sample if the request can never be served; else nothing.

        Raises:
            ValueError: a request with this id waits or runs already.
        """
        wanted = list(range(request.samples)) if samples is None else list(samples)
        try:
            sequences = self._encoded(request, wanted)
        except ValueError as error:
            return [Completion.failed(request, sample, str(error)) for sample in wanted]
        refusal = next(filter(None, map(self.scheduler.refusal, sequences)), None)
        if refusal is not None:
            return [Completion.failed(request, sample, refusal) for sample in wanted]
        for sequence in sequences:
            self.scheduler.add(sequence)
            stream = TextStream(self.text_format, request.stop, sequence.prompt_ids)
            self._texts[sequence.key] = _Text(stream)
        return []

    def cancel(self, id: str | int) -> int:
        """Drops all samples of a request; returns how many there were."""
        running = self.scheduler.running
        sequences, moves = self.scheduler.cancel(id)
        self._remove([s for s in running if s in sequences], moves)
        for sequence in sequences:
            del self._texts[sequence.key]
        return len(sequences)

    # ------------------------------------------------------------------------------------ writing

    @torch.no_grad()
    def step(self) -> list[Completion]:
        """One token for every running text, and the first one for newcomers; returns what is finished."""
        began, models, sampling = time.perf_counter(), *self._spent()
        before = self.scheduler.running
        plan = self.scheduler.schedule()
        if not plan.running:
            return []
        ended: list[tuple[Sequence, Completion]] = []
        if plan.decode:
            ended += self._advance(before, self._decoded(before))
        if plan.prefill:
            ended += self._advance(plan.prefill, self._prefilled(plan.prefill))
        slots = [sequence.slot for sequence, _ in ended if sequence.slot is not None]
        self._remove([sequence for sequence, _ in ended], self.scheduler.finish(slots))
        self.stats.steps += 1
        spent = self._spent()
        self.stats.seconds["rest"] += (
            time.perf_counter() - began - (spent[0] - models) - (spent[1] - sampling)
        )
        return [completion for _, completion in ended]

    def _decoded(self, sequences: Several[Sequence]) -> list[Term]:
        """The terms of the next token of running sequences, rows (n,)."""
        began, n = time.perf_counter(), len(sequences)
        lanes = [lane for lane in self._lanes.values() if lane.members]
        parts = [(lane, lane.rows(sequences)) for lane in lanes]
        together = not parts or (len(parts) == 1 and parts[0][1] is None)
        name = lanes[0].name if lanes else None
        recorded = self._graphs is not None and self._graphs.serves(name) and together
        if self._graphs is not None and recorded and not _wants_logprobs(sequences):
            tokens = [s.generated[-1] for s in sequences]
            terms = self._graphs.terms(name, tokens, [self._drawer.scale(s) for s in sequences])
        else:
            terms = self._computed(sequences, [AuxiliaryRows(lane.name, rows, None) for lane, rows in parts])
        for table in (self._table, *(lane.table for lane in lanes)):
            table.advance()
        self.stats.seconds["models"] += time.perf_counter() - began
        return [rows_of(term, torch.arange(n, device=self.model.device)) for term in terms]

    def _computed(self, sequences: Several[Sequence], parts: list[AuxiliaryRows]) -> list[Term]:
        """The same without graphs; ``parts`` without their caches."""
        n, table = len(sequences), self._table
        ids = torch.tensor([[s.generated[-1]] for s in sequences], device=self.model.device)
        mask = torch.cat([table.window, torch.ones_like(ids)], 1)
        width = max(len(s.condition_ids) for s in sequences)
        parts = [AuxiliaryRows(p.name, p.rows, self._lanes[p.name].cache(width)) for p in parts]
        terms, cache = self.model.terms(
            PairInputs(ids, mask, *self._condition[:, :n, :width]),
            cache=PairCache(table.cache, parts),
            use_cache=True,
            keep=1,
            aux_scale=self._drawer.scales(sequences),
            separate=_wants_logprobs(sequences),
        )
        for part in cache.auxiliaries:
            self._lanes[part.name].keep(part.cache)
        found: list[Term] = terms
        return found

    def _prefilled(self, newcomers: Several[Sequence]) -> list[Term]:
        """Reads prompts and conditions, and takes slots; the terms of the first token, rows (n,)."""
        began = time.perf_counter()
        # Samples of one request read their prompt once.
        keys = [(s.request.auxiliary, s.prompt_ids, s.condition_ids, s.request.aux_scale) for s in newcomers]
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        unique = sorted(first.values())
        place = {keys[i]: row for row, i in enumerate(unique)}
        of = torch.tensor([place[key] for key in keys], device=self.model.device)
        readers = [newcomers[i] for i in unique]
        inputs = self._padded(readers)
        names = self.model.auxiliary_names
        asked = [-1 if s.request.auxiliary is None else names.index(s.request.auxiliary) for s in readers]
        terms, cache = self.model.terms(
            inputs,
            use_cache=True,
            keep=1,
            auxiliary_ids=torch.tensor(asked, device=self.model.device),
            aux_scale=self._drawer.scales(readers),
            separate=_wants_logprobs(readers),
        )
        cache.lm.reorder_cache(of)
        self._table.join(cache.lm, inputs.attention_mask[of])
        start = self._table.count - len(newcomers)
        self._condition[:, start : self._table.count] = 0
        width = inputs.condition_ids.shape[1]
        for side, ids in zip(self._condition, (inputs.condition_ids, inputs.condition_mask), strict=True):
            side[start : self._table.count, :width] = ids[of]
        for part in cache.auxiliaries:
            rows = range(len(readers)) if part.rows is None else part.rows.tolist()
            here = {row: i for i, row in enumerate(rows)}
            joining = [(s, here[row]) for s, row in zip(newcomers, of.tolist(), strict=True) if row in here]
            self._lanes[part.name].join(joining, part.cache)
        self.stats.prefill_tokens += int(inputs.attention_mask.sum() + inputs.condition_mask.sum())
        self.stats.seconds["models"] += time.perf_counter() - began
        return [rows_of(term, of) for term in terms]

    def _advance(self, sequences: Several[Sequence], terms: list[Term]) -> list[tuple[Sequence, Completion]]:
        """Draws a token for each sequence; those that it ends, with what they wrote."""
        began = time.perf_counter()
        drawn = self._drawer.draw(terms, sequences)
        self.stats.seconds["sampling"] += time.perf_counter() - began
        ended = []
        for row, sequence in enumerate(sequences):
            if drawn.status[row]:
                problem = "the logits are NaN or infinite; look at the models' weights and aux_scale"
                ended.append((sequence, self._completion(sequence, "error", problem)))
                continue
            token = drawn.tokens[row]
            sequence.generated.append(token)
            self.stats.new_tokens += 1
            if sequence.request.logprobs:
                self._texts[sequence.key].logprobs.append(drawn.logprobs[row])
            reason = self._reason(sequence, token)
            if reason is not None:
                ended.append((sequence, self._completion(sequence, reason)))
        return ended

    def _reason(self, sequence: Sequence, token: int) -> str | None:
        """Why the text ends with this token; None if it goes on."""
        request, text = sequence.request, self._texts[sequence.key]
        if token == self.text_format.end_id and not request.ignore_eos:
            return "end"
        piece = text.stream.push(token)
        if piece and self.on_text is not None:
            self.on_text(request.id, sequence.sample, piece)
        if text.stream.stopped is not None:
            return "stop"
        return "length" if len(sequence.generated) >= request.max_new_tokens else None

    def _completion(self, sequence: Sequence, reason: Any, error: str | None = None) -> Completion:
        text = self._texts.pop(sequence.key)
        rest = text.stream.finish()
        if rest and self.on_text is not None:
            self.on_text(sequence.request.id, sequence.sample, rest)
        if text.stream.stopped is not None and error is None:
            reason = "stop"  # the rest may hold a stop string
        logprobs = None
        if sequence.request.logprobs and error is None:
            raw, processed, lm, auxiliary = (tuple(column) for column in zip(*text.logprobs, strict=True))
            logprobs = TokenLogprobs(raw, processed, lm, None if None in auxiliary else auxiliary)
        return Completion(
            sequence.request.id,
            sequence.sample,
            text.stream.text,
            tuple(sequence.generated),
            reason,
            len(sequence.prompt_ids),
            sequence.seed,
            error,
            logprobs,
        )

    def _remove(self, ended: Several[Sequence], moves: Several[Any]) -> None:
        if not ended:
            return
        left = len(self.scheduler.running)
        self._table.leave(moves, left)
        for source, destination in moves:
            self._condition[:, destination] = self._condition[:, source]
        for lane in self._lanes.values():
            lane.leave(ended)

    # ---------------------------------------------------------------------------------- preparing

    def _encoded(self, request: Request, samples: list[int]) -> list[Sequence]:
        if request.auxiliary is not None and request.auxiliary not in self._lanes:
            raise ValueError(
                f"there is no auxiliary {request.auxiliary!r}; choose one of {', '.join(self._lanes)}, or "
                "null for the base alone"
            )
        check_drawable(request, self.model.config.vocab_size)
        inputs = self.text_format.prompts([request.condition], [request.prompt])
        condition = inputs["condition_ids"][0].tolist() if request.auxiliary is not None else []
        if request.auxiliary is not None and not condition and self.model.needs_condition(request.auxiliary):
            raise ValueError(
                f"the condition has no tokens, but the encoder of auxiliary {request.auxiliary!r} needs one; "
                "give a condition"
            )
        return request.sequences(inputs["input_ids"][0].tolist(), condition, samples)

    def _padded(self, sequences: Several[Sequence]) -> PairInputs:
        """(R, T) prompts padded on the left, (R, K) conditions on the right."""
        T = max(len(s.prompt_ids) for s in sequences)
        K = max(len(s.condition_ids) for s in sequences)
        prompts = [[0] * (T - len(s.prompt_ids)) + [*s.prompt_ids] for s in sequences]
        mask = [[0] * (T - len(s.prompt_ids)) + [1] * len(s.prompt_ids) for s in sequences]
        conditions = [[*s.condition_ids] + [0] * (K - len(s.condition_ids)) for s in sequences]
        real = [[1] * len(s.condition_ids) + [0] * (K - len(s.condition_ids)) for s in sequences]
        device = self.model.device
        sides = (prompts, mask, conditions, real)
        return PairInputs(*(torch.tensor(ids, dtype=torch.int64, device=device) for ids in sides))

    @torch.no_grad()
    def _reserve(self) -> None:
        """Takes the memory of all caches before the first request, as large as one token shows it to be."""
        token = torch.tensor([[self.text_format.start_id]], device=self.model.device)
        caches = []
        for number, lane in enumerate(self._lanes.values()):
            which = torch.tensor([number], device=self.model.device)
            _, cache = self.model.terms(
                PairInputs(token, None, token, None), use_cache=True, keep=1, auxiliary_ids=which
            )
            caches.append((lane, cache.auxiliaries[0].cache))
            lm_cache = cache.lm
        needed = self._table.needed_bytes(lm_cache)
        needed += sum(lane.table.needed_bytes(lane.attention_of(cache)) for lane, cache in caches)
        if self.model.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.model.device)
            if needed > free:
                raise RuntimeError(
                    f"the caches of {self.scheduler.slots} slots of {self.scheduler.max_length} tokens take "
                    f"{needed / 1e9:.1f} GB, but the GPU has {free / 1e9:.1f} GB free; lower slots or "
                    "max_length"
                )
        self._table.reserve(lm_cache)
        for lane, cache in caches:
            lane.reserve(cache)

    def _recorder(self, graphs: bool | None) -> Record | None:
        refusal = None
        if self.model.device.type != "cuda":
            refusal = f"they need a GPU, and the model is on {self.model.device}"
        elif not counts_positions(self.model.lm):
            refusal = f"{type(self.model.lm).__name__} tells positions by columns of its cache"
        if graphs and refusal is not None:
            raise ValueError(f"graphs cannot be recorded: {refusal}; leave graphs out")
        return CudaRecorder() if refusal is None and graphs is not False else None

    def _spent(self) -> tuple[float, float]:
        return self.stats.seconds["models"], self.stats.seconds["sampling"]


def _wants_logprobs(sequences: Several[Sequence]) -> bool:
    return any(sequence.request.logprobs for sequence in sequences)
