"""Texts and pairs of texts as rows of token ids, and how rows are put together into batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opta_lmx.errors import ContextTooLong, InvalidRequest
from opta_lmx.types import TextPrompt, TokenPrompt

# A request is cancelled between batches, and a batch's attention is in memory at once where there is no GPU (12 heads,
# two rows of 512 tokens: 25 MB). Larger batches have not been faster on a CPU, and fill a GPU no better.
BATCH_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class Row:
    """One input as the model reads it, special tokens included; ``types`` tells the two texts of a pair apart."""

    ids: list[int]
    types: list[int]


class InputReader:
    """Tokenises without cutting: what is too long is refused. One thread's, the reader's."""

    def __init__(self, tokenizer: Any, vocab_size: int, longest: int, *, lowercase: bool = False) -> None:
        """``tokenizer`` is a ``tokenizers.Tokenizer``; ``longest`` is in tokens."""
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._longest = longest
        self._lowercase = lowercase

    def inputs(self, inputs: Sequence[TextPrompt | TokenPrompt], field: str) -> list[Row]:
        """One row for each input. Token ids are taken as they are: no special tokens are put around them."""
        rows = []
        for at, given in enumerate(inputs):
            param = field if len(inputs) == 1 else f"{field}[{at}]"
            row = self._text(given.text) if isinstance(given, TextPrompt) else self._tokens(given.token_ids, param)
            rows.append(self._checked(row, param))
        return rows

    def pairs(self, query: str, documents: Sequence[str]) -> list[Row]:
        """One row for each document, read together with the query."""
        rows = (self._text(query, document) for document in documents)
        return [self._checked(row, f"documents[{at}]") for at, row in enumerate(rows)]

    def _text(self, *texts: str) -> Row:
        encoding = self._tokenizer.encode(*(text.lower() if self._lowercase else text for text in texts))
        return Row(encoding.ids, encoding.type_ids)

    def _tokens(self, token_ids: list[int], param: str) -> Row:
        for token in token_ids:
            if not 0 <= token < self._vocab_size:
                raise InvalidRequest(
                    f"Invalid token id {token}: this model's ids go from 0 to {self._vocab_size - 1}.",
                    param=param,
                    code="invalid_value",
                )
        return Row(token_ids, [0] * len(token_ids))

    def _checked(self, row: Row, param: str) -> Row:
        if len(row.ids) > self._longest:
            raise ContextTooLong(len(row.ids), self._longest, param=param)
        if not row.ids:
            raise InvalidRequest(f"Invalid {param!r}: no token of this model stands in it.", param=param)
        return row


def batches(lengths: Sequence[int], most_tokens: int = BATCH_TOKENS) -> list[list[int]]:
    """Places in batches of like lengths, longest first; a batch, padded, has at most ``most_tokens``.

    A row longer than that is a batch of its own.
    """
    found: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if found and lengths[found[-1][0]] * (len(found[-1]) + 1) <= most_tokens:
            found[-1].append(place)
        else:
            found.append([place])
    return found
