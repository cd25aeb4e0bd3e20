"""What a GGUF header tells, every way it can lie, and the import job's files against what went in."""

import json
import struct
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from safetensors.numpy import load_file

from opta_lmx.inference.worker import convert, gguf_tensors, gguf_tokenizer
from opta_lmx.inference.worker.gguf_config import Dimensions, ImportRefused
from opta_lmx.manager import importing
from opta_lmx.manager.gguf import (
    ARCHITECTURES,
    MAX_ARRAY_ITEMS,
    PRE_TOKENIZERS,
    TENSOR_TYPES,
    GgufError,
    inspect,
)
from tests.gguf_files import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    WIDE,
    Vocabulary,
    byte_level_vocabulary,
    random_weights,
    to_pairs,
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


def run(source: Path, target: Path, precision: str = "full") -> dict[str, NDArray[Any]]:
    """Imports in this process and returns the tensors."""
    convert.convert(source, target, precision, progress=lambda done, total: None)
    return load_file(target / "model.safetensors")


# -- the header -------------------------------------------------------------------------------------


def test_facts_are_those_of_the_file(whole: Path, vocabulary: Vocabulary) -> None:
    """Architecture, sizes, types and tokenizer come from the header; matrices weigh more than norms."""
    facts = inspect(whole)
    assert (facts.architecture, facts.tokenizer, facts.quantization) == ("llama", "gpt2", "Q8_0")
    assert (facts.context_length, facts.layers, facts.kv_heads, facts.head_dim) == (256, LAYERS, KV_HEADS, HEAD_DIM)
    assert facts.tensor_types == {"Q8_0": 1 + 7 * LAYERS, "F32": 1 + 2 * LAYERS}
    assert facts.tensor_bytes["F32"] == (1 + 2 * LAYERS) * HIDDEN * 4
    assert facts.tensor_count == 2 + 9 * LAYERS


def test_tables_agree_with_the_package_and_the_job() -> None:
    """What is accepted here is what the job can import, and sizes are those of the format's own package."""
    sizes = {kind.value: (kind.name, *gguf.GGML_QUANT_SIZES[kind]) for kind in Kind}
    assert all(sizes[number] == row for number, row in TENSOR_TYPES.items())
    assert {name for name, _, _ in TENSOR_TYPES.values()} == gguf_tensors.QUANTIZED.keys() | gguf_tensors.FLOATS.keys()
    assert set(ARCHITECTURES) == gguf_tensors.ARCHITECTURES.keys()
    assert set(PRE_TOKENIZERS) == gguf_tokenizer.PRE_TOKENIZERS.keys()
    assert importing.STAGING_SUFFIX == convert.STAGING_SUFFIX


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind.value not in TENSOR_TYPES])
def test_every_other_type_is_refused_by_name(kind: Kind, tmp_path: Path) -> None:
    """A type of the package that cannot be imported is named, with those that can."""
    path = tmp_path / "m.gguf"
    path.write_bytes(header(1, 2, KNOWN + tensor("w", [256], kind.value, 0)) + bytes(4096))
    reason = refusal(path)
    assert f"has the type {kind.name}," in reason
    assert "supported: F32, F16, BF16, Q4_0, Q4_1, Q8_0" in reason


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
        ({"tokenizer.ggml.pre": "tekken"}, "pre-tokenizer 'tekken' is not supported; supported: default"),
        ({"llama.expert_count": 8}, "mixture-of-experts"),
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
    assert refusal(path) == "the architecture 'mamba' is not supported; supported: llama"


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
    assert inspect(path).tensor_count == 1


# -- the job's arithmetic ----------------------------------------------------------------------------


def affine(weights: Mapping[str, NDArray[Any]], module: str, bits: int) -> NDArray[np.float32]:
    """MLX's affine quantisation by its definition: value i of a row stands ``bits * i`` bits into it."""
    packed = weights[f"{module}.weight"]
    rows = np.unpackbits(packed.view(np.uint8), axis=1, bitorder="little").reshape(len(packed), -1, bits)
    values = (rows << np.arange(bits, dtype=np.uint32)).sum(axis=2).astype(np.float32)
    scales, biases = (
        weights[f"{module}.{part}"].astype(np.float32).repeat(32, axis=1) for part in ("scales", "biases")
    )
    return np.asarray(scales * values + biases, dtype=np.float32)


