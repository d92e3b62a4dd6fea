"""Files that no reader meets half written, and files that one process holds."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def replace_file(path: Path, content: str | bytes) -> None:
    """Writes ``content`` beside ``path`` and renames it, so that no reader meets half a file.

    What is no file, such as a pipe or /dev/stdout, is written to as it is.

    Raises:
        OSError: the folder does not exist or cannot be written, or the disk is full; it names ``path``.
    """
    if isinstance(content, str):
        content = content.encode()
    try:
        if is_descriptor(path) or (path.exists() and not path.is_file()):
            with path.open("ab") as file:
                file.write(content)
        else:
            _replace(path, content)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _replace(path: Path, content: bytes) -> None:
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


def is_descriptor(path: Path) -> bool:
    """Whether a name stands for what a process has open, as /dev/stdout does, whatever that is."""
    folder = os.path.realpath(path.absolute().parent)
    return folder == "/dev" or folder.startswith("/proc/")


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


def write_whole(file: int, content: bytes) -> None:
    """Writes to a descriptor; a disk that fills up takes a part before it refuses.

    Raises:
        OSError: it cannot be written; a part of it may be.
    """
    while content:
        content = content[os.write(file, content) :]


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
