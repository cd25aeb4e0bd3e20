"""The command line of ``scripts/bench``. The table goes to standard output, progress to standard error."""

import argparse
import asyncio
import json
import secrets
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import uvloop

from tests.load.bench.conditions import read_conditions, read_cpu
from tests.load.bench.measure import MODELS, Elsewhere, Measured, Run, measure_elsewhere, measure_model
from tests.load.bench.processes import BenchError
from tests.load.bench.report import to_json, to_text
from tests.load.bench.targets import can_serve_vllm_mlx

_DESCRIPTION: Final = """\
Measures the server against mlx-lm without a server, in one run and in turns: throughput, latency, prefix reuse, long
prompts against running streams, disconnects, cold start, memory. Exit code 0 if everything was measured, whatever the
numbers; 1 if something was not; 2 for a wrong command line.
"""


def main() -> int:
    """Run what the command line asks for."""
    arguments = _parse(sys.argv[1:])
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            return runner.run(_bench(arguments))
        except (KeyboardInterrupt, asyncio.CancelledError):
            sys.stderr.write("error: stopped before the end\n")
            return 1


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=_DESCRIPTION)
    parser.add_argument("--models", default=",".join(MODELS), help="of %(default)s, separated by commas")
    parser.add_argument("--rounds", type=int, default=3, help="medians are taken over so many (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="fewer batches and shorter answers")
    parser.add_argument("--seed", type=int, help="of the prompts (default: another one in each run)")
    parser.add_argument("--json", metavar="FILE", help="write every sample there; - for standard output, then no table")
    parser.add_argument("--against", metavar="URL", help="measure a server that runs already: http://HOST:PORT")
    parser.add_argument("--model", metavar="ID", help="the model to ask that server for")
    parser.add_argument("--model-dir", type=Path, metavar="DIR", help="its directory, to measure mlx-lm itself as well")
    parser.add_argument(
        "--vllm-mlx",
        metavar="PYTHON",
        nargs="?",
        const=sys.executable,
        help="measure vllm-mlx's own server beside ours, by an interpreter that has it whole",
    )
    arguments = parser.parse_args(words)
    arguments.models = [name for name in arguments.models.split(",") if name]
    if unknown := [name for name in arguments.models if name not in MODELS]:
        parser.error(f"no such model: {', '.join(unknown)}")
    if (arguments.against is None) != (arguments.model is None):
        parser.error("--against and --model go together")
    if arguments.against is not None and arguments.vllm_mlx is not None:
        parser.error("--vllm-mlx is measured beside our own server, not with --against")
    if arguments.rounds < 1:
        parser.error("--rounds must be at least 1")
    if arguments.model_dir is not None and not (arguments.model_dir / "config.json").is_file():
        parser.error(f"{arguments.model_dir} is no model directory")
    return arguments


async def _bench(arguments: argparse.Namespace) -> int:
    task = asyncio.current_task()
    assert task is not None
    # So that every process started here is ended here.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    run = Run(
        rounds=arguments.rounds,
        seed=secrets.randbits(32) if arguments.seed is None else arguments.seed,
        quick=arguments.quick,
        vllm_mlx=await _usable_vllm_mlx(arguments.vllm_mlx),
    )
    conditions = read_conditions(run)
    cpu = read_cpu()
    with tempfile.TemporaryDirectory(prefix="opta-lmx-bench-") as scratch:
        measured, failed = await _measure(arguments, run, Path(scratch))
    conditions["other processes meanwhile"] = f"{cpu.cores_of_others(read_cpu()):.2f} cores busy"
    if measured:
        _write(arguments.json, measured, conditions)
    return int(failed or any(one.book.failures for one in measured))


async def _measure(arguments: argparse.Namespace, run: Run, scratch: Path) -> tuple[list[Measured], bool]:
    """What was measured, and whether a model could not be measured at all."""
    measured: list[Measured] = []
    failed = False
    for name in ["elsewhere"] if arguments.against else arguments.models:
        try:
            if arguments.against:
                directory = arguments.model_dir.resolve() if arguments.model_dir else None
                server = Elsewhere(arguments.against, arguments.model, directory)
                measured.append(await measure_elsewhere(server, run, scratch / name))
            else:
                measured.append(await measure_model(name, run, scratch / name))
        except (BenchError, OSError) as error:
            sys.stderr.write(f"error: {name}: {error}\n")
            failed = True
    return measured, failed


async def _usable_vllm_mlx(python: str | None) -> str | None:
    """The interpreter if it can run vllm-mlx's server; else None, and one line that says why."""
    if python is None:
        return None
    missing = await can_serve_vllm_mlx(python)
    if missing is None:
        return python
    sys.stderr.write(f"vllm-mlx is left out, its server cannot be imported by {python}: {missing}\n")
    return None


def _write(destination: str | None, measured: list[Measured], conditions: dict[str, object]) -> None:
    if destination is not None:
        content = json.dumps(to_json(measured, conditions), indent=1) + "\n"
        if destination == "-":
            sys.stdout.write(content)
            return
        Path(destination).write_text(content, encoding="utf-8")
    sys.stdout.write(to_text(measured, conditions))


if __name__ == "__main__":
    sys.exit(main())
