"""Which sequences run, in which slots, and that none is forgotten."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from auxkern.generation.members import Part
from auxkern.generation.request import Request, Sequence
from auxkern.generation.scheduler import Move, Plan, Scheduler


def sequence(id: str | int, width: int = 1, new: int = 1, condition: int = 0, sample: int = 0) -> Sequence:
    request = Request(id, max_new_tokens=new, samples=sample + 1)
    return Sequence(request, sample, tuple(range(width)), tuple(range(condition)))


def scheduler(slots: int = 4, max_length: int = 100, prefill_tokens: int = 1000, **options: Any) -> Scheduler:
    return Scheduler(slots, max_length, prefill_tokens, **options)


def ids(sequences: tuple[Sequence, ...] | list[Sequence]) -> list[str | int]:
    return [one.request.id for one in sequences]


class Histories(RuleBasedStateMachine):
    """A scheduler beside a simulated cache, which holds for each slot the sequence that it is of."""

    @initialize(
        slots=st.integers(1, 5),
        prefill_tokens=st.integers(1, 40),
        look_ahead=st.integers(1, 6),
        max_padding=st.sampled_from([0.0, 0.3, 0.9]),
    )
    def begin(self, slots: int, prefill_tokens: int, look_ahead: int, max_padding: float) -> None:
        self.scheduler = Scheduler(
            slots, 20, prefill_tokens, max_condition=6, look_ahead=look_ahead, max_padding=max_padding
        )
        self.cache: list[Sequence | None] = [None] * slots
        self.patience: dict[Sequence, int] = {}  # steps with a free slot in which one may yet wait
        self.ended: list[Sequence] = []
        self.released: list[Sequence] = []
        self.count = 0

    @rule(
        width=st.integers(1, 20),
        new=st.integers(1, 12),
        condition=st.integers(0, 7),
        samples=st.integers(1, 3),
    )
    def add(self, width: int, new: int, condition: int, samples: int) -> None:
        self.count += 1
        fits = width + new <= 20 and condition <= 6
        request = Request(self.count, max_new_tokens=new, samples=samples)
        for one in request.sequences(range(width), range(condition)):
            if fits:
                ahead = self.scheduler.waiting
                self.scheduler.add(one)
                self.patience[one] = ahead + 1
            else:
                with pytest.raises(ValueError, match=r"room for"):
                    self.scheduler.add(one)

    @rule()
    def schedule(self) -> None:
        running = list(self.scheduler.running)
        waiting = self.scheduler.waiting
        plan = self.scheduler.schedule()
        assert [self.cache[slot] for slot in plan.decode] == running
        for slot, one in enumerate(plan.prefill, start=len(running)):
            assert self.cache[slot] is None
            self.cache[slot] = one
            self.patience.pop(one)
        free = len(self.cache) - len(running)
        assert plan.running <= len(self.cache)
        assert bool(plan.prefill) == bool(free and waiting)
        widths = [len(one.prompt_ids) + len(one.condition_ids) for one in plan.prefill]
        if len(widths) > 1:
            assert len(widths) * max(widths) <= self.scheduler.prefill_tokens
            padding = len(widths) * max(widths) - sum(widths)
            assert padding <= self.scheduler.max_padding * len(widths) * max(widths)
        if free:
            for one in self.patience:
                self.patience[one] -= 1

    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        running = len(self.scheduler.running)
        slots = data.draw(st.lists(st.integers(0, running - 1), unique=True) if running else st.just([]))
        ended = [self.cache[slot] for slot in slots]
        self.ended += ended
        self.follow(self.scheduler.finish(slots), ended)

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        running = self.scheduler.running
        gone = data.draw(st.lists(st.sampled_from(running), unique=True) if running else st.just([]))
        self.released += gone
        self.follow(self.scheduler.release(gone), gone)

    @rule()
    def end_the_released(self) -> None:
        ended, moves = self.scheduler.remove(self.released)
        assert set(ended) == set(self.released)
        assert len(ended) == len(self.released)
        assert moves == []
        self.ended += self.released
        self.released = []

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        id = data.draw(st.integers(1, self.count + 1))
        alive = [*self.patience, *self.scheduler.running, *self.released]
        expected = [one for one in alive if one.request.id == id]
        ended, moves = self.scheduler.cancel(id)
        assert set(ended) == set(expected)
        assert len(ended) == len(expected)
        for one in ended:
            self.patience.pop(one, None)
        self.released = [one for one in self.released if one not in ended]
        self.ended += ended
        self.follow(moves, ended)

    def follow(self, moves: list[Move], ended: list[Any]) -> None:
        """Makes the moves in the cache, all at once as an engine would."""
        self.cache = [None if one in ended else one for one in self.cache]
        assert not {move.source for move in moves} & {move.destination for move in moves}
        for source, destination in reversed(moves):
            assert self.cache[destination] is None
            self.cache[destination], self.cache[source] = self.cache[source], None
        assert len(moves) <= len(ended)

    @invariant()
    def slots_are_a_prefix_and_each_has_one_sequence(self) -> None:
        running = self.scheduler.running
        assert list(running) == self.cache[: len(running)]
        assert all(one is None for one in self.cache[len(running) :])
        assert [one.slot for one in running] == list(range(len(running)))
        assert {one.state for one in running} <= {"running"}

    @invariant()
    def every_sequence_is_somewhere_once(self) -> None:
        assert self.scheduler.waiting == len(self.patience)
        assert {one.state for one in self.patience} <= {"waiting"}
        everywhere = [*self.patience, *self.scheduler.running, *self.released, *self.ended]
        assert len(set(everywhere)) == len(everywhere)
        alive = {*self.patience, *self.scheduler.running, *self.released}
        assert set(self.scheduler.sequences) == alive
        assert self.scheduler.idle == (not alive)
        assert all(one.state == "running" and one.slot is None for one in self.released)
        assert all(one.state == "ended" and one.slot is None for one in self.ended)

    @invariant()
    def nobody_starves(self) -> None:
        assert all(left > 0 for left in self.patience.values())

    def teardown(self) -> None:
        """Whatever the history, running on ends everything, in as many steps as there are sequences."""
        self.end_the_released()
        for _ in range(len(self.patience) + len(self.scheduler.running)):
            self.schedule()
            slots = range(len(self.scheduler.running))[-1:]
            self.follow(self.scheduler.finish(slots), [self.cache[slot] for slot in slots])
        assert self.scheduler.idle


def test_histories() -> None:
    run_state_machine_as_test(Histories, settings=settings(max_examples=100, stateful_step_count=25))


@pytest.mark.slow
def test_ten_thousand_histories() -> None:
    run_state_machine_as_test(Histories, settings=settings(max_examples=10_000, stateful_step_count=12))


def test_a_place_is_taken_at_the_next_step() -> None:
    queue = scheduler(slots=2)
    a, b, c = (sequence(id) for id in "abc")
    for one in (a, b, c):
        queue.add(one)
    assert queue.schedule() == Plan(range(0), (a, b))
    assert queue.schedule() == Plan(range(2), ())
    assert queue.finish(0) == [Move(1, 0)]
    assert (a.state, b.slot) == ("ended", 0)
    plan = queue.schedule()
    assert plan == Plan(range(1), (c,))
    assert (plan.running, c.slot) == (2, 1)


def test_several_that_end_together_take_few_moves() -> None:
    queue = scheduler(slots=8)
    for id in range(8):
        queue.add(sequence(id))
    queue.schedule()
    # 5 stays in the part that is left behind, 6 and 7 end there: two gaps, two moves.
    assert queue.finish([7, 1, 6, 2, 0]) == [Move(3, 0), Move(4, 1), Move(5, 2)]
    assert ids(queue.running) == [3, 4, 5]


def test_newcomers_of_like_length_go_together() -> None:
    queue = scheduler(slots=4, look_ahead=4)
    for id, width in enumerate([10, 60, 12, 11, 10]):
        queue.add(sequence(id, width))
    # 1 is six times as long as the rest, 4 is too far behind.
    assert ids(queue.schedule().prefill) == [0, 2, 3]
    assert ids(queue.schedule().prefill) == [1]


def test_the_nearest_in_length_go_first() -> None:
    queue = scheduler(slots=2)
    for id, width in enumerate([30, 20, 28]):
        queue.add(sequence(id, width))
    assert ids(queue.schedule().prefill) == [0, 2]


def test_the_condition_is_read_with_the_prompt() -> None:
    queue = scheduler(prefill_tokens=30)
    queue.add(sequence("a", 5, condition=10))
    queue.add(sequence("b", 15))
    queue.add(sequence("c", 15))
    assert ids(queue.schedule().prefill) == ["a", "b"]


def mixture(id: int, *contexts: tuple[str, int], conditions: tuple[int, ...] = ()) -> Sequence:
    """Language models that read so many tokens, and auxiliaries of the first that see such conditions."""
    parts = [Part(model, tuple(range(i, i + length))) for i, (model, length) in enumerate(contexts)]
    first = parts[0].prompt_ids
    parts += [Part(f"aux {i}", first, tuple(range(K)), base=0) for i, K in enumerate(conditions)]
    return Sequence(Request(id, max_new_tokens=1), 0, first, members=tuple(parts))


@pytest.mark.parametrize(
    ("one", "tokens"),
    [
        (mixture(0, ("base", 10)), 10),
        (mixture(0, ("base", 10), ("base", 8)), 20),
        (mixture(0, ("base", 10), ("expert", 10), ("anti", 10)), 30),
        (mixture(0, ("base", 7), conditions=(2, 1)), 10),
        (mixture(0, ("base", 4), ("expert", 9), conditions=(2, 3)), 18),
    ],
)
def test_a_step_takes_as_many_mixtures_as_it_can_read(one: Sequence, tokens: int) -> None:
    for room, taken in ((3 * tokens, 3), (3 * tokens - 1, 2)):
        queue = scheduler(slots=20, prefill_tokens=room)
        queue.add(
            *(
                Sequence(Request(id, max_new_tokens=1), 0, one.prompt_ids, members=one.members)
                for id in range(4)
            )
        )
        assert len(queue.schedule().prefill) == taken


def test_members_that_read_the_same_do_so_once() -> None:
    alike = Part("base", (1, 2, 3)), Part("base", (1, 2, 3), weight=-0.5), Part("expert", (1, 2, 3))
    seen = [Part("aux", (1, 2, 3), (4, 5), base=place) for place in (0, 0, 1)]
    one = Sequence(Request(0), 0, (1, 2, 3), members=(*alike, *seen[:2]))
    assert one.contexts == (5, 3)
    # An auxiliary behind another member of the base is read for itself.
    assert Sequence(Request(0), 0, (1, 2, 3), members=(*alike, *seen)).contexts == (7, 3)


def test_contexts_of_unlike_lengths_go_with_others_like_them() -> None:
    queue = scheduler(slots=20)
    queue.add(*(mixture(id, ("base", 60), ("base", 2), ("base", 3)) for id in range(4)))
    assert ids(queue.schedule().prefill) == [0, 1, 2, 3]


def test_one_prompt_may_be_longer_than_a_step_takes() -> None:
    queue = scheduler(prefill_tokens=10)
    queue.add(sequence("long", 50))
    queue.add(sequence("short", 5))
    assert ids(queue.schedule().prefill) == ["long"]
    assert ids(queue.schedule().prefill) == ["short"]


def test_a_cancelled_request_leaves_queue_and_slots() -> None:
    queue = scheduler(slots=2)
    for sample in range(3):
        queue.add(sequence("twice", sample=sample))
    queue.add(sequence("stays"))
    queue.schedule()
    ended, moves = queue.cancel("twice")
    assert sorted(one.sample for one in ended) == [0, 1, 2]
    assert moves == []
    assert ids(queue.schedule().prefill) == ["stays"]
    assert queue.cancel("nobody") == ([], [])


def test_what_can_never_run_is_refused() -> None:
    queue = scheduler(max_length=20, max_condition=4)
    queue.add(sequence("just", 15, new=5, condition=4))
    with pytest.raises(
        ValueError, match=r"'long': .* 16 tokens and max_new_tokens is 5, together 21, .* 20;"
    ):
        queue.add(sequence("long", 16, new=5))
    with pytest.raises(ValueError, match=r"'wide': the condition has 5 tokens, .* 4;"):
        queue.add(sequence("wide", condition=5))
    assert queue.waiting == 1


def test_a_sequence_is_added_once() -> None:
    queue = scheduler()
    one = sequence("a")
    queue.add(one)
    with pytest.raises(ValueError, match="is waiting; only a new one"):
        queue.add(one)
    with pytest.raises(ValueError, match=r"\('a', 0\) waits or runs already"):
        queue.add(sequence("a"))
    queue.schedule()
    queue.finish(0)
    with pytest.raises(ValueError, match="is ended"):
        queue.add(one)
    queue.add(sequence("a"))  # the id is free again


@pytest.mark.parametrize(("slots", "message"), [([0, 3], "nothing runs in slot 3; 2"), ([1, 1], "twice")])
def test_only_running_slots_finish(slots: list[int], message: str) -> None:
    queue = scheduler()
    for id in range(2):
        queue.add(sequence(id))
    queue.schedule()
    with pytest.raises(ValueError, match=message):
        queue.finish(slots)
    assert ids(queue.running) == [0, 1]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"slots": 0}, ValueError, "slots is 0; it must be 1"),
        ({"slots": 2.0}, TypeError, "slots must be an int, got float"),
        ({"max_length": 1}, ValueError, "max_length is 1"),
        ({"prefill_tokens": True}, TypeError, "prefill_tokens must be an int"),
        ({"look_ahead": 0}, ValueError, "look_ahead is 0"),
        ({"max_padding": 1.0}, ValueError, r"max_padding is 1.0; it must be in \[0, 1\)"),
    ],
)
def test_bad_numbers_are_refused(options: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        scheduler(**options)
