"""What a reload changes: which settings differ, which of them a running server takes, and what is then in force. Pure.

``reload.py`` asks. A setting that is named in neither list below needs a restart: a new one is promised nothing
until its owner can take it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from opta_lmx.config import Config
from opta_lmx.config_fields import Section
from opta_lmx.config_models import PerModel

_PER_MODEL: Final = "models.per_model"

# Read anew for every request, connection or decision.
AT_ONCE: Final = frozenset(
    {
        "server.request_inactivity_seconds",
        "server.drain_seconds",
        "server.cors_origins",
        "server.allowed_hosts",
        "server.keep_alive_seconds",
        "server.request_head_seconds",
        "server.request_body_seconds",
        "server.max_connections",
        "server.max_body_bytes",
        "models.jit",
        "models.ttl_seconds",
        "models.aliases",
        "models.presets",
        "models.per_model.ID.ttl_seconds",
        "models.per_model.ID.pinned",
        "memory.max_memory_percent",
        "memory.auto_evict_lru",
        "scheduling.max_waiting",
        "workers.stall_seconds",
        "workers.restart_limit",
        "workers.restart_window_seconds",
        "downloads.endpoint",
        "downloads.token_env",
        "downloads.token_file",
        "logging.level",
        "logging.format",
        "logging.file",
        "scheduling.max_running_total",
        "scheduling.max_waiting_total",
        "security.api_keys",
        "security.callers",
        "security.admin_key",
        "security.allow_open_lan",
    }
)

# Told to a worker when it loads its model; one that is loaded keeps what it was told.
AT_NEXT_LOAD: Final = frozenset(
    {
        "models.per_model.ID.context_length",
        "models.per_model.ID.kv_bits",
        "memory.kv_reserve_fraction",
        "scheduling.max_running",
        "scheduling.prefill_chunk_tokens",
        "scheduling.stall_bound_seconds",
        "scheduling.prefix_cache.ram_bytes",
    }
)


@dataclass(frozen=True, slots=True)
class ConfigChanges:
    """The settings that differ, by dotted key in the order of the file, by when they take effect."""

    applied: tuple[str, ...] = ()
    at_next_load: tuple[str, ...] = ()
    restart_required: tuple[str, ...] = ()

    @property
    def updated(self) -> tuple[str, ...]:
        """The sections of which something is in force now or will be at the next load."""
        return tuple(dict.fromkeys(key.partition(".")[0] for key in (*self.applied, *self.at_next_load)))


def compare(old: Config, new: Config) -> ConfigChanges:
    """What differs between the settings in force and those just read."""
    keys = list(_differing(old, new))
    at_once = tuple(key for key in keys if _kind(key) in AT_ONCE)
    at_next_load = tuple(key for key in keys if _kind(key) in AT_NEXT_LOAD)
    return ConfigChanges(at_once, at_next_load, tuple(key for key in keys if key not in {*at_once, *at_next_load}))


def in_force(old: Config, new: Config) -> Config:
    """``new``, but with ``old``'s values where a change needs a restart."""
    config: Config = _take_over(old, new, compare(old, new).restart_required, "")
    return config


def _kind(key: str) -> str:
    """``key`` as the lists above write it: a model's own id gives way to ID."""
    if not key.startswith(f"{_PER_MODEL}."):
        return key
    return f"{_PER_MODEL}.ID.{key.rpartition('.')[2]}"


def _differing(old: Section, new: Section, prefix: str = "") -> Iterator[str]:
    for name in type(new).model_fields:
        key, before, after = f"{prefix}{name}", getattr(old, name), getattr(new, name)
        if isinstance(after, Section):
            yield from _differing(before, after, f"{key}.")
        elif key == _PER_MODEL:
            yield from _differing_models(before, after)
        elif before != after:
            yield key


def _differing_models(old: Mapping[str, PerModel], new: Mapping[str, PerModel]) -> Iterator[str]:
    for model_id in dict.fromkeys((*old, *new)):
        before, after = old.get(model_id, PerModel()), new.get(model_id, PerModel())
        yield from _differing(before, after, f"{_PER_MODEL}.{model_id}.")


def _take_over(old: Any, new: Any, keys: tuple[str, ...], prefix: str) -> Any:
    kept: dict[str, Any] = {}
    for name in type(new).model_fields:
        key = f"{prefix}{name}"
        if key in keys:
            kept[name] = getattr(old, name)
        elif any(wanted.startswith(f"{key}.") for wanted in keys) and isinstance(getattr(new, name), Section):
            kept[name] = _take_over(getattr(old, name), getattr(new, name), keys, f"{key}.")
    return new.model_copy(update=kept)
