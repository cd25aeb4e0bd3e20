"""The verb ``doctor``: gathers the facts of this installation; ``service/findings.py`` judges them."""

import json
import platform
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from opta_lmx import __version__
from opta_lmx.cli.arguments import Arguments
from opta_lmx.cli.failure import ExitCode, Failure
from opta_lmx.cli.logs import find_logs
from opta_lmx.cli.remote import Remote, ask, find_remote, table
from opta_lmx.cli.serve import check_address
from opta_lmx.cli.service import Host, find_services, this_host
from opta_lmx.cli.settings import load_settings
from opta_lmx.config import Config, ConfigError
from opta_lmx.config_sources import Sources
from opta_lmx.service import findings, machine
from opta_lmx.service.findings import Finding, Level
from opta_lmx.service.job import ServiceStatus
from opta_lmx.service.lock import find_holder
from opta_lmx.service.permissions import Lax, find_lax

# ``name[extra]==version; marker``, in a distribution's metadata.
_PIN: Final = re.compile(r"([\w.-]+)(?:\[[^]]*\])? ?==([\w.]+)")

_ENGINE: Final = frozenset({"mlx", "mlx-lm", "vllm-mlx"})


def run_doctor(arguments: Arguments, environ: Mapping[str, str], host: Host | None = None) -> int:
    """Print every finding; exit code 1 if one of them is a failure. Works with the server up or down."""
    found = list(_examine(arguments, environ, host or this_host(environ)))
    failed = any(finding.level is Level.FAIL for finding in found)
    if arguments.json:
        print(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in found]}, indent=2))
    else:
        print("\n".join(_lines(found)))
    return ExitCode.REFUSED if failed else ExitCode.DONE


def _lines(found: list[Finding]) -> Iterator[str]:
    """A line for each, its remedy below it, then the count."""
    yield from table(
        [{"level": finding.level.value, "check": finding.check, "what": finding.what} for finding in found]
    )
    remedies = [finding for finding in found if finding.remedy is not None]
    if remedies:
        yield ""
    yield from (f"{finding.check}: {finding.remedy}" for finding in remedies)
    counts = Counter(finding.level for finding in found)
    yield ""
    yield ", ".join(f"{counts[level]} {level}" for level in Level)


def _examine(arguments: Arguments, environ: Mapping[str, str], host: Host) -> Iterator[Finding]:
    services = find_services(host)
    try:
        config, path = load_settings(arguments, environ)
    except ConfigError as error:
        remedy = "docs/configuration.md lists every key; what depends on the settings was not looked at"
        yield Finding("config", Level.FAIL, str(error), remedy)
    else:
        yield Finding("config", Level.OK, str(path) if path else "no file, only defaults")
        yield from _server(arguments, environ, config)
        yield from _files(config, path, host, environ)
        yield from _machine(config)
        security = config.security
        yield findings.check_door(
            loopback=config.server.is_loopback,
            api_keys=bool(security.inference_keys),
            admin_key=security.admin_key is not None,
        )
        yield _token(config, environ, services)
    yield from findings.check_service(
        services, program_exists=all(service.program is None or service.program.exists() for service in services)
    )
    log, _ = find_logs(arguments, environ, host)
    there = log.is_file()
    yield findings.check_log(log if there else None, log.stat().st_size if there else None)
    pins = _pins()
    yield from machine.check_versions(platform.python_version(), pins, {name: _version(name) for name in pins}, _ENGINE)


def _server(arguments: Arguments, environ: Mapping[str, str], config: Config) -> Iterator[Finding]:
    """Port, lock and workers."""
    # This machine's server, whichever the other verbs ask.
    remote = find_remote(arguments, {name: value for name, value in environ.items() if name != "OPTA_LMX_URL"})
    health = _answer(remote, "/admin/health")
    listener = findings.Listener(remote.url, _problem(config), health)
    yield findings.check_port(listener, __version__)
    try:
        holder = find_holder(config.models.directory)
    except OSError as error:
        what = f"the lock in {config.models.directory} cannot be read: {error.strerror}"
        yield Finding("lock", Level.WARN, what, "look at who owns that directory")
    else:
        yield findings.check_lock(holder, serving=health is not None)
    if health is not None:
        try:
            yield from findings.check_workers(ask(remote, "GET", "/admin/status"))
        except Failure as failure:
            yield Finding("workers", Level.WARN, f"cannot be seen: {failure}", failure.hint)


