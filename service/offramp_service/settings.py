"""Settings of `offramp-serve`: one field per flag, the same name in UPPER_SNAKE in the environment
and in lower case in a YAML file (flag > environment > file > default).

Built by whoever calls `create_app` and passed in; importing this module reads nothing. What a
value means for a given checkpoint (its longest text, its reachable speed-ups) is checked in
`served_model.py`, where the checkpoint is known.
"""

import json
import os
import re
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_origin

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PositiveInt,
    SecretStr,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    InitSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from offramp_service.api_keys import is_key
from offramp_service.config_file import read_config

LogLevel = Literal["debug", "info", "warning", "error"]
SloMode = Literal["off", "observe", "enforce"]

_ENDPOINT = re.compile(r"https?://[^\s/?#@]+(/[^\s?#]*)?")
_NAME = re.compile(r"[\w.-]{1,100}")
_ROOT_PATH = re.compile(r"(/[\w.~-]+)+", re.ASCII)
_ORIGIN = re.compile(r"https?://[a-z0-9.:\[\]-]+")


def _check_key(key: SecretStr) -> SecretStr:
    if not is_key(key.get_secret_value()):
        raise ValueError("allowed is printable ASCII without spaces")
    return key


def _split(given: object) -> object:
    """A list as a flag or the environment carries it: with commas, not as JSON."""
    if isinstance(given, str):
        return [part.strip() for part in given.split(",") if part.strip()]
    return given


def _check_origin(origin: str) -> str:
    if origin != "*" and not _ORIGIN.fullmatch(origin):
        raise ValueError(
            f"{origin!r} is no origin; allowed is scheme://host or scheme://host:port, as browsers "
            "send it, or *"
        )
    return origin


def _check_endpoint(url: str) -> str:
    if not _ENDPOINT.fullmatch(url):
        raise ValueError(
            "allowed is http://host:port or https://host:port, and a path where the collector has "
            "one; credentials go into OTEL_EXPORTER_OTLP_HEADERS"
        )
    return url


def _check_root_path(path: str) -> str:
    if path and not _ROOT_PATH.fullmatch(path):
        raise ValueError(
            f"{path!r}: allowed is a path like /models/intents, without a / at its end"
        )
    return path


Endpoint = Annotated[str, AfterValidator(_check_endpoint)]
Key = Annotated[SecretStr, AfterValidator(_check_key)]
Origin = Annotated[str, AfterValidator(_check_origin)]
RootPath = Annotated[str, AfterValidator(_check_root_path)]


