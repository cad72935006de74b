"""What a PNG says of itself: how it was made, for people, galleries and a replay."""

from collections.abc import Mapping
from io import BytesIO
from os import PathLike, fspath
from types import MappingProxyType

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from texforce_hub.reading import open_regular


def encode_png(image: Image.Image, text: Mapping[str, str]) -> bytes:
    """The image as a PNG file's bytes, with these text entries (UTF-8 where Latin-1 does not do)."""
    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    buffer = BytesIO()
    image.save(buffer, format="PNG", pnginfo=info)
    return buffer.getvalue()


def read_png_text(path: str | PathLike[str]) -> dict[str, str]:
    """The text entries of a PNG file."""
    with open_regular(fspath(path)) as file, Image.open(file) as image:
        image.load()
        return {str(key): value for key, value in image.info.items() if isinstance(value, str)}


def a1111_parameters(
    prompt: str,
    negative: str,
    *,
    steps: int,
    sampler: str,
    guidance: float,
    seed: int,
    size: tuple[int, int],
    clip_skip: int | None = None,
    model: tuple[str, str] = ("", ""),
    lora_hashes: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """The ``parameters`` entry as AUTOMATIC1111's web UI writes it, which image galleries read.

    Args:
        prompt: with the tags of the adapters that acted, ``<lora:name:weight>``.
        clip_skip: layers left out, as diffusers counts them; A1111 counts one more.
        model: the base's name, and the first ten digits of its file's SHA-256 if it has one.
        lora_hashes: by name, the first twelve digits of the SHA-256 of the adapter's tensors.
    """
    lines = [prompt, *([f"Negative prompt: {negative}"] if negative else [])]
    facts = [f"Steps: {steps}, Sampler: {sampler}, CFG scale: {guidance:g}, Seed: {seed}, Size: {size[0]}x{size[1]}"]
    name, digest = model
    facts += [f"Model hash: {digest}"] if digest else []
    facts += [f"Model: {name}"] if name else []
    facts += [f"Clip skip: {clip_skip + 1}"] if clip_skip else []
    if lora_hashes:
        facts.append(f'Lora hashes: "{", ".join(f"{name}: {digest}" for name, digest in lora_hashes.items())}"')
    return "\n".join([*lines, ", ".join(facts)])
