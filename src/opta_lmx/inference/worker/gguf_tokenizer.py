"""The tokenizer files of a model, built from a GGUF header: byte-level BPE and SentencePiece BPE.

A header says which kind and which pre-tokenizer; the splitting patterns themselves are facts about the models
that llama.cpp knows by name, so they stand in a table here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from opta_lmx.inference.worker.gguf_config import ImportRefused, JsonObject, Metadata


class TokenKind(IntEnum):
    """The numbers of tokenizer.ggml.token_type."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """How text is cut before merging: each pattern splits what the ones before it left whole.

    ``whole_words`` takes a piece that is itself a token as it stands, without looking at the merges. ``composed``
    joins letters with their accents first (Unicode's NFC).
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False
    composed: bool = False


_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_BY_THREE = _WORDS + r"\p{N}{1,3}" + _REST
_BY_ONE = _WORDS + r"\p{N}" + _REST
# Words that begin anew where a capital follows small letters, as tekken and GPT-4o cut them.
_START = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_REST_SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased(ending: str, digits: str) -> str:
    return f"{_START}{_UPPER}*{_LOWER}+{ending}|{_START}{_UPPER}+{_LOWER}*{ending}|{digits}{_REST_SLASH}"


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_PLAIN = PreTokenizer((_GPT2,))
_SINGLE_DIGITS = PreTokenizer((r"\p{N}", _GPT2))
_LLAMA3 = PreTokenizer((_BY_THREE,), whole_words=True, add_bos=True)
_QWEN2 = PreTokenizer((_BY_ONE,), composed=True)
_GPT4O = PreTokenizer((_cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}"),))
PRE_TOKENIZERS: Mapping[str, PreTokenizer] = {
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    "gpt-2": _PLAIN,
    "phi-2": _PLAIN,
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "pixtral": _LLAMA3,
    "dbrx": PreTokenizer((_BY_THREE,)),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "tekken": PreTokenizer((_cased("", r"\p{N}"),), whole_words=True, add_bos=True),
    "gpt-4o": _GPT4O,
    "deepseek-coder": PreTokenizer(
        ("[\\r\\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", r"\p{N}")
    ),
}

# How SentencePiece writes a space.
_SPACE = "\u2581"

# A chat model's turn ends with one of these even where the header names another end (base models' files do).
_TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>")


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """``tokenizer`` is tokenizer.json as text, ``config`` is tokenizer_config.json; ids are token ids."""

    tokenizer: str
    config: JsonObject
    vocab_size: int
    bos: int | None
    pad: int
    ends: tuple[int, ...]


def build(metadata: Metadata, context_length: int) -> TokenizerFiles:
    """Raises ImportRefused for a kind, a table or an id that cannot be carried over."""
    kind = metadata.text("tokenizer.ggml.model")
    tokens = metadata.texts("tokenizer.ggml.tokens")
    vocabulary = {token: id for id, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ImportRefused("its vocabulary holds a token twice")
    kinds = metadata.integers("tokenizer.ggml.token_type")
    if len(kinds) != len(tokens):
        raise ImportRefused(f"it has {len(tokens):,} tokens but {len(kinds):,} token kinds")
    bos = metadata.token("tokenizer.ggml.bos_token_id", tokens)
    eos = metadata.token("tokenizer.ggml.eos_token_id", tokens)
    if eos is None:
        raise ImportRefused("it names no end-of-sequence token")
    unknown = metadata.token("tokenizer.ggml.unknown_token_id", tokens)
    if kind == "gpt2":
        tokenizer, adds_bos = _byte_level(metadata, vocabulary)
    elif kind == "llama":
        tokenizer, adds_bos = _sentencepiece(metadata, vocabulary, kinds, unknown), True
    else:
        raise ImportRefused(f"the tokenizer kind {kind!r} is not supported")
    # Phi-3's own tokenizer takes the line end after a mark of its chats into the mark.
    strips = kind == "llama" and metadata.text("general.architecture", default="") == "phi3"
    _add_special(tokenizer, tokens, kinds, strips)
    first = bos if metadata.flag("tokenizer.ggml.add_bos_token", adds_bos) else None
    last = eos if metadata.flag("tokenizer.ggml.add_eos_token", False) else None
    _frame(tokenizer, tokens, first, last)
    padding = metadata.token("tokenizer.ggml.padding_token_id", tokens)
    pad = eos if padding is None else padding
    config: JsonObject = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens[eos],
        "pad_token": tokens[pad],
    }
    if bos is not None:
        config["bos_token"] = tokens[bos]
    if unknown is not None:
        config["unk_token"] = tokens[unknown]
    template = metadata.text("tokenizer.chat_template")
    if template is not None:
        config["chat_template"] = template
    return TokenizerFiles(
        tokenizer=tokenizer.to_str(),
        config=config,
        vocab_size=len(tokens),
        bos=bos,
        pad=pad,
        ends=_ends(metadata, tokens, kinds, eos),
    )


def _byte_level(metadata: Metadata, vocabulary: dict[str, int]) -> tuple[Tokenizer, bool]:
    name = metadata.text("tokenizer.ggml.pre", default="default")
    pre = PRE_TOKENIZERS.get(name or "")
    if pre is None:
        raise ImportRefused(f"the pre-tokenizer {name!r} is not supported")
    merges: list[tuple[str, str]] = []
    for merge in metadata.texts("tokenizer.ggml.merges"):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocabulary.keys():
            raise ImportRefused(f"its merge {merge!r} uses or makes a piece that is no token")
        merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=pre.whole_words))
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in pre.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    if pre.composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, pre.add_bos


