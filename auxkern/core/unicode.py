"""Text that can be written down."""

from __future__ import annotations


def check_unicode(name: str, text: str) -> None:
    """Refuses text that no encoding has: JSON may hold half of a pair of surrogates.

    Raises:
        ValueError: there is one; the message says where.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} has half a character, {text[error.start]!r}, at {error.start}; write the whole one, or "
            "leave it out"
        ) from error
