"""What a download takes from a repository, which wishes are refused, and the lines the two processes speak."""

from datetime import UTC, datetime

import msgspec
import pytest

from opta_lmx.errors import (
    Conflict,
    DiskFull,
    DownloadError,
    HubUnreachable,
    IntegrityMismatch,
    InvalidRequest,
    LmxError,
    ModelNotFound,
)
from opta_lmx.manager.hub import Failed, HubFile, check_wish, choose_files
from opta_lmx.manager.hub_errors import retry_after_seconds

SHA1, SHA256 = "0" * 40, "0" * 64


def files(*paths: str) -> list[HubFile]:
    """Files of one byte."""
    return [HubFile(path, 1, None, SHA1) for path in paths]


def chosen(*paths: str, patterns: tuple[str, ...] = ()) -> list[str]:
    """Which of these paths are taken."""
    return [file.path for file in choose_files("a/b", files(*paths), patterns)]


def test_data_is_taken_and_nothing_else() -> None:
    """Pickles, code, pictures and hidden files are not; JSON in folders is."""
    wanted = ["1_Pooling/config.json", "config.json", "merges.txt", "model.safetensors", "tokenizer.model", "x.jinja"]
    others = [
        "pytorch_model.bin",
        "a.pt",
        "a.py",
        "README.md",
        ".hidden.json",
        ".git/x.json",
        "a/./m.json",
        "other.model",
        "a.gguf",
    ]
    assert chosen(*wanted, *others) == wanted


@pytest.mark.parametrize(
    ("weights", "taken"),
    [
        (["model-1.safetensors", "model-2.safetensors", "consolidated.safetensors"], 2),
        (["weights.safetensors"], 1),
        (["model.safetensors", "original/model.safetensors", "onnx/model.safetensors"], 1),
    ],
)
def test_weights_are_taken_once(weights: list[str], taken: int) -> None:
    """A second set of the same weights, under another name or in a folder, is left where it is."""
    assert chosen(*weights) == sorted(weights[:taken])


def test_patterns_choose_among_the_data() -> None:
    """They can ask for a GGUF or a folder, and never for what is no data."""
    names = ["a.Q4.gguf", "a.Q8.gguf", "config.json", "fp16/model.safetensors", "x.bin"]
    assert chosen(*names, patterns=("*Q8.gguf", "config.json")) == ["a.Q8.gguf", "config.json"]
    assert chosen(*names, patterns=("fp16/*", "*.bin")) == ["fp16/model.safetensors"]


@pytest.mark.parametrize(
    ("patterns", "param"), [((), "allow_patterns"), (("*.gguf",), "allow_patterns"), (("*.json",), "allow_patterns")]
)
def test_without_weights_the_choice_is_named(patterns: tuple[str, ...], param: str) -> None:
    """Several GGUF files are several models: the message lists them."""
    with pytest.raises(InvalidRequest, match=r"a\.Q4\.gguf, a\.Q8\.gguf") as caught:
        chosen("a.Q4.gguf", "a.Q8.gguf", "config.json", patterns=patterns)
    assert caught.value.param == param


@pytest.mark.parametrize(
    "path",
    [
        *("../m.safetensors", "a/../m.safetensors", "/m.safetensors", "a//m.safetensors"),
        *("a\\m.safetensors", "\0.json", "x" * 600 + ".json"),
    ],
)
def test_a_path_out_of_the_directory_is_refused(path: str) -> None:
    """And the whole download with it, since such a hub is not to be trusted."""
    with pytest.raises(DownloadError, match="no path inside a model"):
        chosen(path, "model.safetensors", patterns=("*",))


@pytest.mark.parametrize("other", ["config.json", "CONFIG.json"])
def test_a_path_that_is_listed_twice_is_refused(other: str) -> None:
    """Two files would be written into one, on some disks also where their names differ in case alone."""
    with pytest.raises(DownloadError, match="twice"):
        chosen("config.json", "model.safetensors", other)
    assert chosen("config.json", "model.safetensors", other, patterns=("[m]*",)) == ["model.safetensors"]


