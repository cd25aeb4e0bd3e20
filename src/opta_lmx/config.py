"""Every setting: its name, default and range (written here and nowhere else), and how settings are read.

Later wins: defaults, the YAML file, ``OPTA_LMX__SECTION__KEY``, flags. All is validated once and then frozen; a
reload builds a new Config. Each room is given its own section. Sizes are bytes, times seconds.
"""

import re
from collections.abc import Mapping
from difflib import get_close_matches
from fractions import Fraction
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError, ValidationInfo
from pydantic import model_validator as validate_model
from pydantic_core import PydanticCustomError

from opta_lmx.config_sources import ConfigError, KeyPath, Origin, Sources

__all__ = ["Config", "ConfigError", "find_config", "load_config"]

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?) ?(?:([KMGT])(I?)B|B)?", re.ASCII | re.IGNORECASE)

_REASONS: Final = {
    "missing": "is missing",
    "model_type": "should be a mapping of keys to values",
    "dict_type": "should be a mapping of keys to values",
    "tuple_type": "should be a list",
    "string_type": "should be text; put it in quotes",
}


def _parse_bytes(value: object) -> object:
    """An int from 10485760, "10MiB" or "1.5 GB"; "auto" passes, for the keys that take it."""
    if isinstance(value, str) and value != "auto":
        match = _SIZE.fullmatch(value.strip())
        if match is None:
            raise ValueError("should be a size such as 10485760, 10MiB or 1.5GB")
        number, prefix, binary = match.groups()
        power = " KMGT".index(prefix.upper()) if prefix else 0
        return int(Fraction(number) * (1024 if binary else 1000) ** power)
    if isinstance(value, bool | float) or (isinstance(value, int) and value < 0):
        raise ValueError("should be a whole number of bytes, 0 or more")
    return value


def _resolve_key(value: object, info: ValidationInfo) -> object:
    """The key itself, or what ``env:NAME`` or ``file:PATH`` holds; no error of it shows a key."""
    if not isinstance(value, str):
        return value
    key = value
    kind, _, name = value.partition(":")
    if kind == "env":
        environ = (info.context or {}).get("environ", {})
        if name not in environ:
            raise ValueError(f"the environment variable {name} is not set")
        key = environ[name]
    elif kind == "file":
        try:
            key = Path(name).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise ValueError(f"the file {name} cannot be read: {reason}") from None
    # What an HTTP header carries unchanged. A row of asterisks is how a key is shown, and so no secret.
    if not re.fullmatch(r"(?!\*+$)[!-~]+", key):
        raise ValueError("should be printable ASCII characters without spaces, and not asterisks alone")
    return SecretStr(key)


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


def _expand(path: str | None) -> Path | None:
    return None if path is None else Path(path).expanduser()


Bytes: TypeAlias = Annotated[int, BeforeValidator(_parse_bytes)]
BytesOrAuto: TypeAlias = Annotated[int | Literal["auto"], BeforeValidator(_parse_bytes)]
Key: TypeAlias = Annotated[SecretStr, BeforeValidator(_resolve_key)]
Level: TypeAlias = Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], BeforeValidator(_upper)]
Words: TypeAlias = Annotated[tuple[str, ...], Field(strict=False)]


class Section(BaseModel):
    """A frozen group of settings. Nothing is guessed: "80" is no number, 1 no truth value, a typo no setting."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    @validate_model(mode="before")
    @classmethod
    def _check_names(cls, data: Any) -> Any:
        # A section whose keys are all commented out reads as null.
        if data is None:
            return {}
        for name in data if isinstance(data, dict) else ():
            if name not in cls.model_fields:
                near = get_close_matches(str(name), cls.model_fields, n=1)
                hint = f"the nearest is {near[0]!r}" if near else f"known here: {', '.join(cls.model_fields)}"
                raise PydanticCustomError("unknown_key", "unknown key; {hint}", {"name": str(name), "hint": hint})
        return data


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


class PresetSampling(Section):
    """Sampling a preset sets; a request's own values win."""

    temperature: float | None = Field(
        default=None, ge=0, le=2, description="Randomness; 0 always takes the likeliest token."
    )
    top_p: float | None = Field(default=None, gt=0, le=1, description="Share of the probability mass to sample from.")
    top_k: int | None = Field(default=None, ge=0, description="Number of likeliest tokens to sample from; 0 is all.")
    min_p: float | None = Field(
        default=None, ge=0, le=1, description="Lowest probability, relative to the likeliest token."
    )
    frequency_penalty: float | None = Field(
        default=None, ge=-2, le=2, description="Penalty that grows with each repetition."
    )
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, description="Penalty for any token already used.")
    repetition_penalty: float | None = Field(
        default=None, gt=0, description="Divisor for tokens already seen; 1 is none."
    )
    max_tokens: int | None = Field(default=None, ge=1, description="Most tokens of an answer.")
    seed: int | None = Field(default=None, ge=0, description="Seed of the random choices.")
    stop: Words | None = Field(default=None, description="Texts that end an answer.")


class Preset(Section):
    """A name that stands for a model and how to ask it."""

    model: str = Field(description="Id or alias of the model.")
    system_prompt: str | None = Field(default=None, description="System message for conversations that bring none.")
    sampling: PresetSampling = Field(
        default=PresetSampling(), description="Sampling values for requests that bring none."
    )
    template_kwargs: Mapping[str, Any] = Field(default={}, description="Variables for the model's chat template.")
    context_length: int | None = Field(
        default=None, ge=1, description="Most tokens of prompt and answer; null: the model's."
    )


