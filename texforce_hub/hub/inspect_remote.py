"""What a file on the Hub says, looked at from here: its header by byte ranges, its hash from the repository."""

from dataclasses import replace
from pathlib import Path, PurePosixPath

from texforce_hub.errors import TexForceHubError
from texforce_hub.formats.peft_config import owns_config
from texforce_hub.formats.plan.planning import plan
from texforce_hub.hub.filenames import is_safetensors
from texforce_hub.hub.huggingface.ranges import RemoteHeader
from texforce_hub.hub.huggingface.repository import RemoteFile
from texforce_hub.hub.inspect import Inspection, describe, with_error
from texforce_hub.hub.remote import open_remote_header
from texforce_hub.hub.remote_sidecars import find_remote_sidecars

_PICKLE = "a pickle, which cannot be looked into from here; texforce-hub convert --allow-pickle reads it"


_SCATTERED = "its alphas lie scattered over the file and were not fetched"
_LEFT = "alphas not fetched, or few of them; inspect one file alone for more, or with --weights for all"


def inspect_remote_file(file: RemoteFile, *, alone: bool = True, hashed: bool = True) -> Inspection:
    """The facts of one file on the Hub, adapter or not; ``path`` is the reference that will always mean it.

    Of one of many (not ``alone``) only the header is read, which takes two requests: alphas are known as far as they
    lie beside it, and of sidecars their names. A file that cannot be looked at, damaged or behind a fault of the
    network, gives its ``error``.
    """
    container = "safetensors" if is_safetensors(file.path) else "pickle"
    sidecars = find_remote_sidecars(file, read=alone)
    sha256 = file.blob.sha256 if hashed else ""
    known = Inspection(Path(file.name), file.blob.size, sha256, container, sidecars=sidecars)
    if container == "pickle":
        return replace(known, problems=(_PICKLE,))
    try:
        remote = open_remote_header(file, numbers=alone)
        planned = plan(remote.header, owns_config=owns_config(PurePosixPath(file.path).name))
    except TexForceHubError as error:
        return with_error(known, str(error).removeprefix(f"{file}: "))
    return _without_unread(describe(known, planned), remote, alone=alone)


def _without_unread(described: Inspection, remote: RemoteHeader, *, alone: bool) -> Inspection:
    """What is described, with no alpha said to be missing that is only unread."""
    if not remote.unread:
        return described
    alphas: dict[float | None, int] = {
        alpha: count for alpha, count in (described.alphas or {}).items() if alpha is not None
    }
    some = f" but for {remote.read} of {remote.read + remote.unread}" if alphas else ""
    note = f"{_SCATTERED}{some}; inspect --weights fetches it" if alone else _LEFT
    return replace(described, alphas=alphas or None, notes=(note,))
