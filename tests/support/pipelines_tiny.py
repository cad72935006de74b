"""Tiny random pipelines of every family, built in code: two layers, width 32."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
)

from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter

TOKENS = 16
FAMILIES = ("sd1", "sd2", "sdxl", "sd3", "flux", "pixart")
WORDS = ["a", "red", "blue", "green", "square", "circle", "cat", "of", "photo", "the", "on", "left", "big"]


def tiny_tokenizer():
    marks = ["<|startoftext|>", "<|endoftext|>"]
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    entries = {symbol: i for i, symbol in enumerate([*letters, *(c + "</w>" for c in letters)])}
    for mark in marks:
        entries[mark] = len(entries)
    return CLIPTokenizer(vocab=entries, merges=[], model_max_length=TOKENS)


def tiny_clip(*, projected=False, width=32, layers=2, act="quick_gelu"):
    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=width,
        hidden_act=act,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
    )
    model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()
    with torch.no_grad():  # the library's own initialisation is so small that a wrong layer would hardly show
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, 0.3 if "embedding" in name else parameter.shape[1] ** -0.5)
    return model


def tiny_t5(width=32):
    config = T5Config(
        vocab_size=64,
        d_model=width,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    return T5EncoderModel(config).eval()


def tiny_unet(*, cross=32, linear=False, added=None):
    extra = {}
    if added:
        extra = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": added + 6 * 8,
        }
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=cross,
        attention_head_dim=4,
        norm_num_groups=8,
        use_linear_projection=linear,
        **extra,
    ).eval()


def tiny_vae(latents=4):
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",),
        up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(16,),
        layers_per_block=1,
        latent_channels=latents,
        norm_num_groups=8,
        sample_size=16,
    ).eval()


def scheduler():
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


def tiny_pipeline(family, seed=0):
    torch.manual_seed(seed)
    return {
        "sd1": _sd1,
        "sd2": _sd2,
        "sdxl": _sdxl,
        "sd3": _sd3,
        "flux": _flux,
        "pixart": _pixart,
    }[family]()


def _sd1():
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_clip(),
        tokenizer=tiny_tokenizer(),
        unet=tiny_unet(),
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sd2():
    pipe = _sd1()
    pipe.register_modules(text_encoder=tiny_clip(width=48, act="gelu"), unet=tiny_unet(cross=48, linear=True))
    return pipe


def _sdxl():
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(
        vae=tiny_vae(),
        text_encoder=tiny_clip(),
        text_encoder_2=tiny_clip(projected=True, width=40, act="gelu"),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=tiny_unet(cross=72, linear=True, added=40),
        scheduler=scheduler(),
        add_watermarker=False,
    )


def _sd3():
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=72,
        caption_projection_dim=32,
        pooled_projection_dim=72,
        out_channels=4,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(),
        text_encoder=tiny_clip(projected=True),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=tiny_clip(projected=True, width=40, act="gelu"),
        tokenizer_2=tiny_tokenizer(),
        text_encoder_3=tiny_t5(72),
        tokenizer_3=tiny_tokenizer(),
    )


def _flux():
    from diffusers import FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=72,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=tiny_vae(1),
        text_encoder=tiny_clip(),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=tiny_t5(72),
        tokenizer_2=tiny_tokenizer(),
        transformer=transformer.eval(),
    )


def _pixart():
    from diffusers import PixArtSigmaPipeline, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=32,
        in_channels=4,
        cross_attention_dim=32,
        out_channels=8,
    )
    return PixArtSigmaPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_t5(),
        vae=tiny_vae(),
        transformer=transformer.eval(),
        scheduler=scheduler(),
    )


TARGETS = {
    "text": ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "SelfAttention.q", "wo"),
    "unet": ("to_q", "to_k", "to_v", "to_out.0"),
}


def text_parts(pipe):
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    return [name for name in names if getattr(pipe, name, None) is not None]


def canonical(part, path, module):
    """The published spelling of a live layer's name."""
    flat = "self_attn" in path or "mlp" in path
    dropped = flat and not hasattr(module, "text_model")
    return f"{part}.text_model.{path}" if dropped else f"{part}.{path}"


def random_adapter(pipe, *, parts=None, rank=4, seed=0, size=0.05, scale=1.0, kinds=LowRank):
    """A low-rank change of every attention and feed-forward layer of these parts."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for part in parts or text_parts(pipe):
        module = getattr(pipe, part)
        wanted = TARGETS["text" if part.startswith("text") else "unet"]
        for path, child in module.named_modules():
            if path.endswith(wanted) and isinstance(child, torch.nn.Linear):
                down = torch.randn(rank, child.in_features, generator=generator) * size
                up = torch.randn(child.out_features, rank, generator=generator)
                layers[canonical(part, path, module)] = LowRank(down, up, scale)
    return Adapter(layers)
