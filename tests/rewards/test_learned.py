"""Learned rewards compute what the published code computes; ``tests/golden/rewards/make.py`` ran that once."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.support import reward_recipes as recipe
from texforce_hub.errors import RewardError
from texforce_hub.families.reward_models import from_image_reward, from_linear_layers, from_whole_open_clip, is_unused
from texforce_hub.files.writing import write_tensors
from texforce_hub.rewards import weights
from texforce_hub.rewards.aesthetic import make_head
from texforce_hub.rewards.aesthetic import make_score as aesthetic_score
from texforce_hub.rewards.built_in import BUILT_IN
from texforce_hub.rewards.clip import convert_open_clip, make_similarity
from texforce_hub.rewards.clipscore import make_score as clip_score
from texforce_hub.rewards.imagereward import make_model
from texforce_hub.rewards.imagereward import make_score as image_reward_score
from texforce_hub.rewards.networks import HIDDEN
from texforce_hub.rewards.preprocess import MEAN, STD, prepare
from texforce_hub.rewards.reward import resolve_reward

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "rewards" / "scores.json").read_text())
CLIP_CONFIG = {
    "projection_dim": 24,
    "text_config": {
        "hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 2,
        "hidden_act": "gelu", "projection_dim": 24, "eos_token_id": 49407,
    },
    "vision_config": {
        "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2, "num_hidden_layers": 2,
        "hidden_act": "gelu", "patch_size": 8, "image_size": 32, "projection_dim": 24,
    },
}  # fmt: skip
VISION = {"hidden_size": 48, "intermediate_size": 192, "num_attention_heads": 4, "num_hidden_layers": 2}
VISION |= {"patch_size": 8, "image_size": 32}
TEXT = {"hidden_size": 32, "encoder_hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4}
TEXT |= {"num_hidden_layers": 2, "vocab_size": 60, "max_position_embeddings": 40}
CPU = torch.device("cpu")


class Encoded:
    def __init__(self, ids):
        self.input_ids = torch.tensor(ids)
        self.attention_mask = (self.input_ids != 0).long()


class Recorded:
    """A tokenizer that gives the published one's tokens of the recipe's prompts."""

    def __init__(self, tokens):
        self.tokens = dict(zip(recipe.PROMPTS, tokens, strict=True))

    def __call__(self, prompts, **_):
        return Encoded([self.tokens[prompt] for prompt in prompts])


def images():
    return recipe.pictures().permute(0, 3, 1, 2) / 255


def similarity():
    state = {name: recipe.weight(name, tuple(shape)) for name, shape in GOLDEN["open_clip"]["names"].items()}
    return make_similarity(
        CLIP_CONFIG, convert_open_clip(state), Recorded(GOLDEN["open_clip"]["tokens"]), CPU, name="x"
    )


def image_reward_model():
    names = GOLDEN["image_reward"]["names"]
    return make_model({name: recipe.weight(name, tuple(shape)) for name, shape in names.items()}, VISION, TEXT)


def pillow(picture, size):
    """The published preprocessing of a picture ``(h, w, 3)`` in bytes, before it is normalised."""
    height, width = picture.shape[:2]
    rows, columns = (int(size * side / min(height, width)) for side in (height, width))
    resized = Image.fromarray(picture.numpy()).resize((columns, rows), Image.Resampling.BICUBIC)
    top, left = round((rows - size) / 2), round((columns - size) / 2)
    cropped = resized.crop((left, top, left + size, top + size))
    return torch.frombuffer(bytearray(cropped.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1) / 255


@pytest.mark.parametrize(("height", "width", "size"), [(48, 40, 32), (512, 512, 224), (100, 333, 224), (64, 64, 224)])
def test_pictures_are_prepared_as_pillow_does_to_one_of_255(height, width, size):
    pictures = recipe.pictures(2, height, width)
    prepared = prepare(pictures.permute(0, 3, 1, 2) / 255, size)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    for ours, picture in zip(prepared * std + mean, pictures, strict=True):
        levels = (ours - pillow(picture, size)).abs() * 255
        assert (levels > 1.001).sum() <= 3  # where a picture is enlarged, Pillow's fixed point breaks a tie otherwise
        assert levels.max() < 2.001


def test_the_gradient_of_prepared_pictures_is_that_of_the_interpolation():
    pixels = images().requires_grad_()
    (prepare(pixels, 32) * torch.linspace(-1, 1, 32)).sum().backward()
    plain = images().requires_grad_()
    resized = torch.nn.functional.interpolate(plain, (38, 32), mode="bicubic", antialias=True)[..., 3:35, :]
    (resized / torch.tensor(STD).view(3, 1, 1) * torch.linspace(-1, 1, 32)).sum().backward()
    inside = (resized > 0.02).all() and (resized < 0.98).all()
    assert torch.nn.functional.cosine_similarity(pixels.grad.flatten(), plain.grad.flatten(), dim=0) > 0.98 or inside
    assert pixels.grad.abs().sum() > 0


def test_cosines_are_those_of_open_clip():
    model = similarity()
    pixels = prepare(images(), 32).mean((2, 3))
    assert (
        pixels - torch.tensor(GOLDEN["open_clip"]["pixels"])
    ).abs().max() < 5e-5  # one byte of one picture is rounded otherwise
    embeddings = model.embed_images(images())
    torch.testing.assert_close(embeddings, torch.tensor(GOLDEN["open_clip"]["embeddings"]), atol=5e-5, rtol=0)
    wanted = torch.tensor(GOLDEN["open_clip"]["scores"])
    found = torch.stack([model(images(), [prompt] * 3) for prompt in recipe.PROMPTS], 1)
    assert (found - wanted).abs().max() < 5e-5
    assert wanted.std() > 0.01


def test_scores_are_those_of_image_reward():
    score = image_reward_score(image_reward_model(), Recorded(recipe.TOKENS))
    wanted = torch.tensor(GOLDEN["image_reward"]["scores"])
    torch.testing.assert_close(score(images(), recipe.PROMPTS), wanted, atol=5e-5, rtol=0)


def test_a_causal_mask_would_change_image_rewards_scores():
    model = image_reward_model()
    plain = model.text.forward
    model.text.forward = lambda **options: plain(**{**options, "is_decoder": True})
    score = image_reward_score(model, Recorded(recipe.TOKENS))
    assert (score(images(), recipe.PROMPTS) - torch.tensor(GOLDEN["image_reward"]["scores"])).abs().max() > 1e-3


def all_scores():
    clip = similarity()
    widths = (24, *HIDDEN)
    layers = {f"layers.{n}": (out, inner) for n, inner, out in zip("02467", widths, HIDDEN)}
    state = {f"{name}.weight": recipe.weight(name, shape) for name, shape in layers.items()}
    state |= {f"{name}.bias": recipe.weight(name, shape[:1]) for name, shape in layers.items()}
    return {
        "clipscore": clip_score(clip),
        "cosine": clip,
        "aesthetic": aesthetic_score(clip, make_head(state)),
        "imagereward": image_reward_score(image_reward_model(), Recorded(recipe.TOKENS)),
    }


@pytest.mark.parametrize("name", ["clipscore", "cosine", "aesthetic", "imagereward"])
def test_a_learned_score_is_one_per_picture_in_any_order_with_a_gradient(name):
    score = all_scores()[name]
    pixels = images().requires_grad_()
    scores = score(pixels, recipe.PROMPTS)
    assert scores.shape == (3,)
    assert scores.dtype == torch.float32
    one_by_one = [score(images()[i : i + 1], [recipe.PROMPTS[i]]) for i in range(3)]
    torch.testing.assert_close(scores.detach(), torch.cat(one_by_one), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        score(images().flip(0), recipe.PROMPTS[::-1]), scores.detach().flip(0), atol=1e-5, rtol=1e-4
    )
    scores.sum().backward()
    assert pixels.grad.isfinite().all()
    assert pixels.grad.abs().max() > 0


def test_key_maps_take_every_published_name_to_one_of_ours_and_all_of_ours():
    from transformers import CLIPConfig, CLIPModel

    names = GOLDEN["open_clip"]["names"]
    targets = [new for name, shape in names.items() for new in from_whole_open_clip(name, tuple(shape))]
    own = {name: tuple(t.shape) for name, t in CLIPModel(CLIPConfig.from_dict(CLIP_CONFIG)).state_dict().items()}
    assert len(targets) == len(dict(targets)) == len(own)
    assert dict(targets) == own
    names = [name for name in GOLDEN["image_reward"]["names"] if not is_unused(name)]
    ours = [from_image_reward(name) for name in names]
    assert len(set(ours)) == len(ours)
    assert set(ours) == set(image_reward_model().state_dict())
    assert from_linear_layers("layers.1.weight") is None


def test_weights_that_do_not_fit_are_named():
    state = {name: recipe.weight(name, tuple(shape)) for name, shape in GOLDEN["open_clip"]["names"].items()}
    good = convert_open_clip(state)
    for change in (lambda s: s.pop("logit_scale"), lambda s: s.update(odd=torch.zeros(1))):
        bad = dict(good)
        change(bad)
        with pytest.raises(RewardError, match=r"logit_scale|odd"):
            make_similarity(CLIP_CONFIG, bad, None, CPU, name="x")
    with pytest.raises(RewardError, match="strange"):
        convert_open_clip({**state, "strange": torch.zeros(1)})


@pytest.mark.parametrize("name", [name for name, row in BUILT_IN.items() if row.downloads])
def test_weights_that_are_not_there_are_one_line_with_the_way_to_get_them(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    for spec in (name, f"{name}:{tmp_path}"):
        with pytest.raises(RewardError, match=r"hf download|raw/main") as caught:
            resolve_reward(spec)
        assert "\n" not in str(caught.value)
    with pytest.raises(RewardError, match="does not exist"):
        resolve_reward(f"{name}:/no/such")


def test_a_published_pickle_is_converted_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.save({"state_dict": {"a": torch.ones(2)}}, tmp_path / "x.pt")
    assert torch.equal(weights.load_state(tmp_path / "x.pt")["a"], torch.ones(2))
    [copy] = (tmp_path / "cache" / "texforce-hub" / "rewards").iterdir()
    write_tensors(copy, {"a": torch.zeros(2)})
    assert torch.equal(weights.load_state(tmp_path / "x.pt")["a"], torch.zeros(2))  # read from the copy by now


def test_a_reward_may_lie_in_a_file(tmp_path):
    path = tmp_path / "my_reward.py"
    path.write_text("def score(images, prompts):\n    return images.mean((1, 2, 3))\n")
    reward = resolve_reward(f"python:{path}:score=2")
    assert torch.equal(reward(images(), recipe.PROMPTS), images().mean((1, 2, 3)))
    assert reward.weight == 2
    for text, says in (
        ("x = (", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("score = 5", "not a function"),
        ("", "score"),
    ):
        path.write_text(text)
        with pytest.raises(RewardError, match=says):
            resolve_reward(f"python:{path}:score")
    with pytest.raises(RewardError, match="there is no file"):
        resolve_reward("python:/no/such.py:score")
