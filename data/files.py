"""Files that appear whole, and folders that one process at a time may write."""

import errno
import fcntl
import json
import os
import re
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

LOCK = ".lock"
PARTIAL = re.compile(r".+\.\d+-[0-9a-f]{8}\.partial")  # what `whole_file` writes to
NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # of a file system that has none


class ClaimedError(OSError):
    """Another process writes this folder. One line: which, where, since when, what to do."""


@contextmanager
def whole_file(path: Path, mode: str = "wb") -> Iterator[IO]:
    """A file to write, which gets its name when all of it is on the disk.

    Until then it is of this process alone; after an error nothing is left of it.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with partial.open(mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


class Claim:
    """Holds a folder, which is made if it is not there, for this process alone.

    Until `release`, or the end of the process, however it ends. What `whole_file` was writing there
    when its process was killed is removed. With `new` the folder must not be there: FileExistsError
    if it is. Raises ClaimedError if another process holds it.
    """

    def __init__(self, folder: Path, new: bool = False):
        folder.mkdir(parents=True, exist_ok=not new)
        self.folder, self._path = folder, folder / LOCK
        while not self._take():  # its holder has just released it
            folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():  # of processes that were killed
            if PARTIAL.fullmatch(path.name):
                path.unlink()
        self._file.truncate(0)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        holder = {"process": os.getpid(), "host": socket.gethostname(), "since": since}
        self._file.write(json.dumps(holder))
        self._file.flush()

    def release(self) -> None:
        """Let others have it; a folder in which there is nothing is removed."""
        self._path.unlink(missing_ok=True)
        self._file.close()
        with suppress(OSError):
            self.folder.rmdir()

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *_) -> None:
        self.release()

    def _take(self) -> bool:
        """Lock the file, and see whether it still is the folder's."""
        try:
            self._file = self._path.open("a+")
        except FileNotFoundError:
            return False
        self._lock()
        return self._is_in_place()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ClaimedError(self._refusal()) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            told = f"{self.folder} cannot be locked ({error.strerror}): let one process write it"
            print(told, file=sys.stderr)

    def _is_in_place(self) -> bool:
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
        return False

    def _refusal(self) -> str:
        self._file.seek(0)
        try:
            said = json.load(self._file)
            holder = f"process {said['process']} on {said['host']} since {said['since']}"
        except (ValueError, TypeError, KeyError):  # which has yet to write it
            holder = "another process"
        return f"{self.folder} is being written by {holder}: wait for its end, or give another"
