"""The words of the command line. Imports argparse alone: ``--help`` must be at once."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NoReturn

from opta_lmx import __version__
from opta_lmx.cli.failure import ExitCode, Failure

_LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

# Of whatever is counted: beyond it is a slip of the keyboard.
_MOST: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Arguments:
    """A parsed command line. ``flags`` are the settings it overrides, by dotted key."""

    verb: str
    config: Path | None = None
    flags: dict[str, object] = field(default_factory=dict)
    action: str = ""
    model: str = ""
    context_length: int | None = None
    seconds: float = 0.0
    owner: str | None = None
    force: bool = False
    revision: str | None = None
    include: tuple[str, ...] = ()
    url: str | None = None
    admin_key: str | None = field(default=None, repr=False)
    json: bool = False
    # ``--system`` and ``--user`` of a service; None: as it is installed.
    system: bool | None = None
    run_as: str | None = None
    only_print: bool = False
    follow: bool = False
    lines: int = 100
    once: bool = False
    api_key: str | None = field(default=None, repr=False)
    concurrency: tuple[int, ...] = ()
    requests: int | None = None
    prompt_words: int = 0
    max_tokens: int = 0

    @property
    def debug(self) -> bool:
        """True if the user asked to see everything."""
        return self.flags.get("logging.level") == "DEBUG"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Failure(message, f"{self.prog} --help shows the usage", ExitCode.USAGE)


def parse(argv: Sequence[str] | None) -> Arguments:
    """The command line in ``argv`` (None: the process's own).

    Raises Failure for one that makes no sense, and SystemExit after ``--help`` and ``--version``.
    """
    values = vars(_parser().parse_args(argv))
    flags = {key: values.pop(key) for key in list(values) if "." in key}
    return Arguments(flags=flags, **values)


def _parser() -> _Parser:
    parser = _Parser(
        prog="opta-lmx",
        description="Serve MLX models with the OpenAI API. Without a verb: serve.",
        allow_abbrev=False,
        parents=[_shared(), _serving()],
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")
    parser.set_defaults(verb="serve")

    def add(verb: str, help: str, *parents: _Parser) -> _Parser:
        parents = (_shared(), *parents)
        return verbs.add_parser(verb, help=help, description=help, allow_abbrev=False, parents=parents)

    add("serve", "Run the server.", _serving())
    config = add(
        "config",
        "Check the settings, show them with all sources merged and keys masked, or have the server read them again.",
        _remote(),
        _reading(),
    )
    config.add_argument("action", choices=("check", "show", "reload"))
    add("status", "Show what the server does now.", _remote(), _reading())
    add("ls", "List the models on disk.", _remote(), _reading())
    add("ps", "List the loaded models.", _remote(), _reading())
    for verb, help in (
        ("load", "Load a model, and wait for it."),
        ("unload", "Unload a model, and wait for it."),
        ("pin", "Keep a loaded model in memory until it is unpinned."),
        ("unpin", "End a model's pin."),
        ("lease", "Keep a loaded model in memory for a time."),
        ("plan", "Show whether a model would fit in memory; changes nothing."),
        ("rm", "Remove a model from the disk."),
    ):
        _model_flags(verb, add(verb, help, _remote(), _reading()))
    _service_flags(add("service", "Run the server as a service: started with the machine, and after a crash."))
    _log_flags(add("logs", "Show the end of the server's log.", _reading()))
    add("doctor", "Look for what is wrong with the installation, and say what to do.", _reading())
    top = add("top", "Watch what the server works on now; q ends it.", _remote(), _reading())
    top.add_argument("--once", action="store_true", help="print it once (as where there is no terminal)")
    _bench_flags(add("bench", "Measure how fast a model answers, one and several requests at a time.", _reading()))
    verify = add("verify", "Hash models' files and hold them against models.lock.", _remote(), _reading())
    verify.add_argument("model", metavar="MODEL", nargs="?", default="", help="id as ls shows it (else all)")
    pull = add("pull", "Download a model from the hub, and check every file of it.", _remote(), _reading())
    pull.add_argument("model", metavar="REPO", help="publisher/name, as on the hub")
    pull.add_argument("--revision", metavar="REVISION", help="branch, tag or commit (else the default branch)")
    pull.add_argument(
        "--include", nargs="+", default=(), metavar="PATTERN", help="files to take, such as '*Q4_K_M.gguf'"
    )
    return parser


def _model_flags(verb: str, parser: _Parser) -> None:
    """What a verb about one model takes."""
    parser.add_argument("model", metavar="MODEL", help="id as ls shows it")
    if verb == "lease":
        parser.add_argument("seconds", metavar="SECONDS", type=_positive, help="how long, from now")
        parser.add_argument("--owner", metavar="NAME", help="who asks (else $USER)")
    elif verb == "plan":
        parser.add_argument(
            "--context-length", type=int, metavar="TOKENS", help="context to plan for (else the model's)"
        )
    elif verb == "unload":
        parser.add_argument("--force", action="store_true", help="end its pin and its leases first")


def _service_flags(parser: _Parser) -> None:
    """What can be done about the service, each deed with its own flags."""
    deeds = parser.add_subparsers(dest="action", metavar="DEED", required=True)

    def add(deed: str, help: str) -> _Parser:
        parents = [_shared(), _scope(), _reading()]
        return deeds.add_parser(deed, help=help, description=help, allow_abbrev=False, parents=parents)

    install = add("install", "Write the service's file and start it; again: bring both up to date.")
    install.add_argument("--run-as", metavar="USER", help="whose server a --system service is (else who called sudo)")
    install.add_argument(
        "--print", dest="only_print", action="store_true", help="print the file that would be written, and do nothing"
    )
    add("uninstall", "Stop it and remove its file; models, settings and logs stay.")
    add("status", "Show how it is.")
    add("start", "Start it.")
    add("stop", "Stop it until the next start, login or boot, and wait for its end.")
    _log_flags(add("logs", "Show the end of its log, as opta-lmx logs does."))


def _log_flags(parser: _Parser) -> None:
    parser.add_argument("-f", "--follow", action="store_true", help="go on with what is written from now on")
    parser.add_argument("-n", "--lines", type=int, default=100, metavar="N", help="lines to begin with (100)")


def _bench_flags(parser: _Parser) -> None:
    """What is measured, and with whose key: chats are asked for, not the admin API."""
    parser.add_argument("model", metavar="MODEL", help="name, as a client would give it")
    parser.add_argument("--url", metavar="URL", help="server to ask (else $OPTA_LMX_URL, else host and port as set)")
    parser.add_argument(
        "--api-key", metavar="KEY", help="key for /v1 (else $OPTA_LMX_API_KEY, else, without a URL, as set)"
    )
    counts = [
        ("--concurrency", "+", (1, 4), "requests at a time, each in its turn (1 4)"),
        ("--requests", None, None, "requests of each turn (else four times as many as at a time)"),
        ("--prompt-words", None, 128, "words of each prompt, no two alike (128)"),
        ("--max-tokens", None, 128, "tokens of each answer (128)"),
    ]
    for flag, many, default, help in counts:
        parser.add_argument(flag, nargs=many, default=default, type=_count, metavar="N", help=help)


def _scope() -> _Parser:
    group = _group()
    either = group.add_mutually_exclusive_group()
    either.add_argument("--system", action="store_true", help="of the machine: needs nobody to be logged in")
    either.add_argument("--user", dest="system", action="store_false", help="of this user, while logged in")
    return group


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 0 < int(text) <= _MOST:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to {_MOST}")
    return int(text)


def _positive(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return seconds


def _group() -> _Parser:
    # SUPPRESS: a flag that is not given sets nothing, so that the one before the verb and the one after it agree.
    return _Parser(add_help=False, argument_default=argparse.SUPPRESS)


def _shared() -> _Parser:
    group = _group()
    group.add_argument(
        "--config",
        type=Path,
        metavar="PATH",
        help="settings (else $OPTA_LMX_CONFIG, ~/.opta-lmx/config.yaml, defaults)",
    )
    group.add_argument("--host", dest="server.host", metavar="HOST", help="address of the server")
    group.add_argument("--port", dest="server.port", type=int, metavar="PORT", help="port of the server")
    group.add_argument(
        "--log-level", dest="logging.level", type=str.upper, choices=_LEVELS, metavar="LEVEL", help=", ".join(_LEVELS)
    )
    return group


def _serving() -> _Parser:
    group = _group()
    group.add_argument(
        "--no-starter", dest="models.starter", action="store_false", help="do not offer the model that comes along"
    )
    return group


def _remote() -> _Parser:
    group = _group()
    group.add_argument("--url", metavar="URL", help="server to ask (else $OPTA_LMX_URL, else host and port as set)")
    group.add_argument(
        "--admin-key", metavar="KEY", help="key for /admin (else $OPTA_LMX_ADMIN_KEY, else, without a URL, as set)"
    )
    return group


def _reading() -> _Parser:
    group = _group()
    group.add_argument("--json", action="store_true", help="print JSON")
    return group
