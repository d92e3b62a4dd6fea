"""The tasks by name, for settings and commands. A task's module is imported when it is asked for."""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from auxkern.tasks.task import Task

# Module and class of each, and what it has in place of the class's defaults.
_TABLE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "keyword": ("keywords", "Keyword", {}),
    "definition": ("definitions", "Definition", {}),
    "length": ("lengths", "Length", {}),
    "wordnet-keywords": (
        "keywords",
        "Keyword",
        {"name": "wordnet-keywords", "condition_template": "{condition}", "test_share": 0.0},
    ),
}
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
    if source is not None and name == "wordnet-keywords":
        raise ValueError(f"the task {name} has its own data; take the task keyword for source={source!r}")
    from auxkern.tasks.sources import WordNet, source_from

    module, kind, options = _TABLE[name]
    texts = WordNet() if source is None else source_from(source)
    task: Task = getattr(importlib.import_module(f"auxkern.tasks.{module}"), kind)(source=texts, **options)
    return task
