"""Atomic writes of files."""

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

__all__ = ["atomic_write"]

_UNFINISHED = ".unfinished"
_DAY = 24 * 60 * 60


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Write a file completely or not at all: after an error, the previous file is unchanged.

    Args:
        path: The file to write or to replace.

    Yields:
        A path of the same name in a hidden folder beside it, to write to. At the end it is synced to disk and replaces
        the file, with the permissions of a new file; the folder is removed, after an error, too. Folders that killed
        processes left are removed by a later write beside them, when they are a day old.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> with atomic_write(path) as temporary:
        ...     _ = temporary.write_text("all of it")
        >>> path.read_text(), len(list(path.parent.iterdir()))
        ('all of it', 1)
    """
    path = Path(path)
    for left in path.parent.glob(f".*{_UNFINISHED}"):
        with suppress(OSError):  # another process was faster, or it is another user's
            if left.stat().st_mtime < time.time() - _DAY:
                shutil.rmtree(left)
    folder = path.with_name(f".{uuid4().hex}{_UNFINISHED}")
    folder.mkdir()
    temporary = folder / path.name
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        with suppress(PermissionError):  # of a file system without permissions
            temporary.chmod(folder.stat().st_mode & 0o666)  # some libraries' files are for their owner alone
        os.replace(temporary, path)
    finally:
        shutil.rmtree(folder)