class PerModel(Section):
    """What differs for one model id."""

    ttl_seconds: float | None = Field(
        default=None, gt=0, description="Idle seconds before unloading; null: models.ttl_seconds."
    )
    context_length: int | None = Field(
        default=None, ge=1, description="Most tokens of prompt and answer; null: the model's."
    )
    kv_bits: Literal[4, 8] | None = Field(
        default=None, description="Bits of a KV cache value, 4 or 8; null: not quantised."
    )
    pinned: bool = Field(default=False, description="Never evict this model and never let it expire.")


class ModelsConfig(Section):
    """Which models there are, what they are called, and how long they stay loaded."""

    models_directory: str = Field(default="~/.opta-lmx/models", description="Directory of the models on disk.")
    default_model: str = Field(
        default="smollm2-135m-instruct",
        description="Model id made ready for its first load at the start, and watched by /admin/health.",
    )
    starter: bool = Field(default=True, description="Offer the small model that comes with the installation.")
    auto_load: Words = Field(default=(), description="Model ids loaded when the server starts.")
    jit: bool = Field(default=True, description="Load a model when a request names it; false: only through /admin.")
    ttl_seconds: float | None = Field(
        default=3600, gt=0, description="Idle seconds before a model is unloaded; null: never."
    )
    spare_worker: bool = Field(default=True, description="Keep one worker process started ahead of the next load.")
    aliases: Mapping[str, str] = Field(default={}, description="Other names for models: name or glob to model id.")
    presets: Mapping[str, Preset] = Field(default={}, description="Names for a model with prompt and sampling.")
    per_model: Mapping[str, PerModel] = Field(default={}, description="Settings of single models, by model id.")

    @property
    def directory(self) -> Path:
        """``models_directory`` with ``~`` expanded."""
        return Path(self.models_directory).expanduser()


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
        return _expand(self.ssd_directory)


class SchedulingConfig(Section):
    """How requests share one model."""

    max_running: int = Field(default=32, ge=1, le=1024, description="Most sequences in one model's batch.")
    max_waiting: int = Field(default=256, ge=0, description="Most requests that wait for one model; more are refused.")
    prefill_chunk_tokens: int = Field(
        default=512, ge=16, le=65536, description="Most prompt tokens processed in one step."
    )
    stall_bound_seconds: float = Field(
        default=0.25, gt=0, description="Seconds that prefill may hold up running streams; chunks shrink to keep it."
    )
    prefix_cache: PrefixCacheConfig = Field(default=PrefixCacheConfig(), description="The prefix cache.")


class DownloadsConfig(Section):
    """Where models come from."""

    endpoint: str | None = Field(
        default=None, pattern=r"^https?://[^@\s]+$", description="URL of the model hub; null: https://huggingface.co."
    )
    token_env: str | None = Field(
        default="HF_TOKEN", description="Environment variable with the hub's token; null: none."
    )
    max_parallel: int = Field(default=4, ge=1, le=32, description="Most files downloaded at once.")


class LoggingConfig(Section):
    """The log."""

    level: Level = Field(default="INFO", description="Least level written: DEBUG, INFO, WARNING, ERROR or CRITICAL.")
    format: Literal["json", "console"] = Field(
        default="json", description="json: an object a line; console: for reading."
    )
    file: str | None = Field(default=None, description="File to append to; null: standard error.")

    @property
    def path(self) -> Path | None:
        """``file`` with ``~`` expanded."""
        return _expand(self.file)


class SecurityConfig(Section):
    """Who may call. A key is its text, ``env:NAME`` (a variable's value) or ``file:PATH`` (a file's content)."""

    api_keys: Annotated[tuple[Key, ...], Field(strict=False)] = Field(
        default=(), description="Keys for /v1, /api and the SDK socket; none: open."
    )
    admin_key: Key | None = Field(default=None, description="Key for /admin; null: open.")
    allow_open_lan: bool = Field(default=False, description="Let other machines connect although a key is missing.")


class Config(Section):
    """All settings."""

    server: ServerConfig = Field(default=ServerConfig(), description=ServerConfig.__doc__)
    models: ModelsConfig = Field(default=ModelsConfig(), description=ModelsConfig.__doc__)
    memory: MemoryConfig = Field(default=MemoryConfig(), description=MemoryConfig.__doc__)
    scheduling: SchedulingConfig = Field(default=SchedulingConfig(), description=SchedulingConfig.__doc__)
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


def load_config(path: Path | None, *, environ: Mapping[str, str], flags: Mapping[str, object] | None = None) -> Config:
    """The settings of ``path`` (None: no file), ``environ`` and ``flags``, whose keys are dotted ("server.port").

    Raises ConfigError at the first setting that cannot be used.
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
    if reason := _open_door(config):
        raise sources.error(("server", "host"), reason)
    return config


def _first_fault(error: ValidationError) -> tuple[KeyPath, str]:
    """Which setting, and what is wrong with it."""
    details = error.errors(include_url=False, include_input=False)[0]
    path = tuple(str(part) for part in details["loc"] if part != "[key]")
    if details["type"] == "unknown_key":
        path = (*path, details["ctx"]["name"])
    reason = _REASONS.get(details["type"]) or details["msg"].removeprefix("Value error, ").removeprefix("Input ")
    return path, reason


def _open_door(config: Config) -> str | None:
    """Why the server may not listen where it is told to; None if it may."""
    security = config.security
    if config.server.is_loopback or security.allow_open_lan:
        return None
    missing = [] if security.api_keys else ["security.api_keys"]
    missing += [] if security.admin_key else ["security.admin_key"]
    if not missing:
        return None
    return f"other machines could connect without a key: set {' and '.join(missing)}, or security.allow_open_lan: true"
