"""Where the CLIP vocabulary lies: in an installed package that carries it; it is too big to ship."""

import importlib.util
from pathlib import Path

from texforce_hub.errors import PipelineError

FILE = "bpe_simple_vocab_16e6.txt.gz"
PACKAGES = ("open_clip", "clip")  # PyPI: open_clip_torch, clip-anytorch; read as files, never imported


def find_vocabulary() -> Path:
    """The vocabulary's file in an installed package.

    Raises:
        PipelineError: no installed package carries it.
    """
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            if (Path(folder) / FILE).is_file():
                return Path(folder) / FILE
    raise PipelineError("single-file checkpoints need CLIP's vocabulary: pip install --no-deps open_clip_torch")
