"""An adapter onto the Hub: one commit with everything that every tool needs to load it, and a card."""

import logging
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from texforce_hub.arguments import check_kind
from texforce_hub.errors import ConfigError, FamilyError, HubError, PipelineError, RefError
from texforce_hub.files.writing import writing
from texforce_hub.hub.card import render_card
from texforce_hub.hub.catalog import read_catalog
from texforce_hub.hub.convert import parse_weights
from texforce_hub.hub.find import find_bundle
from texforce_hub.hub.huggingface.client import find_endpoint
from texforce_hub.hub.huggingface.fetch import read_text
from texforce_hub.hub.huggingface.repository import Repository, open_repository
from texforce_hub.hub.huggingface.upload import (
    Account,
    ChangedMeanwhileError,
    commit_files,
    create_branch,
    create_repository,
    find_repository,
    read_account,
)
from texforce_hub.hub.licenses import check_license, is_definite
from texforce_hub.hub.publication import Publication, Request, write_publication
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.hub.refs.hub_id import HubId, is_repository

_LOG = logging.getLogger("texforce_hub")

CARD = "README.md"
_WEIGHTS = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True, slots=True)
class PushedFile:
    """A file of the repository, and whether this push changes it."""

    path: str
    size: int
    changed: bool


@dataclass(frozen=True, slots=True)
class PushedAdapter:
    """Where an adapter was published, or would be.

    ``url`` is the repository's page, or that of the pull request; ``commit`` the one that holds the files, empty if
    nothing was sent (``dry_run``). ``account`` is who pushed, ``is_new`` whether the repository was not there before.
    """

    url: str
    commit: str
    files: tuple[PushedFile, ...]
    card: str
    account: str
    role: str
    is_new: bool
    private: bool

    @property
    def changed(self) -> int:
        """How many files differ from what was there; with none, no commit is made."""
        return sum(file.changed for file in self.files)


class Fitting(Protocol):
    """What a check of an adapter against a base says."""

    @property
    def fits(self) -> bool:
        """Whether it fits."""

    @property
    def verdict(self) -> str:
        """That, in words."""


Check = Callable[[str | Path | AdapterRef, str], Fitting]


@dataclass(frozen=True, slots=True)
class _Target:
    """Where it goes: the repository, a branch of it, and whether as a pull request; ``now``: what it holds."""

    repo: str
    revision: str | None
    create_pr: bool
    private: bool
    now: Repository | None


