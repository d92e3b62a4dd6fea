"""Words of a text, and which of them carry its content. Word lists and endings are English ones."""

from __future__ import annotations

import re
import unicodedata

_WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")

_FUNCTION_WORDS = """
a about above across after again against all along also although am among an and another any anybody
anyone anything are around as at be because been before behind being below beneath beside besides
between beyond both but by can cannot could despite did do does doing done down during each either etc
every everybody everyone everything except few fewer for from had has have having he her here hers
herself him himself his how however i if in inside into is it its itself just least less like many may
me might mine more most much must my myself near neither no nobody none nor not nothing of off on once
one ones only onto or other others our ours ourselves out outside over own past per rather same several
shall she should since so some somebody someone something such than that the their theirs them
themselves then there these they this those though through throughout till to too toward towards under
unless until up upon us very via was we were what whatever when whenever where wherever whether which
while who whoever whom whose why will with within without would yet you your yours yourself yourselves
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())


def split_words(text: str) -> list[str]:
    """The words in order, lower case: letters and digits, joined by single hyphens or apostrophes."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def is_content_word(word: str) -> bool:
    """Whether a lower-case word is none of ``FUNCTION_WORDS``."""
    return word not in FUNCTION_WORDS


def stem(word: str) -> str:
    """A lower-case word without the ending of a plural: the S-stemmer (Harman 1991).

    The first of three rules whose ending matches: -ies, but not -eies or -aies, becomes -y; -es, but not
    -aes, -ees or -oes, becomes -e; -s, but not -us or -ss, goes.
    """
    for ending, but, became in (("ies", ("eies", "aies"), "y"), ("es", ("aes", "ees", "oes"), "e")):
        if word.endswith(ending) and not word.endswith(but):
            return word.removesuffix(ending) + became
    if word.endswith("s") and not word.endswith(("us", "ss")):
        return word.removesuffix("s")
    return word
