"""What SD1, SD2, SDXL, SD3, Flux … are: one row each, and every parameter of theirs by name and shape.

Nothing here needs torch: a file's header is enough to tell which family an adapter was made for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType

from texforce_hub.errors import FamilyError
from texforce_hub.families.original_transformer import FLUX, SD3, XLABS, templates
from texforce_hub.families.parameters import Shape
from texforce_hub.families.text import ClipEncoder, T5Encoder
from texforce_hub.families.transformer import Transformer
from texforce_hub.families.unet import UNet

Part = ClipEncoder | T5Encoder | UNet | Transformer


@dataclass(frozen=True)
class Family:
    """One row: a pipeline's parts, how other tools name them, and what files say when they mean it.

    ``kohya`` and ``comfy`` map our part names to those tools' prefixes; ``claims`` are substrings, in lower
    case, of the base names that metadata carries (``ss_base_model_version``, ``modelspec.architecture``, model
    ids); one that begins with ``!`` excludes the family.
    """

    name: str
    title: str
    pipeline: str
    parts: Mapping[str, Part]
    kohya: Mapping[str, str]
    comfy: Mapping[str, str]
    claims: tuple[str, ...] = ()
    architecture: str | None = None
    kohya_version: str | None = None

    @cached_property
    def weights(self) -> Mapping[str, Shape]:
        """Every parameter, ``<part>.<name>``, and its shape."""
        return MappingProxyType(
            {f"{part}.{name}": shape for part, row in self.parts.items() for name, shape in row.weights().items()}
        )

    def shape_of(self, layer: str) -> Shape | None:
        """The shape of what a layer of this name changes: a module's ``weight``, or a parameter by its own name."""
        return self.weights.get(f"{layer}.weight", self.weights.get(layer))


_CLIP_L = ClipEncoder(768, 12)
_CLIP_L_PROJECTED = ClipEncoder(768, 12, projection=768)
_CLIP_G = ClipEncoder(1280, 32, projection=1280)
_SD_CHANNELS = (320, 640, 1280, 1280)