def _answer(remote: Remote, path: str) -> dict[str, Any] | None:
    """None if nothing of ours is there."""
    try:
        answer = ask(remote, "GET", path)
    except Failure:
        return None
    return answer if "version" in answer else None


def _problem(config: Config) -> str | None:
    try:
        check_address(config.server.host, config.server.port)
    except Failure as failure:
        return str(failure)
    return None


def _files(config: Config, path: Path | None, host: Host, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Rights of secrets and of the rest."""
    secrets = [place for place in _secret_files(config, path, environ) if place.is_file()]
    places = [host.owner.home / ".opta-lmx", config.models.directory, config.logging.path]
    lax = {found.path: found for found in find_lax(*(place for place in places if place is not None))}
    lax_secrets = {found.path: found for found in find_lax(*secrets)}
    data: list[Lax] = [found for place, found in lax.items() if place not in lax_secrets]
    yield from findings.check_modes(data, list(lax_secrets.values()))


def _secret_files(config: Config, path: Path | None, environ: Mapping[str, str]) -> Iterator[Path]:
    """The files that hold keys or tokens: those the settings name, and the settings where a key stands in them."""
    if config.downloads.token_path is not None:
        yield config.downloads.token_path
    # Config itself holds what the files hold, and no longer where that came from.
    sources = Sources()
    if path is not None:
        sources.read_file(path)
        if any(not key.startswith(("file:", "env:")) for key in _keys(sources)):
            yield path
    sources.read_environ(environ)
    yield from (Path(key.removeprefix("file:")).expanduser() for key in _keys(sources) if key.startswith("file:"))


def _keys(sources: Sources) -> list[str]:
    """The keys as they are written; what is no text is no key."""
    security = sources.values.get("security")
    written = security if isinstance(security, dict) else {}
    keys = written.get("api_keys")
    found = [*(keys if isinstance(keys, list) else ()), written.get("admin_key")]
    return [key for key in found if isinstance(key, str)]


def _machine(config: Config) -> Iterator[Finding]:
    import psutil

    from opta_lmx.manager.metal import read_metal

    directory = config.models.directory
    there = next(place for place in (directory, *directory.parents) if place.exists())
    yield machine.check_disk(there, shutil.disk_usage(there).free)
    total = psutil.virtual_memory().total
    cap = int(total * config.memory.limit_fraction)
    gpu, largest = read_metal(), _largest(directory)
    limit = cap if gpu is None else min(cap, gpu.working_set_bytes)
    yield machine.check_memory(total, limit, largest)
    yield machine.check_metal(gpu, cap, largest)


def _largest(directory: Path) -> machine.LargestModel | None:
    """By the sizes of weight files; nothing is opened, and nothing of a running server's is touched."""
    sizes: Counter[str] = Counter()
    for pattern in ("*/*.safetensors", "*/*/*.safetensors", "*/*.gguf", "*/*/*.gguf"):
        for file in directory.glob(pattern):
            model = file.parent.relative_to(directory).as_posix()
            if file.is_file() and not model.startswith("."):
                sizes[model] += file.stat().st_size
    return machine.LargestModel(*sizes.most_common(1)[0]) if sizes else None


def _token(config: Config, environ: Mapping[str, str], services: list[ServiceStatus]) -> Finding:
    downloads = config.downloads
    return findings.check_token(
        variable=downloads.token_env,
        in_environment=bool(downloads.token_env and environ.get(downloads.token_env)),
        in_file=downloads.token_path is not None and downloads.token_path.is_file(),
        service=bool(services),
    )


def _pins() -> dict[str, set[str]]:
    """What this release pins; nothing where it runs without having been installed."""
    pins: dict[str, set[str]] = {}
    try:
        requirements = metadata.requires("opta-lmx") or ()
    except metadata.PackageNotFoundError:
        requirements = ()
    for match in filter(None, map(_PIN.match, requirements)):
        pins.setdefault(match[1], set()).add(match[2])
    return pins


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
