"""Files into a repository on the Hub, in one commit: all of them or none."""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

from texforce_hub.errors import HubError
from texforce_hub.hub.huggingface.client import LIBRARY, ask_json, bounded, find_endpoint
from texforce_hub.hub.huggingface.faults import LOG_IN, explained
from texforce_hub.hub.huggingface.repository import Repository, ask_repository

_LOG = logging.getLogger("texforce_hub")
_LONGEST_COMMIT = 600.0  # seconds of one answer while files are committed
_CHANGED = 412  # what the Hub answers if the parent is no longer the newest commit


@dataclass(frozen=True, slots=True)
class Account:
    """Who the user's token belongs to, what it may (``read``, ``write``, ``fineGrained``), and the organisations."""

    name: str
    role: str
    organisations: tuple[str, ...] = ()

    def check_writing(self, repo: str) -> None:
        """Refuse what the token cannot do, before anything is sent.

        Raises:
            HubError: a token that only reads, or somebody else's namespace.
        """
        owner = repo.partition("/")[0]
        if self.role == "read":
            raise HubError(
                f"{repo}: the token of {self.name} may only read; make one with the role 'write' at "
                f"{find_endpoint()}/settings/tokens, then {LOG_IN}"
            )
        if owner not in (self.name, *self.organisations):
            mine = ", ".join((self.name, *self.organisations))
            raise HubError(f"{repo}: you are {self.name}, and {owner} is not yours; push to one of: {mine}")


class ChangedMeanwhileError(HubError):
    """Somebody committed between our look at the repository and our own commit."""


def read_account() -> Account:
    """Who the user's token belongs to.

    Raises:
        HubError: there is no token, it is not accepted, or the Hub cannot be asked.
    """
    if get_token() is None:
        raise HubError(f"no token: the Hub lets nobody write who is not logged in; {LOG_IN}")
    with explained("who you are"):
        said = ask_json(f"{find_endpoint()}/api/whoami-v2", {})
    try:
        token = said.get("auth", {}).get("accessToken", {})
        organisations = tuple(str(organisation["name"]) for organisation in said.get("orgs") or [])
        return Account(str(said["name"]), str(token.get("role", "")), organisations)
    except (KeyError, TypeError, AttributeError) as error:
        raise HubError(f"who you are: {find_endpoint()} answers as no Hub does; check HF_ENDPOINT") from error


def find_repository(repo: str, revision: str | None = None) -> Repository | None:
    """What a repository holds now; ``None`` if there is none that we may see.

    Of a branch that is not there yet, ``main``, which it would begin with.

    Raises:
        HubError: the Hub cannot be asked.
    """
    try:
        return ask_repository(repo, revision)
    except HubError as error:
        if revision is not None and isinstance(error.__cause__, RevisionNotFoundError):
            return find_repository(repo)
        if isinstance(error.__cause__, RepositoryNotFoundError) and not isinstance(error.__cause__, GatedRepoError):
            return None
        raise


def create_repository(repo: str, *, private: bool) -> None:
    """Make an empty repository; one that is there already is fine.

    Raises:
        HubError: it cannot be made.
    """
    try:
        with explained(repo, writing=True), bounded():
            _api().create_repo(repo, visibility="private" if private else "public", exist_ok=True)
    except KeyError as error:  # 409 without the repository's address
        raise HubError(f"{repo}: the Hub is busy with another change of it; push again in a minute") from error


def create_branch(repo: str, branch: str, commit: str) -> None:
    """Begin a branch at a commit.

    Raises:
        HubError: it cannot be made.
    """
    with explained(f"{repo}@{branch}", writing=True), bounded():
        _api().create_branch(repo, branch=branch, revision=commit, exist_ok=True)


def commit_files(
    repository: Repository,
    files: Mapping[str, Path],
    *,
    message: str,
    revision: str | None,
    create_pr: bool,
) -> CommitInfo:
    """Upload files as one commit on top of the one that ``repository`` is; the others there stay as they are.

    Raises:
        ChangedMeanwhileError: it is no longer the newest.
        HubError: the Hub refuses, or cannot be reached; the repository is as it was.
    """
    additions = [CommitOperationAdd(path, source) for path, source in files.items()]
    with explained(repository.repo, writing=True), bounded(seconds=_LONGEST_COMMIT), _quiet():
        try:
            return _api().create_commit(
                repository.repo,
                additions,
                commit_message=message,
                revision=revision,
                create_pr=create_pr or None,
                parent_commit=repository.commit,
            )
        except HfHubHTTPError as error:
            if error.response.status_code == _CHANGED:
                raise ChangedMeanwhileError(f"{repository.repo}: somebody committed meanwhile") from error
            raise


def _api() -> HfApi:
    return HfApi(
        endpoint=find_endpoint(),
        library_name=LIBRARY["library_name"],
        library_version=LIBRARY["library_version"],
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the client's note that nothing changed, and without its bars where nobody watches."""
    logger = logging.getLogger("huggingface_hub.hf_api")
    before, bars = logger.level, not are_progress_bars_disabled()
    logger.setLevel(logging.ERROR)
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    finally:
        logger.setLevel(before)
        if bars:
            enable_progress_bars()
