"""The verbs that ask a running server over its admin API, or have it do something."""

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from threading import Event, Thread
from typing import Any, Final
from urllib.parse import quote, urlsplit

from opta_lmx.cli.arguments import Arguments
from opta_lmx.cli.failure import ExitCode, Failure
from opta_lmx.cli.memory_bar import memory_bar

# A look at the server's own state is over in milliseconds unless it is stuck.
_READ_SECONDS: Final = 10.0
# A load or a verification ends by itself; this bound only keeps a lost connection from holding the shell for ever.
_CHANGE_SECONDS: Final = 3600.0

# Between two looks at the imports that a load waits for.
_WATCH_SECONDS: Final = 0.5

# The width of a terminal that nobody has widened, for output that goes elsewhere.
PLAIN_COLUMNS: Final = 80

# OpenAI's mark for the end of a stream.
_LAST_EVENT: Final = b"data: [DONE]\n"

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")


_READS: Final = {"status": "/admin/status", "ls": "/admin/models/available", "ps": "/admin/models"}


@dataclass(frozen=True, slots=True)
class Remote:
    """A server to ask, and the key for what is asked of it."""

    url: str
    key: str | None = field(default=None, repr=False)


def run_remote(arguments: Arguments, environ: Mapping[str, str]) -> int:
    """Do what the verb says and print the answer.

    Raises Failure if the server refuses or cannot be reached; if files are wrong, after they have been printed.
    """
    remote = find_remote(arguments, environ)
    with _imports_shown(remote) if arguments.verb == "load" and sys.stderr.isatty() else nullcontext():
        answer = ask(remote, *_wish(arguments, environ))
    text = json.dumps(answer, indent=2) if arguments.json else _words(arguments, environ, answer)
    if text:
        print(text)
    if arguments.verb == "verify" and not answer["success"]:
        # Standard error may be the same terminal: the report comes first.
        sys.stdout.flush()
        hint = "opta-lmx rm MODEL removes it, to be downloaded again"
        raise Failure("not all files are what models.lock says", hint)
    return ExitCode.DONE


