"""What has been written of a sequence, and what its caller has been told of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from auxkern.generation.completion import Completion, FinishReason, TokenLogprobs
from auxkern.generation.drawing import Logprob
from auxkern.generation.request import Sequence
from auxkern.generation.stops import TextStream
from auxkern.model.text import TextFormat


class Text:
    """A text on its way: tokens that count, and others that a step has drawn but not ended with yet.

    Args:
        sequence: whose text it is; ``generated`` is changed here alone.
        text_format: what decodes.
        ends: ids that end it, and are no part of it.
    """

    def __init__(self, sequence: Sequence, text_format: TextFormat, ends: frozenset[int]) -> None:
        self.sequence, self._format, self._ends = sequence, text_format, ends
        self._stops = frozenset(sequence.request.stop_token_ids)
        self._logprobs: list[Logprob] = []
        self._kept = self._told = 0
        self._pushed = 0  # tokens that the stream has seen
        self._stream = self._new_stream()

    def take(self, token: int, logprob: Logprob | None, *, awaited: bool = True) -> FinishReason | None:
        """Adds a token; why the text ends with it, None if it goes on.

        Args:
            token, logprob: as drawn.
            awaited: whether somebody wants to be told of the text before its end.
        """
        request, generated = self.sequence.request, self.sequence.generated
        if logprob is not None:
            self._logprobs.append(logprob)
        generated.append(token)
        if token in self._ends:
            return "end"
        if self._stream.stop or awaited:
            self._catch_up()
        if self._stream.stopped is not None or token in self._stops:
            return "stop"
        return "length" if len(generated) >= request.max_new_tokens else None

    def keep(self) -> None:
        """The step that drew the last token is done, and the text goes on."""
        self._kept = len(self.sequence.generated)

    def go_back(self) -> None:
        """Drops what came after the last ``keep``; it will be drawn again."""
        del self.sequence.generated[self._kept :]
        del self._logprobs[self._kept :]
        self._stream, self._pushed = self._new_stream(), 0
        if self._stream.stop or self._told:
            self._catch_up()

    @property
    def has_news(self) -> bool:
        """Whether there is text that was not told yet."""
        return len(self._stream.text) > self._told

    def news(self) -> Iterator[Any]:
        """Request, sample, and text that was not told yet; it counts as told once all three are taken."""
        whole = self._stream.text
        yield self.sequence.request.id
        yield self.sequence.sample
        yield whole[self._told :]
        self._told = len(whole)  # not before: Ctrl-C would lose it on its way

    def completion(self, reason: FinishReason, error: str | None = None) -> Completion:
        """The whole text, which is at its end."""
        sequence = self.sequence
        # Where nobody has asked for a part of it, all of it is decoded at once.
        self._stream.finish(self._unread())
        self._pushed = len(sequence.generated)
        if self._stream.stopped is not None and error is None:
            reason = "stop"  # what was held back may have held a stop string
        logprobs = None
        if sequence.request.logprobs and error is None:
            raw, processed, lm, auxiliary, each = zip(*self._logprobs, strict=True)
            members = tuple(zip(*each, strict=True)) or None
            logprobs = TokenLogprobs(raw, processed, lm, None if None in auxiliary else auxiliary, members)
        return Completion(
            sequence.request.id,
            sequence.sample,
            self._stream.text,
            tuple(sequence.generated),
            reason,
            len(sequence.prompt_ids),
            sequence.seed,
            error,
            logprobs,
        )

    def _unread(self) -> list[int]:
        """Tokens that the stream has not seen; the one that ends a text is none of its text."""
        unread = self.sequence.generated[self._pushed :]
        return unread[:-1] if unread and unread[-1] in self._ends else unread

    def _catch_up(self) -> None:
        for token in self._unread():
            self._pushed += 1
            self._stream.push(token)

    def _new_stream(self) -> TextStream:
        return TextStream(self._format, self.sequence.request.stop, self.sequence.prompt_ids)
