"""The page at /ui as HTTP sees it: its files, what a browser may do with them, who may have them,
and that nothing else notices them. What people see is in `tests/e2e/test_ui.py`."""

import json
import re
import zipfile
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import hatchling.build
import httpx
import pytest
from pydantic import ValidationError

from offramp_service.routes.ui import PATHS
from offramp_service.settings import Settings, parse_command_line

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "service/offramp_service/ui"
FILES = {
    "/ui": "text/html; charset=utf-8",
    "/ui/app.js": "text/javascript; charset=utf-8",
    "/ui/style.css": "text/css; charset=utf-8",
    "/ui/icon.svg": "image/svg+xml",
}
KEY = {"authorization": "Bearer sesame"}

Running = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


@pytest.mark.parametrize(("path", "kind"), FILES.items())
async def test_files_come_with_their_type_and_once_only(
    client: httpx.AsyncClient, path: str, kind: str
) -> None:
    response = await client.get(path)
    assert (response.status_code, response.headers["content-type"]) == (200, kind)
    assert response.headers["cache-control"] == "no-cache"
    tag = response.headers["etag"]
    for known in (tag, f"W/{tag}", f'"other", {tag}', "*"):
        again = await client.get(path, headers={"if-none-match": known})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag), known
    other = await client.get(path, headers={"if-none-match": '"other"'})
    assert other.content == response.content
    assert (await client.head(path)).headers["etag"] == tag
    assert (await client.post(path)).status_code == 405


@pytest.mark.parametrize("path", FILES)
async def test_a_browser_may_do_little_with_them(client: httpx.AsyncClient, path: str) -> None:
    headers = (await client.get(path)).headers
    allowed = dict(
        part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";")
    )
    assert allowed.pop("require-trusted-types-for") == "'script'"
    assert set(allowed.values()) == {"'none'", "'self'"}
    assert {name for name, who in allowed.items() if who == "'self'"} == {
        *("script-src", "style-src", "img-src", "connect-src")
    }
    assert allowed["default-src"] == allowed["frame-ancestors"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


def test_nothing_is_inline_or_from_elsewhere() -> None:
    """The policy would stop it; a page that runs into its own policy is broken."""
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    named = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert {f"/{one}" for one in named} - {"/docs"} == set(FILES) - {"/ui"}
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]*\ssrc=)", page)
    for name in ("index.html", "app.js", "style.css"):
        content = (FOLDER / name).read_text(encoding="utf-8")
        elsewhere = re.findall(r"\b(?:https?:)?//[\w.-]+\.\w[^\s\"')]*", content)
        assert set(elsewhere) <= {"http://www.w3.org/2000/svg"}, name
    script = (FOLDER / "app.js").read_text(encoding="utf-8")
    kept = "localStorage|sessionStorage|indexedDB|document.cookie|console.|innerHTML|insertAdjacent"
    assert not re.search(kept.replace(".", r"\."), script)


async def test_the_page_with_a_slash_is_the_page(client: httpx.AsyncClient) -> None:
    response = await client.get("/ui/")
    # Relative, so that it is right behind any proxy.
    assert (response.status_code, response.headers["location"]) == (308, "../ui")


async def test_it_can_be_left_out(running: Running) -> None:
    assert parse_command_line(["--model-id", "x"]).ui
    off = parse_command_line(["--model-id", "x", "--no-ui"]).ui
    async with running(ui=off) as client:
        for path in (*PATHS, "/ui/exits"):
            response = await client.get(path)
            assert (response.status_code, response.headers["content-type"]) == (
                *(404, "application/json"),
            )
        assert (await client.post("/classify", json={"input": "w1"})).status_code == 200


async def test_the_page_is_open_and_what_it_asks_is_not(running: Running) -> None:
    async with running(api_key="sesame") as client:
        for path in FILES:
            assert (await client.get(path)).status_code == 200
        for path in ("/ui/exits", "/info", "/v1/models", "/ui/app.js/", "/ui/other"):
            assert (await client.get(path)).status_code == 401, path
        assert (await client.get("/ui/exits", headers=KEY)).status_code == 200


