"""What a GGUF will take once it is imported, told from its header, against the import itself."""

from pathlib import Path

import gguf
import pytest
from gguf import GGMLQuantizationType as Kind

from opta_lmx.inference.worker import gguf_blocks
from opta_lmx.inference.worker.convert import Form, convert
from opta_lmx.manager.catalog import describe, list_directory
from opta_lmx.manager.gguf_size import ImportForm
from opta_lmx.manager.memory import load_need
from opta_lmx.types import ModelFiles
from tests.gguf_files import Sizes, byte_level_vocabulary, random_weights, write_llama, write_random_llama

KINDS = sorted(gguf_blocks.FLOATS.keys() | gguf_blocks.EXACT.keys() | gguf_blocks.DEQUANTIZED)
FORMS = [ImportForm(8, full=True), ImportForm(8, full=False), ImportForm(5, full=True), ImportForm(4, full=False)]
# What blocks of every type divide, and a row that only 32 divides.
WIDE, NARROW = 256, 96


def described(directory: Path, form: ImportForm) -> ModelFiles:
    """The model as it is listed."""
    files = describe("m", directory, list_directory(directory, directory.resolve()), form)
    assert files.problem is None
    return files


def check_import(source: Path, form: ImportForm) -> ModelFiles:
    """Imports the file; what a load needs was known before, to the byte. Gives how it was listed."""
    before = described(source.parent, form)
    target = source.parent.with_name(f"imported-{form.bits}-{form.full}")
    precision = "full" if form.full else "half"
    convert(source, target, Form(precision, form.bits), progress=lambda done, total: None)
    after = described(target, form)
    assert (before.format, after.format) == ("gguf", "mlx")
    for context_length in (None, 7):
        assert load_need(before, context_length, 0.1) == load_need(after, context_length, 0.1)
    return before


@pytest.mark.parametrize("kind", KINDS)
def test_the_need_of_an_import_is_known_before_it(kind: str, tmp_path: Path) -> None:
    """For every type of tensor, number of bits and precision: weights, KV and tokenizer are those of the import."""
    source = tmp_path / "model" / "m.gguf"
    source.parent.mkdir()
    feed_forward = NARROW if gguf.GGML_QUANT_SIZES[Kind[kind]][0] <= 32 else WIDE
    write_random_llama(source, byte_level_vocabulary(), Kind[kind], Sizes(WIDE, feed_forward, 1))
    for form in FORMS:
        before = check_import(source, form)
        if kind in gguf_blocks.DEQUANTIZED and form.bits == 8:
            assert before.weights_bytes > 1.1 * before.size_bytes


@pytest.mark.parametrize("form", FORMS)
def test_types_may_be_mixed(form: ImportForm, tmp_path: Path) -> None:
    """A file with floats, blocks that stay and blocks that do not; the output matrix is its own."""
    vocabulary = byte_level_vocabulary()
    weights = random_weights(len(vocabulary.tokens), tied=False)
    kinds = dict.fromkeys(weights, Kind.Q4_0) | {
        "model.embed_tokens.weight": Kind.F16,
        "model.layers.0.mlp.down_proj.weight": Kind.Q8_0,
        "model.layers.1.mlp.up_proj.weight": Kind.BF16,
        "lm_head.weight": Kind.Q5_1,
    }
    source = tmp_path / "model" / "m.gguf"
    source.parent.mkdir()
    write_llama(source, weights, vocabulary, kinds)
    check_import(source, form)
