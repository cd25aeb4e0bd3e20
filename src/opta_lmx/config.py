"""Every setting: its name, default and range (written here and nowhere else), and how settings are read.

Later wins: defaults, the YAML file, ``OPTA_LMX__SECTION__KEY``, flags. All is validated once and then frozen; a
reload builds a new Config. Each room is given its own section. Sizes are bytes, times seconds.
"""

from collections.abc import Callable, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator

from opta_lmx.config_fields import Bytes, BytesOrAuto, Key, Level, Name, Section, Words, expand
from opta_lmx.config_models import ModelsConfig
from opta_lmx.config_sources import ConfigError, KeyPath, Origin, Sources

__all__ = ["Config", "ConfigError", "find_config", "load_config", "open_door"]

_REASONS: Final = {
    "missing": "is missing",
    "model_type": "should be a mapping of keys to values",
    "dict_type": "should be a mapping of keys to values",
    "tuple_type": "should be a list",
    "string_type": "should be text; put it in quotes",
}


class ServerConfig(Section):
    """The HTTP listener."""

    host: str = Field(
        default="127.0.0.1", min_length=1, description="Address to listen on; one outside this machine needs keys."
    )
    port: int = Field(default=1234, ge=0, le=65535, description="TCP port; 0 takes any free one.")
    request_inactivity_seconds: float = Field(
        default=300, gt=0, description="Seconds a request may go without a new token before it is ended as failed."
    )
    drain_seconds: float = Field(
        default=30, ge=0, description="Seconds running requests get to end when the server stops."
    )
    cors_origins: Words = Field(default=(), description='Browser origins that may call the API; "*" allows every one.')
    allowed_hosts: Words = Field(
        default=(),
        description="Names the server may be called by besides localhost, 127.0.0.1 and [::1]; a name or a glob.",
    )
    # As nginx's keepalive_timeout: longer than the pools of the usual clients keep an idle connection.
    keep_alive_seconds: float = Field(
        default=75, gt=0, description="Seconds an idle connection is kept open for the next request."
    )
    # The headers of the largest client fit into one packet; who needs ten seconds for them holds a place on purpose.
    request_head_seconds: float = Field(
        default=10, gt=0, description="Seconds a client gets to send a request's headers; then it is cut off."
    )
    # The default body limit, 10 MiB, at 1.4 Mbit/s.
    request_body_seconds: float = Field(
        default=60, gt=0, description="Seconds a client gets to send a request's body; then it gets 408."
    )
    # Each holds a file descriptor; the server raises its own limit of those to what this takes.
    max_connections: int = Field(
        default=1024, ge=1, le=65536, description="Most connections open at once; one more is answered 503."
    )
    # The top leaves room for the rest of a frame to the worker, whose own limit is 256 MiB.
    max_body_bytes: Bytes = Field(
        default=10 * 1024**2, ge=1024, le=128 * 1024**2, description="Bytes of the largest request body taken."
    )
    docs: bool = Field(default=True, description="Serve /docs and /openapi.json.")

    @property
    def is_loopback(self) -> bool:
        """True if only programs on this machine can connect."""
        try:
            return self.host == "localhost" or ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def url(self) -> str:
        """Where a program on this machine reaches the server."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://[{host}]:{self.port}" if ":" in host else f"http://{host}:{self.port}"


class MemoryConfig(Section):
    """The memory cap."""

    max_memory_percent: int = Field(
        default=90, ge=1, le=100, description="Most memory in use after a load, percent of total."
    )
    auto_evict_lru: bool = Field(
        default=True, description="Unload idle models, longest unused first, to make room for a load."
    )
    kv_reserve_fraction: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="Most memory kept for a model's KV cache when it loads, as a fraction of its weights.",
    )

    @property
    def limit_fraction(self) -> float:
        """The cap as a fraction of the machine's memory."""
        return self.max_memory_percent / 100


class PrefixCacheConfig(Section):
    """Reuse of the KV cache of shared prompt beginnings, per model."""

    ram_bytes: BytesOrAuto = Field(
        default="auto", description="Bytes of memory for it; auto: sized to the machine; 0: off."
    )
    ssd_directory: str | None = Field(default=None, description="Directory of its part on disk; null: none.")
    ssd_bytes: Bytes = Field(default=0, ge=0, description="Bytes of disk for it; 0: off.")

    @property
    def ssd_path(self) -> Path | None:
        """``ssd_directory`` with ``~`` expanded."""
        return expand(self.ssd_directory)


