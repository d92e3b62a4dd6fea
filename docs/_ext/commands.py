"""``{command} NAME``: what a command takes, from its parser."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from docutils import nodes
from parsers import parsers
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective


class Command(SphinxDirective):
    """The description, usage, options and epilog of one command's parser."""

    required_arguments = 1
    final_argument_whitespace = True

    def run(self) -> Sequence[nodes.Node]:
        known = dict(parsers())
        if self.arguments[0] not in known:
            raise self.error(f"there is no command {self.arguments[0]!r}; known are {', '.join(known)}")
        parser = known[self.arguments[0]]
        usage = nodes.literal_block(text=parser.format_usage().removeprefix("usage: ").rstrip())
        usage["language"] = "text"
        return [*_paragraphs(parser.description), usage, _options(parser), *_paragraphs(parser.epilog)]


def _paragraphs(text: str | None) -> list[nodes.Node]:
    """A paragraph for what stands between empty lines; a line that begins a sentence begins one, too."""
    paragraphs: list[str] = []
    for line in (text or "").replace("``", "").splitlines():
        if not line or not paragraphs or paragraphs[-1].endswith((".", ":")):
            paragraphs.append(line)
        else:
            paragraphs[-1] += " " + line
    return [nodes.paragraph(text=one) for one in paragraphs if one]


def _options(parser: argparse.ArgumentParser) -> nodes.Node:
    formatter = parser._get_formatter()
    items = nodes.definition_list()
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        spelled = formatter._format_action_invocation(action)
        term = nodes.term("", "", nodes.literal(text=spelled))
        text = formatter._expand_help(action) if action.help else ""
        said = nodes.definition("", nodes.paragraph(text=text[:1].upper() + text[1:]))
        items += nodes.definition_list_item("", term, said)
    return items


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("command", Command)
    return {"parallel_read_safe": True}
