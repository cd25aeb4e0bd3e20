"""What one model directory holds, told from names, sizes, JSON and headers; no tensor is read.

Nothing here raises for a bad model: it gets a ``problem``, one clause that a request for it is answered with.
"""

import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from opta_lmx.manager.gguf import GgufError, inspect
from opta_lmx.manager.gguf_size import ImportForm, imported_bytes
from opta_lmx.manager.safetensors import SafetensorsError, read_facts
from opta_lmx.types import EchoOptions, JsonObject, ModelFiles

# A configuration is some kilobytes; what is larger is none.
_MAX_JSON_BYTES = 8 * 1024 * 1024

# An index names every tensor of a model: 9 MB for the largest published ones.
_MAX_INDEX_BYTES = 16 * 1024 * 1024

# What the loader reads whole. The largest published tokenizers have 35 MB.
_MAX_LOADED_JSON_BYTES = 256 * 1024 * 1024

# Keys by which a file asks for code of its own to be run, and what each means.
_CODE_KEYS = {
    "model_file": "names code to run",
    "auto_map": "needs code of its own",
    "trust_remote_code": "asks for code to be trusted",
}

# The longest part of a foreign text in a problem.
_SHOWN_CHARACTERS = 100

# No file has a name of more than 255.
_MAX_NAME_CHARACTERS = 256

# Turns a directory into an echo model (types.EchoOptions), for tests and dry runs.
ECHO_NAME = "echo.json"

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
# A directory with one of these is a model, whatever else it lacks; without one it may be a publisher.
_MARKS = (".json", ".safetensors", ".gguf", *_PICKLES)

_CONTEXT_KEYS = (
    "max_position_embeddings",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_positions",
    "n_ctx",
    "model_max_length",
)
# Model types that make vectors instead of text; those the worker has a forward for.
_ENCODER_TYPES = frozenset({"bert", "roberta", "xlm-roberta"})

_DTYPE_LABELS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

Entries: TypeAlias = Mapping[str, os.stat_result]


@dataclass(frozen=True, slots=True)
class Listing:
    """A directory's own files and folders, hidden ones left out.

    ``outside`` are links that leave the root, ``special`` what is neither file nor folder: pipes, sockets, devices.
    """

    files: Entries
    folders: tuple[str, ...]
    outside: tuple[str, ...]
    special: tuple[str, ...] = ()

    @property
    def looks_like_model(self) -> bool:
        """True if the files' names say that this is a model, or was meant to be one."""
        return any(name.endswith(_MARKS) for name in (*self.files, *self.outside, *self.special))

    @property
    def ggufs(self) -> tuple[str, ...]:
        """The names of its GGUF files; none where there are safetensors, which are what is loaded then."""
        if any(name.endswith(".safetensors") for name in self.files):
            return ()
        return tuple(name for name in sorted(self.files) if name.endswith(".gguf"))

    @property
    def fingerprint(self) -> tuple[object, ...]:
        """Differs after any change of the directory that ``describe`` could notice."""
        states = ((name, s.st_size, s.st_mtime_ns, s.st_ino) for name, s in self.files.items())
        return (*sorted(states), self.outside, self.special)


def list_directory(directory: Path, root: Path) -> Listing:
    """Raises OSError if the directory cannot be listed. ``root`` must be free of links (``Path.resolve``)."""
    files: dict[str, os.stat_result] = {}
    folders: list[str] = []
    outside: list[str] = []
    special: list[str] = []
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.startswith(".") or not entry.name.isprintable():
                continue
            # An entry that vanishes or cannot be followed is no reason to lose the others.
            with suppress(OSError):
                if entry.is_symlink() and not Path(os.path.realpath(entry.path)).is_relative_to(root):
                    outside.append(entry.name)
                elif entry.is_dir():
                    folders.append(entry.name)
                elif stat.S_ISREG((status := entry.stat()).st_mode):
                    files[entry.name] = status
                else:
                    special.append(entry.name)
    return Listing(files, tuple(sorted(folders)), tuple(sorted(outside)), tuple(sorted(special)))


class _Problem(Exception):
    """Why a model cannot be loaded; becomes ``ModelFiles.problem``."""


