"""The import job's files against what went into the GGUF, bit for bit, and what it refuses to carry over."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from numpy.typing import NDArray
from safetensors.numpy import load_file

from opta_lmx.inference.worker import convert, gguf_blocks, gguf_tensors
from opta_lmx.inference.worker.convert import Form
from opta_lmx.inference.worker.gguf_config import Dimensions, ImportRefused
from opta_lmx.inference.worker.gguf_families import FAMILIES
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
    write_llama,
)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return byte_level_vocabulary()


@pytest.fixture
def whole(tmp_path: Path, vocabulary: Vocabulary) -> Path:
    """A file that can be imported."""
    path = tmp_path / "whole.gguf"
    write_llama(path, random_weights(len(vocabulary.tokens)), vocabulary, Kind.Q8_0)
    return path


def run(source: Path, target: Path, precision: str = "full") -> dict[str, NDArray[Any]]:
    """Imports in this process and returns the tensors."""
    convert.convert(source, target, Form(precision), progress=lambda done, total: None)
    return load_file(target / "model.safetensors")


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


@pytest.mark.parametrize(
    ("kind", "bits"), [(Kind.Q4_0, 4), (Kind.Q4_1, 4), (Kind.Q5_0, 5), (Kind.Q5_1, 5), (Kind.Q8_0, 8)]
)
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
    convert.convert(source, out, Form("half"), progress=lambda done, total: None)
    with (out / "model.safetensors").open("rb") as file:
        entries = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    assert entries["model.norm.weight"]["dtype"] == {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[stored]
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == stored


def test_bfloat16_rounds_to_nearest_even() -> None:
    """Rounding is that of gguf.quants, ties included."""
    ties = np.array([0x3F808000, 0x3F818000, 0x3F80C000, 0xBF808001, 0x00000001], np.uint32).view(np.float32)
    values = np.concatenate([ties, np.random.default_rng(0).normal(0, 1, 251).astype(np.float32)])
    expected = gguf.quants.quantize(values, Kind.BF16).view(np.uint16).reshape(-1)
    np.testing.assert_array_equal(gguf_blocks.DTYPES["BF16"](values), expected)


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
    targets = gguf_tensors.plan(sources, FAMILIES["llama"], sizes, gguf_tensors.Storage("F16", 8))
    reports: list[int] = []
    gguf_tensors.write(tmp_path / "one", targets, lambda done: None)
    gguf_tensors.write(tmp_path / "many", targets, reports.append, chunk_values=100)
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