async def test_under_a_path_that_a_proxy_keeps_or_takes_away(
    running: Running, tmp_path: Path
) -> None:
    operators = tmp_path / "operators"
    operators.write_text("open\n", encoding="utf-8")
    settings = {"api_key": "sesame", "admin_key_file": operators, "root_path": "/models/tiny"}
    async with running(**settings) as client:
        for prefix in ("", "/models/tiny"):
            for path in FILES:
                assert (await client.get(prefix + path)).status_code == 200
            assert (await client.get(f"{prefix}/readyz")).status_code == 200
            ask = {"url": f"{prefix}/classify", "json": {"input": "w1"}}
            refused = await client.post(**ask)
            assert (refused.status_code, refused.json()["error"]["type"]) == (401, "unauthorized")
            assert (await client.post(**ask, headers=KEY)).status_code == 200
            policy = f"{prefix}/admin/policy"
            assert (await client.get(policy, headers=KEY)).status_code == 401
            operator = {"authorization": "Bearer open"}
            assert (await client.get(policy, headers=operator)).status_code == 200
        assert (await client.get("/models/tinyui")).status_code == 401
        document = (await client.get("/openapi.json", headers=KEY)).json()
        assert document["servers"] == [{"url": "/models/tiny"}]


@pytest.mark.parametrize("wrong", ["models", "/", "/models/", "/a//b", "/a b", "http://a/b"])
def test_a_root_path_is_a_path(wrong: str) -> None:
    with pytest.raises(ValidationError, match="without a / at its end"):
        Settings(model_id="x", root_path=wrong)


async def test_programs_do_not_see_it(client: httpx.AsyncClient) -> None:
    async def series() -> int:
        return sum(b"#" not in line for line in (await client.get("/metrics")).content.split(b"\n"))

    before = await series()
    for path in (*PATHS, "/ui/exits", "/ui/exits?model=other", "/ui/nothing"):
        await client.get(path)
    assert await series() == before
    assert b"/ui" not in (await client.get("/metrics")).content
    assert b"/ui" not in (await client.get("/openapi.json")).content


async def test_how_many_texts_have_left_where(client: httpx.AsyncClient) -> None:
    assert (await client.get("/ui/exits")).json() == {
        "model": "tiny",
        "ready": True,
        "exit_counts": [0, 0, 0, 0],
    }
    counts = [0, 0, 0, 0]
    for speedup in (1.0, 1.5, 3.0):
        texts = [f"w{number}" for number in range(20)]
        asked = {"input": texts, "speedup": speedup, "return_details": True}
        for item in (await client.post("/classify", json=asked)).json()["data"]:
            counts[item["details"]["exit_layer"] - 1] += 1
    response = await client.get("/ui/exits?model=tiny")
    assert response.json()["exit_counts"] == counts
    assert response.headers["cache-control"] == "no-store"
    unknown = await client.get("/ui/exits?model=other")
    assert (unknown.status_code, "'tiny' is" in unknown.json()["error"]["message"]) == (404, True)


async def test_each_of_several_models_says_what_it_is(
    running: Running, support: ModuleType, tmp_path: Path
) -> None:
    other = support.write_tiny_checkpoint(tmp_path / "other", exit_layers=(2, 4))
    async with running(model=(f"other={other}",)) as client:
        default = (await client.get("/info")).json()
        named = (await client.get("/info?model=other")).json()
        assert (default["served_model_name"], default["exit_layers"]) == ("tiny", [1, 2, 3, 4])
        assert (named["served_model_name"], named["exit_layers"]) == ("other", [2, 4])
        assert (await client.get("/info?model=third")).status_code == 404
        await client.post("/classify", json={"input": "w1", "model": "other"})
        found = [
            (await client.get(f"/ui/exits?model={name}")).json()["exit_counts"]
            for name in ("tiny", "other")
        ]
        assert found == [[0, 0, 0, 0], [0, 0, 0, 1]]


async def test_the_curve_is_the_whole_calibration(
    client: httpx.AsyncClient, directory: Path
) -> None:
    calibration = (await client.get("/info")).json()["calibration"]
    tables = json.loads((directory / "offramp.json").read_text(encoding="utf-8"))["calibration"]
    table = next(one for one in tables if one["policy"] == "confidence")
    assert calibration["curve"] == [
        [point["speedup"], point["accuracy"]] for point in table["points"]
    ]
    for named in calibration["points"]:
        assert [named["speedup"], named["accuracy"]] in calibration["curve"]


def test_the_wheel_holds_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    name: Any = hatchling.build.build_wheel(str(tmp_path))
    with zipfile.ZipFile(tmp_path / name) as wheel:
        packed = {one for one in wheel.namelist() if one.startswith("offramp_service/ui/")}
        assert packed == {f"offramp_service/ui/{path.name}" for path in FOLDER.iterdir()}
        assert wheel.read("offramp_service/ui/app.js") == (FOLDER / "app.js").read_bytes()
