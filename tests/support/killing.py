"""Runs that are killed with SIGKILL at random moments and started again until they end by themselves."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

from tests.support.launching import environment

# One process, which imports once, for all runs; each run is a child of it.
_DRIVER = """
    import os, random, signal, sys, time
    from pathlib import Path

    def size(folder):
        return (folder / "out").stat().st_size if (folder / "out").exists() else 0

    def child(folder, order):
        process = os.fork()
        if process:
            return process
        code = 1
        try:
            run(folder, order)
            code = 0
        finally:
            os._exit(code)

    def status(process, *options):
        done, status = os.waitpid(process, *options or (0,))
        return os.waitstatus_to_exitcode(status) if done else None

    once, killed, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    order = random.Random(0)
    assert status(child(once, random.Random(order.random()))) == 0
    for left in reversed(range(kills + 1)):
        process = child(killed, random.Random(order.random()))
        # Some of them before they have written anything, and not always just behind a line.
        until = size(killed) + order.uniform(-0.1, 0.8) * size(once) / kills
        pause, ended = order.uniform(0.0, 0.02), None
        while left and ended is None and size(killed) < until:
            time.sleep(1e-3)
            ended = status(process, os.WNOHANG)
        if left and ended is None:
            time.sleep(pause)
            os.kill(process, signal.SIGKILL)
        ended = status(process) if ended is None else ended
        assert ended in ((0, -signal.SIGKILL) if left else (0,)), (left, ended)
        print(size(killed))
"""


def killed_sizes(run: str, once: Path, killed: Path, kills: int, seconds: float = 300) -> list[int]:
    """Does a run in one folder without a break, and in another with kills and without them at the end.

    Args:
        run: source of ``def run(folder, order)``, which writes ``folder / "out"`` and goes on with it;
            ``order`` is a ``random.Random``.
        once, killed: the folders.
        kills: how often.
        seconds: within which all ends.

    Returns:
        Sizes of the second folder's output after each kill, in bytes; those that were in the middle.
    """
    source = textwrap.dedent(run) + textwrap.dedent(_DRIVER)
    done = subprocess.run(
        [sys.executable, "-c", source, str(once), str(killed), str(kills)],
        env=environment(OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    whole = (once / "out").stat().st_size
    return [size for size in map(int, done.stdout.split()) if 0 < size < whole]
