"""Where the hub's token comes from, and that nothing shows it."""

import os
from pathlib import Path

import pytest

from opta_lmx.config import DownloadsConfig
from opta_lmx.errors import DownloadError
from opta_lmx.manager.hub_token import find_token

TOKEN = "hf_secret"


@pytest.fixture
def config(tmp_path: Path) -> DownloadsConfig:
    """A file with a token, for its owner alone."""
    path = tmp_path / "token"
    path.write_text(f"{TOKEN}\n")
    path.chmod(0o600)
    return DownloadsConfig(token_file=str(path))


def test_the_variable_comes_before_the_file(config: DownloadsConfig) -> None:
    """And an empty variable is none."""
    found = find_token(config, {"HF_TOKEN": " hf_env "})
    assert (found.value, found.source) == ("hf_env", "HF_TOKEN")
    found = find_token(config, {"HF_TOKEN": " "})
    assert (found.value, found.source) == (TOKEN, "downloads.token_file")
    found = find_token(DownloadsConfig(), {"HUB_TOKEN": TOKEN})
    assert (found.value, found.source) == (None, "HF_TOKEN")
    found = find_token(DownloadsConfig(token_env=None), {"HF_TOKEN": TOKEN})
    assert (found.value, found.source) == (None, None)


def test_home_is_expanded(config: DownloadsConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in every other path of the settings."""
    assert config.token_path is not None
    monkeypatch.setenv("HOME", str(config.token_path.parent))
    assert find_token(DownloadsConfig(token_file="~/token"), {}).value == TOKEN


def test_a_renewed_token_is_used(config: DownloadsConfig) -> None:
    """The file is read at each download."""
    assert find_token(config, {}).value == TOKEN
    assert config.token_path is not None
    config.token_path.write_text("hf_newer")
    assert find_token(config, {}).value == "hf_newer"


@pytest.mark.parametrize(("mode", "warns"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True)])
def test_a_file_that_others_may_read_is_told_of(
    config: DownloadsConfig, mode: int, warns: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is used all the same; the line in the log names the cure and not the token."""
    assert config.token_path is not None
    config.token_path.chmod(mode)
    assert find_token(config, {}).value == TOKEN
    log = capsys.readouterr().out
    assert ("chmod 600" in log) == warns
    assert TOKEN not in log


@pytest.mark.parametrize("content", ["", "two words", "hf_se\ncret", "hf_\u00e4", "hf_\x00", "x\r\nhost: evil"])
def test_what_is_no_token_is_refused_unseen(config: DownloadsConfig, content: str) -> None:
    """Neither a file's nor a variable's goes into a header; the error says where it is from and not what it is."""
    assert config.token_path is not None
    config.token_path.write_text(content, encoding="utf-8")
    with pytest.raises(DownloadError, match=r"downloads\.token_file holds is no token") as caught:
        find_token(config, {})
    assert not content or content not in str(caught.value)
    if content:
        with pytest.raises(DownloadError, match="HF_TOKEN holds is no token"):
            find_token(DownloadsConfig(), {"HF_TOKEN": content})


def test_a_file_that_cannot_be_read_is_told_of(config: DownloadsConfig) -> None:
    """A missing one, a directory, and a pipe, which must not hold anybody up."""
    path = config.token_path
    assert path is not None
    path.unlink()
    with pytest.raises(DownloadError, match="No such file"):
        find_token(config, {})
    os.mkfifo(path)
    with pytest.raises(DownloadError, match="no token"):
        find_token(config, {})
    path.unlink()
    path.mkdir()
    with pytest.raises(DownloadError, match="Is a directory"):
        find_token(config, {})


def test_no_repr_shows_it(config: DownloadsConfig) -> None:
    """For what a traceback or a log line may print."""
    assert TOKEN not in repr(find_token(config, {}))