class Settings(BaseSettings):
    """Serve a multi-exit checkpoint over HTTP. (How many replicas a load needs: offramp-serve plan
    --help.)"""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="ignore",
        env_ignore_empty=True,
        cli_prog_name="offramp-serve",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        hide_input_in_errors=True,  # it may be a key
    )

    config: Annotated[
        Path | None,
        Field(description="YAML file with further settings, named as here with _ for -"),
    ] = None

    # model
    model_id: Annotated[Path | None, Field(description="checkpoint directory")] = None
    model: Annotated[
        tuple[str, ...],
        NoDecode,
        BeforeValidator(_split),
        Field(
            description="name=directory of a checkpoint; may be repeated. The first model served "
            "answers those who name none"
        ),
    ] = ()
    served_model_name: Annotated[
        str | None, Field(description="name clients use; default: the directory's name")
    ] = None
    model_version: Annotated[str, Field(description="label in metrics and /info")] = "1"
    backend: Annotated[
        Literal["auto", "torch", "onnx"],
        Field(description="what runs the model; auto: what the checkpoint is for"),
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "int8"],
        Field(description="weights and compute; auto: float32, or that of the ONNX graphs"),
    ] = "auto"
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Field(description="where the model runs; auto: a CUDA device if torch sees one"),
    ] = "auto"
    threads: Annotated[
        PositiveInt | None, Field(description="threads of the engine; default: usable cores")
    ] = None
    engine_workers: Annotated[
        PositiveInt | None,
        Field(
            description="batches computed at a time, among which the threads are shared out; "
            "default: as many as threads on a CPU with up to 4 of them, else 1"
        ),
    ] = None

    # network
    hostname: Annotated[str, Field(description="address to listen on; 0.0.0.0 in containers")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Field(ge=0, le=65535, description="0 picks a free one")] = 3000
    root_path: Annotated[
        RootPath,
        Field(
            description="where a proxy in front has put the service, such as /models/intents; "
            "requests may come with it or without"
        ),
    ] = ""
    prometheus_port: Annotated[
        int,
        Field(
            ge=0,
            le=65535,
            description="serve /metrics here too, where no key is asked for; 0: at --port alone",
        ),
    ] = 0
    payload_limit: Annotated[PositiveInt, Field(description="bytes of a request body")] = 2_000_000
    api_key: Annotated[
        Key | None,
        Field(
            description="what clients must show as Authorization: Bearer KEY; others can read a "
            "command line, so better from the environment"
        ),
    ] = None
    api_key_file: Annotated[
        Path | None,
        Field(description="further keys, one a line; read again when the file changes"),
    ] = None
    http_workers: Annotated[
        PositiveInt,
        Field(
            description="processes that speak HTTP; with more than one, the process with the "
            "engine is another one beside them"
        ),
    ] = 1
    admin_key_file: Annotated[
        Path | None,
        Field(
            description="keys that open /admin/policy, where default speed-up and latency target "
            "are read and changed, and nothing else; default: it is closed"
        ),
    ] = None
    cors_allow_origin: Annotated[
        tuple[Origin, ...],
        NoDecode,
        BeforeValidator(_split),
        Field(
            description="origin whose web pages may read answers in a browser; may be repeated; "
            "default: none"
        ),
    ] = ()

    ui: Annotated[
        bool, Field(description="a page for people at /ui; it is open, what it asks needs a key")
    ] = True

    # limits
    max_batch_tokens: Annotated[
        PositiveInt, Field(description="tokens the engine takes at once, each worker so many")
    ] = 2048
    max_batch_requests: Annotated[
        PositiveInt | None,
        Field(description="texts the engine takes at once; default: the most that it can"),
    ] = None
    max_concurrent_requests: Annotated[
        PositiveInt, Field(description="texts admitted and not yet answered")
    ] = 512
    max_queued_tokens: Annotated[
        PositiveInt, Field(description="tokens waiting for the engine")
    ] = 65_536
    max_queued_characters: Annotated[
        PositiveInt, Field(description="characters of large requests waiting for tokenisation")
    ] = 4_000_000
    max_client_batch_size: Annotated[PositiveInt, Field(description="texts in one request")] = 32
    max_input_length: Annotated[
        PositiveInt | None,
        Field(description="tokens of one text, specials included; default: the checkpoint's"),
    ] = None
    auto_truncate: Annotated[
        bool, Field(description="shorten long texts unless the request says otherwise")
    ] = False
    tokenization_workers: Annotated[
        PositiveInt, Field(description="threads that tokenise large requests")
    ] = 1

    warmup: Annotated[
        bool,
        Field(
            description="measure at start what a layer costs (a second), so that requests that "
            "cannot meet their deadline are refused at once"
        ),
    ] = False
    group_batches: Annotated[
        bool,
        Field(
            description="put texts of like length and depth into one batch, where nobody is made "
            "late; needs --warmup"
        ),
    ] = False
    backlog_merging: Annotated[
        bool,
        Field(
            description="under backlog, let batches wait for each other between layers, where the "
            "measured costs say that it pays; needs --warmup"
        ),
    ] = False

    # exits
    default_speedup: Annotated[
        float, Field(ge=1.0, allow_inf_nan=False, description="for requests that name none")
    ] = 1.0
    min_speedup: Annotated[
        float,
        Field(
            ge=1.0,
            allow_inf_nan=False,
            description="smallest speedup to ask for (threshold and layer bounds stay free)",
        ),
    ] = 1.0
    max_speedup: Annotated[
        float | None,
        Field(
            ge=1.0,
            allow_inf_nan=False,
            description="largest speedup to ask for (threshold and layer bounds stay free); "
            "default: the largest calibrated",
        ),
    ] = None
    exit_policy: Annotated[
        str | None, Field(description="when a text may leave; default: the checkpoint's own")
    ] = None

    # exchange of checkpoints
    load_over_http: Annotated[
        bool,
        Field(description="POST /v2/repository/models/{model}/load opens a checkpoint anew"),
    ] = False
    watch_seconds: Annotated[
        float,
        Field(
            ge=0,
            allow_inf_nan=False,
            description="look so often whether a checkpoint directory holds another one, and load "
            "it; 0: never (SIGHUP always does)",
        ),
    ] = 0.0

    # quality
    shadow_rate: Annotated[
        float,
        Field(
            ge=0.0,
            le=1.0,
            allow_inf_nan=False,
            description="share of the texts that left early which are run again to the end while "
            "nobody waits, to count how often the answers agree",
        ),
    ] = 0.0
    speedup_correction: Annotated[
        bool,
        Field(
            description="where traffic differs from the calibration rows, move the thresholds so "
            "that requested speed-ups are achieved (by 0.8 to 1.25 of them at most)"
        ),
    ] = False

    # latency target
    slo_p95_ms: Annotated[
        float | None,
        Field(
            gt=0,
            allow_inf_nan=False,
            description="95 % of requests are to be answered within; under load speed-ups are "
            "raised for it; default: no target",
        ),
    ] = None
    slo_controller: Annotated[
        SloMode | None,
        Field(
            description="enforce raises speed-ups, observe only reports how far it would; "
            "default: enforce where there is a target"
        ),
    ] = None
    min_accuracy: Annotated[
        float | None,
        Field(
            ge=0,
            le=1,
            allow_inf_nan=False,
            description="calibrated accuracy below which the controller raises nobody",
        ),
    ] = None

    # life cycle
    drain_seconds: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="serve on, unready, after SIGTERM")
    ] = 5.0
    shutdown_timeout: Annotated[
        float, Field(ge=0, allow_inf_nan=False, description="then finish what is in flight")
    ] = 30.0
    request_timeout_ms: Annotated[
        PositiveInt, Field(description="504 for answers that take longer")
    ] = 30_000

    dry_run: Annotated[
        bool,
        Field(description="open the checkpoint, print settings and what would be served, and end"),
    ] = False
    preload_only: Annotated[
        bool,
        Field(description="load, warm up, answer one text, and end; for image builds"),
    ] = False

    # compatibility
    tei_strict: Annotated[
        bool, Field(description="TEI's status codes on /predict where ours differ")
    ] = False

    # observability
    json_output: Annotated[bool, Field(description="log JSON lines")] = False
    log_level: Annotated[LogLevel, Field(description="log this and what is worse")] = "info"
    otlp_endpoint: Annotated[
        Endpoint | None,
        Field(
            description="OpenTelemetry collector to send traces to, over HTTP (port 4318 mostly); "
            "needs the extra otel"
        ),
    ] = None
    otlp_service_name: Annotated[str, Field(description="the service's name in traces")] = "offramp"

    @model_validator(mode="after")
    def _check(self) -> Self:
        """Limits that could never be met together would refuse every request at run time."""
        self._check_models()
        if self.max_client_batch_size > self.max_concurrent_requests:
            raise ValueError(
                f"max_client_batch_size {self.max_client_batch_size} is above "
                f"max_concurrent_requests {self.max_concurrent_requests}"
            )
        if self.max_input_length is not None and self.max_input_length > self.max_batch_tokens:
            raise ValueError(
                f"max_input_length {self.max_input_length} is above "
                f"max_batch_tokens {self.max_batch_tokens}"
            )
        if (self.group_batches or self.backlog_merging) and not self.warmup:
            flag = "group_batches" if self.group_batches else "backlog_merging"
            raise ValueError(f"{flag} goes by the costs that warmup measures, which is off")
        if self.slo_p95_ms is None and self.slo_controller in ("observe", "enforce"):
            raise ValueError(f"slo_controller {self.slo_controller} needs a target, slo_p95_ms")
        if self.max_speedup is not None and self.max_speedup < self.min_speedup:
            raise ValueError(
                f"max_speedup {self.max_speedup} is below min_speedup {self.min_speedup}"
            )
        if (self.engine_workers or 1) > self.engine_threads:
            raise ValueError(
                f"engine_workers {self.engine_workers} leaves some without a thread; allowed is up "
                f"to {self.engine_threads}"
            )
        if self.prometheus_port and self.prometheus_port == self.port:
            raise ValueError(f"prometheus_port {self.prometheus_port} is port; allowed is another")
        if self.dry_run and self.preload_only:
            raise ValueError("dry_run computes nothing, preload_only does; allowed is one of them")
        return self

    def _check_models(self) -> None:
        if self.model_id is None and not self.model:
            raise ValueError("model_id or model is needed: a checkpoint directory")
        if self.served_model_name is not None and self.model_id is None:
            raise ValueError("served_model_name is the name of model_id, which is not given")
        names = [self.model_name] if self.model_id is not None else []
        for one in self.model:
            name, found, directory = one.partition("=")
            if not found or not directory or not _NAME.fullmatch(name):
                raise ValueError(f"model {one!r}: allowed is name=directory")
            names.append(name)
        if len(set(names)) < len(names):
            raise ValueError(f"model names must differ, got {', '.join(names)}")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, _Environment(settings_cls), _ConfigFile(settings_cls)

    @property
    def engine_threads(self) -> int:
        return self.threads if self.threads is not None else usable_cores()

    @property
    def slo_mode(self) -> SloMode:
        """What the controller does: nothing without a target."""
        return "off" if self.slo_p95_ms is None else self.slo_controller or "enforce"

    @property
    def model_name(self) -> str:
        """Of `model_id`."""
        return self.served_model_name or self.directory.resolve().name

    @property
    def directory(self) -> Path:
        """The checkpoint of settings for one model, see `of_model`."""
        assert self.model_id is not None
        return self.model_id

    def with_secrets(self) -> bytes:
        """As JSON from which another process of ours makes the same settings."""
        given = self.model_dump(mode="json", exclude_unset=True, exclude={"config"})
        for name in given:
            if isinstance(value := getattr(self, name), SecretStr):
                given[name] = value.get_secret_value()
        return json.dumps(given).encode()

    def _directories(self) -> dict[str, Path]:
        """By name, the default first."""
        own = {self.model_name: self.model_id} if self.model_id is not None else {}
        pairs = (one.split("=", 1) for one in self.model)
        return own | {name: Path(directory) for name, directory in pairs}

    @property
    def model_names(self) -> tuple[str, ...]:
        """Of all models, the default first."""
        return tuple(self._directories())

    def of_model(self, name: str) -> "Settings":
        """The settings as if that model were the only one."""
        only = {"model_id": self._directories()[name], "served_model_name": name, "model": ()}
        return self.model_copy(update=only)


