"""Jobs as processes of their own, some at a time, each with its share of the cores."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from auxkern.training.progress import duration


def run_all(waiting: Sequence[str], command_of: Callable[[str], list[str]], *, jobs: int, logs: Path) -> bool:
    """Runs all of them, the first ones first; where one fails the others go on.

    Args:
        waiting: names.
        command_of: the command of a name.
        jobs: processes at a time.
        logs: folder for a NAME.log of each, with : as -, which is added to.

    Returns:
        Whether all ended with status 0.

    Raises:
        KeyboardInterrupt: Ctrl-C; every process was told to finish its step and save, and has ended.
    """
    logs.mkdir(parents=True, exist_ok=True)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    # A process that waits must not keep a core from another.
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    left, failed = list(waiting), False
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    try:
        while left or running:
            while left and len(running) < jobs:
                name = left.pop(0)
                with log_of(logs, name).open("ab") as log:
                    # Its own group: a terminal's Ctrl-C is passed on below, once.
                    child = subprocess.Popen(
                        command_of(name), stdout=log, stderr=log, env=environment, start_new_session=True
                    )
                running[name] = (child, time.monotonic())
                print(f"{name}: started", flush=True)
            time.sleep(0.1)
            for name, (child, began) in list(running.items()):
                if child.poll() is None:
                    continue
                del running[name]
                took = duration(time.monotonic() - began)
                if child.returncode == 0:
                    print(f"{name}: done after {took}", flush=True)
                else:
                    failed = True
                    where = log_of(logs, name)
                    print(f"{name}: status {child.returncode} after {took}, see {where}", flush=True)
    except KeyboardInterrupt:
        children = [child for child, _ in running.values()]
        for child in children:
            child.send_signal(signal.SIGTERM)
        for child in children:
            child.wait()
        raise
    return not failed


def log_of(logs: Path, name: str) -> Path:
    """Where what a process prints goes."""
    return logs / f"{name.replace(':', '-')}.log"
