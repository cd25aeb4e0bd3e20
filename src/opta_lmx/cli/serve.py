"""The verb ``serve``: everything that can be found wrong before the server starts."""

import errno
import gc
import os
import socket
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from opta_lmx.cli.arguments import Arguments
from opta_lmx.cli.failure import Failure
from opta_lmx.cli.install import complete_installation
from opta_lmx.cli.settings import load_settings, read_config


def serve(arguments: Arguments, environ: Mapping[str, str]) -> int:
    """Run the server until it is told to stop; gives its exit code. Raises Failure if it cannot start."""
    config, path = read_config(arguments, environ)
    check_address(config.server.host, config.server.port)
    complete_installation(environ)
    # A relative path means the same file for as long as the server runs; one that is gone is no reason for defaults.
    file = path.absolute() if path else None
    with ExitStack() as held:
        _take_directory(config.models.directory, held)
        # Next to nothing of a start is garbage, and looking for it takes a tenth of the start. ``main`` turns it on.
        gc.disable()
        from opta_lmx.main import serve as run_server

        return run_server(config, path, lambda: load_settings(arguments, environ, file)[0])


def _take_directory(directory: Path, held: ExitStack) -> None:
    """This server alone has the models directory until ``held`` ends; what it creates is its user's alone."""
    from opta_lmx.service.lock import DirectoryInUse, hold

    # For the children too: workers, imports, downloads.
    os.umask(0o077)
    try:
        held.enter_context(hold(directory))
    except DirectoryInUse as error:
        stop = f"kill {error.pid}, or opta-lmx service stop" if error.pid else "opta-lmx service stop"
        raise Failure(str(error), f"stop it ({stop}), or set another models.models_directory") from None
    except OSError as error:
        hint = "look at who owns it, or set another models.models_directory"
        raise Failure(f"the models directory {directory} cannot be used: {error.strerror}", hint) from None


def check_address(host: str, port: int) -> None:
    """Raises Failure if ``host:port`` cannot be listened on, naming who holds it where that can be seen."""
    shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in addresses:
            with socket.socket(family, kind, protocol) as probe:
                # As the server will: a port whose last connections still linger is free.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                probe.bind(address)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            hint = f"stop it, or choose another port: --port {port + 1 if port < 65535 else port - 1}"
            raise Failure(f"{shown} is in use by {_holder(port)}", hint) from None
        hint = "choose another address: --host HOST --port PORT"
        raise Failure(f"{shown} cannot be listened on: {error.strerror}", hint) from None


def _holder(port: int) -> str:
    """The process that listens on ``port``, as far as this user may see."""
    import psutil

    # Process by process: asking for all connections at once takes root on macOS.
    for process in psutil.process_iter():
        try:
            connections = process.net_connections(kind="tcp")
            if any(link.status == psutil.CONN_LISTEN and link.laddr.port == port for link in connections):
                return f"{process.name()} (pid {process.pid})"
        except psutil.Error:
            continue
    return "another process"
