"""The output file: whole lines, appended one by one, and the only memory of what is done.

Owns the file, its lock and its torn last line. A record is a JSON object with "line" (number of the input line) and
"digest" (of its text), which is how a changed input is told from the one that was begun. A process that is killed at
any moment loses at most the line it was writing, which is cut off and written again.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import orjson

from jaxkv.config import ConfigError


class Journal:
    """Opens ``path`` to go on with it, or creates it. ConfigError if it is no file or holds anything but our
    own records."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the system, however the process ends
        except BlockingIOError:
            os.close(self._fd)
            raise ConfigError(f"output {str(path)!r} is being written by another process") from None
        except OSError as error:
            raise ConfigError(f"output {str(path)!r} cannot be written: {error.strerror}") from None
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):  # reading a pipe would never end
            os.close(self._fd)
            raise ConfigError(f"output {str(path)!r} must be a regular file")
        self.done: dict[int, str] = {}  # number of the input line -> its digest
        self.num_errors = 0
        try:
            self._read()
        except (ConfigError, OSError) as error:
            os.close(self._fd)
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"output {str(path)!r} cannot be read: {error.strerror}") from None

    def check(self, digest_of: Callable[[int], str | None]) -> None:
        """Compares every record with its input line, None where there is none. ConfigError if the input was changed."""
        for number, digest in self.done.items():
            if digest_of(number) != digest:
                raise ConfigError(f"output {str(self._path)!r} was begun with another input: line {number} differs; "
                                  "use another output file")

    def write(self, number: int, digest: str, record: Mapping[str, Any], *, error: bool) -> None:
        """Appends a record; when this returns, the system has it."""
        assert number not in self.done, f"line {number} has a record"
        data = memoryview(orjson.dumps({"line": number, "digest": digest, **record}, option=orjson.OPT_APPEND_NEWLINE))
        while data:
            data = data[os.write(self._fd, data):]
        self.done[number] = digest
        self.num_errors += error

    def close(self) -> None:
        """Waits for the disk and closes the file."""
        os.fsync(self._fd)
        os.close(self._fd)

    def _read(self) -> None:
        whole = 0  # bytes of the lines that end
        with open(self._fd, "rb", closefd=False) as file:
            for row, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                whole += len(line)
                number, digest, failed = self._parse(line, row)
                if number in self.done:
                    raise ConfigError(f"output {str(self._path)!r} holds line {number} twice")
                self.done[number] = digest
                self.num_errors += failed
        os.ftruncate(self._fd, whole)

    def _parse(self, line: bytes, row: int) -> tuple[int, str, bool]:
        try:
            record = orjson.loads(line)
            number, digest = record["line"], record["digest"]
            if type(number) is not int or type(digest) is not str:
                raise TypeError
        except (orjson.JSONDecodeError, KeyError, TypeError):
            raise ConfigError(f"output {str(self._path)!r} exists and its row {row} is no record of this command; "
                              "use another output file") from None
        response = record.get("response") or {}
        return number, digest, bool(record.get("error")) or response.get("status_code", 200) != 200
