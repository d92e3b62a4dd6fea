"""Text from tokens that come one by one, and where a stop string ends it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from auxkern.model.text import TextFormat

_UNDECODABLE = "\N{REPLACEMENT CHARACTER}"  # what a tokenizer writes for bytes that are no character
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Tokens; 1 to 16 of them take about as long to decode. A character has 4 bytes at most, and so tokens.
_SEGMENT = 8


class TextStream:
    """The text of a growing sequence of tokens, as far as no later token can change it.

    All that was returned, joined, is ``decode(prompt + tokens)`` without the beginning that is
    ``decode(prompt)``, cut before the first stop string. First is the one that is complete first; among
    several that end together, the longest. So the text does not depend on how characters and stop
    strings are spread over tokens. A special token is no part of the text, but stop strings see it as it is
    spelled: they may name it, hold it, and do not match across it.

    A token costs one decoding of 16 tokens at most, however long the text. Where a vocabulary of words
    falls back to tokens of single bytes, a run of them comes out with the next other token.

    tokenizers' own ``DecodeStream`` knows no stop strings, and holds back all tokens, decoding them
    again and again, while they end in bytes that are no character.

    Args:
        text_format: what decodes.
        stop: strings that end the text; none of them empty.
        prompt_ids: (T) what the tokens follow. Without it a tokenizer that writes a space before each
            word leaves out the first one.

    Attributes:
        stopped: the stop string that ended the text; None if there was none yet.

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
        self._special = text_format.special_tokens if self.stop else {}
        self._pieces: list[str] = []
        # Certain text that may be the beginning of a stop string; special tokens are only seen by them.
        self._held: list[tuple[str, bool]] = []
        self.stopped: str | None = None
        self._ended = False

    @property
    def text(self) -> str:
        """All that was returned so far."""
        return "".join(self._pieces)

    def push(self, token_id: int) -> str:
        """Takes the next token; returns new text, often none.

        Raises:
            ValueError: the text has ended.
        """
        if self._ended:
            raise ValueError(f"token {token_id} comes after the end of the text; begin another TextStream")
        text = self._out(self._detokenizer.push(token_id))
        if token_id not in self._special:
            return text
        spelled, pending = self._special[token_id], self._detokenizer.rest_seen()
        if _first_stop(self._seen() + pending + spelled, self.stop) is not None:
            self._held.append((pending, True))  # no later token can change what a stop string ends
        return text + self._out(spelled, visible=False)

    def finish(self, last_ids: Sequence[int] = ()) -> str:
        """Ends the text; returns what was held back, which may still hold a stop string.

        A second call returns nothing.

        Args:
            last_ids: tokens that come before the end, as if they were pushed. Without stop strings they are
                decoded once.
        """
        text = ""
        if self.stop:
            for token_id in last_ids:
                text += "" if self._ended else self.push(token_id)
            last_ids = ()
        if self._ended:
            return text
        text += self._out(self._detokenizer.rest(last_ids))
        if not self._ended:
            text += self._released(sum(len(part) for part, _ in self._held))
            self._ended = True
        self._held = []
        return text

    def _seen(self) -> str:
        return "".join(part for part, _ in self._held)

    def _out(self, text: str, visible: bool = True) -> str:
        if not text:
            return ""
        self._held.append((text, visible))
        seen = self._seen()
        stop = _first_stop(seen, self.stop)
        if stop is None:
            return self._released(len(seen) - _begun_stop(seen, self.stop))
        start, self.stopped = stop
        self._ended = True
        return self._released(start)

    def _released(self, count: int) -> str:
        """Gives out the first characters of what is held, without special tokens."""
        pieces = []
        while count and self._held:
            part, visible = self._held[0]
            if visible:
                pieces.append(part[:count])
            if len(part) > count:
                self._held[0] = (part[count:], visible)
                break
            count -= len(part)
            del self._held[0]
        text = "".join(pieces)
        self._pieces.append(text)
        return text


class _Detokenizer:
    """Certain text of tokens, decoded in a window: a segment that is out, and what follows it.

    The segment is there for decoders that write a token otherwise at the beginning of a text, and because
    it may itself begin inside a character: that garbles its first characters, never its last ones.
    """

    def __init__(self, text_format: TextFormat, prompt_ids: Sequence[int]) -> None:
        self._format = text_format
        self._ids = list(prompt_ids[-_SEGMENT:])
        self._text: str | None = text_format.decode(self._ids)  # of the window; None if not decoded
        if not self._text:
            self._ids = []
        self._out = len(self._ids)  # tokens of the segment
        self._sent = len(self._text or "")  # characters of the window that are out

    def push(self, token_id: int) -> str:
        self._ids.append(token_id)
        token = self._format.tokenizer.convert_ids_to_tokens(token_id)
        if isinstance(token, str) and _BYTE.fullmatch(token):
            # Decoders with a fallback to bytes write a run of byte tokens by what the whole run spells.
            self._text = None
            return ""
        text = self._format.decode(self._ids)
        # A special token, or none at all, does not even end a run of bytes. Twice, for a decoder may drop
        # the first space of a text.
        if self._text in (None, text) and not self._format.decode([token_id, token_id]):
            self._ids.pop()
            return ""
        # Bytes at the end that may become a character are one undecodable one until then.
        new = self._new(text[:-1] if text.endswith(_UNDECODABLE) else text)
        self._text = text
        if len(self._ids) - self._out >= _SEGMENT:
            self._ids = self._ids[self._out :]
            self._out = len(self._ids)
            self._text = self._format.decode(self._ids)
            self._sent += len(self._text) - len(text)
        return new

    def rest(self, last_ids: Sequence[int] = ()) -> str:
        return self._new(self._format.decode([*self._ids, *last_ids]))

    def rest_seen(self) -> str:
        """What ``rest`` would return now; more may come."""
        return self._format.decode(self._ids)[self._sent :]

    def _new(self, certain: str) -> str:
        new = certain[self._sent :]
        self._sent += len(new)
        return new


def _first_stop(text: str, stop: tuple[str, ...]) -> tuple[int, str] | None:
    """Where the first stop string in the text begins, and which it is."""
    places = [(place + len(one), place, one) for one in stop if (place := text.find(one)) >= 0]
    return min(places)[1:] if places else None


def _begun_stop(text: str, stop: tuple[str, ...]) -> int:
    """Characters at the end of the text that may be the beginning of a stop string."""
    longest = min(max(map(len, stop), default=1) - 1, len(text))
    for size in range(longest, 0, -1):
        tail = text[len(text) - size :]
        if any(one.startswith(tail) for one in stop):
            return size
    return 0
