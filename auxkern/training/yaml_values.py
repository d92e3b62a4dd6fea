"""YAML as people write it: ``1e-3`` is a number, and a name that stands twice a mistake."""

from __future__ import annotations

import re
from typing import Any

import yaml  # type: ignore[import-untyped]


class _Loader(yaml.SafeLoader):
    """YAML 1.1 but for numbers with an exponent, which need no point and no sign as in YAML 1.2."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        values: dict[Any, Any] = super().construct_mapping(node, deep)
        if len(values) < len(node.value):
            names = [key.value for key, _ in node.value]
            twice = next((name for i, name in enumerate(names) if name in names[:i]), None)
            if twice is not None:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{twice!r} stands twice; keep one", node.start_mark
                )
        return values


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def parsed_yaml(text: str) -> Any:
    """The value that a YAML document holds.

    Raises:
        ValueError: it is no YAML, or a mapping has a name twice.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error


def written_yaml(values: dict[str, Any]) -> str:
    """The mapping as ``parsed_yaml`` reads it, in its order."""
    text: str = yaml.safe_dump(values, sort_keys=False)
    return text
