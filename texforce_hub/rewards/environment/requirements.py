"""What a reward's file says that it needs: the block of PEP 723 at its top, every package pinned.

::

    # /// script
    # requires-python = ">=3.11,<3.13"
    # dependencies = ["mediapipe==0.10.14", "numpy==1.26.4"]
    # [tool.texforce-hub]
    # only-these = true
    # licence = "Apache-2.0"
    # ///

``only-these`` leaves out what those packages ask for themselves, where a list is known to be complete.
"""

import hashlib
import platform
import re
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.utils import canonicalize_name

from texforce_hub.errors import RewardError
from texforce_hub.reading import parse_toml, read_text

_BLOCK = re.compile(r"(?m)^# /// script$\n(?P<lines>(?:^#(?:| .*)$\n)+?)^# ///$")
_OURS = ("numpy", "pillow")  # what the server in the environment imports


@dataclass(frozen=True)
class Requirements:
    """Pinned packages, sorted, and on what terms what is in them may be used.

    only_these: whether packages that they ask for themselves are left out
    """

    packages: tuple[str, ...]
    only_these: bool = False
    licence: str | None = None

    @property
    def key(self) -> str:
        """A short name of the environment that has them, under this Python on this kind of machine."""
        python = f"{platform.python_implementation()} {sys.version_info[:2]} {platform.system()} {platform.machine()}"
        text = "\n".join([python, str(self.only_these), *self.packages])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_requirements(path: Path) -> Requirements:
    """What the block of a reward's file names; the server's own packages are added, as they are here.

    Raises:
        RewardError: the file has no such block, names a package without one version, or needs another Python.
    """
    block = _BLOCK.search(read_text(path, error=RewardError))
    if block is None:
        raise RewardError(
            f"{path} does not say what it needs; expected a block at its top: '# /// script', "
            "'# dependencies = [\"numpy==2.3.0\"]', '# ///' (PEP 723), or python: in place of env:"
        )
    text = "".join(line[2:] + "\n" for line in block["lines"].splitlines())
    table = parse_toml(text, f"the block of {path}", error=RewardError)
    _check_python(path, table.get("requires-python", ""))
    named = table.get("dependencies", [])
    if not isinstance(named, list) or not all(isinstance(line, str) for line in named):
        raise RewardError(f"{path}: dependencies {named!r:.80}; expected a list of texts such as numpy==2.3.0")
    packages = dict(_parse(path, line) for line in named)
    for name in _OURS:
        packages.setdefault(name, f"{name}=={version(name)}")
    own = _own_table(path, table)
    return Requirements(tuple(sorted(packages.values())), own.get("only-these") is True, own.get("licence"))


def _own_table(path: Path, table: dict[str, Any]) -> dict[str, Any]:
    tools = table.get("tool", {})
    own = tools.get("texforce-hub", {}) if isinstance(tools, dict) else {}
    known = {"only-these": bool, "licence": str}
    for name, value in own.items() if isinstance(own, dict) else ():
        if not isinstance(value, known.get(name, ())):
            raise RewardError(f"{path}: {name} = {value!r:.40} in [tool.texforce-hub]; expected only-these or licence")
    return own if isinstance(own, dict) else {}


def _parse(path: Path, line: str) -> tuple[str, str]:
    """The canonical name of a package and its line."""
    try:
        requirement = Requirement(line)
    except InvalidRequirement as error:
        raise RewardError(f"{path}: {line!r:.80} is no requirement; expected e.g. numpy==2.3.0") from error
    pins = [specifier for specifier in requirement.specifier if specifier.operator == "=="]
    if len(pins) != 1 or "*" in pins[0].version or requirement.url:
        raise RewardError(f"{path}: {line!r:.80} names no one version; pin it, e.g. {requirement.name}==1.0")
    return canonicalize_name(requirement.name), line


def _check_python(path: Path, wanted: Any) -> None:
    here = platform.python_version()
    try:
        fits = SpecifierSet(wanted).contains(here, prereleases=True)
    except (InvalidSpecifier, TypeError, AttributeError) as error:
        raise RewardError(f"{path}: requires-python {wanted!r:.40}; expected e.g. '>=3.11'") from error
    if not fits:
        raise RewardError(
            f"{path} needs Python {wanted}, and this is {here}; run texforce-hub with such a Python, "
            "or 'texforce-hub reward-server' there and give its address here"
        )
