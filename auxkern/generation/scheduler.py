"""Which sequences run, and where: pure policy, without tensors."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from auxkern.generation.completion import Completion
    from auxkern.generation.request import Sequence


class Move(NamedTuple):
    """The sequence in slot ``source`` goes on in slot ``destination``, and its caches with it."""

    source: int
    destination: int


@dataclass(frozen=True)
class Plan:
    """What one step does.

    Attributes:
        decode: slots that were running, 0 to n - 1; each gets one token.
        prefill: newcomers; ``prefill[i]`` takes slot n + i, its prompt is read, and it gets its first
            token.
    """

    decode: range
    prefill: tuple[Sequence, ...]

    @property
    def running(self) -> int:
        """Slots in use once the newcomers are in."""
        return len(self.decode) + len(self.prefill)


class Scheduler:
    """A queue, first come first served, in front of a number of slots.

    Running sequences always fill slots 0 to n - 1, so that a cache of all of them is a plain prefix of
    the slots. When one ends, the last running one moves into its slot.

    Each step admits at least the head of the queue if a slot is free. Others are admitted with it if
    they stand among the first ``look_ahead`` and are like it in length, for the prompts of newcomers
    are padded to the longest. So a sequence before which p others wait when it is added starts with
    the (p + 1)-th following step that has a free slot, or sooner.

    Args:
        slots: most sequences that run at a time.
        max_length: most tokens of a sequence, prompt and new ones together.
        prefill_tokens: most padded tokens of the newcomers of one step: the number of their contexts times
            the longest one, prompt and condition together. A text of several contexts counts them all (see
            ``Sequence.contexts``). A single one may have more.
        max_condition: most tokens of a condition; None for any number.
        look_ahead: places of the queue from which newcomers are taken; None for twice the slots.
        max_padding: largest share of padding among the padded tokens, in [0, 1); a text's contexts are
            padded to the longest of them without that.

    Attributes:
        unanswered: texts that are whole, and that nobody has got yet; the engine's to change.
        torn: whether a call that changes several things one after another has begun and not ended; the
            engine's to change.

    Raises:
        TypeError: one of the numbers is not an int.
        ValueError: one of them is out of range.
    """

    def __init__(
        self,
        slots: int,
        max_length: int,
        prefill_tokens: int,
        *,
        max_condition: int | None = None,
        look_ahead: int | None = None,
        max_padding: float = 0.5,
    ) -> None:
        look_ahead = 2 * slots if look_ahead is None else look_ahead
        for name, value, least in (
            ("slots", slots, 1),
            ("max_length", max_length, 2),
            ("prefill_tokens", prefill_tokens, 1),
            ("max_condition", max_condition, 0),
            ("look_ahead", look_ahead, 1),
        ):
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name} is {value}; it must be {least} or more")
        if not 0 <= max_padding < 1:
            raise ValueError(f"max_padding is {max_padding}; it must be in [0, 1)")
        self.slots, self.max_length, self.max_condition = slots, max_length, max_condition
        self.prefill_tokens, self.look_ahead, self.max_padding = prefill_tokens, look_ahead, max_padding
        self._queue: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        # All that wait or run, in the order in which they came.
        self._known: dict[tuple[str | int, int], Sequence] = {}
        self.unanswered: list[Completion] = []
        self.torn = False

    @property
    def running(self) -> tuple[Sequence, ...]:
        """The sequences in slots 0 to n - 1."""
        return tuple(self._running)

    @property
    def waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._queue)

    @property
    def idle(self) -> bool:
        """Whether nothing runs, nothing waits, nothing is unanswered, and nothing is to be put right."""
        return not self._known and not self.unanswered and not self.torn

    @property
    def sequences(self) -> tuple[Sequence, ...]:
        """All that wait, run or are released, in the order in which they came."""
        return tuple(self._known.values())

    def refusal(self, sequence: Sequence) -> str | None:
        """Why the sequence can never run here; None if it can."""
        for model, count in Counter(part.model for part in sequence.parts).items():
            if count > self.slots:
                return (
                    f"it has {count} members of model {model!r}, and there are {self.slots} slots; take more "
                    "slots, or fewer members"
                )
        new = sequence.max_new_tokens
        for part in sequence.parts:
            prompt, condition, of = len(part.prompt_ids), len(part.condition_ids), sequence.named(part)
            if prompt + new > self.max_length:
                return (
                    f"the prompt{of} has {prompt} tokens and max_new_tokens is {new}, together "
                    f"{prompt + new}, but a sequence has room for {self.max_length}; shorten the prompt, or "
                    "lower max_new_tokens"
                )
            if self.max_condition is not None and condition > self.max_condition:
                room = self.max_condition
                return f"the condition{of} has {condition} tokens, but there is room for {room}; shorten it"
        return None

    def add(self, *sequences: Sequence) -> None:
        """Puts new sequences at the end of the queue: all of them, or none.

        Raises:
            ValueError: one can never fit (see ``refusal``), is not new, or one with the same id and
                sample number waits or runs.
        """
        new: set[tuple[str | int, int]] = set()
        for sequence in sequences:
            problem = self.refusal(sequence)
            if problem is not None:
                raise ValueError(f"request {sequence.request.id!r}: {problem}")
            if sequence.state != "new":
                raise ValueError(f"sequence {sequence.key} is {sequence.state}; only a new one can be added")
            if sequence.key in self._known or sequence.key in new:
                raise ValueError(f"a sequence {sequence.key} waits or runs already; ids must differ")
            new.add(sequence.key)
        self._known.update({sequence.key: sequence for sequence in sequences})
        for sequence in sequences:
            sequence.state = "waiting"
            self._queue.append(sequence)

    def restart(self, without: Iterable[tuple[str | int, int]] = ()) -> None:
        """All sequences wait, in the order in which they came, as after a call that did not end.

        It can itself be interrupted and called again.

        Args:
            without: keys of those that are at their end.
        """
        for key in without:
            if key in self._known:
                self._known[key].state = "ended"
        alive = [sequence for sequence in self._known.values() if sequence.state != "ended"]
        for sequence in alive:
            sequence.state, sequence.slot = "waiting", None
        self._known = {sequence.key: sequence for sequence in alive}
        self._running, self._queue = [], deque(alive)

    def schedule(self) -> Plan:
        """Moves newcomers from the queue into free slots, and says what the next step does."""
        before = len(self._running)
        newcomers = self._admitted(self.slots - sum(sequence.width for sequence in self._running))
        for sequence in newcomers:
            sequence.state = "running"
            sequence.slot = len(self._running)
            self._running.append(sequence)
        return Plan(range(before), tuple(newcomers))

    def finish(self, slots: int | Iterable[int]) -> list[Move]:
        """Takes ended sequences out of their slots.

        Args:
            slots: one slot, or several at once, which takes fewer moves.

        Returns:
            Moves that fill the gaps. No source of one is the destination of another, so they can be
            made in any order, or all at once.

        Raises:
            ValueError: nothing runs in one of the slots, or one is named twice.
        """
        ended = [slots] if isinstance(slots, int) else list(slots)
        for slot in ended:
            if not 0 <= slot < len(self._running):
                raise ValueError(f"nothing runs in slot {slot}; {len(self._running)} slots are in use")
        if len(set(ended)) < len(ended):
            raise ValueError(f"slots holds one twice: {sorted(ended)}")
        gone = [self._running[slot] for slot in ended]
        moves = self._vacate(ended)
        for sequence in gone:
            self._end(sequence)
        return moves

    def release(self, sequences: Iterable[Sequence]) -> list[Move]:
        """Takes running sequences out of their slots that go on no more but are not at their end yet.

        ``remove`` ends them; until then they are among ``sequences``.

        Returns:
            Moves as of ``finish``.

        Raises:
            ValueError: one of them has no slot.
        """
        released = list(sequences)
        for sequence in released:
            if sequence.slot is None:
                raise ValueError(f"sequence {sequence.key} has no slot; it is {sequence.state}")
        moves = self._vacate([sequence.slot for sequence in released if sequence.slot is not None])
        for sequence in released:
            sequence.slot = None
        return moves

    def _vacate(self, ended: list[int]) -> list[Move]:
        left = len(self._running) - len(ended)
        moves = closing_moves(len(self._running), ended)
        for move in moves:
            sequence = self._running[move.source]
            sequence.slot = move.destination
            self._running[move.destination] = sequence
        del self._running[left:]
        return moves

    def cancel(self, id: str | int) -> tuple[list[Sequence], list[Move]]:
        """Ends all samples of a request, whether they wait or run.

        Returns:
            The sequences that it ended, none if there is no such request, and moves as of ``finish``.
        """
        return self.remove([one for one in self._known.values() if one.request.id == id])

    def remove(self, sequences: Iterable[Sequence]) -> tuple[list[Sequence], list[Move]]:
        """Ends sequences, whether they wait, run or are released; results as of ``cancel``."""
        gone = set(sequences)
        waiting = [sequence for sequence in self._queue if sequence in gone]
        self._queue = deque(sequence for sequence in self._queue if sequence not in gone)
        known = self._known.values()
        released = [one for one in known if one in gone and one.state == "running" and one.slot is None]
        for sequence in (*waiting, *released):
            self._end(sequence)
        running = [sequence for sequence in self._running if sequence in gone]
        slots = [slot for slot, sequence in enumerate(self._running) if sequence in gone]
        return waiting + released + running, self.finish(slots)

    def _end(self, sequence: Sequence) -> None:
        sequence.state = "ended"
        sequence.slot = None
        del self._known[sequence.key]

    def _admitted(self, free: int) -> list[Sequence]:
        """Takes the head of the queue and those that go well with it out of the queue.

        Args:
            free: slots; a sequence takes as many as it has members of one model.
        """
        if not self._queue or self._queue[0].width > free:
            return []
        seen = [self._queue.popleft() for _ in range(min(self.look_ahead, len(self._queue)))]
        head = _width(seen[0])
        contexts = len(seen[0].contexts)
        # sorted() keeps the order of arrival among those that are equally near.
        nearest = sorted(range(1, len(seen)), key=lambda i: abs(_width(seen[i]) - head))
        chosen, longest, total = {0}, head, contexts * head
        free -= seen[0].width
        for i in nearest:
            if not free:
                break
            if seen[i].width > free:
                continue
            width, more = _width(seen[i]), len(seen[i].contexts)
            padded = (contexts + more) * max(longest, width)
            real = total + more * width
            if padded <= self.prefill_tokens and padded - real <= self.max_padding * padded:
                chosen.add(i)
                free -= seen[i].width
                contexts, longest, total = contexts + more, max(longest, width), real
        self._queue.extendleft(reversed([one for i, one in enumerate(seen) if i not in chosen]))
        return [seen[i] for i in sorted(chosen)]


def closing_moves(count: int, ended: Iterable[int]) -> list[Move]:
    """Moves after which the slots that go on are 0, 1, ... again.

    Args:
        count: slots in use, 0 to count - 1.
        ended: those that are left, without repetition.

    Returns:
        Moves from the last slots into the gaps; no source of one is the destination of another.
    """
    gone = set(ended)
    left = count - len(gone)
    gaps = sorted(slot for slot in gone if slot < left)
    behind = sorted(set(range(left, count)) - gone)
    return [Move(*pair) for pair in zip(behind, gaps, strict=True)]


def _width(sequence: Sequence) -> int:
    """Tokens of its longest context, with what was drawn."""
    return max(sequence.contexts) + len(sequence.generated)
