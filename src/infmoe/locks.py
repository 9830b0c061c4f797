"""Files that one process at a time may hold; the lock goes with the process, however it ends."""

import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # no such thing on Windows: nobody is kept off there
    fcntl = None  # type: ignore[assignment]

LOCKS = fcntl is not None


def take_lock(path: Path) -> int | None:
    """The file descriptor that holds the lock until it is closed; None where another process holds it.

    Raises:
        OSError: the file can't be opened, or its filesystem has no locks.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if fcntl is None:
                return descriptor
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_file(descriptor, path):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # whoever held it has removed the file meanwhile: another may lock a new one


def _is_file(descriptor: int, path: Path) -> bool:
    """Whether an open file is still what its path names."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def is_locked(path: Path) -> bool:
    """Whether another process holds the lock; False where there is no such file, or no locks."""
    if fcntl is None or not path.exists():
        return False
    try:
        descriptor = take_lock(path)
    except OSError:
        return False
    if descriptor is not None:
        os.close(descriptor)
    return descriptor is None
