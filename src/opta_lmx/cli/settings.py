"""The settings of a command, and the verb that shows them."""

import json
from collections.abc import Mapping
from pathlib import Path

from opta_lmx.cli.arguments import Arguments
from opta_lmx.cli.failure import ExitCode, Failure
from opta_lmx.config import Config, ConfigError, find_config, load_config
from opta_lmx.router.resolve import check_aliases


def read_config(arguments: Arguments, environ: Mapping[str, str]) -> tuple[Config, Path | None]:
    """The merged settings and the file they come from (None: no file); raises Failure for the first bad one."""
    try:
        path = find_config(arguments.config, environ=environ, home=Path.home())
        config = load_config(path, environ=environ, flags=arguments.flags)
        check_aliases(config.models.aliases)
        return config, path
    except ConfigError as error:
        hint = "docs/configuration.md lists every key with its type, default and range"
        raise Failure(str(error), hint, ExitCode.USAGE) from None


def run_config(arguments: Arguments, environ: Mapping[str, str]) -> int:
    """``config check``: is everything valid? ``config show``: what is in force, keys masked?"""
    config, path = read_config(arguments, environ)
    if arguments.action == "check":
        file = None if path is None else str(path)
        print(json.dumps({"ok": True, "file": file}) if arguments.json else f"ok: {file or 'no file, only defaults'}")
    elif arguments.json:
        print(json.dumps(config.public(), indent=2))
    else:
        import yaml

        print(yaml.safe_dump(config.public(), sort_keys=False, allow_unicode=True), end="")
    return ExitCode.DONE
