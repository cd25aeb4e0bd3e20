"""The settings of a command, and the verb that shows them."""

import json
from collections.abc import Mapping
from pathlib import Path

from opta_lmx.cli.arguments import Arguments
from opta_lmx.cli.failure import ExitCode, Failure
from opta_lmx.config import Config, ConfigError, find_config, load_config
from opta_lmx.router.resolve import check_aliases


def load_settings(
    arguments: Arguments, environ: Mapping[str, str], path: Path | None = None
) -> tuple[Config, Path | None]:
    """The merged settings and the file they come from (None: no file), which is ``path`` if one is given.

    Raises ConfigError for the first setting that cannot be used.
    """
    path = find_config(path or arguments.config, environ=environ, home=Path.home())

    def check(config: Config) -> None:
        presets = {name: preset.model for name, preset in config.models.presets.items()}
        check_aliases(config.models.aliases, presets)

    return load_config(path, environ=environ, flags=arguments.flags, check=check), path


def read_config(arguments: Arguments, environ: Mapping[str, str]) -> tuple[Config, Path | None]:
    """As ``load_settings``; raises Failure for the first bad one."""
    try:
        return load_settings(arguments, environ)
    except ConfigError as error:
        hint = "docs/configuration.md lists every key with its type, default and range"
        raise Failure(str(error), hint, ExitCode.USAGE) from None


def run_config(arguments: Arguments, environ: Mapping[str, str]) -> int:
    """``config check``: is everything valid? ``show``: what is in force, keys masked? ``reload``: a server's turn."""
    if arguments.action == "reload":
        return _reload(arguments, environ)
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


def _reload(arguments: Arguments, environ: Mapping[str, str]) -> int:
    from opta_lmx.cli.remote import ask, find_remote

    hint = "opta-lmx config check looks for more; the server goes on with the settings it has"
    answer = ask(find_remote(arguments, environ), "POST", "/admin/config/reload", hints={400: hint})
    if arguments.json:
        print(json.dumps(answer, indent=2))
        return ExitCode.DONE
    lists = {
        "in force now": answer["applied"],
        "in force at the next load of a model": answer["at_next_load"],
        "in force after a restart": answer["restart_required"],
    }
    shown = [f"{when}: {', '.join(keys)}" for when, keys in lists.items() if keys]
    print("\n".join(shown) or "nothing has changed")
    return ExitCode.DONE