def _sentencepiece(
    metadata: Metadata, vocabulary: dict[str, int], kinds: Sequence[int], unknown: int | None
) -> Tokenizer:
    """SentencePiece merges the neighbours whose union scores best; merges ranked by that score do the same."""
    if "tokenizer.ggml.precompiled_charsmap" in metadata:
        raise ImportRefused("its tokenizer normalises text by a character map, which is not supported")
    if metadata.flag("tokenizer.ggml.remove_extra_whitespaces", False):
        raise ImportRefused("its tokenizer removes whitespace, which is not supported")
    scores = metadata.reals("tokenizer.ggml.scores")
    if len(scores) != len(vocabulary):
        raise ImportRefused(f"it has {len(vocabulary):,} tokens but {len(scores):,} scores")
    if not {f"<0x{byte:02X}>" for byte in range(256)} <= vocabulary.keys():
        raise ImportRefused("its vocabulary lacks byte tokens, so some text could not be encoded")
    tokens = list(vocabulary)
    unknown_token = tokens[0 if unknown is None else unknown]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=_merges_by_score(vocabulary, kinds, scores),
            unk_token=unknown_token,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    leading_space = metadata.flag("tokenizer.ggml.add_space_prefix", True)
    to_underscore = normalizers.Replace(" ", _SPACE)
    start = [normalizers.Prepend(_SPACE)] if leading_space else []
    tokenizer.normalizer = normalizers.Sequence([*start, to_underscore])
    end = [decoders.Strip(" ", 1, 0)] if leading_space else []
    to_space = decoders.Replace(_SPACE, " ")
    tokenizer.decoder = decoders.Sequence([to_space, decoders.ByteFallback(), decoders.Fuse(), *end])
    return tokenizer


def _merges_by_score(
    vocabulary: Mapping[str, int], kinds: Sequence[int], scores: Sequence[float]
) -> list[tuple[str, str]]:
    normal = {token for token, id in vocabulary.items() if kinds[id] == TokenKind.NORMAL}
    ranked = [
        (-scores[vocabulary[token]], vocabulary[token], token[:cut], token[cut:])
        for token in normal
        for cut in range(1, len(token))
        if token[:cut] in normal and token[cut:] in normal
    ]
    return [(left, right) for _, _, left, right in sorted(ranked)]


# What takes nothing after it into itself in Phi-3's tokenizer.
_NEVER_STRIPS = ("<unk>", "<s>", "<|endoftext|>")


def _add_special(tokenizer: Tokenizer, tokens: Sequence[str], kinds: Sequence[int], strips: bool) -> None:
    """Control tokens are cut out of text whole and hidden in answers; user-defined ones are whole but shown.

    ``strips``: control tokens take the whitespace after them. A user-defined token with SentencePiece's mark for a
    space is looked for in the text that already has such marks.
    """
    special = {TokenKind.CONTROL, TokenKind.UNKNOWN}
    added = {kind: [t for t, k in zip(tokens, kinds, strict=True) if k == kind] for kind in TokenKind}
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True, rstrip=strips and token not in _NEVER_STRIPS)
            for kind in sorted(special)
            for token in added[kind]
        ]
    )
    tokenizer.add_tokens(
        [AddedToken(token, normalized=_SPACE in token, special=False) for token in added[TokenKind.USER_DEFINED]]
    )


def _frame(tokenizer: Tokenizer, tokens: Sequence[str], first: int | None, last: int | None) -> None:
    """Puts the tokens around every text that is encoded with special tokens."""
    if first is None and last is None:
        return
    start = [] if first is None else [f"{tokens[first]}:0"]
    end = [] if last is None else [f"{tokens[last]}:0"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*start, "$A:0", *end],
        pair=[*start, "$A:0", *end, *start, "$B:0", *end],
        special_tokens=[(tokens[id], id) for id in {first, last} if id is not None],
    )


def _ends(metadata: Metadata, tokens: Sequence[str], kinds: Sequence[int], eos: int) -> tuple[int, ...]:
    named = [metadata.token(f"tokenizer.ggml.{name}_token_id", tokens) for name in ("eot", "eom")]
    turns = [id for id, token in enumerate(tokens) if kinds[id] == TokenKind.CONTROL and token in _TURN_ENDS]
    return tuple(dict.fromkeys(id for id in (eos, *named, *turns) if id is not None))
