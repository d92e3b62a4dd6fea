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
        given = [one for one in parser._actions if not isinstance(one, argparse._HelpAction)]
        places = [str(one.metavar or one.dest) for one in given if not one.option_strings]
        usage = nodes.literal_block(text=" ".join([parser.prog, *places, "[OPTIONS]" * (len(given) > 0)]))
        usage["language"] = "text"
        return [
            *_paragraphs(parser.description),
            usage,
            _options(parser, given),
            *_paragraphs(parser.epilog),
        ]


def _paragraphs(text: str | None) -> list[nodes.Node]:
    """One for what stands between empty lines, and for each line that begins with a sentence."""
    paragraphs: list[str] = []
    for line in (text or "").replace("``", "").splitlines():
        if not line or not paragraphs or paragraphs[-1].endswith((".", ":")):
            paragraphs.append(line)
        else:
            paragraphs[-1] += " " + line
    return [nodes.paragraph(text=one) for one in paragraphs if one]


def _options(parser: argparse.ArgumentParser, actions: Sequence[argparse.Action]) -> nodes.Node:
    formatter = parser._get_formatter()
    items = nodes.definition_list(classes=["options"])
    for action in actions:
        spelled = formatter._format_action_invocation(action)
        text = formatter._expand_help(action) if action.help else ""
        term = nodes.term("", "", nodes.literal(text=spelled))
        said = nodes.definition("", nodes.paragraph(text=text[:1].upper() + text[1:]))
        items += nodes.definition_list_item("", term, said)
    return items


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("command", Command)
    return {"parallel_read_safe": True}
