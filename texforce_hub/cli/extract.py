"""``texforce-hub extract``: an adapter out of a fine-tuned checkpoint and its base."""

from pathlib import Path
from typing import Annotated, Any

import typer

from texforce_hub.cli import names
from texforce_hub.cli.console import LOUDNESS, note, put, put_detail, put_json
from texforce_hub.cli.options import (
    RESULT,
    AsJson,
    Base,
    Device,
    Dialect,
    Dtype,
    Energy,
    Force,
    Output,
    Rank,
    Unet,
    option,
    refuse_existing,
)
from texforce_hub.cli.summary import count_of, read_back
from texforce_hub.cli.table import put_table


def register(app: typer.Typer) -> None:
    """Add ``extract``."""
    app.command("extract")(extract)


def extract(
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The fine-tuned pipeline: folder, file or Hub id.")],
    output: Output,
    base: Base = "shapes",
    unet: Unet = None,
    rank: Rank = None,
    energy: Energy = None,
    rest: Annotated[bool, option("--rest", help="Keep biases, norms and embeddings in full.", group=RESULT)] = False,
    threshold: Annotated[
        float, option("--threshold", metavar="X", help="Relative change that counts as rounding: 1e-6.", group=RESULT)
    ] = 1e-6,
    device: Device = None,
    dtype: Dtype = None,
    dialect: Dialect = "diffusers",
    force: Force = False,
    json: AsJson = False,
) -> None:
    """Extract what a fine-tune changed, as an adapter; what is left out is listed, each layer with -v."""
    from texforce_hub.device import choose_device
    from texforce_hub.hub.write import write_adapter
    from texforce_hub.merge.extract import extract_adapter

    dialect = names.read_dialect(dialect)
    refuse_existing(output, force=force, inside=names.file_in(dialect))
    extracted = extract_adapter(
        _open(tuned, unet),
        _open(base, None),
        rank=rank,
        energy=energy,
        rest=rest,
        threshold=threshold,
        device=choose_device(device),
        dtype=dtype,
    )
    path = write_adapter(extracted.adapter, output, dialect=dialect)
    if extracted.left_out:
        note(f"{count_of(len(extracted.left_out), 'change')} are left out; --rest keeps them in full")
    if json:
        put_json({"output": str(path), "written": read_back(path).as_dict(), **extracted.as_dict()})
        return
    if LOUDNESS.verbose:
        rows = [
            [layer.name, str(layer.rank or "–"), f"{layer.kept:.2%}", f"{layer.change:.3g}", layer.reason]
            for layer in extracted.layers
        ]
        put_table(["layer", "rank", "kept", "relative change", ""], rows)
    put_detail(f"{count_of(extracted.unchanged, 'weight')} unchanged")
    put(str(read_back(path)))


def _open(model: str, unet: str | None) -> Any:
    """A folder's parameters as they are asked for; anything else as a pipeline."""
    from texforce_hub.pipelines.folder import stream_parameters
    from texforce_hub.shapes import WEIGHTS

    folder = WEIGHTS if model == "shapes" else Path(model)
    streamed = stream_parameters(folder) if unet is None and folder.is_dir() else None
    if streamed is not None:
        return streamed
    from texforce_hub.pipelines.load import load_pipeline  # brings diffusers

    return load_pipeline(model, unet=unet, device="cpu")