def describe(model_id: str, directory: Path, listing: Listing, form: ImportForm) -> ModelFiles:
    """The model in ``directory``; a GGUF as its import will have ``form``. Raises OSError only if it has gone."""
    size = sum(status.st_size for status in listing.files.values())
    files = _blank(model_id, directory, size, directory.stat())
    try:
        if listing.outside:
            raise _Problem(f"{listing.outside[0]} is a link that leaves the models directory")
        if listing.special:
            # Whoever opens a pipe waits for its writer.
            raise _Problem(f"{listing.special[0]} is neither a file nor a folder")
        if ECHO_NAME in listing.files:
            return _with_echo(files, directory / ECHO_NAME)
        if len(listing.ggufs) > 1:
            raise _Problem(f"it holds {len(listing.ggufs)} GGUF files; keep one")
        if listing.ggufs:
            return _with_gguf(files, directory / listing.ggufs[0], form)
        return _with_config(files, directory, listing.files)
    except _Problem as problem:
        return replace(files, problem=str(problem))
    except OSError as error:
        return replace(files, problem=f"it cannot be read ({error.strerror})")


def describe_gguf(model_id: str, path: Path, form: ImportForm) -> ModelFiles:
    """The model in a GGUF file that lies elsewhere. Raises OSError if it has gone."""
    status = path.stat()
    return _with_gguf(_blank(model_id, path, status.st_size, status), path, form)


def is_encoder(files: ModelFiles) -> bool:
    """True for a model that makes embeddings or scores, and no text."""
    return files.model_type in _ENCODER_TYPES and files.format == "mlx"


def _blank(model_id: str, path: Path, size_bytes: int, status: os.stat_result) -> ModelFiles:
    return ModelFiles(
        id=model_id,
        path=path,
        format="mlx",
        size_bytes=size_bytes,
        weights_bytes=0,
        model_type=None,
        context_length=None,
        quantization=None,
        layers=None,
        kv_heads=None,
        head_dim=None,
        created=int(status.st_mtime),
    )


def _with_gguf(files: ModelFiles, path: Path, form: ImportForm) -> ModelFiles:
    files = replace(files, format="gguf")
    try:
        facts = inspect(path)
    except GgufError as error:
        return replace(files, problem=f"{path.name}: {error.reason}")
    return replace(
        files,
        weights_bytes=imported_bytes(facts.tensors, form),
        model_type=facts.architecture,
        context_length=facts.context_length,
        quantization=facts.quantization,
        layers=facts.layers,
        kv_heads=facts.kv_heads,
        head_dim=facts.head_dim,
        vocab_size=facts.vocab_size,
    )


def _with_echo(files: ModelFiles, path: Path) -> ModelFiles:
    try:
        options = msgspec.json.decode(_read(path, _MAX_JSON_BYTES), type=EchoOptions)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _Problem(f"{ECHO_NAME} is not understood ({error})") from error
    return replace(files, model_type="echo", context_length=options.context_length, echo=options)


def _with_config(files: ModelFiles, directory: Path, entries: Entries) -> ModelFiles:
    if "config.json" not in entries:
        raise _Problem("it has no config.json")
    config = _read_object(directory / "config.json", _MAX_JSON_BYTES)
    files = _with_sizes(files, config)
    _refuse_code("config.json", config)
    _check_others(directory, entries)
    if files.model_type is None:
        raise _Problem("config.json names no model_type")
    bytes_by_dtype = _weights(directory, entries)
    dtype = max(bytes_by_dtype, key=lambda name: bytes_by_dtype[name])
    return replace(
        files,
        weights_bytes=sum(bytes_by_dtype.values()),
        quantization=_quantization(config) or _DTYPE_LABELS.get(dtype, dtype.lower()),
    )


def _refuse_code(name: str, config: JsonObject) -> None:
    for key, meaning in _CODE_KEYS.items():
        if config.get(key) not in (None, False):
            raise _Problem(f"{name} {meaning} ({key}), and only data is loaded")


def _check_others(directory: Path, entries: Entries) -> None:
    """What the loader reads beside config.json."""
    for name, status in entries.items():
        if name.endswith(".json") and status.st_size > _MAX_LOADED_JSON_BYTES:
            raise _Problem(f"{name} is larger than {_MAX_LOADED_JSON_BYTES:,} bytes")
    if "tokenizer_config.json" in entries:
        _refuse_code("tokenizer_config.json", _read_object(directory / "tokenizer_config.json", _MAX_INDEX_BYTES))
    if "modules.json" in entries:
        modules = _read_json(directory / "modules.json", _MAX_JSON_BYTES)
        for module in modules if isinstance(modules, list) else ():
            path = module.get("path") if isinstance(module, dict) else None
            if isinstance(path, str) and not _stays_inside(path):
                raise _Problem(f"modules.json names a path that leaves the model ({path[:_SHOWN_CHARACTERS]!r})")


