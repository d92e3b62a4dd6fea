"""Files that no reader meets half written, and files that one process holds."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes ``content`` beside ``path`` and renames it, so that no reader meets half a file.

    Raises:
        OSError: the folder does not exist or cannot be written.
    """
    if isinstance(content, str):
        content = content.encode()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        # mkstemp makes files that only their owner reads.
        os.chmod(name, path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def lock_file(path: Path) -> int:
    """The file, made if need be, open for appending and locked until it is closed or the process ends.

    Returns:
        its descriptor.

    Raises:
        OSError: it cannot be opened, or its file system has no locks.
        ValueError: another process holds it.
    """
    import fcntl  # POSIX only; all else here imports anywhere

    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # It is worth nothing if another process has put a new file there since it was opened.
        ours = is_open_at(file, path)
    except BlockingIOError:
        ours = False
    except OSError as error:
        os.close(file)
        raise OSError(error.errno, f"cannot be locked ({error.strerror})", str(path)) from error
    if not ours:
        os.close(file)
        raise ValueError(f"another process writes to {path}; wait for it, end it, or name another folder")
    return file


def is_open_at(file: int, path: Path) -> bool:
    """Whether an open file is still the one with that name."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
