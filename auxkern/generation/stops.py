"""Text from tokens that come one by one, and where a stop string ends it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from auxkern.model.text import TextFormat

_UNDECODABLE = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer writes for bytes that are no character
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_SEGMENT = 8  # tokens that are settled at a time; 1 to 32 of them take about as long to decode
_LONGEST_CHARACTER = 4  # bytes in UTF-8, and so tokens


class TextStream:
    """The text of a growing sequence of tokens, as far as no later token can change it.

    All that was returned, joined, is ``decode(prompt + tokens)`` without the beginning that is
    ``decode(prompt)``, cut before the first stop string. First is the one that is complete first; among
    several that end together, the longest. So the text does not depend on how characters and stop
    strings are spread over tokens. A token costs one decoding of at most about three segments of
    eight tokens, however long the text. Where tokens spell bytes that are no character, text may come
    later than it could, never wrong.

    tokenizers' own ``DecodeStream`` returns nothing more once such bytes have come, and knows no stop
    strings.

    Args:
        text_format: what decodes.
        stop: strings that end the text; none of them empty.
        prompt_ids: (T) what the tokens follow. Without it a tokenizer that writes a space before each
            word leaves out the first one.

    Raises:
        TypeError: stop is one str.
        ValueError: stop holds an empty str.
    """

    def __init__(
        self, text_format: TextFormat, stop: Iterable[str] = (), prompt_ids: Sequence[int] = ()
    ) -> None:
        if isinstance(stop, str):
            raise TypeError(f"stop must be several str, got the str {stop!r:.60}; write ({stop!r:.60},)")
        self.stop = tuple(stop)
        if "" in self.stop:
            raise ValueError("stop holds an empty str, which would end every text at once; leave it out")
        self._detokenizer = _Detokenizer(text_format, prompt_ids)
        self._pieces: list[str] = []
        self._held = ""  # certain text that may be the beginning of a stop string
        self._stopped: str | None = None
        self._ended = False

    @property
    def text(self) -> str:
        """All that was returned so far."""
        return "".join(self._pieces)

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text; None if there was none yet."""
        return self._stopped

    def push(self, token_id: int) -> str:
        """Takes the next token; returns new text, often none.

        Raises:
            ValueError: the text has ended.
        """
        if self._ended:
            raise ValueError(f"token {token_id} comes after the end of the text; begin another TextStream")
        return self._out(self._detokenizer.push(token_id))

    def finish(self) -> str:
        """Ends the text; returns what was held back, which may still hold a stop string.

        A second call returns nothing.
        """
        if self._ended:
            return ""
        text = self._out(self._detokenizer.rest())
        if not self._ended:
            text += self._held
            self._pieces.append(self._held)
            self._ended = True
        self._held = ""
        return text

    def _out(self, text: str) -> str:
        if not text:
            return ""
        if self.stop:
            text = self._held + text
            found = _first_stop(text, self.stop)
            if found is not None:
                start, self._stopped = found
                self._ended = True
                self._held = ""
                text = text[:start]
            else:
                begun = _begun_stop(text, self.stop)
                self._held = text[len(text) - begun :]
                text = text[: len(text) - begun]
        self._pieces.append(text)
        return text


class _Detokenizer:
    """Certain text of tokens, decoded a window at a time.

    The window begins and is divided where a character begins: before the division is a segment that is
    kept as context, for decoders that write a token otherwise at the beginning of a text.
    """

    def __init__(self, text_format: TextFormat, prompt_ids: Sequence[int]) -> None:
        self._format = text_format
        self._ids = list(prompt_ids[-_SEGMENT:])
        prompt = text_format.decode(self._ids)
        if not prompt:
            self._ids = []
        self._context = len(self._ids)
        self._sent = len(prompt)  # characters of the window's text that are out
        self._before: str | None = prompt  # the window's text at the last push; None if it was not decoded
        self._patience = 0  # how long the window must grow before the next attempt to divide it

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        if len(self._ids) < self._patience or self._is_byte(token_id):
            # Decoders with a fallback to bytes write a run of byte tokens by what the whole run spells.
            self._before = None
            return ""
        if self._before is None and not self._format.decode([token_id, token_id]):
            self._ids.pop()  # a special token does not end a run of bytes; twice, as one space may be dropped
            return ""
        text = self._format.decode(self._ids)
        complete = not text.endswith(_UNDECODABLE)
        if complete and text and text == self._before:
            self._ids.pop()  # a special token; nothing can come of it
            return ""
        # Bytes at the end that may become a character are one undecodable one until then.
        new = self._new(text if complete else text[:-1])
        self._before = text
        if len(self._ids) - self._context >= _SEGMENT:
            self._divide(text, complete)
        return new

    def rest(self) -> str:
        return self._new(self._format.decode(self._ids))

    def _new(self, certain: str) -> str:
        new = certain[self._sent :]
        self._sent += len(new)
        return new

    def _is_byte(self, token_id: int) -> bool:
        token = self._format.tokenizer.convert_ids_to_tokens(token_id)
        return isinstance(token, str) and _BYTE.fullmatch(token) is not None

    def _divide(self, text: str, complete: bool) -> None:
        """Makes what followed the context the new context, up to where a character begins."""
        size = len(self._ids)
        place = size if complete else self._boundary(text)
        if place is not None:
            old = len(text) if complete else len(self._format.decode(self._ids[:place]))
            context = self._format.decode(self._ids[self._context : place])
            if context:
                self._ids = self._ids[self._context :]
                self._sent += len(context) - old
                self._context = place - self._context
                self._before = None
                self._patience = 0
                return
        # Twice as long each time, so that a text of nothing but such tokens takes linear time.
        self._patience = 2 * size

    def _boundary(self, text: str) -> int | None:
        """A place among the last tokens where a character begins, whatever follows; None if none is seen.

        Decoding both sides apart gives the same as decoding them together only there: a character, or
        the beginning of one, that is cut becomes two undecodable ones at least.
        """
        size = len(self._ids)
        for place in range(size - 1, max(self._context, size - 1 - _LONGEST_CHARACTER), -1):
            right = self._format.decode(self._ids[place:])
            if right and self._format.decode(self._ids[:place]) + right == text:
                return place
        return None


def _first_stop(text: str, stop: tuple[str, ...]) -> tuple[int, str] | None:
    """Where the first stop string in the text begins, and which it is."""
    places = [(place + len(one), place, one) for one in stop if (place := text.find(one)) >= 0]
    if not places:
        return None
    _, start, found = min(places)
    return start, found


def _begun_stop(text: str, stop: tuple[str, ...]) -> int:
    """Characters at the end of the text that may be the beginning of a stop string."""
    longest = min(max(map(len, stop)) - 1, len(text))
    for size in range(longest, 0, -1):
        tail = text[len(text) - size :]
        if any(one.startswith(tail) for one in stop):
            return size
    return 0
