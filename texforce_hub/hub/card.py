"""The page of an adapter on the Hub: a pure function of what is known about the adapter."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from texforce_hub.families import FAMILIES
from texforce_hub.hub.huggingface.front_matter import describe_metrics, join_card, split_card
from texforce_hub.hub.markdown import escape, escape_cell, fence, plain_line

BEGIN = "<!-- texforce-hub: this part is written anew by every push; write your own text above or below it -->"
END = "<!-- texforce-hub: end -->"

_TAGS: Mapping[str, tuple[str, ...]] = {
    "sd1": ("stable-diffusion", "stable-diffusion-diffusers"),
    "sd2": ("stable-diffusion", "stable-diffusion-diffusers"),
    "sdxl": ("stable-diffusion-xl", "stable-diffusion-xl-diffusers"),
    "sd3": ("sd3", "sd3-diffusers"),
    "flux": ("flux", "flux-diffusers"),
}
_LONGEST_PROMPT = 500  # characters


@dataclass(frozen=True, slots=True)
class CardFile:
    """A file of weights beside the card: its path there, size, SHA-256, and who reads it."""

    path: str
    size: int
    sha256: str
    dialect: str


@dataclass(frozen=True, slots=True)
class CardImage:
    """A picture beside the card, and the prompt that it was drawn from."""

    path: str
    prompt: str = ""


@dataclass(frozen=True, slots=True)
class Score:
    """A reward's mean on held-out prompts with its 95 % interval, of the base (``base``) and with the adapter."""

    reward: str
    variant: str
    mean: float
    low: float
    high: float
    difference: str = ""


@dataclass(frozen=True, slots=True)
class MergeSource:
    """One adapter that was merged: what it is called, how much of it, at which commit, under which licence."""

    name: str
    weight: str
    commit: str = ""
    sha256: str = ""
    license: str = ""


@dataclass(frozen=True, slots=True)
class CardFacts:
    """All that the card says. An empty value is something that nobody knows, and the card says so.

    ``parts`` counts layers; ``strip`` and ``curve`` are paths of pictures in the repository; ``sampling`` says how the
    scores were drawn; ``missing`` gives the reason for each layout that the adapter has no file in.
    """

    repo: str
    base: str
    license: str
    family: str | None = None
    parts: Mapping[str, int] = field(default_factory=dict)
    ranks: Sequence[int] = ()
    kinds: Sequence[str] = ()
    dtypes: Sequence[str] = ()
    files: Sequence[CardFile] = ()
    images: Sequence[CardImage] = ()
    strip: str = ""
    curve: str = ""
    scores: Sequence[Score] = ()
    sampling: str = ""
    training: Sequence[tuple[str, str]] = ()
    reward: str = ""
    prompts: str = ""
    prompts_license: str = ""
    sources: Sequence[MergeSource] = ()
    method: str = ""
    recipe: str = ""
    base_license: str = ""
    missing: Mapping[str, str] = field(default_factory=dict)
    version: str = ""

    @property
    def name(self) -> str:
        """The repository's own name."""
        return self.repo.partition("/")[2]

    @property
    def title(self) -> str:
        """The base family in words, as far as it is known."""
        return FAMILIES[self.family].title if self.family else self.base

    @property
    def is_text_only(self) -> bool:
        """Whether nothing but text encoders is changed."""
        return all(part.startswith("text_encoder") for part in self.parts)

    @property
    def prompt(self) -> str:
        """A prompt for examples: that of the first picture that has one."""
        prompts = (image.prompt for image in self.images if image.prompt)
        return plain_line(next(prompts, "a red cat"), _LONGEST_PROMPT)

    def file(self, dialect: str) -> CardFile | None:
        """The file of a layout that has one."""
        return next((file for file in self.files if file.dialect == dialect and _holds_tensors(file)), None)


def render_card(facts: CardFacts, existing: str = "") -> str:
    """The card as Markdown with its YAML front matter. What a person wrote into ``existing`` stays.

    Ours lies between two HTML comments and in the front matter's keys that :func:`describe` gives; everything else
    of an existing card is kept, and its tags are added to.

    Raises:
        ValueError: the front matter of ``existing`` is no YAML.
    """
    body = f"{BEGIN}\n\n{_render_body(facts)}\n\n{END}\n"
    ours = describe(facts)
    if not existing.strip():
        return join_card(ours, f"\n{body}")
    theirs, text = split_card(existing)
    merged = {**theirs, **ours, "tags": list(dict.fromkeys([*(theirs.get("tags") or []), *ours["tags"]]))}
    return join_card(merged, _replace_ours(text, body))


def describe(facts: CardFacts) -> dict[str, Any]:
    """The front matter, by which the Hub files, finds and shows the adapter."""
    scored = [(plain_line(score.reward, 80), round(score.mean, 6)) for score in facts.scores if score.difference]
    widget = list(_widget(facts))
    return {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "base_model": facts.base,
        "base_model_relation": "adapter",
        "license": facts.license,
        "tags": list(_tags(facts)),
        **({"widget": widget} if widget else {}),
        **(describe_metrics(facts.name, scored) if scored else {}),
    }


def _tags(facts: CardFacts) -> Iterator[str]:
    yield from ("text-to-image", "diffusers", "lora", "template:sd-lora", "template:diffusion-lora", "texforce-hub")
    yield from _TAGS.get(facts.family or "", ())
    if any(part.startswith("text_encoder") for part in facts.parts):
        yield "text-encoder"
    if facts.training and facts.reward:
        yield from ("diffusers-training", "reward-finetuning")
    if "DoRA" in facts.kinds:
        yield "dora"


def _widget(facts: CardFacts) -> Iterator[dict[str, Any]]:
    for image in facts.images:
        yield {"text": plain_line(image.prompt, _LONGEST_PROMPT) or "-", "output": {"url": image.path}}
    if facts.strip and not facts.images:
        yield {"text": "Without and with the adapter, from the same noise", "output": {"url": facts.strip}}


def _render_body(facts: CardFacts) -> str:
    environment = Environment(  # Markdown, not HTML: each value goes through a filter of its own
        trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, keep_trailing_newline=False
    )
    environment.filters |= {"text": escape, "cell": escape_cell, "python": _literal, "fence": fence}
    template = environment.from_string((files("texforce_hub.hub") / "card.md.jinja").read_text("utf-8"))
    return template.render(card=facts).strip()


def _literal(text: str) -> str:
    """A Python string of this text, in which no HTML comment begins."""
    return repr(text).replace("<!--", r"<\x21--")


def _replace_ours(text: str, body: str) -> str:
    """A person's card with our part in the place where it was; before all of it if it had none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        return f"\n{body}\n{text.lstrip()}" if text.strip() else f"\n{body}"
    return f"{before}{body.rstrip()}{after}"


def _holds_tensors(file: CardFile) -> bool:
    return file.path.endswith(".safetensors")
