"""What a file on the Hub says, looked at from here: its header by byte ranges, its hash from the repository."""

from dataclasses import replace
from pathlib import Path, PurePosixPath

from texforce_hub.bundles import owns_config
from texforce_hub.choose import is_safetensors
from texforce_hub.dialects import plan
from texforce_hub.errors import TexForceHubError
from texforce_hub.hub import RemoteFile
from texforce_hub.inspection.header import Inspection, describe, with_error
from texforce_hub.remote import open_remote_header

_PICKLE = "a pickle, which cannot be looked into from here; texforce-hub convert --allow-pickle reads it"


def inspect_remote_file(file: RemoteFile) -> Inspection:
    """The facts of one file on the Hub, adapter or not; ``path`` is the reference that will always mean it.

    A file that cannot be looked at, damaged or behind a fault of the network, gives its ``error``.
    """
    container = "safetensors" if is_safetensors(file.path) else "pickle"
    known = Inspection(Path(file.name), file.blob.size, file.blob.sha256, container)
    if container == "pickle":
        return replace(known, problems=(_PICKLE,))
    try:
        planned = plan(open_remote_header(file), owns_config=owns_config(PurePosixPath(file.path).name))
    except TexForceHubError as error:
        return with_error(known, str(error).removeprefix(f"{file}: "))
    return describe(known, planned)
