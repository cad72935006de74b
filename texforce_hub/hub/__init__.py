"""The reading half of the Hub: what a repository holds at one commit, its files' headers, and its files.

``HF_ENDPOINT``, ``HF_TOKEN``, ``HF_HUB_CACHE`` and ``HF_HUB_OFFLINE`` mean what they mean to ``huggingface_hub``,
whose cache this is. Whatever goes wrong is one ``HubError`` of one line.
"""

from texforce_hub.hub.client import find_endpoint, mask_secrets
from texforce_hub.hub.fetch import fetch_file, find_cached
from texforce_hub.hub.ranges import RemoteHeader, read_remote_header
from texforce_hub.hub.repository import RemoteFile, Repository, open_repository

__all__ = [
    "RemoteFile",
    "RemoteHeader",
    "Repository",
    "fetch_file",
    "find_cached",
    "find_endpoint",
    "mask_secrets",
    "open_repository",
    "read_remote_header",
]
