"""Pictures for a card: with nothing in them but the picture and the prompt that it was drawn from."""

from io import BytesIO
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from texforce_hub.errors import ConfigError
from texforce_hub.files.writing import writing
from texforce_hub.hub.privacy import strip_paths
from texforce_hub.reading import open_regular

ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
SHEET = "sheet.png"
"""What ``apply`` calls the sheet of before and after."""
_MOST = 12


def find_pictures(path: Path) -> tuple[list[Path], Path | None]:
    """The pictures at a path, a file or a folder as ``apply`` writes it: those with the adapter, and the sheet.

    Raises:
        ConfigError: there is none.
    """
    if path.is_file():
        return [path], None
    inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in ENDINGS and file.is_file())
    sheet = path / SHEET
    pictures = [file for file in inside if file != sheet and file.relative_to(path).parts[0] != "base"]
    if not pictures and not sheet.is_file():
        raise ConfigError(f"{path}: holds no picture ({', '.join(ENDINGS)})")
    return pictures[:_MOST], sheet if sheet.is_file() else None


def read_prompt(path: Path) -> str:
    """The prompt in a picture, where ``apply`` and A1111 write it; empty if it has none.

    Raises:
        ConfigError: it is no picture.
    """
    parameters = open_picture(path).info.get("parameters", "")
    prompt = str(parameters).partition("\nNegative prompt:")[0].partition("\nSteps:")[0]
    return strip_paths(prompt.strip())


def write_picture(source: Path, target: Path, *, prompt: str = "") -> None:
    """The picture as PNG, without what its file says of folders, cameras and places; ``prompt`` is kept.

    Raises:
        ConfigError: it is no picture.
    """
    image = open_picture(source)
    info = PngInfo()
    if prompt:
        info.add_text("parameters", prompt)
    if image.mode not in ("L", "RGB", "RGBA"):
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    bare = Image.frombytes(image.mode, image.size, image.tobytes())
    buffer = BytesIO()
    bare.save(buffer, format="PNG", pnginfo=info)
    with writing(target) as part:
        part.write_bytes(buffer.getvalue())


def open_picture(path: Path) -> Image.Image:
    """A picture, wholly read.

    Raises:
        ConfigError: it is no picture that can be read, or so large that it could be meant to fill the memory.
    """
    try:
        with open_regular(path, error=ConfigError) as file, Image.open(file) as image:
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path}: is no picture that can be read: {error}") from error
