"""The import job: one GGUF file to one MLX model directory, in a process of its own.

    python -m opta_lmx.inference.worker.convert SOURCE.gguf TARGET_DIRECTORY --precision full|half --bits 4|5|6|8

Run by ``manager/importing.py`` on files that ``manager/gguf.py`` has accepted. Progress goes to standard output
as JSON lines ``{"done": n, "total": m}`` (bytes of the source's tensors); a refusal is the line
``{"error": reason}`` and exit code 1. Standard input is the parent's lifeline: at its end the job ends. MLX is not
needed and not imported.

The files grow in ``TARGET.import.incomplete``, held by a lock on that directory while the job lives, and become
TARGET by one rename, so TARGET is whole or absent.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFReader

from opta_lmx.inference.worker import gguf_tensors, gguf_tokenizer
from opta_lmx.inference.worker.gguf_config import (
    Dimensions,
    ImportRefused,
    JsonObject,
    Metadata,
    RopeFactors,
    expert_count,
    model_config,
)
from opta_lmx.inference.worker.gguf_families import family_of

# Part of the name because downloads have incomplete directories too, which must be kept for their resume.
STAGING_SUFFIX = ".import.incomplete"


@dataclass(frozen=True, slots=True)
class Form:
    """What the weights become: ``precision`` full stores floats as F32, half keeps the 16-bit type of the file.

    ``bits`` (4, 5, 6 or 8) is for the block types that MLX cannot hold as they are.
    """

    precision: str
    bits: int = 8


def convert(source: Path, target: Path, form: Form, progress: Callable[[int, int], None]) -> None:
    """Writes the model directory ``target``, replacing one that is there; nothing is left behind by a failure.

    ``progress`` is told the bytes done and those there are. Raises ImportRefused or OSError.
    """
    with _staging(target) as directory:
        if directory is None:
            return
        _write_model(source, directory, form, progress)
        for file in directory.iterdir():
            _sync(file)
        _replace(directory, target)


def _write_model(source: Path, directory: Path, form: Form, progress: Callable[[int, int], None]) -> None:
    reader = GGUFReader(source)
    metadata = Metadata(reader.fields)
    architecture = metadata.text("general.architecture") or ""
    family = family_of(architecture, expert_count(metadata, architecture))
    if family is None:
        raise ImportRefused(f"the architecture {architecture!r} is not supported")
    tensors = {tensor.name: gguf_tensors.Source.of(tensor) for tensor in reader.tensors}
    factors = {name: tensors.pop(f"rope_{name}.weight", None) for name in ("freqs", "factors_long", "factors_short")}
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise ImportRefused("the tensor 'token_embd.weight' is missing")
    sources = list(tensors.values())

    dimensions = Dimensions.of(metadata, architecture, vocab_size=embedding.shape[0])
    if not family.own_head_dim and dimensions.head_dim * dimensions.num_attention_heads != dimensions.hidden_size:
        raise ImportRefused(f"its heads have {dimensions.head_dim} values, and mlx-lm's {family.model_type} divides")
    every, long, short = (_rope_factors(tensor, dimensions) for tensor in factors.values())
    rope = RopeFactors(every, long, short)
    config = model_config(metadata, architecture, family.model_type, dimensions, rope)
    tokenizer = gguf_tokenizer.build(metadata, config["max_position_embeddings"])
    if tokenizer.vocab_size > dimensions.vocab_size:
        raise ImportRefused(f"it has {tokenizer.vocab_size:,} tokens but {dimensions.vocab_size:,} embeddings")

    dtype = "F32" if form.precision == "full" else gguf_tensors.half_dtype(sources, family)
    targets = gguf_tensors.plan(sources, family, dimensions, gguf_tensors.Storage(dtype, form.bits))
    config |= {
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "torch_dtype": {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype],
    }
    token_ids = {"bos_token_id": tokenizer.bos, "pad_token_id": tokenizer.pad, "eos_token_id": list(tokenizer.ends)}
    quantization = gguf_tensors.quantization_table(targets)
    if quantization is not None:
        config["quantization"] = quantization
    _write_json(directory / "config.json", config | token_ids)
    _write_json(directory / "generation_config.json", token_ids)
    _write_json(directory / "tokenizer_config.json", tokenizer.config)
    (directory / "tokenizer.json").write_text(tokenizer.tokenizer, encoding="utf-8")

    total = sum(source.rows.nbytes for source in sources)
    gguf_tensors.write(directory / "model.safetensors", targets, lambda done: progress(done, total))


def _rope_factors(tensor: gguf_tensors.Source | None, dimensions: Dimensions) -> list[float] | None:
    if tensor is None:
        return None
    if tensor.kind != "F32" or tensor.shape != (dimensions.rotary_dim // 2,):
        raise ImportRefused(f"the rotary factors have the shape {tensor.shape} and the type {tensor.kind}")
    factors = tensor.rows.view("<f4").reshape(-1)
    if not (np.isfinite(factors).all() and (factors > 0).all()):
        raise ImportRefused("the rotary factors are not numbers above zero")
    return [float(factor) for factor in factors]


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[Path | None]:
    """An empty directory beside ``target`` that only this process writes; removed at the end if still there.

    None if another process was importing the same target and has just finished it.
    """
    directory = target.with_name(target.name + STAGING_SUFFIX)
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor, waited = _hold(directory)
    try:
        if waited and target.is_dir():
            yield None
        else:
            for left_over in directory.iterdir():
                left_over.unlink()
            yield directory
    finally:
        # After the rename another process may have made its own directory of this name.
        if _is_at(directory, descriptor):
            shutil.rmtree(directory)
        os.close(descriptor)


def _hold(directory: Path) -> tuple[int, bool]:
    """Makes and locks the directory; the descriptor that holds the lock, and whether another process had it first."""
    waited = False
    while True:
        directory.mkdir(exist_ok=True)
        try:
            descriptor = os.open(directory, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = True
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if _is_at(directory, descriptor):
            return descriptor, waited
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _replace(directory: Path, target: Path) -> None:
    if not target.exists():
        directory.rename(target)
        return
    old = target.with_name(target.name + ".old" + STAGING_SUFFIX)
    shutil.rmtree(old, ignore_errors=True)
    target.rename(old)
    directory.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _sync(file: Path) -> None:
    """Puts the bytes on the disk before the rename, so that a power cut cannot leave a whole name on half a file."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(path: Path, value: JsonObject) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")


def _say(message: JsonObject) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)


def main(arguments: list[str]) -> int:
    """Runs the job; the exit code."""
    parser = argparse.ArgumentParser(prog="convert", description="Import a GGUF file into an MLX model directory.")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--precision", choices=("full", "half"), required=True)
    parser.add_argument("--bits", type=int, choices=(4, 5, 6, 8), required=True)
    options = parser.parse_args(arguments)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        convert(
            options.source,
            options.target,
            Form(options.precision, options.bits),
            progress=lambda done, total: _say({"done": done, "total": total}),
        )
    except ImportRefused as refusal:
        _say({"error": str(refusal)})
    except OSError as error:
        _say({"error": error.strerror or str(error)})
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
