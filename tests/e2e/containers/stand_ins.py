"""Images that stand in for those that the Dockerfile and the compose file name, where there is no
registry: made from Debian packages, under the pinned names, with the entry points, users and
folders of the real ones.

What takes long and never changes (a Debian with Python in it) is kept in a cache folder of the
user's. `PackageSource` leads pip inside a build to where pip on this machine looks, so that the
project's Dockerfile builds as it is. Knows nothing about the project.
"""

import contextlib
import functools
import http.server
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlparse

PROGRAMS = ("/usr/sbin/debootstrap", "/usr/bin/prometheus", "/usr/bin/prometheus-alertmanager")
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "offramp-e2e"
RELEASE = "bookworm"
PACKAGES = "python3,python3-venv,python3-pip,ca-certificates"
CERTIFICATES = Path("/etc/ssl/certs/ca-certificates.crt")

# Of no use in a container; slim images leave them out, too.
_LEFT_OUT = (
    *("usr/share/doc", "usr/share/man", "usr/share/info", "usr/share/locale", "usr/share/lintian"),
    *("var/cache/apt", "var/cache/debconf", "var/lib/apt/lists", "var/log"),
)


def debian_with_python() -> Path:
    """The root file system as an archive, made if it is not in the cache."""
    archive = CACHE / f"{RELEASE}-python3.tar"
    if archive.exists():
        return archive
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as work:
        root, packed = Path(work) / "root", Path(work) / "root.tar"
        # In a mount namespace of its own: what it mounts there is gone when it ends.
        _run(
            *("unshare", "--mount", "debootstrap", "--variant=minbase"),
            *(f"--include={PACKAGES}", RELEASE, str(root), _mirror()),
        )
        for folder in _LEFT_OUT:
            shutil.rmtree(root / folder, ignore_errors=True)
            (root / folder).mkdir(parents=True)
        (root / "var/cache/apt/archives/partial").mkdir(parents=True)
        (root / "usr/bin/python").symlink_to("python3")
        _run(
            "tar",
            "--create",
            "--file",
            str(packed),
            "--directory",
            str(root),
            "--one-file-system",
            ".",
        )
        packed.rename(archive)
    return archive


def _mirror() -> str:
    """Where apt on this machine has that release from."""
    filters = ("Created-By: Packages", f"Release: {RELEASE}")
    found = _run("apt-get", "indextargets", "--format", "$(REPO_URI)", *filters).split()
    if not found:
        raise RuntimeError(f"apt knows no source of Debian {RELEASE}")
    return found[0]


def _run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {(done.stdout + done.stderr)[-3000:]}")
    return done.stdout


def write_base(folder: Path, pip_configuration: str, *, image: str) -> None:
    """What to build the base image from: the root file system, which certificates to trust, and
    where pip looks."""
    folder.mkdir()
    shutil.copy(CERTIFICATES, folder / "ca-certificates.crt")
    (folder / "pip.conf").write_text(pip_configuration)
    (folder / "Dockerfile").write_text(
        f"FROM {image}\n"
        "COPY ca-certificates.crt /etc/ssl/certs/ca-certificates.crt\n"
        "COPY pip.conf /etc/pip.conf\n"
        "ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"
    )


def write_prometheus(folder: Path, *, base: str) -> None:
    """Prometheus as its own image has it: user nobody, data in /prometheus."""
    _write_program(folder, Path("/usr/bin/prometheus"), "prometheus", base=base)


def write_alertmanager(folder: Path, *, base: str) -> None:
    """Alertmanager as its own image has it: user nobody, data in /alertmanager."""
    # Debian keeps the texts of messages beside the program.
    texts = Path("/usr/share/prometheus/alertmanager")
    _write_program(
        folder, Path("/usr/bin/prometheus-alertmanager"), "alertmanager", texts, base=base
    )


def _write_program(folder: Path, program: Path, name: str, *files: Path, base: str) -> None:
    folder.mkdir()
    shutil.copy(program, folder / name)
    lines = [f"FROM {base}", f"COPY {name} /bin/{name}"]
    for number, path in enumerate(files):
        shutil.copytree(path, folder / str(number))
        lines.append(f"COPY {number} {path}")
    lines += [
        f"RUN install -d -o 65534 -g 65534 /{name}",
        "USER 65534",
        f"VOLUME /{name}",
        f"WORKDIR /{name}",
        f'ENTRYPOINT ["/bin/{name}"]',
        f'CMD ["--config.file=/etc/{name}/{name}.yml"]',
    ]
    (folder / "Dockerfile").write_text("\n".join(lines) + "\n")


class PackageSource:
    """pip's configuration on this machine, as a build sees it: what lies in local folders is
    offered over HTTP on loopback (a build shares the machine's network, not its files)."""

    def __init__(self) -> None:
        self._folders: list[Path] = []
        self._server = _FolderServer(self._folders)
        self.configuration = f"[global]\ncert = {CERTIFICATES}\ndisable-pip-version-check = true\n"
        for name, value in _pip_configuration().items():
            if name in ("index-url", "extra-index-url", "find-links", "constraint"):
                places = " ".join(self._reachable(place) for place in value.split())
                self.configuration += f"{name} = {places}\n"

    def _reachable(self, place: str) -> str:
        path = Path(urlparse(place).path)
        if not place.startswith(("file:", "/")) or not path.exists():
            return place
        # Pages of an index point to files beside it.
        folder = path.parent
        if folder not in self._folders:
            self._folders.append(folder)
        slash = "/" if path.is_dir() else ""
        return f"{self._server.address}/{self._folders.index(folder)}/{path.name}{slash}"

    @contextlib.contextmanager
    def offered(self) -> Iterator[None]:
        thread = threading.Thread(target=self._server.serve_forever, name="packages", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


def _pip_configuration() -> dict[str, str]:
    """By name without its section; what is said last counts, as it does for pip."""
    shown = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    pairs = re.findall(r"^[^.]+\.([\w-]+)='(.*)'$", shown.stdout, re.MULTILINE)
    # Several places are shown one a line, as Python shows a line break.
    return {name: value.replace("\\n", " ") for name, value in pairs}


class _FolderServer(http.server.ThreadingHTTPServer):
    """`/0/…` is in the first folder, `/1/…` in the second."""

    daemon_threads = True

    def __init__(self, folders: list[Path]) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(_FromFolders, folders))
        self.address = f"http://127.0.0.1:{self.server_port}"


class _FromFolders(http.server.SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, folders: list[Path], *arguments: object) -> None:
        self._folders = folders
        super().__init__(*arguments)  # type: ignore[arg-type]

    def translate_path(self, path: str) -> str:
        number, _, rest = path.lstrip("/").partition("/")
        if not number.isdigit() or int(number) >= len(self._folders):
            return "/nonexistent"
        self.directory = str(self._folders[int(number)])
        return super().translate_path(f"/{rest}")

    def log_message(self, format: str, *arguments: object) -> None:
        """Builds show what they fetch."""
