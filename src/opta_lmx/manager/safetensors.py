"""What a safetensors file holds, from its header alone: exact tensor bytes without reading a tensor.

The layout, as its authors define it: a little-endian u64 header length, a JSON object of that many bytes, then
one buffer that the tensors fill without gap or overlap. A file that breaks any of these is refused here, before
a worker is given it.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

# The format allows 100 MB, which decodes to over a gigabyte of objects. An entry takes about 120 bytes, so this
# still holds 130,000 tensors in one file; the largest published shards hold a few thousand.
MAX_HEADER_BYTES = 16 * 1024 * 1024

_LENGTH_BYTES = 8

_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}


class SafetensorsError(Exception):
    """The file is not a whole safetensors file; the message says what is wrong, without its path."""


_Size = Annotated[int, msgspec.Meta(ge=0)]
# No framework makes tensors of more axes; without a bound their product alone could take minutes.
_Shape = Annotated[list[_Size], msgspec.Meta(max_length=64)]


class _Tensor(msgspec.Struct, frozen=True):
    dtype: str
    shape: _Shape
    data_offsets: tuple[_Size, _Size]


@dataclass(frozen=True, slots=True)
class SafetensorsFacts:
    """``bytes_by_dtype`` maps the format's dtype names to the bytes their tensors take."""

    tensor_count: int
    bytes_by_dtype: Mapping[str, int]

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors: what loading them takes."""
        return sum(self.bytes_by_dtype.values())


_tensors = msgspec.json.Decoder(dict[str, _Tensor])
_raw = msgspec.json.Decoder(dict[str, msgspec.Raw])


def read_facts(path: Path) -> SafetensorsFacts:
    """Checks the header against itself and against the file's size.

    Raises SafetensorsError for anything a loader would trip over, OSError if the file cannot be read. Reads the
    header only, at most MAX_HEADER_BYTES.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(_LENGTH_BYTES)
        if len(prefix) < _LENGTH_BYTES:
            raise SafetensorsError(f"it is only {len(prefix)} bytes long")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise SafetensorsError(f"its header claims {length:,} bytes, over the limit of {MAX_HEADER_BYTES:,}")
        if _LENGTH_BYTES + length > size:
            raise SafetensorsError(f"its header claims {length:,} bytes but the file has {size:,}")
        header = file.read(length)
    tensors = _decode(header)
    _check_extents(tensors, size - _LENGTH_BYTES - length)
    bytes_by_dtype: dict[str, int] = {}
    for tensor in tensors.values():
        start, end = tensor.data_offsets
        bytes_by_dtype[tensor.dtype] = bytes_by_dtype.get(tensor.dtype, 0) + end - start
    return SafetensorsFacts(len(tensors), bytes_by_dtype)


def _decode(header: bytes) -> dict[str, _Tensor]:
    try:
        json.loads(header, object_pairs_hook=_refuse_duplicates)
        entries = _raw.decode(header)
        # The one entry that is no tensor; its values are free text.
        entries.pop("__metadata__", None)
        return _tensors.decode(msgspec.json.encode(entries))
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise SafetensorsError(f"its header is not a table of tensors ({error})") from error


def _refuse_duplicates(pairs: list[tuple[str, object]]) -> None:
    """Of two entries of one name readers may take either, and so load another tensor than was counted here."""
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            raise ValueError(f"{name[:100]!r} stands in it twice")
        seen.add(name)


def _check_extents(tensors: Mapping[str, _Tensor], buffer_bytes: int) -> None:
    for name, tensor in tensors.items():
        bits = _BITS.get(tensor.dtype)
        if bits is None:
            raise SafetensorsError(f"tensor {name!r} has the unknown type {tensor.dtype!r}")
        start, end = tensor.data_offsets
        need_bits = math.prod(tensor.shape) * bits
        if need_bits != (end - start) * 8:
            raise SafetensorsError(f"tensor {name!r} of shape {tensor.shape} does not fill its {end - start:,} bytes")
    at = 0
    for start, end in sorted(tensor.data_offsets for tensor in tensors.values()):
        if start != at:
            raise SafetensorsError(f"its tensors overlap or leave a gap at byte {min(start, at):,} of the data")
        at = end
    if at > buffer_bytes:
        raise SafetensorsError(f"it is truncated: its tensors need {at:,} bytes but {buffer_bytes:,} are there")
    if at < buffer_bytes:
        raise SafetensorsError(f"{buffer_bytes - at:,} bytes follow its last tensor")