def test_a_list_without_end_is_refused() -> None:
    """A hub cannot make the server keep books of any number of files."""
    with pytest.raises(DownloadError, match="2,000 are the most"):
        chosen(*(f"model-{number}.safetensors" for number in range(2001)))


@pytest.mark.parametrize(
    "file", [HubFile("model.safetensors", -1, None, SHA1), HubFile("model.safetensors", 1, None, None)]
)
def test_what_cannot_be_checked_is_refused(file: HubFile) -> None:
    """Without a size or a hash nothing could be promised of it."""
    with pytest.raises(DownloadError, match="could not be checked"):
        choose_files("a/b", [file], ())


@pytest.mark.parametrize(
    "repo_id",
    [
        *("", "a", "a/", "/b", "a/b/c", "../b", "a/..", "a/b..c", "a/.b", ".a/b", "a/b--c", "a/b.git"),
        *("a/b.incomplete", "https://x/y", "a\\b", "a/b\n", "a/b ", "\u0430/b", "a/" + "x" * 97, "-a/b", "~/b"),
    ],
)
def test_what_is_no_repository_is_refused(repo_id: str) -> None:
    """Paths, URLs, dots, confusables and names this server uses itself."""
    with pytest.raises(InvalidRequest) as caught:
        check_wish(repo_id, None, None)
    assert caught.value.param == "repo_id"


def test_names_as_the_hub_has_them_are_taken() -> None:
    """Letters, digits, dots, dashes and underscores."""
    check_wish("mlx-community/Qwen2.5-0.5B_4bit", "refs/pr/1", ["*.json"])
    check_wish("0x/y", "v1.0+x", None)


@pytest.mark.parametrize(
    ("revision", "patterns", "param"),
    [("../x", None, "revision"), ("", None, "revision"), ("a b", None, "revision"), (None, [""], "allow_patterns")],
)
def test_other_wishes_are_refused_by_name(revision: str | None, patterns: list[str] | None, param: str) -> None:
    """Each by its own field."""
    with pytest.raises(InvalidRequest) as caught:
        check_wish("a/b", revision, patterns)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "0"}, 0),
        ({"retry-after": " 120 "}, 120),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:30 GMT"}, 30),
        ({"retry-after": "Wednesday, 21-Oct-15 07:28:30 GMT"}, 30),
        ({"retry-after": "Wed Oct 21 07:28:30 2015"}, 30),
        ({"retry-after": "Wed, 21 Oct 2015 09:28:30 +0200"}, 30),
        ({"retry-after": "Wed, 21 Oct 2015 07:27:00 GMT"}, 0),
        # Its clock, not ours.
        ({"retry-after": "Wed, 21 Oct 2020 07:28:30 GMT", "date": "Wed, 21 Oct 2020 07:28:25 GMT"}, 5),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:30 GMT", "date": "yesterday"}, 30),
        ({}, None),
        *(({"retry-after": text}, None) for text in ("", "-1", "1.5", "soon", "Wed, 99 Oct 2015 07:28:30 GMT")),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:30 +99999999999999999"}, None),
        ({"retry-after": "9" * 5000}, float("inf")),
    ],
)
def test_when_a_hub_wants_to_be_asked_again(headers: dict[str, str], seconds: float | None) -> None:
    """A number, any of HTTP's three forms of a date, or nothing: whatever the text is, it is no error."""
    assert retry_after_seconds(headers, datetime(2015, 10, 21, 7, 28, tzinfo=UTC)) == seconds


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("no", param="repo_id", code="c"),
        ModelNotFound("a/b"),
        Conflict("no"),
        DiskFull(2, 1),
        DownloadError("no"),
        IntegrityMismatch("f", "a", "b"),
        HubUnreachable("no"),
    ],
)
def test_an_error_survives_the_way_between_processes(error: LmxError) -> None:
    """Class, message and facts."""
    line = msgspec.json.encode(Failed.of(error))
    again = msgspec.json.decode(line, type=Failed).to_error()
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))
