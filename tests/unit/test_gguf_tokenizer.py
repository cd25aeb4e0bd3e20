"""Tokenizers built from GGUF metadata, held against the same tokenizers made another way."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import sentencepiece
from gguf import TokenType
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from opta_lmx.inference.worker.gguf_config import ImportRefused, Metadata
from opta_lmx.inference.worker.gguf_tokenizer import TokenizerFiles, build
from tests.gguf_files import Vocabulary, byte_level_vocabulary, tokenizer_keys

# No lone surrogates: text that reaches a tokenizer is valid Unicode.
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
MIXED = "It's 12345 o'clock,\n\n  don't    stop: 你好 🙂👨‍👩‍👧 ½² naïve\tx+=1;  "


@dataclass(frozen=True)
class Field:
    """As gguf.GGUFReader gives one."""

    value: Any

    def contents(self) -> Any:
        return self.value


def files(vocabulary: Vocabulary, changes: Mapping[str, Any] | None = None) -> TokenizerFiles:
    keys = {**tokenizer_keys(vocabulary), **(changes or {})}
    return build(Metadata({key: Field(value) for key, value in keys.items() if value is not None}), 256)


def load(built: TokenizerFiles) -> Tokenizer:
    return Tokenizer.from_str(built.tokenizer)


def pieces(pre: str, text: str) -> list[str]:
    """How text is cut before merging, each piece as it stood."""
    pre_tokenizer = load(files(byte_level_vocabulary(pre))).pre_tokenizer
    assert pre_tokenizer is not None
    return [text[start:end] for _, (start, end) in pre_tokenizer.pre_tokenize_str(text)]


def id_of(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None
    return found


# -- byte-level BPE -----------------------------------------------------------------------------------

BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
ORACLES = {
    "gpt-2": BYTE_LEVEL,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL]),
}


@pytest.mark.parametrize("pre", ORACLES)
@given(text=TEXTS)
@example(text=MIXED)
def test_text_is_cut_as_the_library_cuts_it(pre: str, text: str) -> None:
    """Our patterns and the library's own GPT-2 and SmolLM pre-tokenizers agree on every text."""
    built = load(files(byte_level_vocabulary(pre))).pre_tokenizer
    assert built is not None
    assert built.pre_tokenize_str(text) == ORACLES[pre].pre_tokenize_str(text)


@pytest.mark.parametrize("pre", ["llama-bpe", "llama3", "llama-v3"])
def test_llama3_cuts_digits_by_three_and_keeps_line_ends(pre: str) -> None:
    """Contractions in any case, up to three digits, line ends with the punctuation before them."""
    cut = pieces(pre, "I'LL pay $12345.\n\n  ok\n\t x")
    assert cut == ["I", "'LL", " pay", " $", "123", "45", ".\n\n", " ", " ok", "\n", "\t", " x"]


_ONE = ["I", "'LL", " pay", " $", "1", "2", "3", ".\n\n", " "]
CUTS = {
    "qwen2": [*_ONE, " okDay", "\n", "\t", " x", "/y"],
    "tekken": [*_ONE, " ok", "Day", "\n", "\t", " x", "/y"],
    "dbrx": ["I", "'LL", " pay", " $", "123", ".\n\n", " ", " okDay", "\n", "\t", " x", "/y"],
    "gpt-4o": ["I'LL", " pay", " $", "123", ".\n\n", " ", " ok", "Day", "\n", "\t", " x", "/y"],
    "refact": ["I", "'", "LL", " pay", " $", "1", "2", "3", ".", "\n\n ", " okDay", "\n\t", " x", "/", "y"],
    "deepseek-coder": [
        *("I", "'", "LL", " pay", " $", "1", "2", "3", ".", "\n", "\n", " ", " okDay", "\n", "\t", " x", "/", "y"),
    ],
}


@pytest.mark.parametrize("pre", CUTS)
def test_other_families_cut_as_they_do(pre: str) -> None:
    """Contractions, digits, line ends and capitals, by the families' published patterns."""
    assert pieces(pre, "I'LL pay $123.\n\n  okDay\n\t x/y") == CUTS[pre]


def test_qwen_joins_letters_with_their_accents() -> None:
    """Its tokenizer normalises to NFC: a letter and its accent are one letter, and the same as the whole one."""
    tokenizer = load(files(byte_level_vocabulary("qwen2")))
    assert tokenizer.encode("caf\u0065\u0301").ids == tokenizer.encode("caf\u00e9").ids
    plain = load(files(byte_level_vocabulary("gpt-2")))
    assert plain.encode("caf\u0065\u0301").ids != plain.encode("caf\u00e9").ids


def test_default_cuts_punctuation_and_digits_by_three() -> None:
    """What llama.cpp does for files that name no pre-tokenizer."""
    expected = ["a", "+=", "b", " ", "123", "4", " ", "!?", " c"]
    assert pieces("default", "a+=b 1234 !? c") == expected
    assert [*files(byte_level_vocabulary(None)).tokenizer] == [*files(byte_level_vocabulary("default")).tokenizer]


