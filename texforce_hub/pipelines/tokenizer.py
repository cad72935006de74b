"""CLIP's tokenizer in the files that every version of the libraries reads, made from its vocabulary."""

import gzip
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from texforce_hub.files.writing import writing
from texforce_hub.pipelines.vocabulary import find_vocabulary

_MERGES = 49152 - 256 - 2


def write_tokenizer(folder: Path, *, padding: str) -> None:
    """Write a CLIP tokenizer's new folder: ``vocab.json``, ``merges.txt``, configuration.

    ``padding``: ``<|endoftext|>`` for SD1 and SDXL's first encoder, ``!`` for OpenCLIP's encoders.
    """
    lines = gzip.decompress(find_vocabulary().read_bytes()).decode("utf-8").split("\n")
    merges = lines[1 : _MERGES + 1]
    letters = _byte_letters()
    symbols = [*letters, *(letter + "</w>" for letter in letters), *("".join(m.split()) for m in merges)]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    with writing(folder) as part:
        part.mkdir()
        write_tokenizer_files(part, {symbol: number for number, symbol in enumerate(symbols)}, merges, padding=padding)


def write_tokenizer_files(
    folder: Path, vocabulary: Mapping[str, int], merges: Iterable[str], *, padding: str, length: int = 77
) -> None:
    """The files of a CLIP tokenizer, in the form that every version of the library reads."""
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    marks = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    config = {**marks, "pad_token": padding, "model_max_length": length, "do_lower_case": True, "errors": "replace"}
    config |= {"add_prefix_space": False, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    special = {**marks, "pad_token": padding}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2), encoding="utf-8")


def _byte_letters() -> list[str]:
    """The printable stand-ins of the 256 bytes, in the order in which CLIP numbers them."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte) for byte in shown] + [chr(256 + number) for number in range(len(hidden))]
