"""What a reward server is asked and answers: pictures and prompts in one message, numbers back; all of it bounded.

A question is eight bytes, the header's length (little endian); the header, a JSON object; the pictures' bytes. Its
header has ``prompts`` and either ``shape`` ``[b, 3, h, w]`` with ``dtype`` (``float32`` in [0, 1], or ``uint8``), or
``png``, the length in bytes of each picture as PNG. An answer is a JSON object, ``{"scores": […]}`` or
``{"error": …}``.
"""

import io
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from texforce_hub.errors import RewardError

LONGEST_QUESTION = 512 * 2**20
"""Bytes: 170 float pictures of 512 × 512."""
LONGEST_ANSWER = 2**20
"""Bytes: some forty thousand numbers."""
_LONGEST_HEADER = 16 * 2**20
_MOST_PICTURES = 4096
_WIDEST = 8192  # pixels of a side
_DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "uint8": np.dtype("u1")}

Pixels = NDArray[np.float32]
"""Pictures ``(b, 3, h, w)`` in [0, 1]."""


def write_question(images: Pixels, prompts: Sequence[str]) -> bytes:
    """The message that asks for the scores of pictures ``(b, 3, h, w)`` in [0, 1]."""
    pixels = np.ascontiguousarray(images, dtype="<f4")
    return _pack({"prompts": list(prompts), "shape": list(pixels.shape), "dtype": "float32"}, [pixels.data])


def write_png_question(pictures: Sequence[bytes], prompts: Sequence[str]) -> bytes:
    """The message that asks for the scores of PNG files."""
    return _pack({"prompts": list(prompts), "png": [len(picture) for picture in pictures]}, pictures)


def _pack(header: dict[str, Any], pieces: Sequence[bytes | memoryview]) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that numbers lie where a processor reads them at once
    return b"".join([len(text).to_bytes(8, "little"), text, *pieces])


def read_question(message: bytes | bytearray) -> tuple[Pixels, list[str]]:
    """The pictures ``(b, 3, h, w)``, float32 in [0, 1], and the prompts of a message.

    Float pictures of a ``bytearray`` are not copied: they lie in the message, and can be written to.

    Raises:
        RewardError: it is none, or claims more than it holds.
    """
    length = int.from_bytes(message[:8], "little")
    if len(message) < 8 or not 2 <= length <= min(_LONGEST_HEADER, len(message) - 8):
        raise RewardError("the question is no message: eight bytes of length, a JSON header, the pictures")
    header = _parse(message[8 : 8 + length], "the question's header")
    prompts, data = header.get("prompts"), memoryview(message)[8 + length :]
    if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
        raise RewardError("the question has no prompts, a list of texts")
    if not 1 <= len(prompts) <= _MOST_PICTURES:
        raise RewardError(f"the question has {len(prompts)} prompts; expected 1 to {_MOST_PICTURES}")
    images = _read_png(header["png"], data) if "png" in header else _read_pixels(header, data)
    if len(images) != len(prompts):
        raise RewardError(f"the question has {len(images)} pictures and {len(prompts)} prompts; expected as many")
    return images, prompts


def _parse(text: bytes | bytearray, what: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RewardError(f"{what} is no JSON") from error
    if not isinstance(content, dict):
        raise RewardError(f"{what} is no JSON object")
    return content


def _read_pixels(header: dict[str, Any], data: memoryview) -> Pixels:
    shape, dtype = header.get("shape"), _DTYPES.get(str(header.get("dtype")))
    sound = isinstance(shape, list) and len(shape) == 4 and all(type(side) is int and side > 0 for side in shape)
    if not sound or not isinstance(shape, list) or shape[1] != 3 or max(shape[2:]) > _WIDEST or dtype is None:
        raise RewardError(
            f"pictures of shape {shape!r:.60} and dtype {header.get('dtype')!r:.20}; expected [b, 3, h, w], float32"
        )
    if len(data) != math.prod(shape) * dtype.itemsize:
        raise RewardError(f"{len(data)} bytes of pictures; shape {shape} has {math.prod(shape) * dtype.itemsize}")
    given = np.frombuffer(data, dtype).reshape(shape)
    owned = given.flags.aligned and not data.readonly
    images = given.astype(np.float32, copy=not owned)
    if not np.isfinite(images).all():
        raise RewardError("pictures that are not finite")
    return images / np.float32(255) if dtype.itemsize == 1 else images


def _read_png(lengths: Any, data: memoryview) -> Pixels:
    if not isinstance(lengths, list) or not all(type(n) is int and n > 0 for n in lengths) or sum(lengths) != len(data):
        raise RewardError("png: expected the length in bytes of each picture, and as many bytes")
    pictures, start = [], 0
    for length in lengths[:_MOST_PICTURES]:
        pictures.append(_decode(bytes(data[start : start + length])))
        start += length
    if len({picture.shape for picture in pictures}) > 1:
        raise RewardError("pictures of several sizes in one question; ask for them one by one")
    return np.stack(pictures)


def _decode(data: bytes) -> Pixels:
    try:
        with Image.open(io.BytesIO(data), formats=["PNG"]) as picture:
            if max(picture.size) > _WIDEST:
                raise RewardError(f"a picture of {picture.size}; expected at most {_WIDEST} pixels a side")
            pixels = np.asarray(picture.convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise RewardError("a picture that is no PNG") from error
    return pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255)


def read_answer(text: bytes, count: int) -> list[float]:
    """The scores of an answer, as many as were asked for.

    Raises:
        RewardError: an error, other numbers than asked for, or what is no finite number.
    """
    answer = _parse(text, "the answer")
    if "error" in answer:
        raise RewardError(f"{answer['error']!s:.300}")
    scores = answer.get("scores")
    if not isinstance(scores, list) or len(scores) != count:
        raise RewardError(f"{len(scores) if isinstance(scores, list) else 'no'} scores for {count} pictures")
    if not all(type(score) in (int, float) and math.isfinite(score) for score in scores):
        raise RewardError("scores that are no finite numbers")
    return [float(score) for score in scores]