@given(text=TEXTS)
@example(text=MIXED)
def test_byte_level_text_comes_back(text: str) -> None:
    """Decoding an encoded text gives it back exactly, whatever it is."""
    tokenizer = load(files(byte_level_vocabulary()))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_merges_are_those_of_the_file() -> None:
    """A word of the vocabulary becomes one token, by its merges; the ids are the file's."""
    vocabulary = byte_level_vocabulary()
    ids = load(files(vocabulary)).encode("go to the Paris").ids
    assert [vocabulary.tokens[id] for id in ids] == ["g", "o", "Ġt", "o", "Ġthe", "ĠParis"]


def test_llama3_takes_whole_words_without_their_merges() -> None:
    """A piece that is a token stands for itself even where no merge leads to it; elsewhere merges decide."""
    for pre, expected in (("llama-bpe", ["Ġthe"]), ("gpt-2", ["Ġ", "t", "h", "e"])):
        changes = {"tokenizer.ggml.merges": ["i n"], "tokenizer.ggml.add_bos_token": False}
        assert load(files(byte_level_vocabulary(pre), changes)).encode(" the").tokens == expected


def test_special_tokens_are_cut_out_whole() -> None:
    """Control tokens in text are single ids and hidden when decoding; user-defined ones are shown."""
    tokenizer = load(files(byte_level_vocabulary()))
    ids = tokenizer.encode("<|im_start|>a<tool>b<|im_end|>").ids
    assert [ids[0], ids[2], ids[4]] == [1, 3, 2]
    assert tokenizer.decode(ids) == "a<tool>b"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|im_start|>a<tool>b<|im_end|>"


@pytest.mark.parametrize(
    ("pre", "changes", "first", "last"),
    [
        ("smollm", {}, [], []),
        ("llama-bpe", {}, [1], []),
        ("smollm", {"tokenizer.ggml.add_bos_token": True}, [1], []),
        ("llama-bpe", {"tokenizer.ggml.add_bos_token": False}, [], []),
        ("smollm", {"tokenizer.ggml.add_eos_token": True}, [], [2]),
        ("llama-bpe", {"tokenizer.ggml.add_eos_token": True}, [1], [2]),
        ("llama-bpe", {"tokenizer.ggml.bos_token_id": None}, [], []),
    ],
)
def test_first_and_last_tokens_follow_the_flags(
    pre: str, changes: Mapping[str, Any], first: list[int], last: list[int]
) -> None:
    """The file's flags decide; without them the pre-tokenizer's habit does."""
    tokenizer = load(files(byte_level_vocabulary(pre), changes))
    bare = tokenizer.encode("a b", add_special_tokens=False).ids
    assert tokenizer.encode("a b").ids == [*first, *bare, *last]


def test_ends_are_every_token_that_closes_a_turn() -> None:
    """The named end first, then named turn ends, then control tokens known to end a turn."""
    vocabulary = byte_level_vocabulary()
    vocabulary.tokens += ["<|eot_id|>", "<end_of_turn>", "<|eom_id|>"]
    vocabulary.kinds += [TokenType.CONTROL, TokenType.NORMAL, TokenType.CONTROL]
    size = len(vocabulary.tokens)
    changes = {"tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.eom_token_id": size - 1}
    assert files(vocabulary, changes).ends == (0, size - 1, 2, size - 3)


def test_config_names_the_special_tokens() -> None:
    """tokenizer_config.json has their texts and the template; padding falls back to the end token."""
    built = files(byte_level_vocabulary(), {"tokenizer.ggml.unknown_token_id": 0})
    assert built.pad == 2
    assert built.config["bos_token"] == "<|im_start|>"
    assert built.config["eos_token"] == built.config["pad_token"] == "<|im_end|>"
    assert built.config["unk_token"] == "<|endoftext|>"
    assert built.config["chat_template"].startswith("{% for m")
    assert files(byte_level_vocabulary(), {"tokenizer.ggml.padding_token_id": 0}).config["pad_token"] == "<|endoftext|>"


# -- SentencePiece BPE --------------------------------------------------------------------------------

TRAINING = [
    "The harbour town wakes before the sun.",
    "Fishermen carry their nets along the quay, and the bakery on the corner fills the street with warm bread.",
    "What is the capital of France? The capital of France is Paris.",
    "def area(width, height): return width * height",
    "In winter the wind comes from the north and the boats stay in the harbour, aaaa bbbbbb.",
]


