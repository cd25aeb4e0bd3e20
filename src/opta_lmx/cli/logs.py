"""The verb ``logs``: the end of the server's log, and on request what comes."""

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from opta_lmx.cli.arguments import Arguments
from opta_lmx.cli.failure import ExitCode, Failure
from opta_lmx.cli.service import Host, find_services, this_host
from opta_lmx.cli.settings import load_settings
from opta_lmx.config import ConfigError

# Between two looks at the file: a line is on the screen before anyone misses it.
_LOOK_SECONDS: Final = 0.2


def run_logs(
    arguments: Arguments,
    environ: Mapping[str, str],
    host: Host | None = None,
    wait: Callable[[], bool] | None = None,
) -> int:
    """Print the last lines, and with ``--follow`` those to come, until interrupted. Raises Failure without a log.

    ``wait`` is slept through between two looks; it gives False to end.
    """
    from opta_lmx.service.log_file import read_log

    if arguments.lines < 0:
        raise Failure("--lines is below 0", "opta-lmx logs --help shows the usage", ExitCode.USAGE)
    file, others = find_logs(arguments, environ, host or this_host(environ))
    for other in others:
        print(f"note: what the service itself says is in {other}", file=sys.stderr)
    out = sys.stdout.buffer
    try:
        for line in read_log(file, arguments.lines, (wait or _sleep) if arguments.follow else None):
            out.write(_as_json(line) if arguments.json else line)
            if arguments.follow:
                out.flush()
    except FileNotFoundError:
        hint = "a server in a terminal logs there; a service, and logging.file, log to a file"
        raise Failure(f"there is no log at {file}", hint) from None
    except OSError as error:
        raise Failure(f"{file} cannot be read: {error.strerror}", "it is its owner's: try as that user") from None
    return ExitCode.DONE


def find_logs(arguments: Arguments, environ: Mapping[str, str], host: Host) -> tuple[Path, list[Path]]:
    """The file the server writes to, and those of services that may hold what it said before it did."""
    services = [status.log for status in find_services(host) if status.log is not None]
    try:
        named = load_settings(arguments, environ)[0].logging.path
    except ConfigError:
        # A server with these settings has told only its service why it does not start.
        named = None
    if named is not None:
        return named, [log for log in services if log != named]
    usual = host.owner.home / ".opta-lmx" / "logs" / "server.log"
    return (services[0] if services else usual), services[1:]


def _sleep() -> bool:
    time.sleep(_LOOK_SECONDS)
    return True


def _as_json(line: bytes) -> bytes:
    """The line if it is an object already; a traceback's or a library's becomes one."""
    text = line.decode(errors="replace").rstrip("\n")
    try:
        if isinstance(json.loads(text), dict):
            return line
    except ValueError:
        pass
    return json.dumps({"event": text}).encode() + b"\n"
