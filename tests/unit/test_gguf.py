"""What a GGUF header tells, and every way it can lie."""

import struct
import tracemalloc
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from opta_lmx.inference.worker import convert, gguf_blocks, gguf_families, gguf_tokenizer
from opta_lmx.manager import importing
from opta_lmx.manager.gguf import (
    ARCHITECTURES,
    EXPERT_ARCHITECTURES,
    MAX_ARRAY_ITEMS,
    PRE_TOKENIZERS,
    TENSOR_TYPES,
    GgufError,
    inspect,
)
from tests.gguf_files import (
    HEAD_DIM,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    Vocabulary,
    byte_level_vocabulary,
    random_weights,
    write_gguf,
    write_llama,
)

TERABYTE = 10**12


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return byte_level_vocabulary()


@pytest.fixture
def whole(tmp_path: Path, vocabulary: Vocabulary) -> Path:
    """A file that can be imported."""
    path = tmp_path / "whole.gguf"
    write_llama(path, random_weights(len(vocabulary.tokens)), vocabulary, Kind.Q8_0)
    return path


def header(tensors: int, keys: int, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + body


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def string(key: str, value: str) -> bytes:
    return text(key) + struct.pack("<I", 8) + text(value)


KNOWN = string("general.architecture", "llama") + string("tokenizer.ggml.model", "llama")


def tensor(name: str, shape: list[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def refusal(path: Path) -> str:
    with pytest.raises(GgufError) as raised:
        inspect(path)
    return raised.value.reason


def test_facts_are_those_of_the_file(whole: Path, vocabulary: Vocabulary) -> None:
    """Architecture, sizes, types and tokenizer come from the header; matrices weigh more than norms."""
    facts = inspect(whole)
    assert (facts.architecture, facts.tokenizer, facts.quantization) == ("llama", "gpt2", "Q8_0")
    assert (facts.context_length, facts.layers, facts.kv_heads, facts.head_dim) == (256, LAYERS, KV_HEADS, HEAD_DIM)
    kinds = Counter(tensor.kind for tensor in facts.tensors)
    assert kinds == {"Q8_0": 1 + 7 * LAYERS, "F32": 1 + 2 * LAYERS}
    assert facts.vocab_size == len(vocabulary.tokens)
    assert facts.tensor_bytes["F32"] == (1 + 2 * LAYERS) * HIDDEN * 4


def test_tables_agree_with_the_package_and_the_job() -> None:
    """What is accepted here is what the job can import, and sizes are those of the format's own package."""
    sizes = {kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in Kind}
    assert all(sizes[number] == row for number, row in TENSOR_TYPES.items())
    importable = gguf_blocks.FLOATS.keys() | gguf_blocks.EXACT.keys() | gguf_blocks.DEQUANTIZED
    assert {name for name, _, _ in TENSOR_TYPES.values()} == importable
    assert set(ARCHITECTURES) == gguf_families.FAMILIES.keys()
    with_experts = {name for name in ARCHITECTURES if gguf_families.family_of(name, 8) is not None}
    assert set(EXPERT_ARCHITECTURES) == with_experts
    assert set(PRE_TOKENIZERS) == gguf_tokenizer.PRE_TOKENIZERS.keys()
    assert importing.STAGING_SUFFIX == convert.STAGING_SUFFIX


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind.value not in TENSOR_TYPES])
def test_every_other_type_is_refused_by_name(kind: Kind, tmp_path: Path) -> None:
    """A type of the package that cannot be imported is named, with those that can."""
    path = tmp_path / "m.gguf"
    path.write_bytes(header(1, 2, KNOWN + tensor("w", [256], kind.value, 0)) + bytes(4096))
    reason = refusal(path)
    assert f"has the type {kind.name}," in reason
    assert "supported: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K" in reason


def test_every_truncation_is_refused(whole: Path, tmp_path: Path) -> None:
    """A file cut anywhere, in its header or in its tensors, is refused."""
    content = whole.read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in {*range(64), *range(64, len(content), 997), len(content) - 1}:
        cut.write_bytes(content[:length])
        assert "truncated" in refusal(cut)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer kind 'bert' is not supported; supported: gpt2, llama"),
        ({"tokenizer.ggml.model": None}, "tokenizer kind None is not supported"),
        ({"tokenizer.ggml.pre": "superbpe"}, "pre-tokenizer 'superbpe' is not supported; supported: default"),
        ({"split.count": 3}, "one part of a model"),
        ({"general.alignment": 48}, "alignment 48 is not a power of two"),
    ],
)
def test_what_cannot_be_imported_is_refused(
    changes: Mapping[str, Any], reason: str, tmp_path: Path, vocabulary: Vocabulary
) -> None:
    """A whole file that needs what the import has not is refused with the reason."""
    path = tmp_path / "m.gguf"
    write_llama(path, random_weights(len(vocabulary.tokens)), vocabulary, changes=changes)
    assert reason in refusal(path)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    """The message names the supported ones."""
    path = tmp_path / "m.gguf"
    write_gguf(path, {}, [("w", np.zeros(4, np.float32), Kind.F32)], architecture="mamba")
    supported = ", ".join(ARCHITECTURES)
    assert refusal(path) == f"the architecture 'mamba' is not supported; supported: {supported}"