@pytest.mark.parametrize(("kind", "bits"), [(Kind.Q4_0, 4), (Kind.Q4_1, 4), (Kind.Q8_0, 8)])
@pytest.mark.parametrize("precision", ["full", "half"])
def test_blocks_are_repacked_exactly(
    kind: Kind, bits: int, precision: str, tmp_path: Path, vocabulary: Vocabulary
) -> None:
    """Every quantised value is bit for bit that of gguf.quants, with float32 scales and with float16 ones alike."""
    source = tmp_path / "m.gguf"
    held = write_llama(source, random_weights(len(vocabulary.tokens), tied=False), vocabulary, kind)
    weights = run(source, tmp_path / "out", precision)
    for name, expected in held.items():
        if expected.ndim == 2:
            np.testing.assert_array_equal(affine(weights, name.removesuffix(".weight"), bits), expected)
    assert weights["lm_head.scales"].dtype == (np.float32 if precision == "full" else np.float16)


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16])
def test_floats_are_carried_over_exactly(kind: Kind, tmp_path: Path, vocabulary: Vocabulary) -> None:
    """In float32 every float tensor equals the file's, whatever type the file has it in."""
    source = tmp_path / "m.gguf"
    held = write_llama(source, random_weights(len(vocabulary.tokens)), vocabulary, kind)
    weights = run(source, tmp_path / "out")
    assert weights.keys() == held.keys()
    for name, expected in held.items():
        np.testing.assert_array_equal(weights[name], expected)
        assert weights[name].dtype == np.float32


@pytest.mark.parametrize(
    ("kind", "stored"), [(Kind.F32, "float32"), (Kind.F16, "float16"), (Kind.BF16, "bfloat16"), (Kind.Q4_0, "float16")]
)
def test_half_precision_keeps_the_type_of_the_matrices(
    kind: Kind, stored: str, tmp_path: Path, vocabulary: Vocabulary
) -> None:
    """Norms take the type of the matrices, or that of the scales of quantised ones."""
    source, out = tmp_path / "m.gguf", tmp_path / "out"
    write_llama(source, random_weights(len(vocabulary.tokens)), vocabulary, kind)
    convert.convert(source, out, "half", progress=lambda done, total: None)
    with (out / "model.safetensors").open("rb") as file:
        entries = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert entries["model.norm.weight"]["dtype"] == {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[stored]
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == stored


def test_bfloat16_rounds_to_nearest_even() -> None:
    """Rounding is that of gguf.quants, ties included."""
    ties = np.array([0x3F808000, 0x3F818000, 0x3F80C000, 0xBF808001, 0x00000001], np.uint32).view(np.float32)
    values = np.concatenate([ties, np.random.default_rng(0).normal(0, 1, 251).astype(np.float32)])
    expected = gguf.quants.quantize(values, Kind.BF16).view(np.uint16).reshape(-1)
    np.testing.assert_array_equal(gguf_tensors.DTYPES["BF16"](values), expected)


def test_rotary_order_undoes_the_interleaving() -> None:
    """The row order maps what llama.cpp keeps back to halves, for any number of heads."""
    for heads, head_dim in ((1, 2), (2, 8), (9, 64)):
        rows = np.arange(heads * head_dim * 3).reshape(-1, 3)
        np.testing.assert_array_equal(to_pairs(rows, heads)[gguf_tensors.half_order(heads, head_dim)], rows)


def test_mixed_widths_have_a_table(tmp_path: Path, vocabulary: Vocabulary) -> None:
    """The commonest width is the default, every other quantised module is listed, floats are not."""
    weights = random_weights(len(vocabulary.tokens))
    kinds = dict.fromkeys(weights, Kind.Q4_1) | {
        "model.embed_tokens.weight": Kind.F16,
        "model.layers.1.mlp.down_proj.weight": Kind.Q8_0,
    }
    source, out = tmp_path / "m.gguf", tmp_path / "out"
    write_llama(source, weights, vocabulary, kinds)
    run(source, out)
    eight = {"group_size": 32, "bits": 8}
    assert json.loads((out / "config.json").read_text())["quantization"] == {
        "group_size": 32,
        "bits": 4,
        "model.layers.1.mlp.down_proj": eight,
    }


def test_large_tensors_are_written_in_chunks(tmp_path: Path, whole: Path, vocabulary: Vocabulary) -> None:
    """Many chunks give the same file as one, and every one of them is reported."""
    sources = [gguf_tensors.Source.of(tensor) for tensor in gguf.GGUFReader(whole).tensors]
    sizes = Dimensions(HIDDEN, LAYERS, WIDE, HEADS, KV_HEADS, HEAD_DIM, len(vocabulary.tokens))
    targets = gguf_tensors.plan(sources, gguf_tensors.ARCHITECTURES["llama"], sizes, "F16")
    reports: list[int] = []
    gguf_tensors.write(tmp_path / "one", targets, lambda done: None)
    gguf_tensors.write(tmp_path / "many", targets, reports.append, chunk_bytes=100)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "many").read_bytes()
    assert len(reports) > 1000
    assert reports == sorted(set(reports))
    assert reports[-1] == sum(source.rows.nbytes for source in sources)