def push_adapter(
    ref: str | Path | AdapterRef,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    message: str | None = None,
    base: str | None = None,
    license: str | None = None,
    dialects: Sequence[str] | None = None,
    images: str | Path | None = None,
    evaluation: str | Path | None = None,
    alpha: float | None = None,
    allow_pickle: bool = False,
    check: Check | None = None,
    dry_run: bool = False,
) -> PushedAdapter:
    """Publish an adapter on the Hub as ``repo`` (``owner/name``), in one commit, so that every tool loads it.

    The repository gets ``pytorch_lora_weights.safetensors`` (diffusers), ``adapter_config.json`` and
    ``adapter_model.safetensors`` (PEFT), ``NAME-kohya.safetensors`` (ComfyUI, A1111), a card, pictures and the recipe.
    It is made if it is not there; what others put there stays, in the card, too. If all of it is there already, no
    commit is made. Everything is checked before anything is sent.

    Args:
        ref: anything that ``read_adapter`` takes; of a run's folder, curve and sheet go along; weights
            (``"mine:0.8"``) go into the files.
        repo: ``owner/name``.
        private: whether a new repository is seen by its owner alone.
        revision: the branch; ``main`` without one. A new one is begun at ``main``.
        create_pr: propose it as a pull request instead.
        message: the commit's.
        base: the Hub id of the base; by default what the adapter's file says.
        license: an id of the Hub's list; by default that of the card there, of the catalogue entry, or of the base.
        dialects: the layouts to write; by default diffusers, kohya and peft, as far as they can hold the adapter.
        images: pictures for the gallery, a file or a folder that ``apply --output`` wrote.
        evaluation: the folder of ``evaluate --output``, or what ``evaluate --json`` printed; by default
            ``evaluation`` or ``evaluation.json`` beside the adapter.
        alpha: of layers that store none.
        allow_pickle: whether a pickle from the Hub may be read.
        check: ``check_adapter``, which sees whether it fits the base; a base that it does not know is not looked at.
        dry_run: find out everything, change nothing.

    Raises:
        ConfigError: an impossible name, licence or option, a base or licence that nobody knows, or ``check`` says
            that the adapter does not fit its base.
        RefError, FileError, DialectError, AdapterError: the adapter cannot be read or written.
        HubError: the Hub refuses, or cannot be reached; what was published before is as it was.

    Example:
        >>> from texforce_hub import push_adapter
        >>> push_adapter("runs/colour", "alice/colour", license="apache-2.0", dry_run=True)  # doctest: +SKIP
    """
    if not is_repository(check_kind(repo, str, "a repository is owner/name")):
        raise ConfigError(f"{repo!r} cannot name a repository; expected owner/name")
    if create_pr and revision not in (None, "main"):
        raise ConfigError("a pull request goes to main; leave out --revision, or --create-pr")
    bundle = find_bundle(ref)
    request = Request(
        bundle,
        parse_weights(ref),
        repo=repo,
        base=base,
        license="" if license is None else check_license(license),
        dialects=dialects,
        alpha=alpha,
        allow_pickle=allow_pickle,
        images=None if images is None else Path(images),
        evaluation=None if evaluation is None else Path(evaluation),
    )
    with tempfile.TemporaryDirectory(prefix="texforce-hub-") as folder:
        publication = write_publication(request, Path(folder))
        if check is not None:
            _check_fit(check, ref, publication.facts.base)
        account = read_account()
        if not create_pr:
            account.check_writing(repo)
        target = _look(repo, revision, create_pr=create_pr, private=private)
        publication = _with_licenses(publication, target, _license_in_catalog(ref))
        plan, card = _plan(publication, target, account, Path(folder))
        if dry_run:
            return replace(plan, commit="")
        if not plan.changed:
            return plan
        return _send(publication, target, plan, card, message or f"Publish {repo.partition('/')[2]} with texforce-hub")


def _check_fit(
    check: Callable[[str | Path | AdapterRef, str], Fitting], ref: str | Path | AdapterRef, base: str
) -> None:
    try:
        fit = check(ref, base)
    except (PipelineError, FamilyError, HubError) as error:
        _LOG.warning("%s: not checked against its base: %s", ref, error)
        return
    if not fit.fits:
        raise ConfigError(f"{ref}: {fit.verdict}; name the base that it was made for with --base-id")


def _look(repo: str, revision: str | None, *, create_pr: bool, private: bool) -> _Target:
    """The place as it is now; of a branch that is not there yet, what it would begin with."""
    now = find_repository(repo, revision)
    if now is not None and private and not now.private:
        _LOG.warning("%s is there already and public; --private is for new repositories", repo)
    if now is None and create_pr:
        raise HubError(f"{repo}: there is no such repository to propose a change to; leave out --create-pr")
    return _Target(repo, revision, create_pr, private, now)


def _license_in_catalog(ref: str | Path | AdapterRef) -> str:
    source = str(ref) if isinstance(ref, Path) else (AdapterRef.parse(ref) if isinstance(ref, str) else ref).source
    entry = read_catalog().get(source)
    return "" if entry is None else entry.license.lower()


def _with_licenses(publication: Publication, target: _Target, in_catalog: str) -> Publication:
    """The licence that was given, else the first that is known and definite."""
    facts = publication.facts
    base = find_repository(facts.base)
    of_base = "" if base is None else base.license
    if base is None:
        _LOG.warning("%s: the Hub has no such base, or a private one; the card names it all the same", facts.base)
    there = "" if target.now is None else target.now.license
    known = (
        license
        for license in (facts.license, there, in_catalog, of_base)
        if is_definite(license) or license == facts.license
    )
    chosen = next((license for license in known if license), "")
    if not chosen:
        raise ConfigError(
            f"nobody says under which licence this adapter is, and the base {facts.base} does not decide it; "
            "give it with --license, e.g. apache-2.0 or creativeml-openrail-m"
        )
    sources = tuple(replace(source, license=source.license or _license_of(source.name)) for source in facts.sources)
    return replace(publication, facts=replace(facts, license=chosen, base_license=of_base, sources=sources))


