"""Scenarios: those of the repository are ones, and what is none is told field by field."""

import json
import tomllib
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp_loadtest.http_client import Address
from offramp_loadtest.scenario import (
    Ramp,
    ScenarioError,
    Steps,
    change,
    find,
    make_scenario,
    parse_url,
    read_table,
    scale,
    shipped,
)

SHIPPED = [
    "burst",
    "clients-that-leave",
    "long-texts",
    "mixed-speedups",
    "smoke",
    "soak",
    "steady",
    "step-overload",
]


def table(**changed: Any) -> dict[str, Any]:
    return {
        "name": "mine",
        "arrivals": {"pattern": "poisson", "rate": 10, "seconds": 5},
        "texts": [{"words": {"distribution": "always", "words": 3}}],
        **changed,
    }


def test_all_shipped_scenarios_are_scenarios() -> None:
    assert list(shipped()) == SHIPPED
    for name, path in shipped().items():
        scenario = make_scenario(read_table(path))
        assert scenario.name == name
        assert scenario.description
        if name != "step-overload":  # which has no bound to keep
            assert scenario.slo.model_dump(exclude_none=True)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"speed": 1}, "scenario: unknown: speed; allowed: name, description, seed, warm_up_s"),
        (
            {"arrivals": {"pattern": "poisson", "rate": 1, "seconds": 1, "burst": 2}},
            "arrivals.poisson: unknown: burst; allowed: pattern, rate, seconds",
        ),
        ({"arrivals": {"pattern": "waves"}}, "'constant', 'poisson', 'bursty', 'step'"),
        ({"arrivals": {"pattern": "poisson", "rate": 0, "seconds": 1}}, "rate: 0 given: input "),
        (
            {"arrivals": {"pattern": "poisson", "rate": "9", "seconds": 1}},
            "rate: '9' given: input ",
        ),
        (
            {"arrivals": {"pattern": "step", "steps": [{"rate": 0, "seconds": 1}]}},
            "nothing would be due",
        ),
        ({"arrivals": {"pattern": "step", "steps": []}}, "arrivals.step.steps: list should have"),
        ({"arrivals": {"pattern": "closed", "in_flight": 600, "seconds": 1}}, "in_flight is 600"),
        ({"texts": [{}]}, "texts.0: texts have a file or a table words, one of them"),
        (
            {"texts": [{"words": {"distribution": "uniform", "words": 3}}]},
            "uniform has the fields least, most",
        ),
        (
            {"texts": [{"words": {"distribution": "uniform", "least": 3, "most": 2}}]},
            "least is 3, more than most, 2",
        ),
        (
            {
                "texts": [
                    {"words": {"distribution": "lognormal", "median": 9.0, "p95": 3.0, "most": 9}}
                ]
            },
            "p95 is 3, less than the median, 9",
        ),
        ({"doors": [{"door": "grpc"}]}, "doors.0.door: 'grpc' given: input should be 'vllm'"),
        ({"controls": [{"speedup": 0.5}]}, "controls.0.speedup: 0.5 given"),
        ({"controls": [{}, {}]}, "controls of the same name: default"),
        ({"clients": {"leave_share": 1.5}}, "clients.leave_share: 1.5 given"),
        ({"target": {"urls": ["ftp://a"]}}, "target: 'ftp://a' is no target"),
        ({"target": {"headers": ["a: b\r\nc: d"]}}, "is not NAME: VALUE"),
        ({"slo": {"p99": 5}}, "slo: unknown: p99; allowed: p50_ms"),
        ({"warm_up_s": 5.0}, "warm_up_s is 5, all of the 5 seconds"),
        ({"name": "a b"}, "name: 'a b' given"),
    ],
)
def test_what_is_no_scenario(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ScenarioError) as refused:
        make_scenario(table(**changed))
    assert said in str(refused.value)


def test_every_complaint_is_told_at_once() -> None:
    with pytest.raises(ScenarioError) as refused:
        make_scenario(table(seed=-1, processes=0))
    assert len(str(refused.value).splitlines()) == 2


