"""The operator's route: read and changed while it serves, with keys of its own."""

import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from loading import load

_conftest = load("tests/integration/conftest.py")
_fronts = load("tests/integration/test_fronts.py")
_service = load("tests/integration/test_service.py")
serving = _conftest.serving

ADMIN = {"authorization": "Bearer operator"}
CLIENT = {"authorization": "Bearer client"}


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    path = tmp_path / "admin-keys"
    path.write_text("operator\n")
    return path


async def change(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.put("/admin/policy", json=body, headers=ADMIN)


async def exit_layer(client: httpx.AsyncClient, **body: Any) -> tuple[int, str]:
    answer = await client.post("/classify", json={"input": "w1 w2", **body})
    return answer.status_code, answer.headers["x-exit-threshold"]


async def test_it_is_closed_unless_a_file_of_keys_opens_it(directory: Path, keys: Path) -> None:
    async with serving(model_id=directory) as client:
        assert (await client.get("/admin/policy", headers=ADMIN)).status_code == 404
        assert "/admin/policy" not in (await client.get("/openapi.json")).text
    async with serving(model_id=directory, admin_key_file=keys, api_key="client") as client:
        assert (await client.get("/admin/policy")).status_code == 401
        assert (await client.get("/admin/policy", headers=CLIENT)).status_code == 401
        assert (await client.get("/admin/policy", headers=ADMIN)).status_code == 200
        assert (await client.get("/info", headers=ADMIN)).status_code == 401
        assert (await client.get("/info", headers=CLIENT)).status_code == 200
    async with serving(model_id=directory, admin_key_file=keys) as client:
        assert (await client.get("/info")).status_code == 200  # clients need none
        assert (await client.get("/admin/policy")).status_code == 401


async def test_a_change_is_served_at_once_and_shown(directory: Path, keys: Path) -> None:
    async with serving(model_id=directory, admin_key_file=keys) as client:
        assert (await client.get("/admin/policy", headers=ADMIN)).json() == {
            "models": {
                "tiny": {
                    "default_speedup": 1.0,
                    "slo_p95_ms": None,
                    "slo_controller": "off",
                    "speedup_floor": 1.0,
                }
            }
        }
        assert await exit_layer(client) == (200, "inf")
        said = await change(client, default_speedup=2.0, slo_p95_ms=80)
        state = said.json()["models"]["tiny"]
        assert (state["default_speedup"], state["slo_p95_ms"]) == (2.0, 80)
        assert state["slo_controller"] == "enforce"
        assert await exit_layer(client) == await exit_layer(client, speedup=2.0)
        assert await exit_layer(client) != (200, "inf")
        info = (await client.get("/info")).json()
        assert (info["speedup"]["default"], info["slo"]["target_p95_ms"]) == (2.0, 80)
        values = await _service.series(client)
        assert _service.sample(values, "default_speedup") == 2.0
        assert _service.sample(values, "slo_target_seconds") == 0.08
        state = (await change(client, slo_p95_ms=None)).json()["models"]["tiny"]
        assert (state["slo_p95_ms"], state["slo_controller"]) == (None, "off")
        assert state["default_speedup"] == 2.0


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        (b"{", 400, "not JSON"),
        (b"[]", 422, "allowed are model, default_speedup"),
        (b'{"default_speed": 2}', 422, "allowed are model, default_speedup"),
        (b'{"default_speedup": 99}', 422, "default_speedup is 99, allowed is 1 to 4"),
        (b'{"default_speedup": "2"}', 422, "default_speedup"),
        (b'{"slo_p95_ms": 0}', 422, "slo_p95_ms"),
        (b'{"slo_controller": "maybe"}', 422, "slo_controller"),
        (b'{"slo_controller": "enforce"}', 422, "needs a target"),
        (b'{"model": "other", "default_speedup": 2}', 404, "'tiny' is"),
        (b" " * 20_000, 413, "larger than 10000 bytes"),
    ],
)
async def test_what_cannot_be_is_refused_and_changes_nothing(
    directory: Path, keys: Path, body: bytes, code: int, says: str
) -> None:
    async with serving(model_id=directory, admin_key_file=keys) as client:
        before = (await client.get("/admin/policy", headers=ADMIN)).json()
        refused = await client.put("/admin/policy", content=body, headers=ADMIN)
        assert refused.status_code == code
        assert says in refused.json()["error"]["message"]
        assert (await client.get("/admin/policy", headers=ADMIN)).json() == before


async def test_of_several_models_all_change_or_none(
    directory: Path, keys: Path, tmp_path: Path, support: ModuleType
) -> None:
    small = support.write_tiny_checkpoint(tmp_path / "small", exit_layers=(2, 4))
    models = (f"a={directory}", f"b={small}")
    async with serving(model=models, admin_key_file=keys) as client:
        assert (await change(client, default_speedup=3.0)).status_code == 422  # b reaches 2
        state = (await client.get("/admin/policy", headers=ADMIN)).json()["models"]
        assert [state[name]["default_speedup"] for name in "ab"] == [1.0, 1.0]
        await change(client, model="a", default_speedup=3.0)
        state = (await client.get("/admin/policy", headers=ADMIN)).json()["models"]
        assert [state[name]["default_speedup"] for name in "ab"] == [3.0, 1.0]


async def test_it_outlives_an_exchange(directory: Path, keys: Path, tmp_path: Path) -> None:
    shutil.copytree(directory, tmp_path / "tiny")
    how = {"model_id": tmp_path / "tiny", "load_over_http": True, "admin_key_file": keys}
    async with serving(**how) as client:
        await change(client, default_speedup=2.0)
        loaded = await client.post("/v2/repository/models/tiny/load")
        assert loaded.status_code == 200
        assert await exit_layer(client) == await exit_layer(client, speedup=2.0)


async def test_fronts_follow(directory: Path, keys: Path) -> None:
    async with _fronts.fronted(model_id=directory, admin_key_file=keys) as world:
        assert (await world.front.get("/admin/policy")).status_code == 401
        assert (await change(world.front, default_speedup=2.0)).status_code == 200
        world.tell()
        controls = world.end.models.default.controls
        await _service.until(lambda: controls.default_speedup == 2.0)
        assert await exit_layer(world.front) == await exit_layer(world.front, speedup=2.0)
