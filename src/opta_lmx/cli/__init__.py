"""The command ``opta-lmx``: serve, and the verbs that look at a running server or change it.

Data goes to standard output, everything else to standard error. Importing this room loads no library: what a verb
needs it imports when it runs.
"""

import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence

from opta_lmx.cli.arguments import Arguments, parse
from opta_lmx.cli.failure import ExitCode, Failure


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and give its exit code: 0 done, 1 refused or failed, 2 usage, 3 server not reached."""
    debug = False
    try:
        arguments = parse(argv)
        debug = arguments.debug
        code = _run(arguments)
        sys.stdout.flush()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else ExitCode.DONE
    except Failure as failure:
        return _tell(str(failure), failure.hint, failure.code)
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # The reader of our output has left. What is still buffered must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.REFUSED
    except Exception as error:  # noqa: BLE001  # the border: a stranger sees what failed, not where
        if debug:
            traceback.print_exc()
        return _tell(f"{type(error).__name__}: {error}", "--log-level DEBUG shows where it failed", ExitCode.REFUSED)
    return code


def _run(arguments: Arguments) -> int:
    run: Callable[[Arguments, Mapping[str, str]], int]
    match arguments.verb:
        case "serve":
            from opta_lmx.cli.serve import serve as run
        case "config":
            from opta_lmx.cli.settings import run_config as run
        case "pull":
            from opta_lmx.cli.pull import run_pull as run
        case "top":
            from opta_lmx.cli.top import run_top as run
        case "bench":
            from opta_lmx.cli.bench import run_bench as run
        case "service":
            from opta_lmx.cli.service import run_service as run
        case "logs":
            from opta_lmx.cli.logs import run_logs as run
        case "doctor":
            from opta_lmx.cli.doctor import run_doctor as run
        case _:
            from opta_lmx.cli.remote import run_remote as run
    return run(arguments, os.environ)


def _tell(message: str, hint: str, code: ExitCode) -> ExitCode:
    print(f"error: {message}\nhint: {hint}", file=sys.stderr)
    return code
