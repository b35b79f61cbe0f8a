"""The API keys that clients may show, and whether one that was shown is among them.

Keys come from a setting, a file, or both. The file is looked at again at most once a second, when
somebody shows a key, so that keys change without a restart: write the new key beside the old one,
move the clients, then remove the old one. A file that cannot be used any more changes nothing.

Only digests are kept, and no message names a key. It knows nothing about HTTP.
"""

import hashlib
import hmac
import logging
import os
import re
import stat
import time
from collections.abc import Callable
from pathlib import Path

from offramp_service.errors import Unauthorized

log = logging.getLogger(__name__)

LOOK_AGAIN_S = 1.0
LARGEST_FILE = 1_000_000  # bytes

_KEY = re.compile(r"[\x21-\x7e]+")  # what fits a header as it is

Version = tuple[int, int, int]
"""Inode, time of change and size of a file: another one is another version of it."""


class KeyFileError(ValueError):
    """A key file that cannot be used. Never names a key."""


class Keyring:
    """The keys in effect: `key`, and those in `path`.

    Raises:
        KeyFileError: the file cannot be read, holds no key, or something that cannot be one.
    """

    def __init__(
        self,
        key: str | None,
        path: Path | None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path, self._clock = path, clock
        self._own = [] if key is None else [_digest(key.encode())]
        self._in_file: list[bytes] = []
        self._version: Version | None = None
        self._looked_at = clock()
        if path is not None:
            self._version, self._in_file = _read(path)

    def check(self, shown: bytes | None) -> None:
        """Let pass who shows a key.

        Raises:
            Unauthorized: none was shown, or one that is not among them.
        """
        self._look_again()
        if shown is None:
            raise Unauthorized("an API key is required, as Authorization: Bearer KEY")
        # All are compared, each in constant time: how long it takes says nothing about any key.
        digest, known = _digest(shown), False
        for one in (*self._own, *self._in_file):
            known |= hmac.compare_digest(one, digest)
        if not known:
            raise Unauthorized("this API key is not valid")

    def _look_again(self) -> None:
        now = self._clock()
        if self._path is None or now - self._looked_at < LOOK_AGAIN_S:
            return
        self._looked_at = now
        version = _version_at(self._path)
        if version == self._version:
            return
        self._version = version  # a bad version is complained about once
        try:
            self._version, self._in_file = _read(self._path)
        except KeyFileError as error:
            log.error("the API keys stay as they were: %s", error)
        else:
            log.info("%d API keys read from %s", len(self._in_file), self._path)


def is_key(text: str) -> bool:
    """Printable ASCII without spaces, so that it can be sent in a header."""
    return _KEY.fullmatch(text) is not None


def _digest(key: bytes) -> bytes:
    """Of one length whatever the key's, and not the key."""
    return hashlib.sha256(key).digest()


def _version_at(path: Path) -> Version | None:
    """None: there is no such file, or none that may be looked at."""
    try:
        return _version(path.stat())
    except OSError:
        return None


def _version(status: os.stat_result) -> Version:
    return status.st_ino, status.st_mtime_ns, status.st_size


def _read(path: Path) -> tuple[Version, list[bytes]]:
    """The file's keys as digests, and the version they are from."""
    try:
        # Without waiting for whoever writes into a pipe, which is refused below.
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as file:
            status = os.fstat(handle)
            content = file.read(LARGEST_FILE + 1) if stat.S_ISREG(status.st_mode) else None
    except OSError as error:
        raise KeyFileError(f"{path}: {error.strerror}") from None
    if content is None:
        raise KeyFileError(f"{path} is not a regular file")
    if len(content) > LARGEST_FILE:
        raise KeyFileError(f"{path} is larger than {LARGEST_FILE} bytes")
    return _version(status), _parse(content, path)


def _parse(content: bytes, path: Path) -> list[bytes]:
    """One key a line; blank lines and those that begin with # are passed over."""
    digests = []
    for number, line in enumerate(content.decode(errors="replace").splitlines(), start=1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        if not is_key(text):
            raise KeyFileError(
                f"{path}, line {number}: allowed is a key of printable ASCII without spaces"
            )
        digests.append(_digest(text.encode()))
    if not digests:
        raise KeyFileError(f"{path} holds no key")
    return digests
