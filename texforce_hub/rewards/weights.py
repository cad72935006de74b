"""The published weights of learned rewards: found here or on the Hub at one commit, read as tensors, converted once."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from texforce_hub.errors import RewardError
from texforce_hub.files.container import sniff
from texforce_hub.files.hashing import hash_files
from texforce_hub.files.tensors import read_tensors
from texforce_hub.files.writing import write_tensors
from texforce_hub.rewards.cache import cache_folder

logger = logging.getLogger("texforce_hub")
_said: set[str] = set()


@dataclass(frozen=True)
class Published:
    """A file on the Hub at one commit, and the licence of what is in it."""

    repo: str
    revision: str
    file: str
    licence: str

    @property
    def download(self) -> str:
        """The command that fetches it."""
        return f"hf download {self.repo} {self.file} --revision {self.revision}"


def find_file(published: Published, folder: Path | None = None) -> Path:
    """The file: in a folder that was given, else in the Hub's cache, else fetched.

    Raises:
        RewardError: it is not there, and what would fetch it.
    """
    if folder is not None:
        path = folder if folder.is_file() else folder / published.file
        if not path.is_file():
            raise RewardError(f"{folder} holds no {published.file}; expected it as '{published.download}' fetches it")
        return path
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(published.repo, published.file, revision=published.revision))
    except Exception as error:  # of another class for each way to be offline
        raise RewardError(
            f"{published.file} of {published.repo} is not on this machine and cannot be fetched; "
            f"where there is a network: {published.download}"
        ) from error


def is_here(published: Published) -> bool:
    """Whether the Hub's cache has the file."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(published.repo, published.file, revision=published.revision), str)


def load_state(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a file. A pickle is read tensors only, once: its safetensors copy, named by the pickle's hash,
    is read from then on.

    Raises:
        FileError: a damaged file, or a pickle of more than tensors.
    """
    if sniff(path) == "safetensors":
        return read_tensors(path)[1]
    copy = cache_folder("rewards") / f"{hash_files([path])}.safetensors"
    if not copy.is_file():
        tensors = read_tensors(path, allow_pickle=True)[1]
        write_tensors(copy, tensors, {"source": path.name})
        logger.info("%s: converted once, to %s", path, copy)
    return read_tensors(copy)[1]


def say_licence(name: str, published: Published) -> None:
    """Log once whose weights these are and on what terms."""
    if published.repo not in _said:
        _said.add(published.repo)
        logger.info("reward %s: %s at %.12s, licence %s", name, published.repo, published.revision, published.licence)
