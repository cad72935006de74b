"""Damages of what a sound container holds: numbers, shapes and names."""

import torch
from safetensors.torch import save_file

from tests.damage.files import HALVES, SPELLINGS, Tensors, join, loaded, pick, resave, split
from tests.damage.registry import damages
from texforce_hub.errors import AdapterError, DialectError


@damages("NaN or infinity", AdapterError, r"NaN or infinity in \d+ of \d+ layers")
def _(path, rng):
    tensors = loaded(path)
    tensor = tensors[pick(dict(tensors), rng)]
    tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([float("nan"), float("inf"), float("-inf")])
    resave(path, tensors)


@damages("whole numbers for weights", DialectError, "floating")
def _(path, rng):
    tensors = loaded(path)
    name = pick(dict(tensors), rng)
    tensors[name] = tensors[name].to(rng.choice([torch.int32, torch.int64, torch.uint8]))
    resave(path, tensors)


@damages("truth values or complex numbers for weights", DialectError, "floating")
def _(path, rng):
    tensors = loaded(path)
    name = pick(dict(tensors), rng)
    tensors[name] = tensors[name].to(rng.choice([torch.bool, torch.complex64]))
    resave(path, tensors)


@damages("a dtype that torch has not", DialectError, "has dtype F[46]")
def _(path, rng):
    dtype, size = rng.choice([("F4", 8), ("F6_E2M3", 12), ("F6_E3M2", 12)])
    entries, data = split(path)
    stem = "lora_te_text_model_encoder_layers_7_mlp_fc1.lora_{}.weight"
    names = rng.choice([["<word>"], [stem.format("down"), stem.format("up")]])
    for name in names:
        entries[name] = {"dtype": dtype, "shape": [4, 4], "data_offsets": [len(data), len(data) + size]}
        data += bytes(size)
    join(path, entries, data)


@damages("a change larger than any model's", DialectError, "more than any model's")
def _(path, rng):
    stem = "lora_te_text_model_encoder_layers_7_mlp_fc1"
    tall, flat = torch.ones(50_000, 1), torch.ones(1, 50_000)
    kinds: list[Tensors] = [
        {"lokr_w1": tall, "lokr_w2": flat},
        {"lokr_w1_a": tall, "lokr_w1_b": flat, "lokr_w2": torch.ones(1, 1)},
        {"hada_w1_a": tall, "hada_w1_b": flat, "hada_w2_a": tall.clone(), "hada_w2_b": flat.clone()},
        {"lora_up.weight": tall, "lora_down.weight": flat},
        {"lora_up.weight": torch.ones(50_000, 0), "lora_down.weight": torch.ones(0, 50_000)},
        {  # the change is small, what leads to it is not
            "lora_up.weight": torch.ones(1, 50_000, 1, 1),
            "lora_mid.weight": torch.ones(50_000, 1, 1, 1),
            "lora_down.weight": torch.ones(1, 50_000, 1, 1),
        },
    ]
    resave(path, loaded(path) | {f"{stem}.{end}": tensor for end, tensor in rng.choice(kinds).items()})


@damages("half a layer", DialectError, "lacks its (up|down) half|do not make two")
def _(path, rng):
    tensors = loaded(path)
    del tensors[rng.choice([key for key in sorted(tensors) if key.endswith((*HALVES, ".lokr_w1", ".lokr_w2"))])]
    resave(path, tensors)


@damages("halves of unequal rank", DialectError, "do not share a rank|do not make two")
def _(path, rng):
    tensors = loaded(path)
    name = rng.choice([key for key in sorted(tensors) if key.endswith(HALVES)])
    tensors[name] = torch.ones(tensors[name].shape[0] + 1, tensors[name].shape[1] + 1).to(tensors[name].dtype)
    resave(path, tensors)


@damages("an alpha that is no number", DialectError, "alpha")
def _(path, rng):
    tensors = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(2, 16)}
    tensors |= {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(64, 2)}
    alpha = rng.choice([torch.tensor(float("nan")), torch.tensor(float("inf")), torch.ones(3), torch.ones(2, 2)])
    resave(path, tensors | {"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": alpha})


@damages("one layer twice, unequal", DialectError, "is there twice, with unequal values")
def _(path, rng):
    tensors: Tensors = {}
    for spelling in rng.sample(sorted(SPELLINGS), 2):
        stem, down, up = SPELLINGS[spelling]
        name = stem.format(i=0, p="q_proj")
        tensors |= {name + down: torch.full((2, 16), rng.random()), name + up: torch.ones(16, 2)}
    resave(path, tensors)


@damages("names that nothing is called", DialectError, "none of")
def _(path, rng):
    resave(path, {f"{rng.getrandbits(60):x}.{i}": tensor for i, tensor in enumerate(loaded(path).values())})


@damages("no tensors", DialectError, "no tensors")
def _(path, rng):
    save_file({}, path, metadata={"note": str(rng.random())})


