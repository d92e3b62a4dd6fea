"""The console command ``auxkern``, which is ``python -m auxkern`` too."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "train": ("auxkern.commands.train", "train an auxiliary for a frozen language model"),
    "generate": ("auxkern.commands.generate", "write texts with a trained pair"),
    "evaluate": ("auxkern.commands.evaluate", "nll and perplexity of a pair, its base and its auxiliary"),
    "bench": ("auxkern.bench.__main__", "time the operators against eager, torch.compile and peers"),
    "inspect": ("auxkern.inspect.__main__", "compile every Triton kernel and print what came of it"),
    "env": ("auxkern.env", "print versions, backends and why each was chosen"),
}


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    head, foot = "usage: auxkern COMMAND [OPTIONS]", "auxkern COMMAND --help says more."
    return "\n".join([head, "", *lines, "", foot])


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit status, 2 for an unknown command."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if not arguments or arguments[0] not in COMMANDS:
        if arguments:
            print(f"auxkern: there is no command {arguments[0]!r}\n", file=sys.stderr)
        print(_usage(), file=sys.stderr)
        return 2
    module = importlib.import_module(COMMANDS[arguments[0]][0])
    return int(module.main(arguments[1:]))


if __name__ == "__main__":
    raise SystemExit(main())
