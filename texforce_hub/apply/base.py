"""The shapes of a base's weights from its headers, its configs or its name alone. Torch-free."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from texforce_hub.arguments import check_path
from texforce_hub.errors import FamilyError, FileError, PipelineError, RefError
from texforce_hub.families import FAMILIES, Family, find_family
from texforce_hub.families.checkpoint import recognize_checkpoint
from texforce_hub.families.checkpoint_weights import checkpoint_weights
from texforce_hub.families.names import PARTS, part_of
from texforce_hub.families.recognition import claims_family
from texforce_hub.families.text import ClipEncoder
from texforce_hub.files.container import open_header
from texforce_hub.hub.filenames import check_name
from texforce_hub.hub.refs.hub_id import HubId
from texforce_hub.reading import is_file, is_folder, read_json

if TYPE_CHECKING:
    from texforce_hub.hub.remote import RemotePath

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BaseShapes:
    """A base as far as a check needs it: what it is called, how that is known, its weights' names and shapes."""

    title: str
    evidence: str
    weights: Mapping[str, Shape]

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts it has."""
        return tuple(dict.fromkeys(part_of(name) for name in self.weights))

    def shape_of(self, layer: str) -> Shape | None:
        """The shape of what a layer of this name changes; ``None`` if there is no such weight."""
        return self.weights.get(f"{layer}.weight", self.weights.get(layer))

    def refusal(self, layer: str) -> str | None:  # noqa: ARG002  # a header does not tell how a library holds the weight
        """Nothing: whatever a file holds can be changed once it is loaded."""
        return None


def read_base(base: str | Path) -> BaseShapes:
    """A base by a family's name, a pipeline's folder, a checkpoint file, or a Hub id.

    Of a pipeline on the Hub whose name says no family, headers and configurations are read; no weights are fetched.

    Raises:
        PipelineError: a folder, a repository or a file that is no known base.
        HubError: the Hub does not give it.
        FamilyError: a name that means no family.
        FileError: a file of it is damaged.
    """
    path = check_path(base, "base")
    if str(base) in FAMILIES:
        return _from_family(find_family(str(base)), "by its name")
    check_name(path)
    if is_folder(path):
        return _from_folder(path)
    if is_file(path):
        return _from_checkpoint(path)
    for family in FAMILIES.values():
        if claims_family(str(base), family):
            return _from_family(family, f"the id {str(base)!r} names it")
    if isinstance(base, str) and _is_hub_id(base):
        return _from_hub(base)
    raise FamilyError(
        f"{str(base)!r} is no folder, no file and no known base; expected one, or a family: {', '.join(FAMILIES)}"
    )


def _from_family(family: Family, evidence: str) -> BaseShapes:
    return BaseShapes(family.title, evidence, family.weights)


def _is_hub_id(base: str) -> bool:
    try:
        HubId.parse(base)
    except RefError:
        return False
    return base.count("/") == 1 or base.startswith(("hf://", "http"))


def _from_hub(base: str) -> BaseShapes:
    from texforce_hub.hub.remote import find_remote

    remote = find_remote(base)
    weights: dict[str, Shape] = {}
    for part in PARTS:
        if f"{part}/config.json" in remote.names:
            weights |= {f"{part}.{name}": shape for name, shape in _remote_weights(remote, part).items()}
    if not weights:
        raise PipelineError(
            f"{remote}: has none of the folders {', '.join(PARTS)}; expected a pipeline as diffusers saves it"
        )
    return BaseShapes(base, "the headers of its files on the Hub", weights)


def _remote_weights(remote: "RemotePath", part: str) -> dict[str, Shape]:
    """A part's weights by the headers of its files; where they are pickles, by its configuration."""
    from texforce_hub.hub.huggingface.fetch import fetch_file
    from texforce_hub.hub.remote import open_remote_header

    names = [n for n in remote.names if PurePosixPath(n).parent.name == part and n.endswith(".safetensors")]
    plain = [name for name in names if "." not in PurePosixPath(name).stem] or names
    weights: dict[str, Shape] = {}
    for name in plain:
        header = open_remote_header(remote.file(name), numbers=False).header
        weights |= {_plain(key): info.shape for key, info in header.tensors.items()}
    return weights or _from_config(fetch_file(remote.file(f"{part}/config.json")).parent)


def _from_folder(folder: Path) -> BaseShapes:
    weights: dict[str, Shape] = {}
    for part in PARTS:
        if (folder / part).is_dir():
            weights |= {f"{part}.{name}": shape for name, shape in _part_weights(folder / part).items()}
    if not weights:
        raise PipelineError(
            f"{folder}: has none of the folders {', '.join(PARTS)}; expected a pipeline as diffusers saves it"
        )
    return BaseShapes(folder.name, "its folder's files", weights)


def _part_weights(folder: Path) -> dict[str, Shape]:
    files = [path for suffix in ("safetensors", "bin") for path in sorted(folder.glob(f"*.{suffix}"))]
    weights: dict[str, Shape] = {}
    for path in files:
        weights |= {_plain(name): info.shape for name, info in open_header(path).tensors.items()}
    return weights or _from_config(folder)


def _plain(name: str) -> str:
    """A weight's published name: without PEFT's wrapper, with the ``text_model.`` that newer libraries drop."""
    name = name.replace(".base_layer.", ".")
    is_flat = name.startswith(("encoder.layers.", "embeddings.", "final_layer_norm."))
    return f"text_model.{name}" if is_flat else name


def _from_config(folder: Path) -> dict[str, Shape]:
    """A part's weights from its config, where the weights themselves are not here."""
    try:
        config = read_json(folder / "config.json")
    except FileError as error:
        raise PipelineError(f"{folder}: holds neither weights nor a readable config.json: {error}") from error
    if "num_hidden_layers" in config and "hidden_size" in config:
        projection = "WithProjection" in str(config.get("architectures"))
        width = config["hidden_size"]
        return ClipEncoder(
            width, config["num_hidden_layers"], config.get("projection_dim", width) * projection or None
        ).weights()
    for family in FAMILIES.values():
        part = family.parts.get("unet")
        if part is not None and _is_described(part, config):
            return dict(part.weights())
    raise PipelineError(f"{folder}: its config.json describes no known model, and it holds no weights")


def _is_described(part: Any, config: Mapping[str, Any]) -> bool:
    return (list(part.channels), part.cross_attention_dim) == (
        config.get("block_out_channels"),
        config.get("cross_attention_dim"),
    )


def _from_checkpoint(path: Path) -> BaseShapes:
    header = open_header(path)
    if "conv_in.weight" in header.tensors:
        shapes = {f"unet.{_plain(name)}": info.shape for name, info in header.tensors.items()}
        return BaseShapes(path.name, "a bare U-Net", shapes)
    weights, name = checkpoint_weights(header), recognize_checkpoint(header)
    if not weights:
        raise PipelineError(f"{path}: no known checkpoint, e.g. {next(iter(header.tensors), None)!r}; expected a base")
    if name is None:
        return BaseShapes(path.name, "a checkpoint's names and shapes", weights)
    family = find_family(name)
    if not any(part.startswith("transformer.") for part in weights):
        return BaseShapes(f"{path.name} ({family.title})", "its tensors' names and shapes", weights)
    rows = {n: shape for n, shape in family.weights.items() if n.startswith("transformer.")}
    title = f"{path.name} ({family.title}; its transformer's layers in diffusers' names have that family's shapes)"
    return BaseShapes(title, "its tensors' names", rows | weights)
