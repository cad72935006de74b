"""Every row of the family table, against the installed libraries' own models on the meta device."""

import pytest
import torch

from texforce_hub.errors import FamilyError
from texforce_hub.families import FAMILIES, find_family, live_name
from texforce_hub.families.text import ClipEncoder, T5Encoder
from texforce_hub.families.unet import UNet


def shapes_of(model):
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def meta_unet(row):
    from diffusers import UNet2DConditionModel

    down = tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in row.transformers)
    up = tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(row.transformers))
    added = {"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": row.added}
    return UNet2DConditionModel(
        sample_size=64,
        in_channels=row.latents,
        out_channels=row.latents,
        block_out_channels=row.channels,
        down_block_types=down,
        up_block_types=up,
        mid_block_type="UNetMidBlock2DCrossAttn",
        layers_per_block=row.layers,
        cross_attention_dim=row.cross_attention_dim,
        use_linear_projection=not row.convolved,
        transformer_layers_per_block=(*tuple(depth or 1 for depth in row.transformers[:-1]), row.middle),
        norm_num_groups=8,
        addition_time_embed_dim=256 if row.added else None,
        **(added if row.added else {}),
    )


def meta_text_encoder(row):
    import transformers

    if isinstance(row, T5Encoder):
        config = transformers.T5Config(
            d_model=row.width, num_layers=row.layers, d_kv=64, num_heads=row.heads, d_ff=row.mlp,
            feed_forward_proj="gated-gelu", vocab_size=row.vocabulary,
        )  # fmt: skip
        return transformers.T5EncoderModel(config)
    config = transformers.CLIPTextConfig(
        vocab_size=row.vocabulary or 1000,
        hidden_size=row.width,
        intermediate_size=4 * row.width,
        num_hidden_layers=row.layers,
        num_attention_heads=4,
        max_position_embeddings=row.positions,
        projection_dim=row.projection or row.width,
    )
    kind = transformers.CLIPTextModelWithProjection if row.projection else transformers.CLIPTextModel
    return kind(config)


def meta_transformer(row):
    import diffusers

    heads = row.width // 64
    if row.design == "sd3":
        return diffusers.SD3Transformer2DModel(
            num_layers=row.blocks, attention_head_dim=64, num_attention_heads=heads, caption_projection_dim=row.width
        )
    if row.design == "flux":
        return diffusers.FluxTransformer2DModel(
            num_layers=row.blocks, num_single_layers=row.singles, num_attention_heads=24, guidance_embeds=True
        )
    return diffusers.PixArtTransformer2DModel(
        num_layers=row.blocks, num_attention_heads=16, attention_head_dim=72, sample_size=64, out_channels=8,
        cross_attention_dim=1152, caption_channels=row.context, use_additional_conditions=False,
    )  # fmt: skip


PARTS = [(family.name, part) for family in FAMILIES.values() for part in family.parts]


@pytest.mark.parametrize(("name", "part"), PARTS)
def test_a_row_names_exactly_the_parameters_of_the_library_s_model(name, part):
    row = FAMILIES[name].parts[part]
    make = {UNet: meta_unet, ClipEncoder: meta_text_encoder, T5Encoder: meta_text_encoder}.get(
        type(row), meta_transformer
    )
    with torch.device("meta"):
        model = make(row)
    real = shapes_of(model)
    ours = {live_name(key, hasattr(model, "text_model")): shape for key, shape in row.weights().items()}
    if name == "shapes" and part == "text_encoder":  # its vocabulary belongs to the tokenizer
        for names in (real, ours):
            names.pop("embeddings.token_embedding.weight")
    if make is meta_transformer:  # the row lists what adapters touch
        real = {key: shape for key, shape in real.items() if "attn.norm_" not in key and key != "scale_shift_table"}
    assert ours == real


@pytest.mark.parametrize(
    ("name", "part", "numel"),
    [
        ("sd1", "unet", 859_520_964),
        ("sd2", "unet", 865_910_724),
        ("sdxl", "unet", 2_567_463_684),
        ("sd1", "text_encoder", 123_060_480),
        ("sd2", "text_encoder", 340_387_840),
        ("sdxl", "text_encoder_2", 694_659_840),
    ],
)
def test_the_published_parameter_counts_are_met(name, part, numel):
    weights = FAMILIES[name].parts[part].weights().values()
    assert sum(torch.Size(shape).numel() for shape in weights) == numel


def test_a_layer_s_shape_is_that_of_its_module_s_weight_or_of_the_parameter_itself():
    layer = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    assert find_family("sd1").shape_of(layer) == (3072, 768)
    assert find_family("sd1").shape_of(f"{layer}.bias") == (3072,)
    assert find_family("sd1").shape_of("text_encoder.nothing") is None


def test_an_unknown_family_is_refused_with_the_known_ones():
    with pytest.raises(FamilyError, match=r"no family 'sd9'; known: sd1, sd2, sdxl"):
        find_family("sd9")


def test_the_live_name_drops_text_model_only_where_the_module_has_none():
    path = "text_model.encoder.layers.0.self_attn.q_proj"
    assert live_name(path, has_text_model=True) == path
    assert live_name(path, has_text_model=False) == "encoder.layers.0.self_attn.q_proj"
    assert live_name("text_projection", has_text_model=False) == "text_projection"