@pytest.fixture(scope="module")
def trained() -> sentencepiece.SentencePieceProcessor:
    """A Llama-2-like SentencePiece model: BPE, byte fallback, no normalisation."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=["<tool>"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def spm_vocabulary(trained: sentencepiece.SentencePieceProcessor) -> Vocabulary:
    """As llama.cpp's converter writes it."""
    tokens, kinds, scores = [], [], []
    for id in range(trained.vocab_size()):
        kind = TokenType.NORMAL
        if trained.is_unknown(id):
            kind = TokenType.UNKNOWN
        elif trained.is_control(id):
            kind = TokenType.CONTROL
        elif trained.is_byte(id):
            kind = TokenType.BYTE
        elif trained.id_to_piece(id) == "<tool>":
            kind = TokenType.USER_DEFINED
        tokens.append(trained.id_to_piece(id))
        kinds.append(kind)
        scores.append(float(trained.get_score(id)))
    return Vocabulary("llama", tokens, kinds, scores=scores)


# A user-defined token ends a stretch of text, after which llama.cpp adds a space again; SentencePiece does not.
PLAIN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<\u2581"), min_size=1, max_size=60)


@given(text=PLAIN)
@example(text=MIXED)
@example(text="  the harbour  aaaaa bbbbbbb")
def test_sentencepiece_ids_are_its_own(text: str, trained: sentencepiece.SentencePieceProcessor) -> None:
    """Every text has the ids that the original SentencePiece model gives it, and comes back from them."""
    tokenizer = load(files(spm_vocabulary(trained)))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == trained.encode(text)
    assert tokenizer.decode(ids) == text


def test_sentencepiece_flags_are_honoured(trained: sentencepiece.SentencePieceProcessor) -> None:
    """The beginning token is added by default; the leading space can be turned off, both ways."""
    vocabulary = spm_vocabulary(trained)
    assert load(files(vocabulary)).encode("the").ids[0] == trained.bos_id() == 1
    bare = load(files(vocabulary, {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}))
    ids = bare.encode("the").ids
    assert not vocabulary.tokens[ids[0]].startswith("\u2581")
    assert bare.decode(ids) == "the"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokenizer.ggml.scores": [0.0]}, "400 tokens but 1 scores"),
        ({"tokenizer.ggml.scores": None}, "'tokenizer.ggml.scores' is missing"),
        ({"tokenizer.ggml.remove_extra_whitespaces": True}, "removes whitespace"),
        ({"tokenizer.ggml.precompiled_charsmap": [1, 2]}, "character map"),
    ],
)
def test_sentencepiece_that_cannot_be_rebuilt_is_refused(
    changes: Mapping[str, Any], reason: str, trained: sentencepiece.SentencePieceProcessor
) -> None:
    """What would give other ids than the original is refused."""
    with pytest.raises(ImportRefused, match=reason):
        files(spm_vocabulary(trained), changes)


@pytest.fixture(scope="module")
def gemma() -> sentencepiece.SentencePieceProcessor:
    """A Gemma-like model: no space before the text, and runs of spaces and line ends as tokens of their own."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINING * 3),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        user_defined_symbols=["\n\n", "\u2581\u2581", "\u2581\u2581\u2581\u2581", "<tool>"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@given(text=st.text(st.sampled_from("a th\n\tTé你<tool>  ")) | PLAIN)
@example(text="  a   b     c\n\n\nd")
@example(text="def f():\n        return  1")
def test_gemma_ids_are_its_own(text: str, gemma: sentencepiece.SentencePieceProcessor) -> None:
    """Runs of spaces are the tokens that SentencePiece takes, the longest first, and the text comes back."""
    vocabulary = spm_vocabulary(gemma)
    runs = ("\n\n", "\u2581\u2581", "\u2581\u2581\u2581\u2581", "<tool>")
    vocabulary.kinds = [
        TokenType.USER_DEFINED if token in runs else kind
        for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)
    ]
    tokenizer = load(files(vocabulary, {"tokenizer.ggml.add_space_prefix": False}))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert ids == gemma.encode(text)
    assert tokenizer.decode(ids) == text


def test_phi3_marks_take_the_line_end_after_them(trained: sentencepiece.SentencePieceProcessor) -> None:
    """As Phi-3's own tokenizer does it; the beginning of the text does not, nor do other families' marks."""
    vocabulary = spm_vocabulary(trained)
    vocabulary.tokens.append("<|user|>")
    vocabulary.kinds.append(TokenType.CONTROL)
    vocabulary.scores.append(0.0)
    for architecture, same in (("phi3", True), ("llama", False)):
        tokenizer = load(files(vocabulary, {"general.architecture": architecture}))
        ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in ("<|user|>\nthe", "<|user|>the")]
        assert (ids[0] == ids[1]) is same
        assert tokenizer.encode("<s> the").ids != tokenizer.encode("<s>the").ids


def test_a_vocabulary_without_bytes_is_refused(trained: sentencepiece.SentencePieceProcessor) -> None:
    """Without byte tokens unknown characters would be lost."""
    vocabulary = spm_vocabulary(trained)
    vocabulary.tokens[vocabulary.tokens.index("<0x0A>")] = "<0xZZ>"
    with pytest.raises(ImportRefused, match="lacks byte tokens"):
        files(vocabulary)
