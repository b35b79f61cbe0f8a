"""Settings from a YAML file: precedence, and refusals that name the line and what was meant."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp_service.__main__ import main
from offramp_service.config_file import ConfigFileError, read_config
from offramp_service.settings import Settings, parse_command_line

NAMES = sorted(Settings.model_fields.keys() - {"config"})


def write(tmp_path: Path, content: str) -> Path:
    path = tmp_path / "offramp.yaml"
    path.write_text(content)
    return path


def test_a_flag_wins_over_the_environment_over_the_file_over_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(
        tmp_path,
        "model_id: /somewhere/tiny\nport: 80\nmax_batch_tokens: 256\nmax_client_batch_size: 7\n"
        "auto_truncate: yes\ndefault_speedup: 1.5\nserved_model_name: 10\nmodel_version: 1.10\n"
        "cors_allow_origin: [https://a.example, 'https://b.example']\n"
        "threads: null\nmax_speedup:\nexit_policy: ''\n",
    )
    monkeypatch.setenv("PORT", "81")
    monkeypatch.setenv("MAX_BATCH_TOKENS", "512")
    settings = parse_command_line(["--config", str(path), "--port", "82"])
    assert (settings.port, settings.max_batch_tokens, settings.max_client_batch_size) == (
        *(82, 512, 7),
    )
    assert (settings.auto_truncate, settings.default_speedup) == (True, 1.5)
    # As they stand there, not as YAML would have them.
    assert (settings.model_name, settings.model_version) == ("10", "1.10")
    assert settings.cors_allow_origin == ("https://a.example", "https://b.example")
    assert (settings.threads, settings.max_speedup, settings.exit_policy) == (None, None, None)
    assert settings.payload_limit == 2_000_000


def test_the_environment_names_the_file_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONFIG", str(write(tmp_path, "model_id: x\nport: 90")))
    assert parse_command_line([]).port == 90
    other = tmp_path / "other.yaml"
    other.write_text("model_id: x\nport: 91")
    assert parse_command_line(["--config", str(other)]).port == 91
    assert Settings(config=other).port == 91


def test_a_file_of_nothing_is_fine(tmp_path: Path) -> None:
    for content in ("", "# only a comment\n", "---\n"):
        assert read_config(write(tmp_path, content), names=NAMES, lists=[]) == {}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("port: 80\nmax_batch_token: 5", r"line 2: .*'max_batch_token'; did you mean max_batch_t"),
        ("max-batch-tokens: 5", "did you mean max_batch_tokens?"),
        ("--Port: 5", "did you mean port?"),
        ("xyzzy: 5", "line 1: there is no setting 'xyzzy'$"),
        ("config: other.yaml", "there is no setting 'config'"),
        ("port: 80\nhostname: x\nport: 81", "line 3: port is there twice"),
        ("port: [80]", "port: allowed is one value"),
        ("engine:\n  id: x", "no setting 'engine'"),
        ("port:\n  number: 80", "line 2: port: allowed is one value"),
        ("cors_allow_origin: [[https://a.example]]", "allowed is a value or a list of values"),
        ("cors_allow_origin: {a: b}", "allowed is a value or a list of values"),
        ("[port]: 80", "there is no setting 'a list or a mapping'"),
        ("- port: 80", "line 1: allowed are lines of the form name: value"),
        ("just words", "line 1: allowed are lines"),
        ("a: 1\n---\nb: 2", "line 2: this is not YAML"),
        ("api_key: [sesame\nport: 1", "this is not YAML"),
        ("[" * 5000, "nested too deeply|not YAML"),
    ],
)
def test_what_no_setting_understands(tmp_path: Path, content: str, said: str) -> None:
    with pytest.raises(ConfigFileError, match=said) as refused:
        read_config(write(tmp_path, content), names=NAMES, lists=["cors_allow_origin"])
    assert "sesame" not in str(refused.value)


def test_nothing_of_the_file_is_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    tag = f"!!python/object/apply:os.mkdir ['{marker}']"
    with pytest.raises(ConfigFileError, match="allowed is one value"):
        read_config(write(tmp_path, f"port: {tag}"), names=NAMES, lists=[])
    assert not marker.exists()


def test_the_command_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "model_id: x\nprot: 80")
    assert main(["--config", str(path)]) == 2
    assert "--config: " in (said := capsys.readouterr().err)
    assert f"{path}, line 2" in said
    assert main(["--config", str(tmp_path / "nowhere")]) == 2
    assert "nowhere: No such file" in capsys.readouterr().err
    path.write_bytes(b"\xff")
    assert main(["--config", str(path)]) == 2
    assert "not UTF-8" in capsys.readouterr().err
    assert main(["--config", str(write(tmp_path, "model_id: x\nport: many"))]) == 2
    assert "--port: " in capsys.readouterr().err


@given(st.sampled_from(NAMES), st.text(st.characters(codec="ascii", categories=["L", "N"])))
def test_a_quoted_value_comes_as_it_stands(
    tmp_path_factory: pytest.TempPathFactory, name: str, value: str
) -> None:
    path = write(tmp_path_factory.mktemp("config"), f"{name}: '{value}'")
    assert read_config(path, names=NAMES, lists=[]) == ({name: value} if value else {})
