"""Everything that can go wrong between here and the Hub, each in one line with the way out."""

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
    XetDownloadError,
)

from texforce_hub.errors import HubError, one_line
from texforce_hub.hub.huggingface.client import find_endpoint, mask_secrets
from texforce_hub.hub.huggingface.transport import httpx

FAULTS = (
    httpx.HTTPError,
    httpx.InvalidURL,
    OSError,
    EntryNotFoundError,
    RevisionResolutionError,
    XetDownloadError,
    RuntimeError,  # what hf_xet raises
    ValueError,  # an answer that is no JSON, a name that the client refuses
)
"""What the client raises of itself; nothing else is caught."""

LOG_IN = "'hf auth login', or set HF_TOKEN"


@contextmanager
def explained(what: str, *, writing: bool = False) -> Iterator[None]:
    """Turn the client's errors into one line that begins with ``what``; ``writing``: the Hub was asked to change.

    Raises:
        HubError: the client raised; its own error is the cause.
    """
    try:
        yield
    except FAULTS as error:
        reason = _explain_refusal(error) if writing else None
        raise HubError(f"{what}: {mask_secrets(reason or _explain(error))}") from error


def is_outage(error: BaseException | None) -> bool:
    """Whether the Hub did not answer, or not for itself: what the cache holds may stand in."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code >= 500
    return isinstance(error, OfflineModeIsEnabled | httpx.TransportError) and not isinstance(error, httpx.ProxyError)


def _explain(error: BaseException) -> str:
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        return _explain(error.__cause__)
    for kind, explain in _REASONS:
        if isinstance(error, kind):
            return explain(error)
    return _explain_system(error)


def _explain_status(error: BaseException) -> str:
    assert isinstance(error, HfHubHTTPError)
    status = error.response.status_code
    if status >= 500:
        return f"the Hub answers {status}, again and again; try later, or set HF_HUB_OFFLINE=1 to use what is cached"
    known = _STATUSES.get(status)
    return known or f"the Hub answers {status}: {_server_message(error)}"


def _server_message(error: HfHubHTTPError) -> str:
    return one_line(mask_secrets(error.server_message or error.response.reason_phrase or "no reason is given"))


def _explain_refusal(error: BaseException) -> str | None:
    """Why the Hub does not write; ``None``: for a reason of reading, too."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, HfHubHTTPError):  # of one file's upload
        error = error.__cause__
    if not isinstance(error, (*_READING, HfHubHTTPError)):
        return f"cannot be uploaded: {_first_line(error)}"
    if not isinstance(error, HfHubHTTPError) or isinstance(error, RepositoryNotFoundError | RevisionNotFoundError):
        return None
    reason = _REFUSALS.get(error.response.status_code)
    return None if reason is None else f"{reason} (the Hub says: {_server_message(error)})"


_READING = (httpx.TransportError, OfflineModeIsEnabled, HFValidationError)
"""Errors that are explained alike, whether something was to be read or to be written."""

_REFUSALS: Mapping[int, str] = {
    403: f"the token may not write here; make one that may write to this owner's repositories, then {LOG_IN}",
    409: "the Hub is busy with another change of it; push again in a minute",
    413: "too large for the Hub; push fewer layouts (--dialect) or fewer pictures (--images)",
    507: "the owner's storage on the Hub is full; delete something there, or push to another owner",
}


_STATUSES: Mapping[int, str] = {
    401: f"the Hub does not accept the token; log in again: {LOG_IN}",
    403: "the token may not read this; make one at the Hub that may, or ask the owner for access",
    416: "the Hub has fewer bytes of it than it says; it is being changed, or the endpoint is no Hub",
    429: f"the Hub answers 429, too many requests; wait some minutes, or log in for more: {LOG_IN}",
}


def _explain_unreachable(error: BaseException) -> str:
    return (
        f"{find_endpoint()} cannot be reached ({_first_line(error)}), and the cache does not hold it; "
        f"check the network, the proxy and HF_ENDPOINT"
    )


def _explain_offline(_: BaseException) -> str:
    return f"not in the cache ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set; unset it to fetch"


_REASONS: tuple[tuple[type[BaseException], Callable[[BaseException], str]], ...] = (
    (GatedRepoError, lambda _: f"a gated repository; ask for access on its page at the Hub, then log in: {LOG_IN}"),
    (
        RepositoryNotFoundError,
        lambda _: f"no such repository on the Hub, or a private one; check the name; for private ones {LOG_IN}",
    ),
    (DisabledRepoError, lambda _: "the Hub has closed this repository"),
    (RevisionNotFoundError, lambda _: "the repository has no such revision; give a branch, a tag or a commit of it"),
    (RemoteEntryNotFoundError, lambda _: "the Hub has no such file"),
    (HfHubHTTPError, _explain_status),
    (OfflineModeIsEnabled, _explain_offline),
    (LocalEntryNotFoundError, _explain_offline),
    (HFValidationError, lambda error: f"cannot be the name of a repository: {_first_line(error)}"),
    (
        httpx.TimeoutException,
        lambda _: "the Hub did not answer in time; try again, or give it more: HF_HUB_ETAG_TIMEOUT=60 (seconds)",
    ),
    (httpx.TransportError, _explain_unreachable),
)


def _explain_system(error: BaseException) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full; make room in {constants.HF_HUB_CACHE}, or set HF_HUB_CACHE to another disk"
    return f"cannot be fetched: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    """What the error says, on one line; what the client says of the address asked is left out."""
    return one_line(mask_secrets(str(error).strip() or type(error).__name__)).rstrip(".")
