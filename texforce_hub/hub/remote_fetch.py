"""An adapter on the Hub, or a folder of them, fetched into the cache."""

import logging
from pathlib import Path

from texforce_hub.errors import HubError
from texforce_hub.files.hashing import hash_files
from texforce_hub.hub.filenames import is_safetensors, list_names
from texforce_hub.hub.huggingface.fetch import fetch_file
from texforce_hub.hub.huggingface.repository import RemoteFile
from texforce_hub.hub.huggingface.store import find_cached
from texforce_hub.hub.pickles import are_pickles_permitted, refuse_pickles
from texforce_hub.hub.remote import RemotePath, lies_in_remote_pieces, list_adapter_files, list_remote_files

_LOG = logging.getLogger("texforce_hub")


def fetch_remote_file(remote: RemotePath, file: RemoteFile) -> Path:
    """Where a file of the folder lies in the cache, fetched if it was not there.

    Raises:
        HubError: it cannot be fetched, or is not what the Hub lists or the catalogue says.
    """
    path = fetch_file(file)
    if remote.sha256:
        digest = hash_files([path])
        if digest != remote.sha256:
            raise HubError(f"{file}: its SHA-256 is {digest[:12]}…, the catalogue's {remote.sha256[:12]}…; not used")
    return path


def fetch_adapter(remote: RemotePath, typed: str) -> Path:
    """The adapter at a path, fetched: its file in the cache, or the folder there of an adapter in several files.

    ``typed`` is the reference as a user gave it, for messages.

    Raises:
        RefError: no adapter, or several of equal standing.
        FileError: it is a pickle, which is not fetched unasked.
        HubError: a file of it cannot be fetched.
    """
    files = list_adapter_files(remote)
    refuse_pickles(typed, [file.path for file in files if find_cached(file) is None])
    paths = [fetch_remote_file(remote, file) for file in files]
    if lies_in_remote_pieces(remote):
        inside = files[0].path.removeprefix(remote.path).strip("/")
        return paths[0].parents[inside.count("/")]
    return paths[-1]


def fetch_all(remote: RemotePath, typed: str) -> Path:
    """The file in the cache, or the folder in it, that a path means, with all tensor files in it fetched.

    Pickles stay on the Hub, unless they are permitted, or cached already.

    Raises:
        RefError: there is none.
        FileError: there are only pickles, which are not fetched unasked.
        HubError: one of them cannot be fetched.
    """
    files = list_remote_files(remote)
    left = [] if are_pickles_permitted() else [file for file in files if _is_unasked(file)]
    if len(left) == len(files):
        refuse_pickles(typed, [file.path for file in files])
    if left:
        names = list_names([file.path for file in left])
        _LOG.warning("%s: pickles, left on the Hub; --allow-pickle fetches them: %s", typed, names)
    files = [file for file in files if file not in left]
    if remote.is_file:
        return fetch_remote_file(remote, files[0])
    paths = [fetch_remote_file(remote, file) for file in files]
    inside = files[0].path.removeprefix(remote.path).strip("/")
    return paths[0].parents[inside.count("/")]


def _is_unasked(file: RemoteFile) -> bool:
    return not is_safetensors(file.path) and find_cached(file) is None
