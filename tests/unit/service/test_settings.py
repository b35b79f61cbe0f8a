"""Flags, environment, precedence, and settings that contradict one another."""

import socket

import pytest
from pydantic import ValidationError

from offramp_service.__main__ import main
from offramp_service.settings import Settings, parse_command_line, usable_cores


def test_a_flag_wins_over_the_environment_over_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MODEL_ID", "/somewhere/tiny")
    monkeypatch.setenv("PORT", "81")
    monkeypatch.setenv("MAX_BATCH_TOKENS", "512")
    settings = parse_command_line(["--port", "82", "--auto-truncate"])
    assert (settings.port, settings.max_batch_tokens, settings.max_concurrent_requests) == (
        *(82, 512, 512),
    )
    assert settings.auto_truncate
    assert settings.model_name == "tiny"


def test_the_machines_name_is_not_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTNAME", socket.gethostname())
    assert Settings(model_id="x").hostname == "127.0.0.1"
    monkeypatch.setenv("HOSTNAME", "0.0.0.0")
    assert Settings(model_id="x").hostname == "0.0.0.0"
    monkeypatch.setenv("PORT", "")
    assert Settings(model_id="x").port == 3000


@pytest.mark.parametrize(
    "wrong",
    [
        {"port": 70000},
        {"default_speedup": 0.5},
        {"default_speedup": float("nan")},
        {"max_client_batch_size": 600},
        {"max_input_length": 4096},
        {"min_speedup": 3.0, "max_speedup": 2.0},
        {"max_queued_tokens": 0},
        {"shadow_rate": 1.5},
        {"shadow_rate": float("nan")},
        {"group_batches": True},
        {"backlog_merging": True},
        {"slo_p95_ms": 0},
        {"slo_p95_ms": float("inf")},
        {"slo_controller": "enforce"},
        {"slo_controller": "observe"},
        {"slo_p95_ms": 100, "slo_controller": "maybe"},
        {"min_accuracy": 1.01},
        {"min_accuracy": float("nan")},
    ],
)
def test_what_cannot_work_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Settings(model_id="x", **wrong)


def test_a_target_is_enforced_unless_the_operator_says_otherwise() -> None:
    assert Settings(model_id="x").slo_mode == "off"
    assert Settings(model_id="x", slo_controller="off").slo_mode == "off"
    assert Settings(model_id="x", slo_p95_ms=100).slo_mode == "enforce"
    given = parse_command_line(
        ["--model-id", "x", "--slo-p95-ms", "99.5", "--slo-controller", "observe"]
    )
    assert (given.slo_p95_ms, given.slo_mode) == (99.5, "observe")


def test_the_command_names_the_flag(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Signals and logging belong to the test process.
    monkeypatch.setattr("offramp_service.__main__._prepare_process", lambda _: None)
    assert main(["--model-id", "x", "--max-batch-tokens", "many"]) == 2
    assert "offramp-serve: --max-batch-tokens: " in capsys.readouterr().err
    assert main(["--model-id", "/no/such/place", "--log-level", "error"]) == 2
    assert "/no/such/place" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        main(["--no-such-flag"])
    assert error.value.code == 2


def test_threads_default_to_usable_cores() -> None:
    assert Settings(model_id="x").engine_threads == usable_cores() >= 1
    assert Settings(model_id="x", threads=3).engine_threads == 3


def test_a_list_is_repeated_or_has_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    both = ("https://a.example", "http://localhost:8080")
    monkeypatch.setenv("CORS_ALLOW_ORIGIN", "https://a.example, http://localhost:8080,")
    assert parse_command_line(["--model-id", "x"]).cors_allow_origin == both
    flag = "--cors-allow-origin"
    for flags in ([flag, both[0], flag, both[1]], [f"{flag}={','.join(both)}"]):
        assert parse_command_line(["--model-id", "x", *flags]).cors_allow_origin == both
    assert parse_command_line(["--model-id", "x", flag, "*"]).cors_allow_origin == ("*",)


@pytest.mark.parametrize(
    "origin", ["a.example", "https://a.example/", "null", "https://a b", "https://*.a/x"]
)
def test_what_is_no_origin(origin: str) -> None:
    with pytest.raises(ValidationError, match="is no origin"):
        parse_command_line(["--model-id", "x", "--cors-allow-origin", origin])


def test_a_key_is_never_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("API_KEY", "sesame")
    settings = parse_command_line(["--model-id", "x"])
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == "sesame"
    assert "sesame" not in repr(settings) + settings.model_dump_json()
    for wrong in ("open sesame", ""):
        assert main(["--model-id", "x", "--api-key", wrong]) == 2
        said = capsys.readouterr().err
        assert "--api-key: allowed is printable ASCII" in said
        assert "sesame" not in said
    with pytest.raises(ValidationError) as refused:
        parse_command_line(["--model-id", "x", "--api-key", "open sesame"])
    assert "sesame" not in str(refused.value)
