"""Hot reload: read the settings again, check them as a whole, and put them in force in one go, or not at all.

``POST /admin/config/reload`` and SIGHUP ask for it. What takes effect when is ``config_changes.py``'s business; who has
to be told is the caller's (``main.Runtime``).
"""

from collections.abc import Callable
from typing import Final

import anyio
from anyio import to_thread

from opta_lmx.config import Config, ConfigError, open_door
from opta_lmx.config_changes import ConfigChanges, compare, in_force
from opta_lmx.monitoring.logging import configure_logging, get_logger

_log = get_logger(__name__)

# A server that a program builds brings its settings along.
_NOWHERE: Final = "this server was not started from the command line: there is nothing to read again"


class Reloader:
    """The one writer of the settings in force after the start."""

    def __init__(
        self, config: Config, put_in_force: Callable[[Config], None], reread: Callable[[], Config] | None = None
    ) -> None:
        """``reread`` reads the sources again, or raises ConfigError; ``put_in_force`` tells every owner."""
        self._config = config
        self._put_in_force = put_in_force
        self._reread = reread
        self._lock = anyio.Lock()

    async def reload(self) -> ConfigChanges:
        """Take what has changed. Raises ConfigError at the first setting that cannot be used; then nothing changes."""
        if self._reread is None:
            raise ConfigError(_NOWHERE)
        async with self._lock:
            # Keys may lie in files, and a file on a disk that sleeps.
            new = await to_thread.run_sync(self._reread)
            changes = compare(self._config, new)
            config = in_force(self._config, new)
            _check_door(config)
            self._begin_log(config)
            # From here to the end nothing waits: no request sees the old and the new.
            self._config = config
            self._put_in_force(config)
        _log.info(
            "config_reloaded",
            applied=changes.applied,
            at_next_load=changes.at_next_load,
            restart_required=changes.restart_required,
        )
        return changes

    async def reload_by_signal(self) -> None:
        """As ``reload``, for those who read the outcome in the log."""
        try:
            await self.reload()
        except ConfigError as error:
            _log.error("config_reload_refused", reason=str(error))

    def _begin_log(self, config: Config) -> None:
        if config.logging == self._config.logging:
            return
        try:
            configure_logging(config.logging)
        except OSError as error:
            raise ConfigError(f"cannot be opened: {error.strerror}", key="logging.file") from None


def _check_door(config: Config) -> None:
    """The settings read are safe as a whole; with the address that stays until a restart they must be so too."""
    if reason := open_door(config):
        raise ConfigError(f"the server listens on {config.server.host} until it is restarted: {reason}", key="security")
