"""Blocks of numbers on their way from GGUF to MLX: what is moved is equal, what is quantised again is close."""

import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray

from opta_lmx.inference.worker import gguf_blocks, gguf_tensors
from opta_lmx.inference.worker.gguf_config import Dimensions
from opta_lmx.inference.worker.gguf_families import FAMILIES, Family
from tests.gguf_files import pack_q6_k, random_blocks


def affine(parts: tuple[NDArray[Any], NDArray[Any], NDArray[Any]], bits: int) -> NDArray[np.float32]:
    """One group a row by the definition: value i stands ``bits * i`` bits into it."""
    packed, scales, biases = parts
    rows = np.unpackbits(packed.view(np.uint8), axis=1, bitorder="little").reshape(len(packed), -1, bits)
    values = (rows << np.arange(bits, dtype=np.uint32)).sum(axis=2).astype(np.float32)
    return np.asarray(scales * values + biases, dtype=np.float32)


@pytest.mark.parametrize("kind", gguf_blocks.EXACT)
def test_moved_blocks_are_equal(kind: str) -> None:
    """Every value of random blocks, all scales and offsets included, is bit for bit the package's."""
    blocks = random_blocks(Kind[kind], 8, 1024, np.random.default_rng(0))
    exact = gguf_blocks.EXACT[kind]
    found = affine(exact.unpack(blocks.reshape(-1, exact.block_bytes)), exact.bits)
    np.testing.assert_array_equal(found, gguf.quants.dequantize(blocks, Kind[kind]).reshape(-1, 32))


@pytest.mark.parametrize("kind", sorted(gguf_blocks.DEQUANTIZED))
def test_dequantised_types_are_the_packages(kind: str) -> None:
    """Each type that is quantised again has values the package knows."""
    blocks = random_blocks(Kind[kind], 4, 512, np.random.default_rng(0))
    values = gguf_blocks.dequantize(kind, blocks)
    assert values.shape == (4, 512)
    np.testing.assert_array_equal(values, gguf.quants.dequantize(blocks, Kind[kind]))


@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_quantised_values_are_within_a_step(bits: int, dtype: str) -> None:
    """Wherever the values lie; a group of zeros, or of any one value, keeps it."""
    rng = np.random.default_rng(0)
    values = rng.normal(0, 0.05, (256, 64)).astype(np.float32)
    values[:32] += 0.5
    values[32:64] -= 0.5
    values[64] = 0
    values[65] = np.float16(0.375)
    parts = gguf_blocks.quantize(values, bits, lambda array: gguf_blocks.rounded(array, dtype))
    found, scales = affine(parts, bits), parts[1]
    assert parts[0].shape == (256, 2 * bits)
    assert (np.abs(found - values) <= np.abs(scales) * 1.01).all()
    np.testing.assert_array_equal(found[64], 0)
    np.testing.assert_array_equal(found[65], values[65])


def test_the_tests_own_q6_k_is_one() -> None:
    """The packer of the tests makes blocks whose values are near what went in."""
    values = np.random.default_rng(0).normal(0, 0.05, (4, 512)).astype(np.float32)
    found = gguf.quants.dequantize(pack_q6_k(values), Kind.Q6_K)
    assert np.abs(found - values).max() < 0.006


def test_a_large_tensor_takes_little_memory(tmp_path: Path) -> None:
    """Sixteen million values, 64 MiB as floats, pass through a few chunks' worth of memory."""
    rows = random_blocks(Kind.Q6_K, 4096, 4096, np.random.default_rng(0))
    source = gguf_tensors.Source("token_embd.weight", "Q6_K", (4096, 4096), rows)
    sizes = Dimensions(4096, 0, 1, 1, 1, 4096, 4096)
    family = Family(model_type="llama", block=FAMILIES["llama"].block, top={"token_embd": "model.embed_tokens"})
    targets = gguf_tensors.plan([source], family, sizes, gguf_tensors.Storage("F16", 8))
    tracemalloc.start()
    try:
        gguf_tensors.write(tmp_path / "m", targets, lambda done: None, chunk_values=64 * 1024)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()
    assert (tmp_path / "m").stat().st_size > 4096 * 4096