def _stays_inside(path: str) -> bool:
    parts = path.replace("\\", "/").split("/")
    return not path.startswith(("/", "\\")) and ".." not in parts


def _with_sizes(files: ModelFiles, config: JsonObject) -> ModelFiles:
    """From config.json, where the language model of a larger whole has a section of its own."""
    inner = config.get("text_config")
    sections = [config, inner] if isinstance(inner, dict) else [config]
    heads = _number(sections, ("num_attention_heads", "n_head", "n_heads"))
    width = _number(sections, ("hidden_size", "n_embd", "d_model", "dim"))
    model_type = config.get("model_type")
    return replace(
        files,
        # It becomes the name of a module of the library; the library's own have no other characters.
        model_type=model_type if isinstance(model_type, str) and re.fullmatch(r"[\w-]{1,64}", model_type) else None,
        context_length=_number(sections, _CONTEXT_KEYS),
        layers=_number(sections, ("num_hidden_layers", "n_layer", "n_layers", "num_layers")),
        kv_heads=_number(sections, ("num_key_value_heads", "n_kv_heads")) or heads,
        head_dim=_number(sections, ("head_dim",)) or (width // heads if width and heads else None),
        vocab_size=_number(sections, ("vocab_size",)),
    )


def _number(sections: Sequence[JsonObject], names: Sequence[str]) -> int | None:
    for section in sections:
        for name in names:
            value = section.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None


def _quantization(config: JsonObject) -> str | None:
    for key in ("quantization", "quantization_config"):
        table: Any = config.get(key)
        if not isinstance(table, dict):
            continue
        for name in ("mode", "quant_method"):
            # Affine is what a number of bits alone means.
            if isinstance(table.get(name), str) and table[name] not in ("affine", "awq", "gptq"):
                return str(table[name])
        if isinstance(table.get("bits"), int):
            return f"{table['bits']}bit"
    return None


def _weights(directory: Path, entries: Entries) -> Mapping[str, int]:
    """Bytes by dtype of the files that mlx-lm loads, those called model*.safetensors."""
    names = sorted(name for name in entries if name.endswith(".safetensors"))
    if not names:
        pickled = next((name for name in entries if name.endswith(_PICKLES)), None)
        if pickled is not None:
            raise _Problem(f"its weights are pickled ({pickled}), and loading those would run code; use safetensors")
        raise _Problem("it has no weights (model*.safetensors)")
    loaded = [name for name in names if name.startswith("model")]
    if not loaded:
        raise _Problem(f"its weights are called {names[0]}, but only files called model*.safetensors are loaded")
    _check_index(directory, entries)
    total: dict[str, int] = {}
    for name in loaded:
        try:
            facts = read_facts(directory / name)
        except SafetensorsError as error:
            raise _Problem(f"{name} is damaged: {error}") from error
        for dtype, size in facts.bytes_by_dtype.items():
            total[dtype] = total.get(dtype, 0) + size
    if not total:
        raise _Problem("its weights hold no tensors")
    return total


def _check_index(directory: Path, entries: Entries) -> None:
    name = "model.safetensors.index.json"
    if name not in entries:
        return
    shards = _read_object(directory / name, _MAX_INDEX_BYTES).get("weight_map")
    if not isinstance(shards, dict):
        raise _Problem(f"{name} has no weight_map")
    for shard in sorted({str(shard)[:_MAX_NAME_CHARACTERS] for shard in shards.values()}):
        shown = shard[:_SHOWN_CHARACTERS]
        if not _stays_inside(shard):
            raise _Problem(f"{name} names a path that leaves the model ({shown!r})")
        if shard not in entries:
            raise _Problem(f"{shown if shown.isprintable() else repr(shown)} is missing")


def _read_json(path: Path, limit: int) -> Any:
    try:
        return json.loads(_read(path, limit))
    except (ValueError, RecursionError) as error:
        raise _Problem(f"{path.name} is not JSON ({error})") from error


def _read_object(path: Path, limit: int) -> JsonObject:
    value = _read_json(path, limit)
    if not isinstance(value, dict):
        raise _Problem(f"{path.name} is not a JSON object")
    return value


def _read(path: Path, limit: int) -> bytes:
    with path.open("rb") as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise _Problem(f"{path.name} is larger than {limit:,} bytes")
    return content
