"""The words of the command line. Imports argparse alone: ``--help`` must be at once."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, NoReturn

from opta_lmx import __version__
from opta_lmx.cli.failure import ExitCode, Failure

_LEVELS: Final = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")


@dataclass(frozen=True, slots=True)
class Arguments:
    """A parsed command line. ``flags`` are the settings it overrides, by dotted key."""

    verb: str
    config: Path | None = None
    flags: dict[str, object] = field(default_factory=dict)
    action: str = ""
    model: str = ""
    url: str | None = None
    admin_key: str | None = field(default=None, repr=False)
    json: bool = False

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
    config = add("config", "Check the settings, or show them with all sources merged and keys masked.", _reading())
    config.add_argument("action", choices=("check", "show"))
    add("status", "Show what the server does now.", _remote(), _reading())
    add("ls", "List the models on disk.", _remote(), _reading())
    add("ps", "List the loaded models.", _remote(), _reading())
    for verb, help in (("load", "Load a model, and wait for it."), ("unload", "Unload a model, and wait for it.")):
        add(verb, help, _remote(), _reading()).add_argument("model", metavar="MODEL", help="id as ls shows it")
    return parser


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
