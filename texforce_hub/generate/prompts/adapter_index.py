"""From the tags of a prompt to adapters: names looked up in a folder, as A1111 does, or in the catalogue."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import MappingProxyType

from texforce_hub.errors import DialectError, FileError, RefError
from texforce_hub.families.names import part_of
from texforce_hub.files.container import open_header
from texforce_hub.generate.prompts.tags import PromptTag, TaggedPrompt
from texforce_hub.hub.bundles import Bundle, plan_bundle
from texforce_hub.hub.catalog import read_catalog
from texforce_hub.hub.filenames import PICKLED, PREFERRED
from texforce_hub.hub.find import find_bundle, find_bundles
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.reading import is_folder
from texforce_hub.settings import nearest_names

_LOG = logging.getLogger("texforce_hub")


def read_tags(prompt: str, folder: str | PathLike[str] | None = None) -> tuple[str, list[AdapterRef]]:
    """A prompt's words without its ``<lora:NAME:WEIGHT>`` tags, and the stack that the tags ask for.

    Names are looked up in ``folder`` (see :class:`AdapterIndex`), without one in the catalogue. The stack may be
    empty; ``apply_adapter`` and ``encode_prompts`` take it as it is.

    Raises:
        RefError: a tag that cannot be read, or a name with no adapter or with several.
        FileError, DialectError: an adapter that cannot be read.

    Example:
        >>> from texforce_hub import read_tags
        >>> text, stack = read_tags("a lime disc <lora:shapes-colour:0.8>")
        >>> text, stack[0].weight
        ('a lime disc', 0.8)
    """
    index = AdapterIndex(folder)
    tagged = TaggedPrompt.parse(prompt)
    return tagged.text, [index.find(tag) for tag in tagged.tags]


class AdapterIndex:
    """The adapters that tags can name.

    In a folder and the folders in it, an adapter goes by its file's name without or with its ending, by its path
    from the folder, and, if its file has a trainer's usual name, by its folder's name; one in several files by the
    name that these share. If none of these fits, by the ``ss_output_name`` in its header. A path that begins with
    ``./`` is nothing but a path. Without a folder, an adapter goes by its name in the catalogue.

    Raises:
        RefError: there is no such folder, or it holds no tensor file.
    """

    def __init__(self, folder: str | PathLike[str] | None = None) -> None:
        self._folder = None if folder is None else Path(folder)
        self._bundles: tuple[Bundle, ...] = ()
        if self._folder is not None:
            if not is_folder(self._folder):
                raise RefError(f"{self._folder}: no folder of adapters here; tags are looked up in it")
            self._bundles = tuple(find_bundles(self._folder))
        self._by_name = _gathered((name, bundle) for bundle in self._bundles for name in self._names(bundle))
        self._by_title: Mapping[str, list[Bundle]] | None = None
        self._found: dict[PromptTag, AdapterRef] = {}

    def find(self, tag: PromptTag) -> AdapterRef:
        """The adapter that a tag means, at the tag's weights; a part that it lacks takes no weight, and that is said.

        Raises:
            RefError: no adapter of that name, or several.
            FileError, DialectError: its file cannot be read.
        """
        if tag not in self._found:
            source = self._find_source(tag.name)
            self._found[tag] = _weighted(source, tag)
        return self._found[tag]

    def find_all(self, prompts: Sequence[str]) -> tuple[tuple[AdapterRef, ...], ...]:
        """For each prompt the adapters of its tags; nothing at all if no prompt has any.

        Raises:
            RefError, FileError, DialectError: as :meth:`find`, or a tag that cannot be read.
        """
        refs = tuple(tuple(self.find(tag) for tag in TaggedPrompt.parse(prompt).tags) for prompt in prompts)
        return refs if any(refs) else ()

    def _names(self, bundle: Bundle) -> set[str]:
        path = self._inside(bundle)
        paths = {path.as_posix(), (path.parent / bundle.stem).as_posix()}
        names = {bundle.stem, path.name, *paths, *(f"./{written}" for written in paths)}
        if path.name in (*PREFERRED, *PICKLED) and path.parent.name:
            names |= {path.parent.name, path.parent.as_posix()}
        return names

    def _inside(self, bundle: Bundle) -> Path:
        assert self._folder is not None
        return bundle.path.relative_to(self._folder)

    def _find_source(self, name: str) -> str:
        if self._folder is None:
            known = [entry for entry, value in read_catalog().items() if value.kind == "adapter"]
            if name not in known:
                raise RefError(_not_found(name, "the catalogue", known, "; give --adapter-dir DIR for your own files"))
            return name
        wanted = name.replace("\\", "/")
        bundles = self._by_name.get(wanted) or self._titles().get(wanted, [])
        if len(bundles) > 1:
            listed = ", ".join(f"./{self._inside(bundle).as_posix()}" for bundle in bundles)
            raise RefError(
                f"<lora:{name}> could mean {len(bundles)} adapters of {self._folder}: {listed}; write the path"
            )
        if not bundles:
            raise RefError(_not_found(name, str(self._folder), [*self._by_name, *self._titles()], ""))
        return _as_source(bundles[0])

    def _titles(self) -> Mapping[str, list[Bundle]]:
        """Adapters by the name that their trainer was told to give them."""
        if self._by_title is None:
            self._by_title = _gathered((title, bundle) for bundle in self._bundles if (title := _title(bundle)))
        return self._by_title


def _gathered(pairs: Iterable[tuple[str, Bundle]]) -> Mapping[str, list[Bundle]]:
    by_name: dict[str, list[Bundle]] = {}
    for name, bundle in pairs:
        by_name.setdefault(name, []).append(bundle)
    return MappingProxyType(by_name)


def _title(bundle: Bundle) -> str:
    try:
        return open_header(bundle.files[0]).metadata.get("ss_output_name", "").strip()
    except FileError:  # a damaged file has no other name, and is refused if it is asked for by its own
        return ""


def _as_source(bundle: Bundle) -> str:
    """How a reference names the adapter: its folder if that means it, else its file."""
    paths = [bundle.path.parent, bundle.path] if bundle.path.name in PREFERRED else [bundle.path, bundle.path.parent]
    for path in paths:
        source = str(path) if path.is_absolute() else f"./{path.as_posix()}"
        try:
            if find_bundle(AdapterRef(source)).files == bundle.files:
                return source
        except RefError:  # a folder of several adapters means none of them
            continue
    raise RefError(f"{bundle.path}: one adapter in several files; put them into a folder of their own to name it")


def _not_found(name: str, where: str, known: Iterable[str], way_out: str) -> str:
    names = list(dict.fromkeys(other for other in known if not other.startswith("./")))
    nearest = nearest_names(name, names, most=3)
    hint = f"the nearest: {', '.join(nearest)}" if nearest else f"it has {', '.join(names[:8]) or 'none'}"
    return f"<lora:{name}>: no adapter {name!r} in {where}; {hint}{way_out}"


def _weighted(source: str, tag: PromptTag) -> AdapterRef:
    bundle = find_bundle(AdapterRef(source))
    try:
        layers = plan_bundle(bundle).layers
    except DialectError as error:
        raise DialectError(f"{bundle.path}: {error}") from error
    parts = dict.fromkeys(part_of(layer) for layer in layers)
    weights = {part: tag.text_encoder if part.startswith("text_encoder") else tag.unet for part in parts}
    if tag.text_encoder != tag.unet:
        _say_idle(tag, parts)
    if len(set(weights.values())) == 1:
        ref = AdapterRef(source, weight=next(iter(weights.values())))
    else:
        ref = AdapterRef(source, parts=tuple(weights.items()))
    return ref.scheduled(tag.schedule) if tag.schedule else ref


def _say_idle(tag: PromptTag, parts: Iterable[str]) -> None:
    is_text = {part.startswith("text_encoder") for part in parts}
    if True not in is_text:
        _LOG.warning("%s: it changes no text encoder; the weight %g acts on nothing", tag, tag.text_encoder)
    if False not in is_text:
        _LOG.warning("%s: it changes text encoders only; the weight %g acts on nothing", tag, tag.unet)