class _Environment(EnvSettingsSource):
    """The environment, without the HOSTNAME that shells and container runtimes set.

    That one holds the machine's name, not an address to listen on; any other value is a setting.
    """

    def __call__(self) -> dict[str, Any]:
        values = super().__call__()
        if values.get("hostname") == socket.gethostname():
            del values["hostname"]
        return values


class _ConfigFile(InitSettingsSource):
    """The file that `config` names, wherever that comes from: values by name, all at once, as the
    library's own sources of files are."""

    def __init__(self, settings_cls: type[BaseSettings]) -> None:
        super().__init__(settings_cls, {})

    def __call__(self) -> dict[str, Any]:
        path = self.current_state.get("config")
        if path is None:
            return {}
        fields = self.settings_cls.model_fields
        lists = [name for name, one in fields.items() if get_origin(one.annotation) is tuple]
        # A file cannot name another.
        return read_config(Path(path), names=fields.keys() - {"config"}, lists=lists)


def parse_command_line(arguments: Sequence[str]) -> Settings:
    """Settings from flags, environment, file and defaults.

    Raises:
        ConfigFileError: see `read_config`.
        pydantic.ValidationError: a value is wrong or `--model-id` is missing.
        SystemExit: `--help`, or a flag that does not exist.
    """
    return Settings(_cli_settings_source=_flags(arguments))  # type: ignore[call-arg]


def _flags(arguments: Sequence[str]) -> CliSettingsSource[Any]:
    flags: CliSettingsSource[Any] = CliSettingsSource(Settings)
    # What is empty in the environment is left out. On the command line it is a mistake:
    # `--api-key "$UNSET"` must not open the server to everybody.
    flags.env_ignore_empty = False
    return flags(args=list(arguments))


def usable_cores() -> int:
    """Cores this process may use: its affinity, cut to the container's CPU quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        return cores
