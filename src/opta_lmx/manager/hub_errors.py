"""What a hub's refusals and broken connections mean, and how often they are borne."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx2  # the client that huggingface_hub brings and hands out
from huggingface_hub.errors import HfHubHTTPError

from opta_lmx.errors import DownloadError, HubUnreachable, InvalidRequest, ModelNotFound
from opta_lmx.manager.hub import Order


class Trouble(Exception):
    """A failure that may pass; ``after_seconds`` is when the hub wants to be asked again."""

    def __init__(self, reason: str, after_seconds: float | None = None) -> None:
        super().__init__(reason)
        self.after_seconds = after_seconds


class Retries:
    """Counts the failures in a row of one piece of work."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._failures = 0

    def progressed(self) -> None:
        """The work goes on: earlier failures are forgiven."""
        self._failures = 0

    def pause(self, trouble: Trouble) -> None:
        """Waits before the next attempt. Raises HubUnreachable if there is to be none."""
        patience = self._order.patience
        self._failures += 1
        seconds = min(patience.first_pause_seconds * 2 ** (self._failures - 1), patience.longest_pause_seconds)
        seconds = seconds if trouble.after_seconds is None else trouble.after_seconds
        if self._failures >= patience.attempts or seconds > patience.longest_pause_seconds:
            raise HubUnreachable(f"{self._order.endpoint} cannot be reached or does not go on: {trouble}.")
        time.sleep(seconds)


def judge(response: httpx2.Response, order: Order) -> Exception:
    """What an answer that is no success means."""
    status, word = response.status_code, response.headers.get("x-error-code")
    if status in (401, 403):
        name = order.token_name
        cure = f"the token in {name} gives no access" if order.token else f"no token is given in {name}"
        cure = cure if name else "neither downloads.token_env nor downloads.token_file names a token"
        return InvalidRequest(
            f"The hub refuses access to {order.repo_id!r}: it is gated or private, or there is no such repository; "
            f"{cure}. Accept the model's terms on its page and use a token of that account.",
            param="repo_id",
            code="hub_access_denied",
        )
    if status == 404 and word == "RevisionNotFound":
        message = f"{order.repo_id!r} has no revision {order.revision!r}."
        return InvalidRequest(message, param="revision", code="revision_not_found")
    if status == 404:
        return ModelNotFound(order.repo_id)
    if status == 429 or status >= 500:
        return Trouble(f"it answers {status}", retry_after_seconds(response.headers, datetime.now(UTC)))
    return DownloadError(f"The hub answers {status}, which means nothing here.")


def retry_after_seconds(headers: Mapping[str, str], now: datetime) -> float | None:
    """What Retry-After asks for, as a number or a date; None where it says nothing that is understood.

    A date is held against the answer's own Date, as far as there is one: a clock here that is wrong changes nothing.
    """
    asked = headers.get("retry-after", "").strip()
    if asked.isdecimal():
        return float(asked)
    until = _date(asked)
    return None if until is None else max(0.0, (until - (_date(headers.get("date", "")) or now)).total_seconds())


def _date(text: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    return date if date.tzinfo is not None else date.replace(tzinfo=UTC)


@contextmanager
def mapped(order: Order) -> Iterator[None]:
    """Turns the hub library's and its client's exceptions into our own."""
    try:
        yield
    except HfHubHTTPError as error:
        raise judge(error.response, order) from None
    except httpx2.TimeoutException:
        raise Trouble(f"no answer within {order.patience.silence_seconds:g} seconds") from None
    except httpx2.ConnectError as error:
        raise Trouble(f"no connection ({error})") from None
    except httpx2.HTTPError as error:
        raise Trouble(f"the connection broke ({type(error).__name__})") from None
