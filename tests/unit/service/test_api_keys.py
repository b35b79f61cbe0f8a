"""API keys: who is let in, and files of keys that change, break and come back under a clock of our
own."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp_service.api_keys import LARGEST_FILE, KeyFileError, Keyring
from offramp_service.errors import Unauthorized
from offramp_service.gate import bearer

KEYS = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=8)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def lets_in(keys: Keyring, shown: bytes | None) -> bool:
    try:
        keys.check(shown)
    except Unauthorized:
        return False
    return True


@given(st.sets(KEYS, min_size=1, max_size=4), KEYS, st.binary(max_size=8))
def test_exactly_the_keys_are_let_in(
    tmp_path_factory: pytest.TempPathFactory, kept: set[str], own: str, other: bytes
) -> None:
    path = tmp_path_factory.mktemp("keys") / "keys"
    lines = [key for key in kept if not key.startswith("#")]
    path.write_text("\n# comment\n\n" + "\r\n ".join([*lines, "file-" + own]) + "\n")
    keys = Keyring(own, path)
    known = {key.encode() for key in (*lines, own, "file-" + own)}
    assert all(lets_in(keys, key) for key in known)
    assert lets_in(keys, other) == (other in known)
    assert not lets_in(keys, None)
    assert not lets_in(keys, b"")


def test_every_key_is_compared_whichever_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(
        "offramp_service.api_keys.hmac.compare_digest",
        lambda one, other: compared.append(len(one) == len(other) == 32) or one == other,
    )
    path = Path(os.devnull)
    keys = Keyring("first", None)
    keys._in_file = [*keys._own, *keys._own]
    assert lets_in(keys, b"first")
    assert not lets_in(keys, b"a much longer key than the one that is known here")
    assert compared == [True] * 6
    with pytest.raises(KeyFileError, match="not a regular file"):
        Keyring(None, path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "holds no key"),
        (b"\n# only a comment\n", "holds no key"),
        (b"good\nnot good\n", "line 2"),
        (b"good\n\n\xffsecret\n", "line 3"),
        (b"x" * (LARGEST_FILE + 1), "larger than"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(KeyFileError, match=said) as refused:
        Keyring("own", path)
    assert not {"good", "secret"} & set(str(refused.value).split())
    with pytest.raises(KeyFileError, match="No such file"):
        Keyring("own", tmp_path / "nowhere")


def replace(path: Path, content: str) -> None:
    """As careful writers do: another file under the same name."""
    fresh = path.with_suffix(".new")
    fresh.write_text(content)
    fresh.replace(path)


def link(path: Path, content: str) -> None:
    """As Kubernetes does with mounted secrets: a link that leads elsewhere."""
    fresh = path.with_name(f"version-{len(list(path.parent.iterdir()))}")
    fresh.write_text(content)
    path.unlink(missing_ok=True)
    path.symlink_to(fresh)


@pytest.mark.parametrize("write", [Path.write_text, replace, link])
def test_keys_change_within_a_second(
    tmp_path: Path, write: Callable[[Path, str], object], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    path, clock = tmp_path / "keys", Clock()
    path.write_text("old")
    keys = Keyring(None, path, clock=clock)
    write(path, "old\nnewer")
    clock.now = 0.99
    assert not lets_in(keys, b"newer")  # looked at a moment ago
    clock.now = 1.0
    assert lets_in(keys, b"newer")
    assert lets_in(keys, b"old")
    write(path, "newer")
    clock.now = 2.0
    assert not lets_in(keys, b"old")
    assert [one for one in caplog.messages if "newer" in one or "old" in one] == []
    assert len(caplog.messages) == 2


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_text("# none\n")])
def test_a_bad_version_changes_nothing_and_is_told_once(
    tmp_path: Path, spoil: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    path, clock = tmp_path / "keys", Clock()
    path.write_text("old")
    keys = Keyring(None, path, clock=clock)
    spoil(path)
    for second in range(1, 5):
        clock.now = float(second)
        assert lets_in(keys, b"old")
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "the API keys stay as they were" in record.message
    replace(path, "repaired")
    clock.now = 5.0
    assert lets_in(keys, b"repaired")
    assert not lets_in(keys, b"old")


def test_the_file_is_looked_at_once_a_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, clock = tmp_path / "keys", Clock()
    path.write_text("key")
    keys = Keyring(None, path, clock=clock)
    looks = []
    monkeypatch.setattr(
        "offramp_service.api_keys._version_at", lambda _: looks.append(clock.now) or keys._version
    )
    for tick in range(1, 31):
        clock.now = tick / 10
        assert lets_in(keys, b"key")
    assert looks == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(
    ("header", "shown"),
    [
        (b"Bearer abc", b"abc"),
        (b"bEARER  abc ", b"abc"),
        (b"Bearer", b""),
        (b"Basic abc", None),
        (b"Bearerabc", None),
        (b"abc", None),
        (b"", None),
    ],
)
def test_what_a_header_shows(header: bytes, shown: bytes | None) -> None:
    assert bearer([(b"accept", b"*/*"), (b"authorization", header)]) == shown
    assert bearer([(b"accept", b"*/*")]) is None
