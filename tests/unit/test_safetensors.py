"""What the header reader counts, and everything it must refuse."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save

from opta_lmx.manager.safetensors import MAX_HEADER_BYTES, SafetensorsError, read_facts

U8 = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def test_bytes_are_those_of_the_tensors(tmp_path: Path) -> None:
    """A file of the reference writer is counted exactly, by dtype, its metadata left aside."""
    tensors: dict[str, NDArray[Any]] = {
        "a": np.zeros((3, 5), np.float32),
        "b": np.zeros((7,), np.float16),
        "c": np.zeros((2, 2), np.uint32),
        "d": np.zeros((), np.float32),
        "e": np.zeros((0, 8), np.float16),
    }
    path = tmp_path / "model.safetensors"
    path.write_bytes(save(tensors, metadata={"format": "mlx"}))
    facts = read_facts(path)
    assert facts.bytes_by_dtype == {"F32": 64, "F16": 14, "U32": 16}
    assert facts.data_bytes == 94
    assert facts.tensor_count == 5


def test_packed_types_count_bits(tmp_path: Path) -> None:
    """Types narrower than a byte fill as many bytes as their bits need."""
    path = write(tmp_path / "m", {"x": {"dtype": "F4", "shape": [6], "data_offsets": [0, 3]}}, b"abc")
    assert read_facts(path).data_bytes == 3


@given(cut=st.integers(min_value=0))
def test_every_truncation_is_refused(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A whole file less any number of its last bytes is no file."""
    whole = save({"a": np.arange(12, dtype=np.float32), "b": np.arange(5, dtype=np.uint8)})
    path = tmp_path_factory.getbasetemp() / "truncated"
    path.write_bytes(whole[: cut % len(whole)])
    with pytest.raises(SafetensorsError):
        read_facts(path)


@pytest.mark.parametrize(
    ("header", "data", "reason"),
    [
        ({"x": {**U8, "dtype": "Q4"}}, b"abcd", "unknown type 'Q4'"),
        ({"x": {**U8, "shape": [5]}}, b"abcd", "does not fill its 4 bytes"),
        ({"x": {**U8, "shape": [-4]}}, b"abcd", "not a table of tensors"),
        ({"x": {**U8, "data_offsets": [4, 0]}}, b"abcd", "does not fill"),
        ({"x": {**U8, "data_offsets": [-4, 0]}}, b"abcd", "not a table of tensors"),
        ({"x": {**U8, "data_offsets": [0, 4, 8]}}, b"abcd", "not a table of tensors"),
        ({"x": {**U8, "data_offsets": ["0", "4"]}}, b"abcd", "not a table of tensors"),
        ({"x": {**U8, "shape": [2**60, 2**60]}}, b"abcd", "does not fill"),
        ({"x": {**U8, "shape": [2**62] * 100}}, b"abcd", "not a table of tensors"),
        ({"x": U8, "y": U8}, b"abcd", "overlap or leave a gap at byte 0"),
        ({"x": U8, "y": {**U8, "data_offsets": [6, 10]}}, b"abcdefghij", "overlap or leave a gap at byte 4"),
        ({"x": U8}, b"abc", "truncated: its tensors need 4 bytes but 3 are there"),
        ({"x": U8}, b"abcdef", "2 bytes follow its last tensor"),
        ({"x": {**U8, "data_offsets": [0, 10**12], "shape": [10**12]}}, b"abcd", "truncated"),
        ([U8], b"abcd", "not a table of tensors"),
        ({"x": 1}, b"", "not a table of tensors"),
        (b"\xff\xfe{}", b"", "not a table of tensors"),
        (b'{"x": ' + b"[" * 100_000, b"", "not a table of tensors"),
        (b"{", b"", "not a table of tensors"),
        (b'{"x": %s, "x": %s}' % ((json.dumps(U8).encode(),) * 2), b"abcd", "'x' stands in it twice"),
        (
            b'{"x": {"dtype": "U8", "dtype": "I8", "shape": [4], "data_offsets": [0, 4]}}',
            b"abcd",
            "'dtype' stands in it",
        ),
    ],
)
def test_bad_headers_are_refused(header: Any, data: bytes, reason: str, tmp_path: Path) -> None:
    """Each way a header can disagree with itself or the file is named."""
    with pytest.raises(SafetensorsError, match=reason):
        read_facts(write(tmp_path / "model.safetensors", header, data))


@pytest.mark.parametrize("length", [3, MAX_HEADER_BYTES, MAX_HEADER_BYTES + 1, 10**12, 2**64 - 1])
def test_claimed_header_lengths_are_checked_before_reading(length: int, tmp_path: Path) -> None:
    """A length past the file or the limit is refused whatever it claims, and one that cuts the header is no JSON."""
    with pytest.raises(SafetensorsError):
        read_facts(write(tmp_path / "model.safetensors", {"x": U8}, b"abcd", length=length))


def test_a_file_too_short_for_a_length_is_refused(tmp_path: Path) -> None:
    """An empty file has no header to read."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    with pytest.raises(SafetensorsError, match="only 0 bytes"):
        read_facts(path)
