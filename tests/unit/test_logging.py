"""The log: one form for every line, whoever writes it, and no secret in any of them."""

import io
import json
import logging
import re
import stat
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from opta_lmx.config import LoggingConfig
from opta_lmx.monitoring.logging import configure_logging, get_logger

SECRET = "sk-very-secret-1234"


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    root = logging.getLogger()
    level, handlers = root.level, root.handlers[:]
    yield
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.contextvars.clear_contextvars()
    structlog.reset_defaults()


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """What standard error holds, each line parsed."""
    captured = capsys.readouterr()
    assert captured.out == ""
    return [json.loads(line) for line in captured.err.splitlines()]


def test_own_event_is_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    """A line has time, level, event and logger first, then what was bound and passed."""
    configure_logging(LoggingConfig())
    structlog.contextvars.bind_contextvars(request_id="r1")
    get_logger("opta_lmx.manager").bind(model="m").info("model_loaded", seconds=1.5)
    [line] = lines(capsys)
    assert list(line)[:4] == ["ts", "level", "event", "logger"]
    assert line.pop("ts").endswith("Z")
    assert line == {
        "level": "info",
        "event": "model_loaded",
        "logger": "opta_lmx.manager",
        "request_id": "r1",
        "model": "m",
        "seconds": 1.5,
    }


def test_line_of_a_library_has_the_same_form(capsys: pytest.CaptureFixture[str]) -> None:
    """A record of the standard library's logging, and a warning, come out as JSON with the bound context."""
    configure_logging(LoggingConfig())
    structlog.contextvars.bind_contextvars(request_id="r1")
    logging.getLogger("uvicorn.error").warning("Started %s", "here")
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.warn("old way", DeprecationWarning, stacklevel=1)
    record, warning = lines(capsys)
    assert (record["event"], record["level"], record["logger"]) == ("Started here", "warning", "uvicorn.error")
    assert record["request_id"] == "r1"
    assert (warning["level"], warning["logger"]) == ("warning", "py.warnings")
    assert "old way" in warning["event"]


def test_level_holds_for_everybody(capsys: pytest.CaptureFixture[str]) -> None:
    """Below the level nothing is written, ours or a library's; a new call changes it for loggers already made."""
    log = get_logger("opta_lmx.test")
    configure_logging(LoggingConfig(level="WARNING"))
    log.info("hidden")
    logging.getLogger("library").info("hidden")
    configure_logging(LoggingConfig(level="DEBUG"))
    log.debug("shown")
    assert [line["event"] for line in lines(capsys)] == ["shown"]


@pytest.mark.parametrize("form", ["json", "console"])
def test_secrets_are_masked_at_any_depth(capsys: pytest.CaptureFixture[str], form: str) -> None:
    """A value under a secret's name is masked in mappings, lists, pairs and bound context; its neighbours are not."""
    configure_logging(LoggingConfig.model_validate({"format": form}))
    structlog.contextvars.bind_contextvars(api_key=SECRET)
    get_logger("opta_lmx.test").info(
        "request_refused",
        admin_key=SECRET,
        token=[SECRET],
        headers=[(b"authorization", f"Bearer {SECRET}".encode()), (b"host", b"here")],
        nested={"list": [{"X-Admin-Key": SECRET, "kept": "yes"}, ("X-API-Key", SECRET)], b"x-api-key": SECRET},
        tokens=7,
    )
    written = capsys.readouterr().err
    assert SECRET not in written
    assert written.count("**********") == 7
    assert all(kept in written for kept in ("request_refused", "yes", "here", "7"))


@pytest.mark.parametrize("form", ["json", "console"])
def test_exception_has_its_traceback_and_no_values(capsys: pytest.CaptureFixture[str], form: str) -> None:
    """A logged exception shows where it came from; neither local variables nor its message, which may quote them."""
    configure_logging(LoggingConfig.model_validate({"format": form}))
    hidden = SECRET
    for log in (get_logger("opta_lmx.test"), logging.getLogger("library")):
        try:
            int(hidden)
        except ValueError:
            log.exception("work_failed")
    written = capsys.readouterr().err
    assert written.count("int(hidden)") == 2
    assert len(re.findall(r"ValueError\b", written)) == 2
    assert written.count("test_exception_has_its_traceback_and_no_values") == 2
    assert SECRET not in written


def test_console_form_is_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    """The console form is for people: no JSON and no colour codes."""
    configure_logging(LoggingConfig(format="console"))
    get_logger("opta_lmx.test").warning("model_unloaded", model="m")
    written = capsys.readouterr().err
    assert "model_unloaded" in written
    assert "model=m" in written
    assert "{" not in written
    assert "\x1b" not in written


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("settings", "no_color", "form", "coloured"),
    [
        ({}, "", "console", True),
        ({}, "1", "console", False),
        ({"format": "console"}, "1", "console", False),
        ({"format": "json"}, "", "json", False),
    ],
)
def test_a_terminal_is_read_by_people(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], no_color: str, form: str, coloured: bool
) -> None:
    """It gets the console form unless the settings name one, in colour unless NO_COLOR forbids it."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("NO_COLOR", no_color)
    configure_logging(LoggingConfig.model_validate(settings))
    get_logger("opta_lmx.test").warning("model_unloaded", model="m")
    written = terminal.getvalue()
    assert "model_unloaded" in written
    assert written.startswith("{") == (form == "json")
    assert ("\x1b[" in written) == coloured


def test_file_is_private_and_follows_rotation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The file is made with its directory, readable by its owner only, and made anew once it has been moved away."""
    file = tmp_path / "logs" / "server.log"
    configure_logging(LoggingConfig(file=str(file)))
    log = get_logger("opta_lmx.test")
    log.info("first")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.rename(tmp_path / "logs" / "server.log.1")
    log.info("second")
    assert json.loads(file.read_text(encoding="utf-8"))["event"] == "second"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert lines(capsys) == []


def test_file_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    """A log that cannot be written is an error at the start, not silence later."""
    with pytest.raises(IsADirectoryError):
        configure_logging(LoggingConfig(file=str(tmp_path)))
