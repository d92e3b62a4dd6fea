"""Cleaning up that Ctrl-C cannot pass by.

Python from 3.12 on runs a list, set or dict comprehension within its function, and no ``try`` around it
covers the jump to its next item: an interrupt there leaves the function without ``except`` and ``finally``.
A generator has a frame of its own, so the ``try`` holds.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "auxkern"


def comprehensions(source: str) -> Iterator[int]:
    """Lines of those within a ``try`` that cleans up after any exception."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Try):
            continue
        caught = [ast.unparse(one.type) if one.type else "BaseException" for one in node.handlers]
        if not node.finalbody and not any("BaseException" in name for name in caught):
            continue
        for statement in node.body:
            for inner in ast.walk(statement):
                if isinstance(inner, (ast.ListComp, ast.SetComp, ast.DictComp)):
                    yield inner.lineno


def test_the_rule():
    body = "try:\n    a = {}\n"
    assert list(comprehensions(body.format("[x for x in y]") + "except BaseException:\n    raise")) == [2]
    assert list(comprehensions(body.format("{x for x in y}") + "finally:\n    b()")) == [2]
    assert not list(comprehensions(body.format("set(x for x in y)") + "except BaseException:\n    raise"))
    assert not list(comprehensions(body.format("[x for x in y]") + "except ValueError:\n    raise"))


def test_no_cleaning_up_is_passed_by():
    found = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in PACKAGE.rglob("*.py")
        for line in comprehensions(path.read_text(encoding="utf-8"))
    ]
    assert found == []
