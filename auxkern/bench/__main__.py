"""``python -m auxkern.bench``: auxkern beside eager PyTorch, ``torch.compile`` and other libraries."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

import torch

from auxkern.bench import session
from auxkern.bench.cases import DTYPES, FILTERS, TEMPERATURE, VOCABULARIES, WIDTHS, select_cases
from auxkern.bench.operators import is_installed
from auxkern.bench.results import Run
from auxkern.bench.runner import NORMAL, OPERATORS, QUICK, backends_for, measure_case
from auxkern.core.terms import MAX_TERMS
from auxkern.terminal import command_parser, device_from, positive

_EPILOG = f"""\
Each implementation is first checked against float64; a wrong one is reported and not timed.
For losses, forward runs without gradients, as in evaluation; forward + backward makes the gradient of the
last term (the auxiliary) only, in freshly allocated memory, as in a training step.
Without --case, --n and --dtype a standard list of cases is run; with any of them, all
combinations, where the default is float32 and, for cross_entropy, gpt2 and 512 rows (8,192 on a
GPU), for linear smollm2 and 1,024 rows (8,192 on a GPU), for sample gpt2 and 64 rows.
--op linear gives heads in place of logits: [Head(h_lm, W_lm), Head(h_aux, W_aux)], gradients for
h_aux and W_aux. A case of it takes a minute or two on a CPU, so it runs only when asked for.
--op sample draws a token for each row at temperature {TEMPERATURE}, with no filter and with each of
{", ".join(list(FILTERS)[1:])}.
Its tokens must be the reference's, those of others such as the filters keep.
--op generate has options of its own: see --op generate --help.
Exit status: 0; 1 if auxkern was wrong or failed; 2 for bad options; 130 after Ctrl-C.
"""


def main(argv: list[str] | None = None) -> int:
    """Measures, prints tables, writes the files; returns the exit status that ``_EPILOG`` tells.

    ``argv`` are the arguments after the program's name; None: those of the process.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    if ["--op", "generate"] in [arguments[i : i + 2] for i in range(len(arguments))]:
        from auxkern.bench import generate

        place = arguments.index("generate")
        return generate.main(arguments[: place - 1] + arguments[place + 1 :])
    parser = _parser()
    options = parser.parse_args(arguments)
    session.check_files(parser, options)
    if "linear" in (options.op or []) and options.terms != 2:
        parser.error(f"--terms {options.terms}: linear is measured with 2 heads; leave --terms out")
    if "sample" in (options.op or []) and not is_installed("transformers"):
        parser.error(
            "--op sample compares with transformers, which is not installed; pip install transformers"
        )
    device = device_from(parser, options.device)
    chosen = {"ops": options.op, "models": options.case, "rows": options.n, "dtypes": options.dtype}
    cases = select_cases(device.type, **chosen, terms=options.terms, quick=options.quick)
    try:
        for dtype in {case.dtype for case in cases}:
            backends_for(device, getattr(torch, dtype), options.backend)
    except (ValueError, RuntimeError) as error:
        parser.error(f"--backend: {error}")
    run = Run(*session.head(parser.prog, argv, device))
    effort = QUICK if options.quick else NORMAL
    jobs: list[session.Job] = [
        (case.title, partial(measure_case, case, device, options.backend, effort)) for case in cases
    ]
    return session.carry_out(run, jobs, options)


def _parser() -> argparse.ArgumentParser:
    about = "auxkern beside eager PyTorch, ``torch.compile`` and other libraries."
    parser = command_parser("python -m auxkern.bench", about, _EPILOG)
    vocabularies = ", ".join(f"{name} {size:,}" for name, size in VOCABULARIES.items())
    widths = ", ".join(f"{name} {lm} + {aux}" for name, (lm, aux) in WIDTHS.items())
    case = (
        f"vocabulary of a model (repeatable): {vocabularies}; with widths of the LM's and the auxiliary's "
        f"head for linear: {widths}"
    )
    terms = "number of terms; of a loss, the last one is trained (default 2; linear always has 2)"

    def repeatable(name: str, words: str, **options: Any) -> None:
        parser.add_argument(name, action="append", help=words, **options)

    repeatable("--op", "operator (repeatable; default: cross_entropy)", choices=tuple(OPERATORS))
    repeatable("--case", case, choices=VOCABULARIES)
    repeatable("--n", "rows (repeatable)", type=positive, metavar="N")
    repeatable("--dtype", "dtype of every term (repeatable)", choices=DTYPES)
    count: dict[str, Any] = {"choices": range(1, MAX_TERMS + 1), "metavar": f"1..{MAX_TERMS}"}
    parser.add_argument("--terms", type=positive, default=2, help=terms, **count)
    session.add_device(parser)
    session.add_effort(parser)
    session.add_files(parser, "case", "bars of time and memory")
    return parser


if __name__ == "__main__":
    sys.exit(main())
