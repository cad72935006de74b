"""``texforce-hub extract``: an adapter out of a fine-tuned checkpoint and its base."""

from pathlib import Path
from typing import Annotated, Any

import typer

from texforce_hub.cli.console import put, put_json, put_table, say


def register(app: typer.Typer) -> None:
    """Add ``extract``."""
    app.command("extract")(extract)


def extract(
    tuned: Annotated[str, typer.Argument(help="The fine-tuned pipeline: folder, checkpoint file or Hub id.")],
    output: Annotated[Path, typer.Option("--output", help="File or folder for the adapter.")],
    base: Annotated[str, typer.Option("--base", help="What it was tuned from.")] = "shapes",
    unet: Annotated[str | None, typer.Option("--unet", help="A fine-tuned U-Net to put in the tuned pipeline.")] = None,
    rank: Annotated[int | None, typer.Option("--rank", help="Largest rank of a layer.")] = None,
    energy: Annotated[float | None, typer.Option("--energy", help="Share to keep of each layer, e.g. 0.99.")] = None,
    rest: Annotated[bool, typer.Option("--rest", help="Keep biases, norms and embeddings in full.")] = False,
    threshold: Annotated[float, typer.Option("--threshold", help="Relative change that counts as rounding.")] = 1e-6,
    device: Annotated[str | None, typer.Option("--device", help="Default: CUDA if present.")] = None,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32 (default), float16 or bfloat16.")] = None,
    dialect: Annotated[str, typer.Option("--dialect", help="Layout of the result.")] = "diffusers",
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Extract what a fine-tune changed, as an adapter; what is left out is listed."""
    from texforce_hub.device import choose_device, choose_dtype
    from texforce_hub.hub.write import write_adapter
    from texforce_hub.merge.extract import extract_adapter

    extracted = extract_adapter(
        _open(tuned, unet),
        _open(base, None),
        rank=rank,
        energy=energy,
        rest=rest,
        threshold=threshold,
        device=choose_device(device),
        dtype=None if dtype is None else choose_dtype(dtype),
    )
    path = write_adapter(extracted.adapter, output, dialect=dialect)
    if json:
        put_json({"output": str(path), **extracted.as_dict()})
    else:
        rows = [
            [layer.name, f"{layer.change:.3g}", str(layer.rank or "–"), f"{layer.kept:.2%}", layer.reason]
            for layer in extracted.layers
        ]
        put_table(["layer", "relative change", "rank", "kept", ""], rows)
        put(f"{len(extracted.adapter.layers)} layers, {extracted.unchanged} weights unchanged; {path}")
    if extracted.left_out:
        say(f"note: {len(extracted.left_out)} changes are left out; --rest keeps them in full")


def _open(model: str, unet: str | None) -> Any:
    """A folder's parameters as they are asked for; anything else as a pipeline."""
    from texforce_hub.pipelines.folder import stream_parameters
    from texforce_hub.pipelines.load import load_pipeline
    from texforce_hub.shapes import WEIGHTS

    folder = WEIGHTS if model == "shapes" else Path(model)
    streamed = stream_parameters(folder) if unet is None and folder.is_dir() else None
    return load_pipeline(model, unet=unet, device="cpu") if streamed is None else streamed
