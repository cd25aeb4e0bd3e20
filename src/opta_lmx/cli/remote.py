"""The verbs that ask a running server over its admin API: status, ls, ps, load, unload."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any, Final
from urllib.parse import urlsplit

from opta_lmx.cli.arguments import Arguments
from opta_lmx.cli.failure import ExitCode, Failure

# A look at the server's own state is over in milliseconds unless it is stuck.
_READ_SECONDS: Final = 10.0
# A load ends by itself, done or failed; this bound only keeps a lost connection from holding the shell for ever.
_CHANGE_SECONDS: Final = 3600.0

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True, slots=True)
class Remote:
    """A server to ask, and the key for its admin API."""

    url: str
    key: str | None = field(default=None, repr=False)


def run_remote(arguments: Arguments, environ: Mapping[str, str]) -> int:
    """Do what the verb says and print the answer. Raises Failure if the server refuses or cannot be reached."""
    remote = find_remote(arguments, environ)
    model = arguments.model
    match arguments.verb:
        case "status":
            answer = ask(remote, "GET", "/admin/status")
            text = "\n".join(outline(answer))
        case "ls":
            answer = ask(remote, "GET", "/admin/models/available")
            text = "\n".join(table(answer["models"]))
        case "ps":
            answer = ask(remote, "GET", "/admin/models")
            text = "\n".join(table(answer["models"]))
        case "load":
            answer = ask(remote, "POST", "/admin/models/load", {"model_id": model})
            text = f"{model} loaded in {answer['time_to_load_ms'] / 1000:.1f} s"
        case _:
            answer = ask(remote, "POST", "/admin/models/unload", {"model_id": model})
            text = f"{model} unloaded, {answer['memory_freed_gb']} GiB freed"
    if arguments.json:
        text = json.dumps(answer, indent=2)
    if text:
        print(text)
    return ExitCode.DONE


def find_remote(arguments: Arguments, environ: Mapping[str, str]) -> Remote:
    """The server the command line, the environment or the settings name, in this order.

    The key in the settings is for the server of the settings; a URL from elsewhere never gets it. Raises Failure.
    """
    url = arguments.url or environ.get("OPTA_LMX_URL")
    key = arguments.admin_key or environ.get("OPTA_LMX_ADMIN_KEY")
    if not url:
        from opta_lmx.cli.settings import read_config

        config, _ = read_config(arguments, environ)
        url = config.server.url
        key = key or (config.security.admin_key.get_secret_value() if config.security.admin_key else None)
    if key and not (key.isascii() and key.isprintable()):
        raise Failure("the admin key is not printable ASCII", "no header can carry such a key", ExitCode.USAGE)
    return Remote(url, key)


def ask(remote: Remote, method: str, path: str, body: dict[str, str] | None = None) -> dict[str, Any]:
    """The server's JSON answer. Raises Failure, with the server's own words if it refused."""
    connection, base = _connect(remote.url, _CHANGE_SECONDS if body else _READ_SECONDS)
    headers = {"Accept": "application/json"} | ({"X-Admin-Key": remote.key} if remote.key else {})
    if body:
        headers["Content-Type"] = "application/json"
    try:
        connection.request(method, base + path, json.dumps(body) if body else None, headers)
        response = connection.getresponse()
        status, content = response.status, response.read()
    except (OSError, HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        hint = "start it with opta-lmx serve, or name another with --url"
        raise Failure(f"no server answers at {remote.url}: {reason}", hint, ExitCode.UNREACHABLE) from None
    finally:
        connection.close()
    try:
        answer = json.loads(content)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        hint = "name the right server with --url"
        message = f"what answers at {remote.url} is not Opta-LMX (status {status})"
        raise Failure(message, hint, ExitCode.UNREACHABLE)
    if status >= 400:
        raise _refusal(status, answer)
    return answer


def _connect(url: str, timeout_seconds: float) -> tuple[HTTPConnection, str]:
    """A connection, not yet open, and the path in front of every route."""
    parts = urlsplit(url)
    try:
        host, port = parts.hostname, parts.port
    except ValueError:
        host, port = None, None
    if not host or parts.scheme not in ("http", "https"):
        raise Failure(f"{url!r} is no address of a server", "write it as http://127.0.0.1:1234", ExitCode.USAGE)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    return kind(host, port, timeout=timeout_seconds), parts.path.rstrip("/")


def _refusal(status: int, answer: dict[str, Any]) -> Failure:
    error = answer.get("error")
    message = error.get("message") if isinstance(error, dict) else None
    hints = {
        401: "give the admin key with --admin-key or $OPTA_LMX_ADMIN_KEY",
        404: "opta-lmx ls shows the models there are",
        409: "opta-lmx ps shows what holds the model",
        507: "opta-lmx ps shows what is loaded, opta-lmx unload MODEL makes room",
    }
    return Failure(message or f"the server answered {status}", hints.get(status, "the server's log tells more"))


def outline(answer: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """An answer as lines: ``name: value``, dotted below objects, a table for a list of objects."""
    for name, value in answer.items():
        match value:
            case dict():
                yield from outline(value, f"{prefix}{name}.")
            case [dict(), *_]:
                yield f"{prefix}{name}:"
                yield from (f"  {line}" for line in table(value))
            case _:
                yield f"{prefix}{name}: {_cell(name, value)}"


def table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Rows in columns under their names; nothing where there are no rows."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names, *([_cell(name, row.get(name)) for name in names] for row in rows)] if rows else []
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        yield "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()


def _cell(name: str, value: Any) -> str:
    """A value for people; sizes are shown in binary units."""
    match value:
        case None | []:
            return "-"
        case bool():
            return "yes" if value else "no"
        case int() if name.endswith("_bytes"):
            power = min(max(value.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
            return f"{value / 1024**power:.1f} {_UNITS[power]}" if power else f"{value} B"
        case list():
            return ", ".join(map(str, value))
        case _:
            return str(value)
