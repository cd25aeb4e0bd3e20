"""What settings are made of: the frozen section, and the types of values that YAML writes in more than one way."""

import re
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationInfo
from pydantic import model_validator as validate_model
from pydantic_core import PydanticCustomError

_SIZE: Final = re.compile(r"(\d+(?:\.\d+)?) ?(?:([KMGT])(I?)B|B)?", re.ASCII | re.IGNORECASE)


def _parse_bytes(value: object) -> object:
    """An int from 10485760, "10MiB" or "1.5 GB"; "auto" passes, for the keys that take it."""
    if isinstance(value, str) and value != "auto":
        match = _SIZE.fullmatch(value.strip())
        if match is None:
            raise ValueError("should be a size such as 10485760, 10MiB or 1.5GB")
        number, prefix, binary = match.groups()
        power = " KMGT".index(prefix.upper()) if prefix else 0
        return int(Fraction(number) * (1024 if binary else 1000) ** power)
    if isinstance(value, bool | float) or (isinstance(value, int) and value < 0):
        raise ValueError("should be a whole number of bytes, 0 or more")
    return value


def _resolve_key(value: object, info: ValidationInfo) -> object:
    """The key itself, or what ``env:NAME`` or ``file:PATH`` holds; no error of it shows a key."""
    if not isinstance(value, str):
        return value
    key = value
    kind, _, name = value.partition(":")
    if kind == "env":
        environ = (info.context or {}).get("environ", {})
        if name not in environ:
            raise ValueError(f"the environment variable {name} is not set")
        key = environ[name]
    elif kind == "file":
        try:
            key = Path(name).expanduser().read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not text"
            raise ValueError(f"the file {name} cannot be read: {reason}") from None
    # What an HTTP header carries unchanged. A row of asterisks is how a key is shown, and so no secret.
    if not re.fullmatch(r"(?!\*+$)[!-~]+", key):
        raise ValueError("should be printable ASCII characters without spaces, and not asterisks alone")
    return SecretStr(key)


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


def expand(path: str | None) -> Path | None:
    """``path`` with ``~`` expanded; None stays None."""
    return None if path is None else Path(path).expanduser()


Bytes: TypeAlias = Annotated[int, BeforeValidator(_parse_bytes)]
BytesOrAuto: TypeAlias = Annotated[int | Literal["auto"], BeforeValidator(_parse_bytes)]
Key: TypeAlias = Annotated[SecretStr, BeforeValidator(_resolve_key)]
Level: TypeAlias = Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], BeforeValidator(_upper)]
# Fit for a log line, a metric's label and a table.
Name: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Words: TypeAlias = Annotated[tuple[str, ...], Field(strict=False)]


class Section(BaseModel):
    """A frozen group of settings. Nothing is guessed: "80" is no number, 1 no truth value, a typo no setting."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)

    @validate_model(mode="before")
    @classmethod
    def _check_names(cls, data: Any) -> Any:
        # A section whose keys are all commented out reads as null.
        if data is None:
            return {}
        for name in data if isinstance(data, dict) else ():
            if name not in cls.model_fields:
                near = get_close_matches(str(name), cls.model_fields, n=1)
                hint = f"the nearest is {near[0]!r}" if near else f"known here: {', '.join(cls.model_fields)}"
                raise PydanticCustomError("unknown_key", "unknown key; {hint}", {"name": str(name), "hint": hint})
        return data
