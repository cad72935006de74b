"""Files that are recognised and not read: whole models, and adapters of kinds that no low-rank reader can hold."""

import re
from collections.abc import Iterable
from functools import lru_cache

_KINDS: tuple[tuple[str, str, str], ...] = (
    (
        "GLoRA",
        r"\.(a1|a2|b1|b2|bm)\.weight$",
        "it rewrites weights and inputs together, which no single change can hold",
    ),
    ("IA3", r"\.on_input$|\.ia3_l(\.|$)", "it multiplies activations and changes no weight"),
    ("VeRA", r"\.?vera_(lambda_[bd]|A|B)(\.|$)", "its shared projections lie outside the layers"),
    ("OFT or BOFT", r"\.(oft_blocks|oft_diag|oft_r|oft_R|oft_s|boft_R)(\.|$)|^oft_", "it rotates weights"),
    (
        "a scaled fp8 file",
        r"^scaled_fp8$|^(?=.*(lora|hada_|lokr_|\.diff)).*(scale_weight|weight_scale(_inv)?|scale_input|input_scale|comfy_quant)$",
        "its numbers count only times scales beside them, for which adapters have no common layout; "
        "save it as fp16 or bf16",
    ),
    ("Custom Diffusion", r"custom_diffusion", "its processors hold whole new projections"),
    (
        "a PEFT embedding adapter",
        r"\.lora_embedding_[AB]",
        "it changes token embeddings, whose halves are stored turned",
    ),
    (
        "a PEFT adapter with biases",
        r"\.lora_B(\.[^.]+)?\.bias$",
        "it was trained with lora_bias=True, whose biases have no layer",
    ),
    (
        "a PEFT adapter with trained tokens",
        r"\.trainable_tokens_",
        "it was trained with trainable_token_indices, and holds rows of an embedding, which no layer is",
    ),
    (
        "a file saved with modules_to_save",
        r"\.modules_to_save\.",
        "it holds whole weights of some modules, not changes",
    ),
)

_PATTERNS = tuple((kind, re.compile(pattern), reason) for kind, pattern, reason in _KINDS)

_MODELS: tuple[tuple[str, str], ...] = (
    (r"^model\.diffusion_model\.", "a whole checkpoint; use it as the base, or its U-Net: --unet"),
    (r"^(cond_stage_model|conditioner|first_stage_model)\.", "a whole checkpoint; use it as the base"),
    (r"^(conv_in|down_blocks\..*\.(attn\d\.to_q|conv1))\.weight$", "a whole U-Net, not an adapter: use --unet"),
    (r"^(text_model\.|encoder\.|)?embeddings\.(token|position)_embedding\.weight$|^text_model\.embeddings\.",
     "a whole text encoder, not an adapter; put it into a pipeline folder and use that as the base"),
    (r"^(emb_params|string_to_param\..*|clip_l|clip_g|<[^>]+>)$", "a textual-inversion embedding, not an adapter"),
)  # fmt: skip


def find_refused(keys: Iterable[str]) -> tuple[str, str, str] | None:
    """``(kind, reason, example)`` of the first tensor that belongs to a kind that is not read."""
    for key in keys:
        if (refusal := _refusal(key)) is not None:
            return *refusal, key
    return None


@lru_cache(maxsize=1 << 14)  # files for one base spell the same names
def _refusal(key: str) -> tuple[str, str] | None:
    return next(((kind, reason) for kind, pattern, reason in _PATTERNS if pattern.search(key)), None)


def describe_model(keys: Iterable[str]) -> str | None:
    """What a file without any adapter layer is, and what to do with it; ``None`` if it is nothing known."""
    keys = list(keys)
    for pattern, description in _MODELS:
        if any(re.search(pattern, key) for key in keys):
            return description
    return None
