"""The monitoring configuration of the stack, hurried: the repository's own files with every
interval and every wait of an alert cut to a second, so that a test need not wait for minutes.

Knows the files' form and nothing about what is watched.
"""

import re
import shutil
from pathlib import Path

DOWN = "OfframpNoReadyReplica"

_EVERY = re.compile(
    r"^(\s*-?\s*)(scrape_interval|scrape_timeout|evaluation_interval|interval|for|keep_firing_for"
    r"|group_wait|group_interval|resolve_timeout|refresh_interval)(\s*:\s*)\S+",
    re.MULTILINE,
)


def hurried(deploy: Path, folder: Path) -> Path:
    """Writes the files and, as the answer, the compose file that puts them in place."""
    folder.mkdir()
    for name in ("prometheus", "alertmanager"):
        shutil.copytree(deploy / name, folder / name)
    for file in folder.rglob("*.yml"):
        file.write_text(_EVERY.sub(r"\g<1>\g<2>\g<3>1s", file.read_text()))
    override = folder / "compose.yml"
    override.write_text(
        "services:\n"
        "  prometheus:\n"
        "    volumes:\n"
        f"      - {folder}/prometheus/prometheus.yml:/etc/prometheus/prometheus.yml:ro\n"
        f"      - {folder}/prometheus/rules:/etc/prometheus/rules:ro\n"
        "  alertmanager:\n"
        "    volumes:\n"
        f"      - {folder}/alertmanager/alertmanager.yml:/etc/alertmanager/alertmanager.yml:ro\n"
    )
    return override
