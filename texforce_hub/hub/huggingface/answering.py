"""Whether the Hub answers, how soon, and as whom it knows the user."""

from dataclasses import dataclass
from time import monotonic

from huggingface_hub import get_token

from texforce_hub.errors import HubError, one_line
from texforce_hub.hub.huggingface.client import ask_json, find_endpoint, mask_secrets
from texforce_hub.hub.huggingface.faults import explained
from texforce_hub.hub.huggingface.transport import httpx


@dataclass(frozen=True, slots=True)
class HubAnswer:
    """What the Hub said: after how many seconds, and the user's name there; empty without a token."""

    seconds: float
    user: str = ""


def ask_hub() -> HubAnswer:
    """Ask the Hub for one repository, and for the name of the token's user if there is a token.

    Raises:
        HubError: it does not answer, or not as a Hub does, or does not accept the token.
    """
    began = monotonic()
    try:
        with explained("the Hub"):
            page = ask_json(f"{find_endpoint()}/api/models", {"limit": 1})
            if not isinstance(page, list):
                raise ValueError("the answer is no list; HF_ENDPOINT is no Hub")
        seconds = monotonic() - began
        with explained("the Hub and the token"):
            said = ask_json(f"{find_endpoint()}/api/whoami-v2", {}) if get_token() else {}
    except HubError as error:
        if not isinstance(error.__cause__, httpx.ConnectError):
            raise
        reason = one_line(mask_secrets(f"{find_endpoint()} cannot be reached ({error.__cause__})"))
        raise HubError(f"{reason}; check the network, the proxy and HF_ENDPOINT") from error.__cause__
    user = said.get("name") if isinstance(said, dict) else None
    return HubAnswer(seconds, user if isinstance(user, str) else "")
