"""Download a checkpoint: a tar archive from a URL, checked by its sha256, into a directory.

    fetch.py URL SHA256 DIRECTORY

The archive holds the checkpoint's files, at its root or in one directory. AUTHORIZATION in the
environment is sent as that header. DIRECTORY appears only when everything is right; if it is there
already, nothing is done. It runs in an init container with the standard library alone and knows
nothing of models but the name of a file that each checkpoint has.
"""

import hashlib
import os
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path

MANIFEST = "offramp.json"
PIECE = 1 << 20
SECONDS = 60  # without a byte


def main(url: str, sha256: str, directory: str) -> None:
    target = Path(directory)
    if (target / MANIFEST).exists():
        print(f"{target} is there already")
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    # On the same file system, so that the last step is a renaming.
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        archive, unpacked = Path(scratch, "archive"), Path(scratch, "unpacked")
        download(url, sha256, archive)
        with tarfile.open(archive) as tar:
            tar.extractall(
                unpacked, filter="data"
            )  # nothing outside, no links to there, no devices
        archive.unlink()
        checkpoint(unpacked).rename(target)
    print(f"{target} is complete")


def download(url: str, sha256: str, archive: Path) -> None:
    """The file at `url`, or an end with the reason."""
    request = urllib.request.Request(url, headers={"user-agent": "offramp"})
    if authorization := os.environ.get("AUTHORIZATION", "").strip():
        # Not sent on, should the server lead us elsewhere.
        request.add_unredirected_header("authorization", authorization)
    digest = hashlib.sha256()
    with urllib.request.urlopen(request, timeout=SECONDS) as answer, archive.open("wb") as file:
        while piece := answer.read(PIECE):
            digest.update(piece)
            file.write(piece)
    if digest.hexdigest() != sha256:
        sys.exit(f"{url} has sha256 {digest.hexdigest()}, expected is {sha256}")


def checkpoint(unpacked: Path) -> Path:
    """Where the checkpoint's files are."""
    places = [unpacked, *sorted(path for path in unpacked.iterdir() if path.is_dir())]
    found = [place for place in places if (place / MANIFEST).is_file()]
    if len(found) != 1:
        sys.exit(f"{MANIFEST} must be in the archive once, at its root or one directory below it")
    return found[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
