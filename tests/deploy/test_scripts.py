"""The chart's two scripts, run as its containers run them: the download of a checkpoint, and the
pod of `helm test` (that one against a real server: test_release.py)."""

import hashlib
import io
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from loading import load

kube = load("tests/deploy/kube.py")
FETCH = kube.CHART / "files/fetch.py"


class Store(ThreadingHTTPServer):
    """Hands out `content`, and remembers who asked for what."""

    content = b""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}/models/sst2.tar.gz"


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Store)
        self.server.asked.append((self.path, self.headers.get("authorization")))
        self.send_response(200 if self.path.endswith(".gz") else 404)
        self.send_header("content-length", str(len(self.server.content)))
        self.end_headers()
        self.wfile.write(self.server.content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def store() -> Iterator[Store]:
    with Store() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def archive(**files: str) -> bytes:
    """A tar archive; `__` in a name stands for a slash."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name.replace("__", "/"))
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content.encode()))
    return buffer.getvalue()


def fetch(url: str, sha256: str, target: Path, **environment: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-I", FETCH, url, sha256, target],
        capture_output=True,
        text=True,
        timeout=50,
        env=environment,
    )
    return done.returncode, done.stdout + done.stderr


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("where", ["", "sst2__", ".__"])
def test_a_checkpoint_is_fetched_once(store: Store, tmp_path: Path, where: str) -> None:
    store.content = archive(
        **{f"{where}offramp.json": "{}", f"{where}model.safetensors": "x" * 999}
    )
    target = tmp_path / "fetched" / "sst2"
    code, said = fetch(store.url, sha256(store.content), target, AUTHORIZATION="Bearer sesame\n")
    assert (code, said) == (0, f"{target} is complete\n")
    assert {path.name for path in target.iterdir()} == {"offramp.json", "model.safetensors"}
    assert list(target.parent.iterdir()) == [target]  # no rest of the work
    # The container is started again: nothing to do.
    assert fetch(store.url, sha256(store.content), target) == (0, f"{target} is there already\n")
    assert store.asked == [("/models/sst2.tar.gz", "Bearer sesame")]


def test_what_is_not_right_does_not_appear(store: Store, tmp_path: Path) -> None:
    target = tmp_path / "fetched" / "sst2"
    store.content = archive(**{"offramp.json": "{}"})
    code, said = fetch(store.url, "0" * 64, target)
    assert code != 0
    assert f"has sha256 {sha256(store.content)}, expected is {'0' * 64}" in said
    for content, reason in (
        (archive(readme="hello"), "offramp.json must be in the archive once"),
        (archive(**{"a__offramp.json": "", "b__offramp.json": ""}), "must be in the archive once"),
        (archive(**{"offramp.json": "", "..__evil": "x"}), "outside the destination"),
        (b"no archive", "file could not be opened"),
    ):
        store.content = content
        code, said = fetch(store.url, sha256(content), target)
        assert code != 0
        assert reason in said
    code, said = fetch(store.url + ".missing", "0" * 64, target)
    assert code != 0
    assert "404" in said
    assert list(target.parent.iterdir()) == []
    assert not (tmp_path / "evil").exists()
    assert not (tmp_path / "fetched/evil").exists()