class SchedulingConfig(Section):
    """How requests share one model."""

    max_running: int = Field(default=32, ge=1, le=1024, description="Most sequences in one model's batch.")
    max_waiting: int = Field(default=256, ge=0, description="Most requests that wait for one model; more are refused.")
    # Eight models at their default, and about what a thousand connections can be told of without a long wait.
    max_running_total: int = Field(default=256, ge=1, description="Most requests that run, over all models.")
    max_waiting_total: int = Field(default=1024, ge=0, description="Most requests that wait, over all models.")
    prefill_chunk_tokens: int = Field(
        default=512, ge=16, le=65536, description="Most prompt tokens processed in one step."
    )
    stall_bound_seconds: float = Field(
        default=0.25, gt=0, description="Seconds that prefill may hold up running streams; chunks shrink to keep it."
    )
    prefix_cache: PrefixCacheConfig = Field(default=PrefixCacheConfig(), description="The prefix cache.")


class WorkersConfig(Section):
    """The processes that hold the models."""

    # Nothing a worker does in one step takes a tenth of it on a machine that is fit for its model.
    stall_seconds: float = Field(
        default=60, ge=1, description="Seconds a worker with work may make no step before it is replaced."
    )
    restart_limit: int = Field(
        default=5, ge=1, description="Deaths within the window after which a model has failed until it is loaded."
    )
    restart_window_seconds: float = Field(default=300, gt=0, description="Seconds after which a death is forgiven.")


class DownloadsConfig(Section):
    """Where models come from."""

    endpoint: str | None = Field(
        default=None, pattern=r"^https?://[^@\s]+$", description="URL of the model hub; null: https://huggingface.co."
    )
    token_env: str | None = Field(
        default="HF_TOKEN", description="Environment variable with the hub's token; null: none."
    )
    token_file: str | None = Field(
        default=None, description="File with the hub's token, for where the variable is not set; null: none."
    )
    max_parallel: int = Field(default=4, ge=1, le=32, description="Most files downloaded at once.")

    @property
    def token_path(self) -> Path | None:
        """``token_file`` with ``~`` expanded."""
        return expand(self.token_file)


class LoggingConfig(Section):
    """The log."""

    level: Level = Field(default="INFO", description="Least level written: DEBUG, INFO, WARNING, ERROR or CRITICAL.")
    format: Literal["json", "console"] = Field(
        default="json", description="json: an object a line; console: for reading, as a terminal gets it unless set."
    )
    file: str | None = Field(default=None, description="File to append to; null: standard error.")

    @property
    def path(self) -> Path | None:
        """``file`` with ``~`` expanded."""
        return expand(self.file)


class CallerConfig(Section):
    """One program or person with a key of its own."""

    key: Key = Field(description="Its key for /v1, /api and the SDK socket, beside security.api_keys.")
    weight: float = Field(default=1, ge=0.01, le=100, description="Its share beside others' while requests wait.")
    lane: Literal["interactive", "batch"] = Field(
        default="interactive", description="Lane of its requests that name none (x-lmx-lane): interactive or batch."
    )


class SecurityConfig(Section):
    """Who may call. A key is its text, ``env:NAME`` (a variable's value) or ``file:PATH`` (a file's content)."""

    api_keys: Annotated[tuple[Key, ...], Field(strict=False)] = Field(
        default=(), description="Keys for /v1, /api and the SDK socket; none: open."
    )
    admin_key: Key | None = Field(default=None, description="Key for /admin; null: open.")
    callers: Mapping[Name, CallerConfig] = Field(
        default={}, description="Callers with a key, a share and a lane of their own, by the name logs and status show."
    )
    allow_open_lan: bool = Field(default=False, description="Let other machines connect although a key is missing.")

    @field_validator("callers")
    @classmethod
    def _check_each_has_its_own_key(
        cls, callers: Mapping[str, CallerConfig], info: ValidationInfo
    ) -> Mapping[str, CallerConfig]:
        owners = dict.fromkeys(info.data.get("api_keys", ()), "security.api_keys")
        for name, caller in callers.items():
            if caller.key in owners:
                raise ValueError(f"the key of {name!r} is that of {owners[caller.key]} too; give each its own")
            owners[caller.key] = repr(name)
        return callers

    @property
    def inference_keys(self) -> tuple[SecretStr, ...]:
        """Every key that opens the inference API; none: it is open."""
        return (*self.api_keys, *(caller.key for caller in self.callers.values()))


