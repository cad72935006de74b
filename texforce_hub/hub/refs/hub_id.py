"""A repository on the Hub as a user names it."""

import re
from dataclasses import dataclass

from texforce_hub.arguments import fail

_ADDRESS = re.compile(r"https?://(www\.)?(huggingface\.co|hf\.co)/", re.IGNORECASE)
_REPO_WORD = re.compile(r"\w[\w.-]*", re.ASCII)
_LONGEST = 96  # characters of a repository's name, its owner's included
_QUOTED = re.compile(r"(%[0-9A-Fa-f]{2})+")
_LONG_REVISION = re.compile(r"refs/(pr/\d+|convert/\w+)", re.ASCII)


def is_address(text: str) -> bool:
    """Whether a text is an address of the Hub, as browsers show it."""
    return _ADDRESS.match(text) is not None


@dataclass(frozen=True, slots=True)
class HubId:
    """A repository on the Hub, one of its revisions, one of its files: ``owner/name[@revision][/file]``."""

    repo: str
    revision: str | None = None
    file: str | None = None

    @classmethod
    def parse(cls, text: str) -> "HubId":
        """The Hub id that ``text`` writes, with or without ``hf://``, or the address that browsers show of it.

        Raises:
            RefError: it writes none, or its file would leave the repository's folder.
        """
        if _ADDRESS.match(text):
            return cls._parse_address(text)
        start = len("hf://") if text.startswith("hf://") else 0
        owner, slash, rest = text[start:].partition("/")
        if not slash or not _REPO_WORD.fullmatch(owner):
            fail(text, start, "not a Hub id; expected owner/name, e.g. me/style@v1/lora.safetensors")
        at = start + len(owner) + 1
        match = _REPO_WORD.match(rest)
        if match is None:
            fail(text, at, "not a Hub id; expected a repository's name after the owner")
        at += match.end()
        if at - start > _LONGEST:
            fail(text, start, f"not a Hub id; the Hub's have at most {_LONGEST} characters")
        revision, file = _parse_revision_and_file(text, at)
        return cls(f"{owner}/{match[0]}", revision, file)

    @classmethod
    def _parse_address(cls, text: str) -> "HubId":
        """The Hub id of an address as browsers show it, with a page's ``/blob/main/`` or ``/resolve/main/`` or none."""
        match = _ADDRESS.match(text)
        begin = match.end() if match else 0
        path = _unquoted(re.split("[?#]", text[begin:], maxsplit=1)[0]).strip("/")
        owner, _, rest = path.partition("/")
        if owner in ("datasets", "spaces", "models", "docs", "collections", "api"):
            fail(text, begin, "not a model's address; expected https://huggingface.co/owner/name")
        name, _, inside = rest.partition("/")
        page, _, inside = inside.partition("/")
        if page and page not in ("blob", "resolve", "raw", "tree"):
            fail(text, begin, "not a file's address; expected …/owner/name/blob/main/file.safetensors")
        return cls.parse(f"{owner}/{name}" + (f"@{inside}" if page and inside else ""))

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{self.repo}{revision}" + ("" if self.file is None else f"/{self.file}")


def _unquoted(text: str) -> str:
    """The text of an address, whose odd characters are written ``%2F`` as bytes."""
    return _QUOTED.sub(lambda match: bytes.fromhex(match[0].replace("%", "")).decode("utf-8", "replace"), text)


def _parse_revision_and_file(text: str, at: int) -> tuple[str | None, str | None]:
    revision = None
    if text[at : at + 1] == "@":
        long = _LONG_REVISION.match(text, at + 1)
        slash = text.find("/", at)
        end = long.end() if long else len(text) if slash < 0 else slash
        revision = text[at + 1 : end]
        if not revision:
            fail(text, at + 1, "no revision after '@'; expected a branch, a tag or a commit")
        at = end
    if at == len(text):
        return revision, None
    file = text[at + 1 :]
    if text[at] != "/" or not file or "\\" in file or not set(file.split("/")).isdisjoint({"", ".", ".."}):
        fail(text, at, "expected '/' and a file inside the repository")
    return revision, file


def is_repository(text: str) -> bool:
    """Whether a text is a repository's name and nothing more: ``owner/name``."""
    owner, slash, name = text.partition("/")
    return bool(slash) and all(_REPO_WORD.fullmatch(word) for word in (owner, name))
