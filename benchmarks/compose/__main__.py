"""``python -m benchmarks.compose``: auxiliaries that were trained apart, composed when texts are written."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from auxkern.training.progress import progress_for
from benchmarks.compose.jobs import STATES, do_job, facts_of, training_jobs, writing_jobs
from benchmarks.compose.presets import PRESETS
from benchmarks.compose.record import KIND, study_record
from benchmarks.keyword.runs import Workplace
from benchmarks.studies import run_study, study_parser, study_status, take_own_threads

_MODULE = "benchmarks.compose"
_ABOUT = "Keyword and length auxiliaries trained apart and composed, beside one that was trained on both."
_EPILOG = """\
The study caches the base's states for the sentences, trains each auxiliary on them, and writes texts for the
same held-out conditions with every mixture. Every job is a process of its own with a log in the output
folder; stopped by Ctrl-C or worse, the same command goes on where it was.
`python -m benchmarks.compose.page FILE.json` makes the page and the pictures.
Exit status: 0; 1 if a job failed (its log says why); 2 for bad options or missing data; 130 after Ctrl-C.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the study, or one job of it.

    Args:
        argv: arguments after the program's name; those of the process when None.

    Returns:
        0; 1 if a job failed; 2 if data is missing; 130 after Ctrl-C. Bad options exit with 2.
    """
    arguments = sys.argv[1:] if argv is None else argv
    parser = study_parser(_MODULE, _ABOUT, _EPILOG, PRESETS, Path("out/compose"))
    options = parser.parse_args(arguments)
    preset = PRESETS[options.preset]

    def work() -> int:
        if options.run is not None:
            take_own_threads()
            place = Workplace.open(preset.keyword, options.output)
            do_job(preset, place, options.run, progress_for())
            return 0
        stages = (((STATES,), False), (training_jobs(preset), True), (writing_jobs(preset), True))
        results = partial(study_record, preset, options.output)
        return run_study(_MODULE, options, arguments, stages, facts_of, KIND, results)

    return study_status(parser.prog, work)


if __name__ == "__main__":
    sys.exit(main())