def test_files_are_seen_from_the_scenarios_own_directory(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        '[arrivals]\npattern = "replay"\nfile = "trace.jsonl"\n'
        '[[texts]]\nfile = "../rows.jsonl"\n[target]\nca_file = "/etc/ca.pem"\n'
    )
    found = read_table(path)
    assert found["name"] == "mine"
    assert found["arrivals"]["file"] == str(tmp_path / "trace.jsonl")
    assert found["texts"][0]["file"] == str(tmp_path.parent / "rows.jsonl")
    assert found["target"]["ca_file"] == "/etc/ca.pem"
    assert make_scenario(found).arrivals.pattern == "replay"


def test_a_scenario_by_name_or_file(tmp_path: Path) -> None:
    assert find("smoke").stem == "smoke"
    mine = tmp_path / "mine.toml"
    mine.touch()
    assert find(str(mine)) == mine
    with pytest.raises(ScenarioError, match="neither a file nor one of burst, "):
        find("nonsense")
    mine.write_text("a = ")
    with pytest.raises(ScenarioError, match=r"mine\.toml: "):
        read_table(mine)


def test_fields_are_changed_by_their_path() -> None:
    changed = table(arrivals={"pattern": "step", "steps": [{"rate": 1.0, "seconds": 1.0}]})
    change(changed, "arrivals.steps.0.rate", 5.0)
    change(changed, "target.model", "clf")
    scenario = make_scenario(changed)
    assert isinstance(scenario.arrivals, Steps)
    assert scenario.arrivals.steps[0].rate == 5.0
    assert scenario.target.model == "clf"
    for key, said in {
        "arrivals.steps.1.rate": "1 is none of 0 to 0",
        "name.first": "name is no table",
        "arrivals.steps.x": "x is none of",
    }.items():
        with pytest.raises(ScenarioError, match=said):
            change(changed, key, 1)


def test_all_rates_are_scaled() -> None:
    changed = table(
        arrivals=tomllib.loads(
            'pattern = "step"\nsteps = [{rate = 1.0, seconds = 2.0}, {rate = 3.0, seconds = 2.0}]'
        )
    )
    scale(changed, 2.0)
    assert [one["rate"] for one in changed["arrivals"]["steps"]] == [2.0, 6.0]
    assert [one["seconds"] for one in changed["arrivals"]["steps"]] == [2.0, 2.0]
    trace = table(arrivals={"pattern": "replay", "file": "x"})
    scale(trace, 3.0)
    assert trace["arrivals"]["speed"] == 3.0
    with pytest.raises(ScenarioError, match="scale is 0"):
        scale(changed, 0)


def test_a_ramp_holds_its_last_rate() -> None:
    ramp = Ramp(pattern="ramp", from_rate=0, to_rate=100, ramp_s=10, hold_s=10, spread="constant")
    due = list(ramp.due(Random(0)))
    assert ramp.seconds == 20
    assert sum(at < 10 for at in due) == pytest.approx(500, abs=1)
    assert sum(at >= 10 for at in due) == pytest.approx(1000, abs=1)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("127.0.0.1:3000", Address("127.0.0.1", 3000)),
        ("http://a.example", Address("a.example", 80)),
        ("https://a.example/clf/", Address("a.example", 443, tls=True, prefix="/clf")),
        ("http://[::1]:9", Address("::1", 9)),
    ],
)
def test_targets(url: str, address: Address) -> None:
    assert parse_url(url) == address
    assert parse_url(str(address)) == address


@given(st.text(max_size=30))
def test_any_target_is_an_address_or_refused(url: str) -> None:
    try:
        address = parse_url(url)
    except ValueError:
        return
    assert address.host
    assert 0 <= address.port < 65536


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
FIELDS = ("name", "arrivals", "texts", "batches", "doors", "controls", "clients", "target", "slo")


@given(st.dictionaries(st.sampled_from(FIELDS), json_values))
def test_any_table_is_a_scenario_or_refused(changed: dict[str, Any]) -> None:
    try:
        scenario = make_scenario(table(**changed))
    except ScenarioError:
        return
    json.dumps(scenario.model_dump())


def test_a_key_comes_from_the_environment_and_stays_there() -> None:
    target = make_scenario(table(target={"api_key_env": "KEY"})).target
    assert target.api_key({"KEY": "secret"}) == "secret"
    with pytest.raises(ScenarioError, match="KEY is not set"):
        target.api_key({})
    assert make_scenario(table()).target.api_key({}) is None