class Config(Section):
    """All settings."""

    server: ServerConfig = Field(default=ServerConfig(), description=ServerConfig.__doc__)
    models: ModelsConfig = Field(default=ModelsConfig(), description=ModelsConfig.__doc__)
    memory: MemoryConfig = Field(default=MemoryConfig(), description=MemoryConfig.__doc__)
    scheduling: SchedulingConfig = Field(default=SchedulingConfig(), description=SchedulingConfig.__doc__)
    workers: WorkersConfig = Field(default=WorkersConfig(), description=WorkersConfig.__doc__)
    downloads: DownloadsConfig = Field(default=DownloadsConfig(), description=DownloadsConfig.__doc__)
    logging: LoggingConfig = Field(default=LoggingConfig(), description=LoggingConfig.__doc__)
    security: SecurityConfig = Field(default=SecurityConfig(), description=SecurityConfig.__doc__)

    def public(self) -> dict[str, Any]:
        """All settings as plain values, fit to be shown: each key is a row of asterisks."""
        return self.model_dump(mode="json")


def find_config(explicit: Path | None, *, environ: Mapping[str, str], home: Path) -> Path | None:
    """The file to read: ``explicit``, else $OPTA_LMX_CONFIG, else ~/.opta-lmx/config.yaml if it exists, else None.

    Raises ConfigError if one that was named does not exist.
    """
    named = environ.get("OPTA_LMX_CONFIG")
    path, source = (explicit, "--config") if explicit or not named else (Path(named), "$OPTA_LMX_CONFIG")
    if path is None:
        usual = home / ".opta-lmx" / "config.yaml"
        return usual if usual.is_file() else None
    path = path.expanduser()
    if not path.is_file():
        raise ConfigError(f"there is no such file (named by {source})", file=str(path))
    return path


def load_config(
    path: Path | None,
    *,
    environ: Mapping[str, str],
    flags: Mapping[str, object] | None = None,
    check: Callable[[Config], None] = lambda config: None,
) -> Config:
    """The settings of ``path`` (None: no file), ``environ`` and ``flags``, whose keys are dotted ("server.port").

    ``check`` knows what this module does not, and raises ConfigError with a key; the place is found here. Raises
    ConfigError at the first setting that cannot be used.
    """
    sources = Sources()
    if path is not None:
        sources.read_file(path)
    sources.read_environ(environ)
    for dotted, value in (flags or {}).items():
        sources.put(tuple(dotted.split(".")), value, Origin("command line"))
    try:
        config = Config.model_validate(sources.values, context={"environ": environ})
    except ValidationError as error:
        # The chain is cut: pydantic's error holds the values, and keys may be among them.
        raise sources.error(*_first_fault(error)) from None
    if reason := open_door(config):
        raise sources.error(("server", "host"), reason)
    try:
        check(config)
    except ConfigError as error:
        # What a user named, such as an alias, may have dots of its own.
        raise sources.error(tuple((error.key or "").split(".", 2)), error.reason) from None
    return config


def _first_fault(error: ValidationError) -> tuple[KeyPath, str]:
    """Which setting, and what is wrong with it."""
    details = error.errors(include_url=False, include_input=False)[0]
    path = tuple(str(part) for part in details["loc"] if part != "[key]")
    if details["type"] == "unknown_key":
        path = (*path, details["ctx"]["name"])
    reason = _REASONS.get(details["type"]) or details["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return path, reason


def open_door(config: Config) -> str | None:
    """Why the server may not listen where it is told to; None if it may."""
    security = config.security
    if config.server.is_loopback or security.allow_open_lan:
        return None
    missing = [] if security.inference_keys else ["security.api_keys"]
    missing += [] if security.admin_key else ["security.admin_key"]
    if not missing:
        return None
    return f"other machines could connect without a key: set {' and '.join(missing)}, or security.allow_open_lan: true"