def _license_of(ref: str) -> str:
    """A merge source's licence, by the catalogue, or its card on the Hub or in the cache; empty: unknown."""
    if entry := read_catalog().get(ref):
        return entry.license
    if not ref.startswith("hf://"):
        return ""
    try:
        source = HubId.parse(ref)
        return open_repository(source.repo, source.revision).license
    except (RefError, HubError):
        return ""


def _plan(publication: Publication, target: _Target, account: Account, folder: Path) -> tuple[PushedAdapter, Path]:
    """What would be there afterwards, file by file, with the card written beside the others."""
    now = target.now
    _check_layout(target)
    existing = read_text(now.file(CARD)) if now is not None and CARD in now.blobs else ""
    try:
        card = render_card(publication.facts, existing)
    except ValueError as error:
        raise HubError(f"{target.repo}: its {CARD} has no readable front matter ({error}); correct it there") from error
    path = folder / CARD
    with writing(path) as part:
        part.write_bytes(card.encode())
    files = {**publication.files, CARD: path}
    described = tuple(
        PushedFile(name, file.stat().st_size, now is None or name not in now.blobs or not now.blobs[name].is_of(file))
        for name, file in sorted(files.items())
    )
    url = f"{find_endpoint()}/{target.repo}"
    private = target.private if now is None else now.private
    commit = "" if now is None else now.commit
    return PushedAdapter(url, commit, described, card, account.name, account.role, now is None, private), path


def _check_layout(target: _Target) -> None:
    """Refuse a repository in which diffusers would load another file than ours.

    Raises:
        HubError: it looks for this name in all folders, and takes the first.
    """
    rivals = [] if target.now is None else [p for p in target.now.blobs if p.endswith(_WEIGHTS) and p != _WEIGHTS]
    rivals = [path for path in rivals if "checkpoint" not in path]
    if rivals:
        raise HubError(
            f"{target.repo}: holds {rivals[0]}, which diffusers may load instead of this adapter; delete it there, "
            "or move it into a folder named checkpoint-…"
        )


def _send(publication: Publication, target: _Target, plan: PushedAdapter, card: Path, message: str) -> PushedAdapter:
    """Upload what changes, and commit it."""
    if target.now is None:
        create_repository(target.repo, private=target.private)
        target = replace(target, now=find_repository(target.repo))
    if target.now is None:
        raise HubError(f"{target.repo}: was made, and cannot be seen; does the token reach it?")
    if target.revision is not None and target.revision != target.now.revision:
        create_branch(target.repo, target.revision, target.now.commit)
    files = {**publication.files, CARD: card}
    changed = {file.path: files[file.path] for file in plan.files if file.changed}
    try:
        done = commit_files(target.now, changed, message=message, revision=target.revision, create_pr=target.create_pr)
    except ChangedMeanwhileError as error:
        return _explain_change(target, plan, files, error)
    return replace(plan, commit=done.oid, url=done.pr_url or plan.url)


def _explain_change(
    target: _Target, plan: PushedAdapter, files: dict[str, Path], error: ChangedMeanwhileError
) -> PushedAdapter:
    """Somebody else committed first: that is fine if it was the same, and said if it was not.

    Raises:
        HubError: it was not.
    """
    now = find_repository(target.repo, target.revision)
    if now is not None and all(name in now.blobs and now.blobs[name].is_of(file) for name, file in files.items()):
        return replace(plan, commit=now.commit, files=tuple(replace(file, changed=False) for file in plan.files))
    newest = "" if now is None else f", its newest commit is {now.commit[:12]}"
    raise HubError(
        f"{target.repo}: somebody committed to it meanwhile{newest}; nothing was changed by this push, "
        "look at theirs and push again to put yours on top"
    ) from error
