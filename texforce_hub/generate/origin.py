"""What a picture's file says of how it was made: A1111's ``parameters``, and everything in ``texforce_hub``."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from texforce_hub.files.hashing import hash_files, hash_tensors
from texforce_hub.generate.columns import Column
from texforce_hub.generate.images.png import a1111_parameters
from texforce_hub.generate.prompts.tags import TaggedPrompt
from texforce_hub.generate.recipe import DrawRun
from texforce_hub.hub.find import find_bundle
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.hub.stack import StackEntry


class Origin:
    """The texts of one run's pictures; every file is hashed once."""

    def __init__(self, run: DrawRun, entries: Sequence[StackEntry]) -> None:
        self.run = run
        self.refs = {entry.label: ref for entry, ref in zip(entries, run.adapters)}
        self._hashes: dict[str, str] = {}

    def texts(self, column: Column, images: Sequence[Image.Image], *, sampler: str) -> list[dict[str, str]]:
        """The text entries of a column's pictures, in the order of its jobs."""
        settings, texts = column.settings, []
        for number, (image, (prompt, seed)) in enumerate(zip(images, settings.jobs(), strict=True)):
            index = number // settings.num_images
            written = self._prompt(index, prompt)
            parameters = a1111_parameters(
                " ".join([written, *self._tags(column)]),
                settings.negative_prompt,
                steps=settings.inference_steps,
                sampler=sampler,
                guidance=settings.guidance,
                seed=seed,
                size=image.size,
                clip_skip=settings.clip_skip,
                model=self._model,
                lora_hashes=self._lora_hashes(column, index),
            )
            sampled = asdict(replace(settings, prompts=self.run.settings.prompts))
            whole = {"prompt": written, "seed": seed, **self._facts(column, index), "settings": sampled}
            encoded = json.dumps(whole, ensure_ascii=False, default=str)
            texts.append({"parameters": parameters, "texforce_hub": encoded})
        return texts

    def _prompt(self, index: int, drawn: str) -> str:
        """The prompt as it was given, with its tags; as it was drawn where the column changes its words."""
        given = self.run.settings.prompts[index]
        return given if TaggedPrompt.parse(given).text == drawn else drawn

    def _facts(self, column: Column, index: int) -> dict[str, Any]:
        facts: dict[str, Any] = {"base": self.run.base, "unet": self.run.unet, "column": column.label}
        if column.entries or (column.tagged and self.run.tags):
            facts |= {"adapters": [self._written(entry) for entry in column.entries], "mode": self.run.mode}
            facts |= {"composite": self.run.composite} if self.run.composite else {}
        if column.tagged and self.run.tags and self.run.tags[index]:
            facts["tags"] = [{"adapter": str(ref), "sha256": self._digest(ref.source)} for ref in self.run.tags[index]]
        return facts

    def _written(self, entry: StackEntry) -> str:
        """The reference that gives this entry, with the weight it has here."""
        return str(replace(self.refs[entry.label], weight=entry.weight.weight, parts=entry.weight.parts))

    def _tags(self, column: Column) -> list[str]:
        """The column's stack as A1111 writes it into a prompt: one number an adapter, of the text encoder."""
        return [f"<lora:{entry.label}:{_weight_of(entry):g}>" for entry in column.entries]

    def _lora_hashes(self, column: Column, index: int) -> dict[str, str]:
        named = {entry.label: self.refs[entry.label].source for entry in column.entries}
        named |= {ref.label: ref.source for ref in (self.run.tags[index] if column.tagged and self.run.tags else ())}
        return {name: self._short_hash(source) for name, source in named.items()}

    def _short_hash(self, source: str) -> str:
        files = find_bundle(AdapterRef(source)).files
        key = f"tensors of {source}"
        if key not in self._hashes:
            alone = len(files) == 1 and files[0].suffix == ".safetensors"
            self._hashes[key] = hash_tensors(files[0]) if alone else hash_files(files)
        return self._hashes[key][:12]

    def _digest(self, source: str) -> str:
        if source not in self._hashes:
            self._hashes[source] = hash_files(find_bundle(AdapterRef(source)).files)
        return self._hashes[source]

    @cached_property
    def _model(self) -> tuple[str, str]:
        """The base's name, and the first ten digits of its file's hash if it is one file."""
        path = Path(self.run.base)
        return path.stem if path.is_file() else path.name, hash_files([path])[:10] if path.is_file() else ""


def _weight_of(entry: StackEntry) -> float:
    parts: Mapping[str, float] = dict(entry.weight.parts)
    return parts.get("text_encoder", entry.weight.weight)
