"""The engine: one ``step`` schedules, runs both models, and draws."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as AnySequence
from typing import Any

import torch

from auxkern.generation import limits
from auxkern.generation.completion import Completion
from auxkern.generation.drawing import Drawn, Pending, check_drawable
from auxkern.generation.graphs import CudaRecorder, Record
from auxkern.generation.members import BASE, FIRST, Part, check_reads
from auxkern.generation.request import Request, Sequence, Sequences
from auxkern.generation.runner import Room, Runner
from auxkern.generation.scheduler import Move, Scheduler
from auxkern.generation.slots import columns_for
from auxkern.generation.stats import EngineStats
from auxkern.generation.texts import Text
from auxkern.model.base import counts_positions
from auxkern.model.text import TextFormat


class Engine:
    """Texts for many requests at once, by continuous batching.

    A place that a finished text leaves is taken at the next step. The models stay transformers
    models; the engine gives them caches of fixed size (see ``SlotTable``). A text depends on its own
    request and seed. On a CPU with native kernels (``model.use_native_kernels()``), decoders with heads
    of a multiple of 16 and full-precision activations, it is the same to the last bit whatever it is
    written with. Elsewhere the batch reaches it through the rounding of the models' own products, whose
    order of additions may change with the batch's size; where even that must not be, use ``slots=1``.

    A call that does not end, for Ctrl-C, an error of ``on_text`` or one of a model, loses nothing: the
    next call goes on where every text was whole, and reads again what was in the slots. ``generate``
    alone takes its requests with it.

    Args:
        model: an ``AuxTunedForCausalLM``; auxiliaries are loaded with ``load_auxiliary``, before the engine
            is made. Decoders and encoder-decoders of the package; the base has attention, full or of
            sliding windows, in every layer.
        text_format: makes ids of requests and text of ids.
        models: language models beside the base, by the name that members call them; of its vocabulary, on
            its device.
        slots: most texts that are written at a time.
        max_length: most tokens of a text with its prompt.
        max_condition: most tokens of a condition.
        prefill_tokens: most padded tokens of newcomers' contexts in one step (see ``Scheduler``).
        graphs: whether steps are recorded as CUDA graphs when the engine is made (see ``DecodeGraphs``);
            on a GPU they are unless it is False. Of mixtures it records those that it is told of, each the
            models of a text's members: ``[("base", "base")]`` for guidance. Steps with log-probabilities or
            plausibility, with more than 32 biases of a request, or of texts of several kinds run without.
            What is written is then known to the host one step after it was drawn, and so ``on_text`` is told
            and ``step`` returns it then.
        on_text: called with (request id, sample, new text) when a step is done, as soon as the text is
            certain. It may submit and cancel requests. What it raises comes out of ``step`` or ``generate``;
            the other texts are told, and the finished ones returned, by the next call.

    Raises:
        ValueError: the base has fewer positions than ``max_length``, a model does not fit, or graphs are
            asked for where they cannot be recorded.
        RuntimeError: the caches do not fit the free memory; the message says what each model's take.
    """

    def __init__(
        self,
        model: Any,
        text_format: TextFormat,
        *,
        models: Mapping[str, Any] | None = None,
        slots: int = 32,
        max_length: int = 512,
        max_condition: int = 64,
        prefill_tokens: int = 2048,
        graphs: bool | Iterable[AnySequence[str]] | None = None,
        on_text: Callable[[str | int, int, str], None] | None = None,
    ) -> None:
        self.scheduler = Scheduler(slots, max_length, prefill_tokens, max_condition=max_condition)
        before = len(model.base_prefix)
        limits.check_format(model, text_format)
        limits.check_slots_of_base(model, max_length + before)
        for name in model.auxiliary_names:
            limits.check_slots_of_auxiliary(model, name, max_length + max_condition)
        self._others = dict(models or {})
        limits.check_members(model, self._others, max_length)
        self.model, self.text_format, self.on_text = model, text_format, on_text
        self.stats = EngineStats()
        self._texts: dict[Sequence, Text] = {}  # of what runs, and of what ended and was not told yet
        self._told = True
        self._flying: Pending | None = None  # a step whose tokens the host has not looked at
        for one in (model, *self._others.values()):
            one.eval()
        room = Room(slots, max_length, max_condition, before)
        shapes = [] if graphs is None or isinstance(graphs, bool) else [tuple(shape) for shape in graphs]
        limits.check_shapes(model, self._others, shapes, slots, columns_for(max_length))
        record = self._recorder(True if shapes else graphs if isinstance(graphs, bool) else None)
        self._runner = Runner(model, self._others, room, text_format.start_id, record, shapes)

    # ------------------------------------------------------------------------------------- asking

    def generate(self, requests: Iterable[Request]) -> list[Completion]:
        """The texts of all requests, in the order of requests and samples.

        One that ``on_text`` cancels has an error. Requests that were submitted before go on meanwhile, and
        their texts are returned by the next ``step``. After an error or Ctrl-C none of ``requests`` waits
        or runs any more.

        Raises:
            ValueError: two requests have one id, or one of them waits or runs already; then none is begun.
        """
        listed = list(requests)
        completions: dict[tuple[str | int, int], Completion] = {}
        sequences: list[Sequence] = []
        if len({request.id for request in listed}) < len(listed):
            ids = [request.id for request in listed]
            twice = next(id for id in ids if ids.count(id) > 1)
            raise ValueError(f"two requests have the id {twice!r}; ids must differ")
        for request in listed:
            new, failed = self._encoded(request, range(request.samples))
            sequences += new
            completions |= {(done.id, done.sample): done for done in failed}
        left = {sequence.key for sequence in sequences}
        self._settle()
        try:
            self._add(sequences)
            while left and (self.scheduler.sequences or not self._told):
                self._work()
                # Not a comprehension: see tests/test_interrupts.py.
                self._move_answers(left, completions)
        except BaseException:
            self._discard(sequences)
            raise
        for sequence in sequences:
            if sequence.key in left:
                cancelled = Completion.failed(sequence.request, sequence.sample, "it was cancelled")
                completions[sequence.key] = cancelled
        return [completions[request.id, sample] for request in listed for sample in range(request.samples)]

    def submit(self, request: Request, samples: Iterable[int] | None = None) -> list[Completion]:
        """Puts a request's samples (all of them if None) into the queue.

        Returns:
            A failed completion for each sample if the request can never be served; else nothing.

        Raises:
            ValueError: a request with this id waits or runs already, or its text is not fetched yet.
        """
        wanted = range(request.samples) if samples is None else list(samples)
        sequences, failed = self._encoded(request, wanted)
        self._settle()
        self._add(sequences)
        return failed

    def cancel(self, id: str | int) -> int:
        """Drops all samples of a request, and texts of it that nobody got; returns how many there were."""
        self._settle()
        gone = [sequence for sequence in self.scheduler.sequences if sequence.request.id == id]
        done = [completion for completion in self.scheduler.unanswered if completion.id == id]
        for sequence in [one for one in self._texts if one.request.id == id and one not in gone]:
            del self._texts[sequence]
        self._forget(done)
        self._discard(gone)
        return len(gone) + len(done)

    # ------------------------------------------------------------------------------------ writing

    def step(self) -> list[Completion]:
        """One token for every running text, and the first one for newcomers; returns what is finished.

        Where steps are recorded, that are texts whose last token the step before has drawn.
        """
        self._work()
        unanswered = self.scheduler.unanswered
        try:
            self.scheduler.unanswered = []
            return unanswered
        except BaseException:  # Ctrl-C would lose them on their way
            self.scheduler.unanswered = unanswered
            raise

    @torch.no_grad()
    def _work(self) -> None:
        """A step, and what is to be told of it; finished texts are ``scheduler.unanswered``."""
        self._settle()
        self._tell()
        self.scheduler.torn = True
        self._fail_unloaded()
        self._advance_all()
        self._told = False
        self.scheduler.torn = False
        self._tell()

    def _settle(self) -> None:
        """Makes everything whole again after a call that did not end."""
        if not self.scheduler.torn:
            return
        self.scheduler.restart((done.id, done.sample) for done in self.scheduler.unanswered)
        for sequence, text in self._texts.items():
            if sequence.state != "ended":
                text.go_back()
        self._flying = None
        self._runner.clear()
        self._told = False
        self.scheduler.torn = False

    def _tell(self) -> None:
        """Calls ``on_text``; nothing is torn meanwhile, so it may do and raise what it likes."""
        if self._told:
            return
        for sequence, text in list(self._texts.items()):
            if sequence not in self._texts:
                continue  # cancelled by on_text just now
            if self.on_text is not None and text.has_news:
                self.on_text(*text.news())
            if sequence.state == "ended":
                self._texts.pop(sequence, None)
        self._told = True

    def _add(self, sequences: Sequences) -> None:
        keys = {sequence.key for sequence in sequences}
        for done in self.scheduler.unanswered:
            if (done.id, done.sample) in keys:
                raise ValueError(
                    f"the text of {done.id!r} is not fetched yet; call step, or choose another id"
                )
        self.scheduler.torn = True
        try:
            self.scheduler.add(*sequences)
        except ValueError:
            self.scheduler.torn = False  # nothing was added
            raise
        self.scheduler.torn = False

    def _discard(self, sequences: Sequences) -> None:
        """Drops sequences, whether they wait, run or have ended."""
        self._settle()
        gone = {sequence.key for sequence in sequences if sequence.state != "new"}
        self._forget([done for done in self.scheduler.unanswered if (done.id, done.sample) in gone])
        self.scheduler.torn = True
        self._end(sequences)
        self.scheduler.torn = False

    def _move_answers(
        self, left: set[tuple[str | int, int]], completions: dict[tuple[str | int, int], Completion]
    ) -> None:
        """Takes the finished texts of ``left`` out of those that nobody got yet, into ``completions``."""
        mine = [done for done in self.scheduler.unanswered if (done.id, done.sample) in left]
        for done in mine:
            completions[done.id, done.sample] = done
            left.discard((done.id, done.sample))
        self._forget(mine)

    def _forget(self, done: list[Completion]) -> None:
        """Takes finished texts out of those that nobody got yet."""
        gone = set(map(id, done))
        self.scheduler.unanswered = [one for one in self.scheduler.unanswered if id(one) not in gone]

    def _end(self, sequences: Sequences) -> None:
        running = self.scheduler.running
        gone, moves = self.scheduler.remove(sequences)
        self._leave([sequence for sequence in gone if sequence in running], moves)
        for sequence in sequences:
            self._texts.pop(sequence, None)

    def _fail_unloaded(self) -> None:
        """Ends what an auxiliary was to write that the model has no longer."""
        unloaded = self._runner.lanes.keys() - {*self.model.auxiliary_names}
        gone = [one for one in self.scheduler.sequences if any(p.model in unloaded for p in one.parts)]
        for one in gone:
            name = next(part.model for part in one.parts if part.model in unloaded)
            problem = f"auxiliary {name!r} has been unloaded"
            self.scheduler.unanswered.append(Completion.failed(one.request, one.sample, problem))
        self._end(gone)

    def _advance_all(self) -> None:
        """Schedules, has both models run and draw, and ends what is at its end.

        Where steps are recorded, the tokens that are taken are those of the step before: the device draws
        the next ones meanwhile. A text that ends has then been computed one token too far, which is
        dropped when it comes; one whose length is known to end it has left its slot in time.
        """
        with self.stats.timed("rest"):
            arriving = self._flying
            try:
                launched = self._launched()
            except Exception:
                if arriving is not None:
                    self._take(arriving)  # drawn already, whatever befell the step behind it
                raise
            if self._runner.recorded:
                self._flying = launched
            else:
                arriving = launched
            if arriving is not None:
                self._arrive(arriving)

    def _launched(self) -> Pending | None:
        """Begins a step; None if there is nothing to do."""
        self._release()
        before = self.scheduler.running
        plan = self.scheduler.schedule()
        if not plan.running:
            return None
        launched = self._runner.launch(before, plan.prefill, self.stats)
        self.stats.steps += 1
        return launched

    def _release(self) -> None:
        """Frees the slots of texts whose last token is on its way."""
        flying = [] if self._flying is None else self._flying.sequences
        last = [
            one for one in flying if one.slot is not None and len(one.generated) + 1 >= one.max_new_tokens
        ]
        self._leave(last, self.scheduler.release(last))

    def _arrive(self, pending: Pending) -> None:
        """Takes a step's tokens, and has those leave that they end."""
        ended = self._take(pending)
        in_slots = [sequence for sequence in ended if sequence.slot is not None]
        _, moves = self.scheduler.remove(ended)
        self._leave(in_slots, moves)
        if self._flying is not None and all(one.state == "ended" for one in self._flying.sequences):
            self._flying = None

    def _take(self, pending: Pending) -> list[Sequence]:
        """Adds a step's tokens to their texts; returns those that are at their end."""
        with self.stats.timed("sampling"):
            drawn = pending.result()
        ended: dict[Sequence, Completion] = {}
        for row, sequence in enumerate(pending.sequences):
            if sequence.state == "ended":
                continue  # before this token, or it was cancelled
            completion = self._taken(sequence, drawn, row)
            if completion is not None:
                ended[sequence] = completion
        # From here on they are finished, whatever happens.
        self.scheduler.unanswered += ended.values()
        for sequence in pending.sequences:
            if sequence in self._texts:
                self._texts[sequence].keep()
        return list(ended)

    def _taken(self, sequence: Sequence, drawn: Drawn, row: int) -> Completion | None:
        """Adds a token to its text; the whole text if that ends it."""
        if sequence not in self._texts:
            ends = () if sequence.request.ignore_eos else self.text_format.end_ids(self.model)
            self._texts[sequence] = Text(sequence, self.text_format, frozenset(ends))
        text = self._texts[sequence]
        if drawn.status[row]:
            problem = "the logits are NaN or infinite; look at the models' weights and aux_scale"
            return text.completion("error", problem)
        logprob = drawn.logprobs[row] if sequence.request.logprobs else None
        reason = text.take(drawn.tokens[row], logprob, awaited=self.on_text is not None)
        self.stats.new_tokens += 1
        return None if reason is None else text.completion(reason)

    def _leave(self, ended: Sequences, moves: list[Move]) -> None:
        if ended:
            self._runner.leave(ended, moves, len(self.scheduler.running))

    # ---------------------------------------------------------------------------------- preparing

    def _encoded(self, request: Request, samples: Iterable[int]) -> tuple[list[Sequence], list[Completion]]:
        """The samples to be written, or a failed completion for each."""
        try:
            sequences = self._sequences(request, samples)
            for one in sequences[:1]:
                refusal = self.scheduler.refusal(one) or limits.sequence_refusal(
                    self.model, self._others, one
                )
                if refusal is not None:
                    raise ValueError(refusal)
        except ValueError as error:
            return [], [Completion.failed(request, sample, str(error)) for sample in samples]
        return sequences, []

    def _sequences(self, request: Request, samples: Iterable[int]) -> list[Sequence]:
        check_drawable(request, self.model.config.vocab_size)
        if not request.members:
            prompt, told, condition = self._ids(request.auxiliary, request.prompt, request.condition)
            base = FIRST if self._runner.ends_early(request) else BASE
            return request.sequences(prompt, condition, samples, told=told, base=base)
        members: list[Part] = []
        first = next(place for place, one in enumerate(request.members) if one.model == BASE)
        own = request.members[first].prompt
        own = request.prompt if own is None else own
        prompt, told = self._first_prompt(request, own)
        for place, member in enumerate(request.members):
            name = member.model
            check_reads(member, [BASE, *self._others], self._runner.lanes)
            if name in self._runner.lanes:
                _, _, condition = self._ids(name, "", member.condition or "")
                members.append(Part(name, tuple(prompt), tuple(condition), member.weight, first, told))
                continue
            if place == first:
                members.append(Part(name, tuple(prompt), weight=member.weight, told=told))
                continue
            ids = self._plain_ids(request.prompt if member.prompt is None else member.prompt)
            members.append(Part(name, tuple(ids), weight=member.weight))
        return request.sequences(prompt, (), samples, members, told)

    def _first_prompt(self, request: Request, prompt: str) -> tuple[list[int], int]:
        """What the first member of the base reads, and how much of it tells it an auxiliary's condition."""
        steered = [one for one in request.members if one.model in self._runner.lanes]
        if not steered or self.text_format.base_prompt is None:
            return self._plain_ids(prompt), 0
        conditions = {one.condition or "" for one in steered}
        if len(conditions) > 1:
            raise ValueError(
                f"the base is told one condition ({self.text_format.base_prompt!r}), but members have "
                f"{sorted(conditions)!r:.80}; give auxiliaries of one text one condition"
            )
        ids, told, _ = self._ids(steered[0].model, prompt, conditions.pop())
        return ids, told

    def _plain_ids(self, prompt: str) -> list[int]:
        ids: list[int] = self.text_format.plain.prompts([""], [prompt])["input_ids"][0].tolist()
        return ids

    def _ids(self, name: str | None, prompt: str, condition: str) -> tuple[list[int], int, list[int]]:
        """Of base prompt and prompt, how many the first has, and of an auxiliary's condition."""
        names = self.model.auxiliary_names
        if name in self._runner.lanes and name not in names:
            raise ValueError(f"auxiliary {name!r} has been unloaded; choose one of {names}")
        if name is not None and name not in self._runner.lanes:
            can = ", ".join(self._runner.lanes)
            raise ValueError(
                f"there is no auxiliary {name!r}; choose one of {can}, or null for the base alone"
            )
        inputs = self.text_format.prompts([condition], [prompt])
        ids = inputs["condition_ids"][0].tolist() if name is not None else []
        if name is not None and not ids and self.model.auxiliary_traits(name).needs_condition:
            raise ValueError(
                f"the condition has no tokens, but the encoder of auxiliary {name!r} needs one; give a "
                "condition"
            )
        told = int(inputs["told"][0]) if "told" in inputs else 0
        return inputs["input_ids"][0].tolist(), told, ids

    def _recorder(self, graphs: bool | None) -> Record | None:
        window = limits.window_of(self.model)
        refusal = None
        if window is not None and window < columns_for(self.scheduler.max_length):
            # A recorded step keeps the new token behind all columns, where a window would not reach.
            refusal = f"the base has a sliding window of {window} positions"
        elif self.model.device.type != "cuda":
            refusal = f"they need a GPU, and the model is on {self.model.device}"
        elif not counts_positions(self.model.lm):
            refusal = f"{type(self.model.lm).__name__} tells positions by columns of its cache"
        if graphs and refusal is not None:
            raise ValueError(f"graphs cannot be recorded: {refusal}; leave graphs out")
        return CudaRecorder() if refusal is None and graphs is not False else None