@contextmanager
def _imports_shown(remote: Remote) -> Iterator[None]:
    """Shows how far the server's imports of GGUF files are, until the block ends."""
    ended = Event()
    watcher = Thread(target=_watch_imports, args=(remote, ended), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join(_READ_SECONDS)


def _watch_imports(remote: Remote, ended: Event) -> None:
    while not ended.wait(_WATCH_SECONDS):
        # What is wrong with the server is told by the load itself.
        with suppress(Failure):
            for row in ask(remote, "GET", _READS["status"]).get("imports", ()):
                done, total = row["done_bytes"], max(row["total_bytes"], 1)
                sizes = f"{show_size(done)} of {show_size(total)}"
                show_line(f"importing {row['model_id']} {100 * done // total:3d}%  {sizes}")
    show_line("")


def _wish(arguments: Arguments, environ: Mapping[str, str]) -> tuple[str, str, dict[str, Any] | None]:
    """Method, path and body of what the verb asks for."""
    verb, model = arguments.verb, arguments.model
    if verb in _READS:
        return "GET", _READS[verb], None
    if verb == "rm":
        return "DELETE", f"/admin/models/{quote(model)}", None
    body: dict[str, Any] = {"model_id": model} if model else {}
    if arguments.force:
        body["force"] = True
    if arguments.context_length is not None:
        body["context_length"] = arguments.context_length
    if verb == "lease":
        owner = arguments.owner or environ.get("USER") or "opta-lmx"
        return "POST", "/admin/leases", body | {"seconds": arguments.seconds, "owner": owner}
    return "POST", f"/admin/models/{verb}", body


def _words(arguments: Arguments, environ: Mapping[str, str], answer: dict[str, Any]) -> str:
    """The answer for people."""
    model = arguments.model
    match arguments.verb:
        case "status":
            lines = outline(answer)
        case "ls" | "ps":
            lines = table(answer["models"])
        case "plan":
            lines = _plan(answer, environ)
        case "verify":
            lines = table(list(_checked_files(answer)))
        case "load":
            lines = iter([f"{model} loaded in {answer['time_to_load_ms'] / 1000:.1f} s"])
        case "unload":
            lines = iter([f"{model} unloaded, {answer['memory_freed_gb']} GiB freed"])
        case "rm":
            lines = iter([f"{model} removed, {_cell('freed_bytes', answer['freed_bytes'])} freed"])
        case "lease":
            lines = iter([f"{model} leased until {_local_time(answer['expires_at'])} as {answer['lease_id']}"])
        case verb:
            lines = iter([f"{model} {verb}ned"])
    return "\n".join(lines)


def _plan(answer: dict[str, Any], environ: Mapping[str, str]) -> Iterator[str]:
    """Sized for the terminal, coloured unless $NO_COLOR forbids it; elsewhere plain and of a fixed width."""
    on_terminal = sys.stdout.isatty()
    columns = shutil.get_terminal_size().columns if on_terminal else PLAIN_COLUMNS
    # Beside the cells: the brackets and the cap.
    return memory_bar(answer, max(columns - 3, 10), colour=on_terminal and not environ.get("NO_COLOR"))


def _checked_files(answer: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each file; one for a model without a record."""
    for model in answer["models"]:
        for file in model["files"] or ({"name": None, "verdict": model["verdict"]},):
            wrong = file["verdict"] in ("different", "missing", "added", "unreadable")
            hashes = {key: file[f"{key}_sha256"] if wrong else None for key in ("expected", "actual")}
            yield {"model": model["model_id"], "file": file["name"], "verdict": file["verdict"], **hashes}


def _local_time(at: float) -> str:
    return datetime.fromtimestamp(at).astimezone().isoformat(" ", "seconds")


def find_remote(arguments: Arguments, environ: Mapping[str, str]) -> Remote:
    """The server the command line, the environment or the settings name, in this order.

    The key in the settings is for the server of the settings; a URL from elsewhere never gets it. Raises Failure.
    """
    return _find(arguments, environ, arguments.admin_key or environ.get("OPTA_LMX_ADMIN_KEY"), admin=True)


def find_inference(arguments: Arguments, environ: Mapping[str, str]) -> Remote:
    """As ``find_remote``, with a key for ``/v1``: the first of the settings' where no other is given."""
    return _find(arguments, environ, arguments.api_key or environ.get("OPTA_LMX_API_KEY"), admin=False)


def _find(arguments: Arguments, environ: Mapping[str, str], key: str | None, *, admin: bool) -> Remote:
    url = arguments.url or environ.get("OPTA_LMX_URL")
    if not url:
        from opta_lmx.cli.settings import read_config

        config, _ = read_config(arguments, environ)
        url = config.server.url
        security = config.security
        own = [security.admin_key] if admin else security.inference_keys
        key = key or next((secret.get_secret_value() for secret in own if secret is not None), None)
    if key and not (key.isascii() and key.isprintable()):
        kind = "admin" if admin else "API"
        raise Failure(f"the {kind} key is not printable ASCII", "no header can carry such a key", ExitCode.USAGE)
    return Remote(url, key)


def ask(
    remote: Remote,
    method: str,
    path: str,
    body: dict[str, Any] | None = None,
    hints: Mapping[int, str] | None = None,
) -> dict[str, Any]:
    """The server's JSON answer. Raises Failure, with the server's own words if it refused.

    ``hints`` by status say what to do where the usual hint would mislead.
    """
    connection, base = _connect(remote.url, _READ_SECONDS if method == "GET" else _CHANGE_SECONDS)
    try:
        connection.request(method, base + path, *_message(remote, path, "application/json", body))
        response = connection.getresponse()
        status, content = response.status, response.read()
    except (OSError, HTTPException) as error:
        raise _silence(remote, error) from None
    finally:
        connection.close()
    return _read_answer(remote, status, content, hints or {})


def follow(
    remote: Remote, path: str, body: dict[str, Any] | None = None, hints: Mapping[int, str] | None = None
) -> Iterator[dict[str, Any]]:
    """The server's events, each as it comes, to their end: of a GET, or of what a ``body`` asks for.

    Raises Failure, as ``ask`` does.
    """
    connection, base = _connect(remote.url, _CHANGE_SECONDS)
    try:
        method = "GET" if body is None else "POST"
        connection.request(method, base + path, *_message(remote, path, "text/event-stream", body))
        response = connection.getresponse()
        if response.status != 200:
            _read_answer(remote, response.status, response.read(), hints or {})
        for line in response:
            if line.startswith(b"data: ") and line != _LAST_EVENT:
                yield json.loads(line.removeprefix(b"data: "))
    except (OSError, HTTPException) as error:
        raise _silence(remote, error) from None
    finally:
        connection.close()


def _message(remote: Remote, path: str, accept: str, body: dict[str, Any] | None) -> tuple[str | None, dict[str, str]]:
    """The body and the headers of a request."""
    headers = {"Accept": accept}
    if remote.key:
        admin = path.startswith("/admin")
        headers |= {"X-Admin-Key": remote.key} if admin else {"Authorization": f"Bearer {remote.key}"}
    if body is None:
        return None, headers
    return json.dumps(body), headers | {"Content-Type": "application/json"}


def _silence(remote: Remote, error: Exception) -> Failure:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    hint = "start it with opta-lmx serve, or name another with --url"
    return Failure(f"no server answers at {remote.url}: {reason}", hint, ExitCode.UNREACHABLE)


def _read_answer(remote: Remote, status: int, content: bytes, hints: Mapping[int, str]) -> dict[str, Any]:
    try:
        answer = json.loads(content)
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        hint = "name the right server with --url"
        message = f"what answers at {remote.url} is not Opta-LMX (status {status})"
        raise Failure(message, hint, ExitCode.UNREACHABLE)
    if status >= 400:
        raise _refusal(status, answer, hints)
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


def _refusal(status: int, answer: dict[str, Any], better: Mapping[int, str]) -> Failure:
    error = answer.get("error")
    message = error.get("message") if isinstance(error, dict) else None
    hints = {
        401: "give the admin key with --admin-key or $OPTA_LMX_ADMIN_KEY",
        404: "opta-lmx ls shows the models there are",
        409: "opta-lmx ps shows the loaded models, and what holds them",
        507: "opta-lmx ps shows what is loaded, opta-lmx unload MODEL makes room",
        **better,
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


def show_size(size_bytes: int) -> str:
    """A size in binary units."""
    power = min(max(size_bytes.bit_length() - 1, 0) // 10, len(_UNITS) - 1)
    return f"{size_bytes / 1024**power:.1f} {_UNITS[power]}" if power else f"{size_bytes} B"


def show_line(line: str) -> None:
    """Puts ``line`` in the place of the one before; nothing where nobody watches."""
    if sys.stderr.isatty():
        # Back to the first column, and clear to the right. A line that wraps could not be replaced.
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\x1b[K{line[:width]}", end="", file=sys.stderr, flush=True)


def _cell(name: str, value: Any) -> str:
    """A value for people: sizes in binary units, moments in local time."""
    match value:
        case None | []:
            return "-"
        case bool():
            return "yes" if value else "no"
        case int() if name.endswith("_bytes"):
            return show_size(value)
        case float() if name.endswith("_at"):
            return _local_time(value)
        case list():
            return ", ".join(map(str, value))
        case _:
            return str(value)
