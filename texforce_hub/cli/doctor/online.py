"""What the Hub itself says when it is asked.

Imports the Hub's client: only after an import of it went well, and where ``HF_ENDPOINT`` is an address.
"""

from huggingface_hub import constants

from texforce_hub.cli.doctor.finding import Finding
from texforce_hub.errors import HubError
from texforce_hub.hub.huggingface.answering import ask_hub
from texforce_hub.hub.huggingface.client import find_endpoint, mask_secrets


def examine_online() -> Finding:
    """Whether the Hub answers, and as whom it knows the user; asked to stay offline, it is not asked."""
    if constants.HF_HUB_OFFLINE:
        return Finding("online", "note", "not asked: HF_HUB_OFFLINE is set", "unset HF_HUB_OFFLINE to ask the Hub")
    try:
        answer = ask_hub()
    except HubError as error:
        problem, _, advice = str(error).partition("; ")
        return Finding("online", "problem", problem, advice or "try again later")
    known = f", and knows you as {answer.user}" if answer.user else ""
    return Finding("online", "ok", f"{mask_secrets(find_endpoint())} answered in {answer.seconds:.1f} s{known}")
