"""Scores of the published reward code on weights by a recipe: ``python tests/golden/rewards/make.py``.

Run once, in an environment with open_clip_torch 3.3.0, image-reward 1.5, timm, fairscale and torchvision beside this
project's own; versions are written into the result. image-reward imports names that newer ``transformers`` dropped:
they are put back below, as the versions that it was written for had them.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import sys
import types
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[3]))
from tests.support import reward_recipes as recipe

sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))


def open_clip_scores():
    """Cosines by OpenCLIP's model, transform and tokenizer, which HPSv2 and PickScore's training used."""
    import open_clip  # type: ignore[import-untyped]
    from open_clip.transform import image_transform  # type: ignore[import-untyped]

    model = open_clip.CLIP(**recipe.OPEN_CLIP).eval()
    state = {name: recipe.weight(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
    state["logit_scale"] = torch.tensor(2.0)
    state["attn_mask"] = model.state_dict().get("attn_mask", state.get("attn_mask"))
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    transform = image_transform(32, is_train=False)
    pixels = torch.stack([transform(Image.fromarray(picture.numpy())) for picture in recipe.pictures()])
    tokens = open_clip.tokenize(recipe.PROMPTS)
    with torch.no_grad():
        images = torch.nn.functional.normalize(model.encode_image(pixels), dim=-1)
        texts = torch.nn.functional.normalize(model.encode_text(tokens), dim=-1)
    return {
        "names": {name: list(tensor.shape) for name, tensor in model.state_dict().items()},
        "tokens": tokens.tolist(),
        "pixels": pixels.mean((2, 3)).tolist(),
        "embeddings": images.tolist(),
        "scores": (images @ texts.T).tolist(),
    }


def restore_old_names():
    import transformers.modeling_utils as modeling
    import transformers.pytorch_utils as utils

    def chunked(function, size, dimension, *tensors):
        return function(*tensors)

    for name in ("find_pruneable_heads_and_indices", "prune_linear_layer", "apply_chunking_to_forward"):
        fallback = chunked if name == "apply_chunking_to_forward" else (lambda *a, **k: None)
        setattr(modeling, name, getattr(utils, name, fallback))

    def invert(self, mask):
        return (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min

    modeling.PreTrainedModel.invert_attention_mask = invert
    modeling.PreTrainedModel.get_head_mask = lambda self, mask, layers, *rest: [None] * layers


def image_reward_scores():
    """ImageReward's picture encoder, text encoder and layers, by its own code."""
    restore_old_names()
    package = Path(importlib.util.find_spec("ImageReward").submodule_search_locations[0])
    for name, path in (("ImageReward", package), ("ImageReward.models", package / "models")):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(path)]
    blip = types.ModuleType("ImageReward.models.BLIP")
    blip.__path__ = [str(package / "models" / "BLIP")]
    sys.modules["ImageReward.models.BLIP"] = blip
    from ImageReward.models.BLIP.med import BertConfig, BertModel  # type: ignore[import-not-found]
    from ImageReward.models.BLIP.vit import VisionTransformer  # type: ignore[import-not-found]

    vision = VisionTransformer(**recipe.BLIP_VISION).eval()
    config = BertConfig(**{k: v for k, v in recipe.BERT.items() if k not in ("encoder_width", "fusion_layer")})
    for name in ("encoder_width", "fusion_layer", "add_cross_attention"):
        setattr(config, name, recipe.BERT[name])
    BertModel.post_init = BertModel.init_weights = lambda self: None
    text = BertModel(config, add_pooling_layer=False).eval()
    layers = [torch.nn.Linear(a, b) for a, b in zip((32, 1024, 128, 64, 16), (1024, 128, 64, 16, 1))]
    names = {}
    for prefix, module in (("blip.visual_encoder.", vision), ("blip.text_encoder.", text)):
        state = {name: tensor for name, tensor in module.state_dict().items() if tensor.is_floating_point()}
        names |= {prefix + name: list(tensor.shape) for name, tensor in state.items()}
        module.load_state_dict({n: recipe.weight(prefix + n, tuple(t.shape)) for n, t in state.items()}, strict=False)
    for number, layer in zip((0, 2, 4, 6, 7), layers):
        for kind, parameter in layer.named_parameters():
            name = f"mlp.layers.{number}.{kind}"
            names[name] = list(parameter.shape)
            parameter.data.copy_(recipe.weight(name, tuple(parameter.shape)))
    transforms = importlib.import_module("torchvision.transforms")

    transform = transforms.Compose([
        transforms.Resize(32, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.CenterCrop(32),
        transforms.ToTensor(),
        transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ])  # fmt: skip
    pixels = torch.stack([transform(Image.fromarray(picture.numpy())) for picture in recipe.pictures()])
    ids = torch.tensor(recipe.TOKENS)
    with torch.no_grad():
        seen = vision(pixels)
        read = text(
            ids, attention_mask=(ids != 0).long(), encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long), return_dict=True,
        ).last_hidden_state[:, 0]  # fmt: skip
        numbers = read
        for layer in layers:
            numbers = layer(numbers)
        scores = (numbers - 0.16717362830052426) / 1.0333394966054072
    return {"names": names, "seen": seen[:, 0].tolist(), "read": read.tolist(), "scores": scores[:, 0].tolist()}


def main():
    """Write ``scores.json`` beside this file."""
    packages = ("open_clip_torch", "image-reward", "timm", "torch", "transformers", "torchvision", "pillow")
    result = {
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "open_clip": open_clip_scores(),
        "image_reward": image_reward_scores(),
    }
    (Path(__file__).parent / "scores.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
