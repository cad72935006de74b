"""What lies in a diffusers folder, without loading it."""

from pathlib import Path

WEIGHT_SUFFIXES = (".safetensors", ".bin")


def weight_files(folder: Path) -> list[Path]:
    """The weight files of one component's folder."""
    return sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES and path.is_file())


def folder_variant(folder: Path) -> str | None:
    """``fp16`` if some component has its weights only in files of that variant; ``None`` if plain files will do."""
    for component in sorted(entry for entry in folder.iterdir() if entry.is_dir()):
        files = weight_files(component)
        if files and all(".fp16." in path.name for path in files):
            return "fp16"
    return None
