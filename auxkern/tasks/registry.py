"""The tasks by name, for settings and commands. A task's module is imported when it is asked for."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from auxkern.tasks.task import Task


def _keyword(**options: Any) -> Task:
    from auxkern.tasks.keywords import Keyword

    return Keyword(**options)


def _definition(**options: Any) -> Task:
    from auxkern.tasks.definitions import Definition

    return Definition(**options)


def _length(**options: Any) -> Task:
    from auxkern.tasks.lengths import Length

    return Length(**options)


def _wordnet_keywords() -> Task:
    return _keyword(name="wordnet-keywords", condition_template="{condition}", test_share=0.0)


_TABLE: Mapping[str, Callable[..., Task]] = MappingProxyType(
    {"keyword": _keyword, "definition": _definition, "length": _length, "wordnet-keywords": _wordnet_keywords}
)
TASKS = tuple(_TABLE)


def load_task(name: str, source: str | None = None) -> Task:
    """The task of a name; no data is read yet.

    Args:
        name: one of ``TASKS``. "wordnet-keywords" is "keyword" on WordNet without a test side, so that
            runs with it train on what they always did.
        source: as ``source_from`` takes it; WordNet when None.

    Raises:
        TypeError: source is not a str.
        ValueError: an unknown name or source, or a source for a task that has its own.
    """
    if name not in _TABLE:
        close = difflib.get_close_matches(str(name), TASKS, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(TASKS)}"
        raise ValueError(f"there is no task {name!r}; {remedy}")
    if source is None:
        return _TABLE[name]()
    if name == "wordnet-keywords":
        raise ValueError(f"the task {name} has its own data; take the task keyword for source={source!r}")
    from auxkern.tasks.sources import source_from

    return _TABLE[name](source=source_from(source))