def test_experts_are_refused_where_there_is_no_class_for_them(tmp_path: Path) -> None:
    """A mixture of experts of a family that is supported without them is refused, with those that are."""
    path = tmp_path / "m.gguf"
    write_gguf(path, {"granite.expert_count": 8}, [("w", np.zeros(4, np.float32), Kind.F32)], architecture="granite")
    expected = "mixture-of-experts models of 'granite' are not supported; supported: llama, qwen3moe"
    assert refusal(path) == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "truncated"),
        (b"PK\x03\x04" + bytes(60), "not a GGUF file"),
        (header(0, 0, version=1), "version 1 is not supported"),
        (header(0, 0, version=3 << 24), r"version 50331648 \(big-endian\)"),
        (header(TERABYTE, 0), "claims 1,000,000,000,000 tensors"),
        (header(0, 2**64 - 1), "keys, over the limit"),
        (header(0, 1, struct.pack("<Q", TERABYTE)), "bytes in one string"),
        (header(0, 1, text("k") + struct.pack("<IQ", 8, TERABYTE)), "truncated"),
        (header(0, 1, text("k") + struct.pack("<IQ", 8, 2**64 - 1)), "truncated"),
        (header(0, 1, text("general.name") + struct.pack("<IQ", 8, TERABYTE)), "bytes in one string"),
        (header(0, 1, text("k") + struct.pack("<IIQ", 9, 4, TERABYTE)), "list items"),
        (header(0, 1, text("k") + struct.pack("<IIQ", 9, 4, MAX_ARRAY_ITEMS)), "truncated"),
        (header(0, 1, text("k") + struct.pack("<IIQ", 9, 8, MAX_ARRAY_ITEMS)), "truncated"),
        (header(0, 1, text("k") + struct.pack("<IIQQ", 9, 8, 1, TERABYTE)), "truncated"),
        (header(0, 1, text("k") + struct.pack("<IIQ", 9, 9, 1)), "unknown kind 9"),
        (header(0, 1, text("k") + struct.pack("<I", 77)), "unknown kind 77"),
        (header(0, 2, string("a", "1") + string("a", "2")), "key 'a' twice"),
        (header(0, 1, struct.pack("<Q", 2) + b"\xff\xff"), "not UTF-8"),
        (header(0, 0), "names no architecture"),
        (header(0, 2, KNOWN), "holds no tensors"),
        (header(1, 2, KNOWN + text("w") + struct.pack("<I", 5)), "axes of a tensor"),
        (header(1, 2, KNOWN + tensor("w", [], 0, 0)), r"impossible shape \[\]"),
        (header(1, 2, KNOWN + tensor("w", [0], 0, 0)), "impossible shape"),
        (header(1, 2, KNOWN + tensor("w", [31], 8, 0)), "impossible shape"),
        (header(1, 2, KNOWN + tensor("w", [32], 14, 0)), "impossible shape"),
        (header(1, 2, KNOWN + tensor("w", [2**63] * 4, 0, 0)), "truncated"),
        (header(1, 2, KNOWN + tensor("w", [4], 0, TERABYTE)), "truncated"),
        (header(1, 2, KNOWN + tensor("w", [4], 0, 7)), "not aligned"),
        (header(1, 2, KNOWN + tensor("w", [4], 99, 0)), "type number 99"),
        (header(2, 2, KNOWN + tensor("w", [4], 0, 0) * 2), "tensor 'w' twice"),
    ],
)
def test_a_hostile_header_costs_little(content: bytes, reason: str, tmp_path: Path) -> None:
    """Each lie is refused by its reason, before memory is taken for what it claims."""
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(GgufError, match=reason):
            inspect(path)
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
    finally:
        tracemalloc.stop()


def test_tensors_that_share_bytes_cannot_multiply(tmp_path: Path) -> None:
    """Many tensors over the same bytes are refused, so that an import is never much larger than its file."""
    path = tmp_path / "m.gguf"
    tensors = b"".join(tensor(f"w{i}", [256], 0, 0) for i in range(64))
    path.write_bytes(header(64, 2, KNOWN + tensors) + bytes(4096))
    assert refusal(path) == "its tensors overlap"


def test_a_long_list_across_many_reads_is_stepped_over(tmp_path: Path) -> None:
    """Strings of every length around the size of a read end exactly where the next key starts."""
    lengths = [0, 1, 7, 1_048_568, 1_048_576, 1_048_577, 3, 2_500_000, 0]
    items = b"".join(struct.pack("<Q", length) + bytes(length) for length in lengths)
    path = tmp_path / "m.gguf"
    body = text("k") + struct.pack("<IIQ", 9, 8, len(lengths)) + items + KNOWN
    path.write_bytes(header(1, 3, body + tensor("w", [4], 0, 0)) + bytes(64))
    assert [tensor.name for tensor in inspect(path).tensors] == ["w"]
