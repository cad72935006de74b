"""Whether ``HF_ENDPOINT`` is an address at all: with some that are none, the Hub's client cannot even be imported."""

import os
from collections.abc import Iterator
from urllib.parse import urlsplit

from texforce_hub.cli.doctor.finding import Finding


def examine_address() -> Iterator[Finding]:
    """The problem with the address in ``HF_ENDPOINT``, if there is one; what may be a password in it is not shown."""
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if not _is_address(address):
        text = f"HF_ENDPOINT is {address.rpartition('@')[2]!r}, which is no address of a Hub"
        yield Finding("endpoint", "problem", text, "unset it, or set it to an address such as https://huggingface.co")


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False