_ROWS = (
    Family(
        name="sd1",
        title="Stable Diffusion 1.x",
        pipeline="StableDiffusionPipeline",
        parts={
            "text_encoder": _CLIP_L,
            "unet": UNet(_SD_CHANNELS, (1, 1, 1, 0), 1, cross_attention_dim=768, convolved=True),
        },
        kohya={"text_encoder": "lora_te", "unet": "lora_unet"},
        comfy={"text_encoder": "clip_l"},
        claims=("sd_v1", "stable-diffusion-v1", "stable-diffusion-1-", "stable-diffusion-1.", "sd1.5", "sd15"),
        architecture="stable-diffusion-v1",
        kohya_version="sd_v1",
    ),
    Family(
        name="sd2",
        title="Stable Diffusion 2.x, SD-Turbo",
        pipeline="StableDiffusionPipeline",
        parts={
            "text_encoder": ClipEncoder(1024, 23),
            "unet": UNet(_SD_CHANNELS, (1, 1, 1, 0), 1, cross_attention_dim=1024),
        },
        kohya={"text_encoder": "lora_te", "unet": "lora_unet"},
        comfy={"text_encoder": "clip_h"},
        claims=("sd_v2", "stable-diffusion-v2", "stable-diffusion-2", "sd-turbo", "sd2"),
        architecture="stable-diffusion-v2-512",
        kohya_version="sd_v2",
    ),
    Family(
        name="sdxl",
        title="Stable Diffusion XL, SDXL-Turbo, SDXL-Lightning",
        pipeline="StableDiffusionXLPipeline",
        parts={
            "text_encoder": _CLIP_L,
            "text_encoder_2": _CLIP_G,
            "unet": UNet((320, 640, 1280), (0, 2, 10), 10, cross_attention_dim=2048, added=2816),
        },
        kohya={"text_encoder": "lora_te1", "text_encoder_2": "lora_te2", "unet": "lora_unet"},
        comfy={"text_encoder": "clip_l", "text_encoder_2": "clip_g"},
        claims=("sdxl", "stable-diffusion-xl", "!refiner"),
        architecture="stable-diffusion-xl-v1-base",
        kohya_version="sdxl_base_v1-0",
    ),
    Family(
        name="sdxl-refiner",
        title="Stable Diffusion XL refiner",
        pipeline="StableDiffusionXLImg2ImgPipeline",
        parts={
            "text_encoder_2": _CLIP_G,
            "unet": UNet((384, 768, 1536, 1536), (0, 4, 4, 0), 4, cross_attention_dim=1280, added=2560),
        },
        kohya={"text_encoder_2": "lora_te", "unet": "lora_unet"},
        comfy={"text_encoder_2": "clip_g"},
        claims=("stable-diffusion-xl-refiner", "sdxl-refiner", "xl-v1-refiner"),
        architecture="stable-diffusion-xl-v1-refiner",
    ),
    Family(
        name="sd3",
        title="Stable Diffusion 3",
        pipeline="StableDiffusion3Pipeline",
        parts={
            "text_encoder": _CLIP_L_PROJECTED,
            "text_encoder_2": _CLIP_G,
            "text_encoder_3": T5Encoder(),
            "transformer": Transformer("sd3", 1536, 24, context=4096, originals=templates(SD3)),
        },
        kohya={
            "text_encoder": "lora_te1",
            "text_encoder_2": "lora_te2",
            "text_encoder_3": "lora_te3",
            "transformer": "lora_unet",
        },
        comfy={"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"},
        claims=("stable-diffusion-3", "sd3"),
        architecture="stable-diffusion-3-medium",
        kohya_version="sd3",
    ),
    Family(
        name="flux",
        title="Flux",
        pipeline="FluxPipeline",
        parts={
            "text_encoder": _CLIP_L,
            "text_encoder_2": T5Encoder(),
            "transformer": Transformer(
                "flux", 3072, 19, context=4096, singles=38, originals=templates({**FLUX, **XLABS})
            ),
        },
        kohya={"text_encoder": "lora_te1", "text_encoder_2": "lora_te3", "transformer": "lora_unet"},
        comfy={"text_encoder": "clip_l", "text_encoder_2": "t5xxl"},
        claims=("flux",),
        architecture="flux-1-dev",
        kohya_version="flux1",
    ),
    Family(
        name="pixart",
        title="PixArt",
        pipeline="PixArtSigmaPipeline",
        parts={"text_encoder": T5Encoder(), "transformer": Transformer("pixart", 1152, 28, context=4096)},
        kohya={"text_encoder": "lora_te1", "transformer": "lora_transformer"},
        comfy={"text_encoder": "t5xxl"},
        claims=("pixart",),
    ),
    Family(
        name="shapes",
        title="shapes, the embedded pipeline",
        pipeline="StableDiffusionPipeline",
        parts={
            "text_encoder": ClipEncoder(96, 3, vocabulary=0, positions=16),
            "unet": UNet((48, 96), (0, 1), 1, cross_attention_dim=96, convolved=True, layers=1, latents=8),
        },
        kohya={"text_encoder": "lora_te", "unet": "lora_unet"},
        comfy={"text_encoder": "clip_l"},
        claims=("shapes",),
    ),
)

FAMILIES: Mapping[str, Family] = MappingProxyType({row.name: row for row in _ROWS})


def find_family(name: str) -> Family:
    """The row of that name.

    Raises:
        FamilyError: there is none.
    """
    if name not in FAMILIES:
        raise FamilyError(f"no family {name!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


def live_name(canonical_path: str, has_text_model: bool) -> str:  # noqa: FBT001  # the answer of hasattr
    """What the installed library calls a module, from our path inside its part.

    ``transformers`` dropped ``text_model.`` from ``CLIPTextModel`` in 5.6 and kept it in
    ``CLIPTextModelWithProjection``: ``hasattr(module, "text_model")`` tells.
    """
    return canonical_path if has_text_model else canonical_path.removeprefix("text_model.")