# -- the job's refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "rotary scaling of type 'yarn'"),
        ({"llama.rope.dimension_count": 16}, "rope.dimension_count is 16 but a head has 32 values"),
        ({"llama.attention.value_length": 16}, "value_length is 16"),
        ({"llama.attention.head_count_kv": [2, 2]}, "'llama.attention.head_count_kv' is '\\[2, 2\\]'"),
        ({"llama.attention.head_count_kv": 3}, "cannot share 3 key-value heads"),
        ({"llama.feed_forward_length": 128}, r"has the shape \(96, 64\), not \(128, 64\)"),
        ({"llama.block_count": 3}, r"'blk\.2\..*' is missing"),
        ({"llama.block_count": 4_000_000_000}, "4,000,000,000 layers but has 20 tensors"),
        ({"llama.block_count": 1}, r"'blk\.1\..*' has no place"),
        ({"llama.context_length": None}, "'llama.context_length' is missing"),
        ({"llama.context_length": "long"}, "not a whole number above zero"),
        ({"llama.rope.freq_base": float("nan")}, "not a number above zero"),
        ({"tokenizer.ggml.eos_token_id": 9_999}, "not a token of the vocabulary"),
        ({"tokenizer.ggml.eos_token_id": None}, "names no end-of-sequence token"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "holds a token twice"),
        ({"tokenizer.ggml.tokens": ["a", "b", "c"]}, "3 tokens but"),
        ({"tokenizer.ggml.merges": ["a"]}, "its merge 'a'"),
        ({"tokenizer.ggml.merges": ["q q"]}, "its merge 'q q'"),
        ({"tokenizer.ggml.add_bos_token": 1}, "neither true nor false"),
    ],
)
def test_what_cannot_be_carried_over_is_refused(
    changes: Mapping[str, Any], reason: str, tmp_path: Path, vocabulary: Vocabulary
) -> None:
    """The job names what it cannot express, and leaves neither the target nor a directory of its own."""
    source = tmp_path / "m.gguf"
    write_llama(source, random_weights(len(vocabulary.tokens)), vocabulary, changes=changes)
    with pytest.raises(ImportRefused, match=reason):
        run(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(
    ("name", "rows", "reason"),
    [
        ("model.norm.bias", 64, r"'output_norm\.bias' has no place"),
        ("model.layers.0.self_attn.q_proj.bias", 128, r"'blk\.0\.attn_k\.bias' is missing"),
        ("model.layers.1.mlp.up_proj.bias", 64, r"has the shape \(64,\), not \(96,\)"),
    ],
)
def test_biases_come_in_whole_groups(name: str, rows: int, reason: str, tmp_path: Path, vocabulary: Vocabulary) -> None:
    """A bias that mlx-lm's llama has no place for, or only a part of a group, is refused."""
    source = tmp_path / "m.gguf"
    weights = random_weights(len(vocabulary.tokens)) | {name: np.zeros(rows, np.float32)}
    write_llama(source, weights, vocabulary)
    with pytest.raises(ImportRefused, match=reason):
        run(source, tmp_path / "out")


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e6])
def test_values_that_do_not_fit_are_refused(value: float, tmp_path: Path, vocabulary: Vocabulary) -> None:
    """A number that is not finite in the type it would be stored in is refused, not turned into infinity."""
    weights = random_weights(len(vocabulary.tokens))
    weights["model.norm.weight"][3] = value
    source = tmp_path / "m.gguf"
    write_llama(source, weights, vocabulary, Kind.F16)
    with pytest.raises(ImportRefused, match=r"output_norm\.weight.*no finite F16 numbers"):
        run(source, tmp_path / "out", "half")


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q8_0])
@pytest.mark.parametrize("scale", [np.inf, np.nan])
def test_scales_that_are_no_numbers_are_refused(
    kind: Kind, scale: float, tmp_path: Path, vocabulary: Vocabulary
) -> None:
    """One damaged block anywhere stops the import."""
    source = tmp_path / "m.gguf"
    write_llama(source, random_weights(len(vocabulary.tokens)), vocabulary, kind)
    target = next(tensor for tensor in gguf.GGUFReader(source).tensors if tensor.name == "blk.1.ffn_down.weight")
    content = bytearray(source.read_bytes())
    content[target.data_offset : target.data_offset + 2] = np.float16(scale).tobytes()
    source.write_bytes(content)
    with pytest.raises(ImportRefused, match=r"blk\.1\.ffn_down\.weight.*no finite F32 numbers"):
        run(source, tmp_path / "out")


def test_an_import_replaces_the_one_before(tmp_path: Path, vocabulary: Vocabulary, whole: Path) -> None:
    """The target is the new model alone, and nothing else stays beside it."""
    out = tmp_path / "out"
    out.mkdir()
    (out / "stale.json").write_text("{}")
    run(whole, out)
    assert {path.name for path in tmp_path.iterdir()} == {"whole.gguf", "out"}
    assert not (out / "stale.json").exists()
