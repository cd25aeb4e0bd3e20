"""What libraries raise for bad model files, as LoadFailed with a reason for people."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opta_lmx.errors import LoadFailed

# Of a library's error message; the names of missing tensors can run to pages.
_MOST_CHARACTERS = 300


@contextmanager
def named_load_errors(model_id: str) -> Iterator[None]:
    """Maps the exceptions of mlx-lm, transformers and MLX; a LoadFailed passes as it is."""
    try:
        yield
    except json.JSONDecodeError as error:
        raise LoadFailed(model_id, f"config.json or the tokenizer's files are not valid JSON: {error}") from error
    except FileNotFoundError as error:
        raise LoadFailed(model_id, f"a file is missing: {Path(str(error.filename or error)).name}") from error
    except (KeyError, TypeError) as error:
        raise LoadFailed(model_id, f"config.json does not describe a model of its type: {error}") from error
    except (ValueError, RuntimeError, OSError) as error:
        raise LoadFailed(model_id, _in_short(error)) from error


def _in_short(error: Exception) -> str:
    """A library's message on one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}..."
