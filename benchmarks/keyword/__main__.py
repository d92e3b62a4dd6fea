"""``python -m benchmarks.keyword``: auxiliary tuning beside its alternatives, on keywords never seen."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from auxkern.training.progress import progress_for
from benchmarks.keyword.jobs import do_job, facts_of, stages
from benchmarks.keyword.presets import PRESETS
from benchmarks.keyword.record import KIND, study_record
from benchmarks.keyword.runs import Workplace
from benchmarks.studies import run_study, study_parser, study_status, take_own_threads

_MODULE = "benchmarks.keyword"
_ABOUT = "Auxiliary tuning and its alternatives on the keyword task."
_EPILOG = """\
The study caches the base's states, trains each method at several learning rates and then on data sets of
several sizes, with the same sentences in the same order and the same prompt, and scores the weights that
the validation side chooses on a test side. Every run is a process of its own with a log in the output
folder, one for each preset; stopped by Ctrl-C or worse, the same command goes on where it was.
`python -m benchmarks.keyword.page FILE.json` makes the page and the pictures.
Exit status: 0; 1 if a run failed (its log says why); 2 for bad options or missing data; 130 after Ctrl-C.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the study, or one job of it.

    Args:
        argv: arguments after the program's name; those of the process when None.

    Returns:
        0; 1 if a run failed; 2 if data is missing; 130 after Ctrl-C. Bad options exit with 2.
    """
    arguments = sys.argv[1:] if argv is None else argv
    parser = study_parser(_MODULE, _ABOUT, _EPILOG, PRESETS, Path("out/keyword"))
    options = parser.parse_args(arguments)
    preset = PRESETS[options.preset]
    options.output = options.output / preset.name if options.run is None else options.output

    def work() -> int:
        if options.run is not None:
            take_own_threads()
            do_job(Workplace.open(preset, options.output), options.run, progress_for())
            return 0
        results = partial(study_record, preset, options.output)
        return run_study(_MODULE, options, arguments, stages(preset), facts_of, KIND, results)

    return study_status(parser.prog, work)


if __name__ == "__main__":
    sys.exit(main())
