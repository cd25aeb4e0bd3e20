"""What an import costs and what it must not bring: each asked of a fresh interpreter."""

import json
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, distribution

import pytest

from tests.unit.house.source import ROOT, modules

_HEAVY = {"mlx", "mlx_lm", "vllm_mlx", "transformers", "torch"}


def _imported_by(*names: str) -> set[str]:
    """The top-level modules an interpreter holds after importing some of ours."""
    program = "import importlib, json, sys\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    program += "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", program, *names], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_command_line_is_light() -> None:
    """``opta-lmx --help`` pays for neither the web framework nor MLX."""
    assert _imported_by("opta_lmx.cli") & {*_HEAVY, "fastapi", "starlette", "uvicorn"} == set()


def test_the_server_is_free_of_mlx() -> None:
    """The server process loads no model code: a Metal abort or a slow import cannot touch it."""
    assert _imported_by("opta_lmx.main") & _HEAVY == set()


def test_the_server_is_free_of_fastapi() -> None:
    """It writes the OpenAPI document, in another process; its import was a fifth of the time to the first answer."""
    assert "fastapi" not in _imported_by("opta_lmx.main")


def test_the_echo_backend_is_free_of_mlx() -> None:
    """A worker that echoes starts in the time of a bare interpreter."""
    assert _imported_by("opta_lmx.inference.worker.echo_backend") & _HEAVY == set()


@pytest.mark.mlx
@pytest.mark.timeout(60)
def test_every_module_imports_without_what_is_kept_out() -> None:
    """All of ours import in this environment, the MLX backend too, and none of them needs torch."""
    # A __main__ is run, not imported.
    names = [module.name for module in modules() if not module.name.endswith("__main__")]
    loaded = _imported_by(*names)
    assert {"mlx", "vllm_mlx"} <= loaded
    assert "torch" not in loaded


def test_what_is_kept_out_is_not_installed() -> None:
    """Every package that [tool.uv] overrides away is absent, so the import test above proves something."""
    overrides = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]["override-dependencies"]
    kept_out = [line.partition(";")[0].strip() for line in overrides if "sys_platform == 'never'" in line]
    assert "torch" in kept_out
    assert [name for name in kept_out if _is_installed(name)] == []


def _is_installed(name: str) -> bool:
    try:
        distribution(name)
    except PackageNotFoundError:
        return False
    return True
