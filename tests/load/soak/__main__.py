"""The command line of ``scripts/soak``. The sheet goes to standard output."""

import argparse
import json
import secrets
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Final

import anyio

from tests.load.soak.run import Plan, build_models, soak

_DESCRIPTION: Final = """\
Puts a server over tiny models under a mixed load (chats, tools, schemas, embeddings, clients who leave, loads and
unloads, killed workers, corrupt requests), then draws the balance: every request has one end and nothing is held any
more. Exit code 0 if the sheet is even, 1 if not.
"""


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description=_DESCRIPTION)
    parser.add_argument("--seconds", type=float, default=600, help="of traffic (default %(default)s)")
    parser.add_argument("--clients", type=int, default=24, help="at once (default %(default)s)")
    parser.add_argument("--kill-every", type=float, default=4, help="seconds between kills (default %(default)s)")
    parser.add_argument("--seed", type=int, help="of all traffic (default: another one in each run)")
    parser.add_argument("--json", action="store_true", help="the sheet as JSON")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="a new directory for the server's files and its log")
    arguments = parser.parse_args()
    seed = secrets.randbits(32) if arguments.seed is None else arguments.seed
    sys.stderr.write(f"seed {seed}\n")
    plan = Plan(seed, arguments.seconds, arguments.clients, arguments.kill_every)
    with tempfile.TemporaryDirectory(prefix="opta-lmx-soak-") as made:
        home = arguments.keep or Path(made)
        (home / "models").mkdir(parents=True)
        build_models(home / "models")
        sheet = anyio.run(partial(soak, plan, home), backend_options={"use_uvloop": True})
    sys.stdout.write(json.dumps(sheet.to_json(), indent=1) + "\n" if arguments.json else sheet.to_text())
    return 0 if sheet.is_even else 1


if __name__ == "__main__":
    sys.exit(main())