@damages("names that are terminal escapes", DialectError, "none of")
def _(path, rng):
    resave(path, {f"\x1b[{rng.randint(0, 9)}J\x07[bold]{i}": tensor for i, tensor in enumerate(loaded(path).values())})


@damages("names that are paths", DialectError, "none of")
def _(path, rng):
    start = rng.choice(["/etc/", "../../", "C:\\"])
    resave(path, {f"{start}{i}": tensor for i, tensor in enumerate(loaded(path).values())})


@damages("a kind that cannot be read", DialectError, "it cannot be read")
def _(path, rng):
    tensors = loaded(path)
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    resave(path, tensors | {f"{stem}{rng.choice(['.on_input', '.oft_blocks', '.a1.weight'])}": torch.ones(4, 4)})


@damages("a whole model", DialectError, "a whole (U-Net|text encoder|checkpoint)")
def _(path, rng):
    names = ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight", "conv_in.weight")
    names = rng.choice([names, ("text_model.embeddings.token_embedding.weight",), ("model.diffusion_model.x.weight",)])
    resave(path, dict.fromkeys(names, torch.ones(4, 4)) if len(names) == 1 else {n: torch.ones(4, 4) for n in names})


@damages("another kind among the layers", DialectError, r"this is (IA3|VeRA) .*it cannot be read")
def _(path, rng):
    stem = "text_encoder.text_model.encoder.layers.0.self_attn.k_proj"
    resave(path, loaded(path) | {f"{stem}.{rng.choice(['ia3_l', 'vera_lambda_b', 'vera_lambda_d'])}": torch.ones(16)})


def rename_layer(path, rng, change):
    """Give all tensors of one layer names whose stem is changed."""
    tensors = loaded(path)
    stem = rng.choice(sorted({key.partition("_proj")[0] for key in tensors}))
    renamed = {change(stem) + key.removeprefix(stem) if key.startswith(stem) else key: tensors[key] for key in tensors}
    resave(path, renamed)


@damages("a name in capitals", DialectError, "name no known layer")
def _(path, rng):
    rename_layer(path, rng, str.upper)


@damages("control characters in a name", DialectError, "holds control characters|name no known layer")
def _(path, rng):
    odd = rng.choice(["\x1b[2J", "\r", "\u202e", "\x00"])
    rename_layer(path, rng, lambda stem: stem + odd)


@damages("a magnitude beside a difference", DialectError, "beside a difference stored in full")
def _(path, rng):
    stem = f"lora_te_text_model_encoder_layers_{rng.randrange(9)}_mlp_fc1"
    resave(path, {f"{stem}.diff": torch.ones(8, 4), f"{stem}.dora_scale": torch.ones(8, 1)})


@damages("a layer of no entries", DialectError, "has no entries")
def _(path, rng):
    stem, down, up = SPELLINGS[rng.choice(sorted(SPELLINGS))]
    name, sizes = stem.format(i=0, p="k_proj"), rng.choice([(0, 16), (16, 0)])
    resave(path, loaded(path) | {name + down: torch.ones(2, sizes[0]), name + up: torch.ones(sizes[1], 2)})


@damages("an alpha beyond all numbers", DialectError, "alpha is (1e\\+3|inf)")
def _(path, rng):
    stem = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    alpha = torch.tensor(rng.choice([1e39, 1e308, float("inf")]), dtype=torch.float64)
    halves = {f"{stem}.lora_down.weight": torch.ones(1, 16), f"{stem}.lora_up.weight": torch.ones(64, 1)}
    resave(path, halves | {f"{stem}.alpha": alpha})


@damages("a huge alpha", None, "absurdly large")
def _(path, rng):
    stem = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    alpha = torch.tensor(rng.choice([1e5, 1e10, -1e20]))
    halves = {f"{stem}.lora_down.weight": torch.ones(2, 16), f"{stem}.lora_up.weight": torch.ones(64, 2)}
    resave(path, loaded(path) | halves | {f"{stem}.alpha": alpha})


@damages("a layer of no rank", None, "rank 0, which changes nothing")
def _(path, rng):
    stem, down, up = SPELLINGS[rng.choice(sorted(SPELLINGS))]
    name = stem.format(i=0, p="k_proj")
    resave(path, loaded(path) | {name + down: torch.ones(0, 16), name + up: torch.ones(16, 0)})


@damages("tensors that nobody knows", None, "of unknown names|embeddings")
def _(path, rng):
    resave(path, loaded(path) | {rng.choice(["text_encoder.x.scaling", "", "<token>", "a.b.c"]): torch.ones(3)})


@damages("words that move the cursor", None, "")
def _(path, rng):
    words = {
        "ss_output_name": "\x1b[2J\x1b]0;gone\x07",
        "note\x1b[1A": "[bold red]",
        "ss_sd_model_name": "\x9b31msd_v1",
    }
    resave(path, loaded(path), words)
