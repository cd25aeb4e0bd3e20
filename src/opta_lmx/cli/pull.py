"""``opta-lmx pull``: have the server download a model, and show how far it is."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Final

from opta_lmx.cli.arguments import Arguments
from opta_lmx.cli.failure import ExitCode, Failure
from opta_lmx.cli.remote import Remote, ask, find_remote, follow, show_line, show_size

_ROUTE: Final = "/admin/models/download"

_HINTS: Final = {
    400: "opta-lmx pull --help shows what can be asked for",
    404: "name it as its page on the hub does: publisher/name",
    409: "opta-lmx ls shows what is on disk, opta-lmx rm MODEL removes it",
    502: "the server reaches the hub at downloads.endpoint; try again later",
    507: "opta-lmx rm MODEL makes room on the disk",
}

_BAR_CELLS: Final = 24


def run_pull(arguments: Arguments, environ: Mapping[str, str]) -> int:
    """Download one model and print how it ended; on a terminal, show a bar meanwhile. Control-C cancels.

    Raises Failure if the server refuses, the download fails, or nobody answers.
    """
    remote = find_remote(arguments, environ)
    body: dict[str, Any] = {"repo_id": arguments.model}
    if arguments.revision is not None:
        body["revision"] = arguments.revision
    if arguments.include:
        body["allow_patterns"] = list(arguments.include)
    download = ask(remote, "POST", _ROUTE, body, _HINTS)
    path = f"{_ROUTE}/{download['download_id']}"
    with _cancelled_by_interrupt(remote, path):
        for download in follow(remote, f"{path}/progress"):  # each is the same download, later
            show_line(_line(download))
    show_line("")
    if arguments.json:
        print(json.dumps(download, indent=2))
    if download["state"] != "completed":
        raise _failure(arguments.model, download)
    if not arguments.json:
        print(f"{arguments.model} downloaded and verified, {show_size(download['total_bytes'])}")
    return ExitCode.DONE


@contextmanager
def _cancelled_by_interrupt(remote: Remote, path: str) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        show_line("")
        with suppress(Failure):
            ask(remote, "DELETE", path)
        raise


def _failure(model: str, download: Mapping[str, Any]) -> Failure:
    error = download["error"]
    ended = "was cancelled" if download["state"] == "cancelled" else "goes on, but the server says no more of it"
    message = error["message"] if error else f"the download of {model} {ended}"
    return Failure(message, f"opta-lmx pull {model} goes on with what is here")


def _line(download: Mapping[str, Any]) -> str:
    """How far it is: a bar, sizes, speed and the time left."""
    done, total = download["done_bytes"], max(download["total_bytes"], 1)
    filled = _BAR_CELLS * done // total
    parts = [
        f"{download['repo_id']} [{'#' * filled}{'.' * (_BAR_CELLS - filled)}] {100 * done // total:3d}%",
        f"{show_size(done)} of {show_size(total)}",
    ]
    if download["bytes_per_second"]:
        parts.append(f"{show_size(int(download['bytes_per_second']))}/s")
    if download["eta_seconds"] is not None:
        minutes, seconds = divmod(int(download["eta_seconds"]), 60)
        parts.append(f"{minutes}:{seconds:02d} left")
    return "  ".join(parts)
