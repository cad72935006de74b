"""Other libraries of another age, run by themselves: ``python old_libraries.py FOLDER``.

For every case in FOLDER the libraries that are installed here build the base, load the adapter by their own loader
and save what the parts put out. Nothing of this project is imported: what it wrote must do.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import load_file, save_file

PIPELINES = {"sd1": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}


def main(folder: Path) -> None:
    """Save every case's outputs beside it, and the libraries' versions."""
    libraries = {name: version(name) for name in ("diffusers", "transformers", "peft", "torch")}
    (folder / "versions.json").write_text(json.dumps(libraries))
    for path in sorted((folder / "cases").iterdir()):
        case = json.loads((path / "case.json").read_text())
        parts = build_parts(folder / "bases" / case["family"])
        load_adapter(parts, path, case)
        inputs = load_file(folder / "bases" / case["family"] / "inputs.safetensors")
        save_file(compute_outputs(parts, inputs), path / "outputs.safetensors")


def build_parts(folder: Path) -> dict[str, Any]:
    """The base's text encoders and U-Net, with the weights that lie there."""
    parts = {}
    for path in folder.glob("*.json"):
        kind, config = json.loads(path.read_text())
        if kind == "UNet2DConditionModel":
            module = diffusers.UNet2DConditionModel.from_config(config)
        else:
            module = getattr(transformers, kind)(transformers.CLIPTextConfig(**config))
        module.load_state_dict(load_file(path.with_suffix(".safetensors")))
        parts[path.stem] = module.eval()
    return parts


def load_adapter(parts: dict[str, Any], path: Path, case: dict[str, Any]) -> None:
    """By a pipeline's ``load_lora_weights``, or by ``PeftModel.from_pretrained`` where the case names a part."""
    if case["loader"] == "none":
        return
    if case["loader"] == "pipeline":
        pipeline = build_pipeline(case["family"], parts)
        pipeline.load_lora_weights(str(path), weight_name=case["file"])
    else:
        from peft import PeftModel

        parts[case["loader"]] = PeftModel.from_pretrained(parts[case["loader"]], str(path)).eval()


def build_pipeline(family: str, parts: dict[str, Any]) -> Any:
    """A pipeline of these parts; what a LoRA loader never looks at is small or absent."""
    vae = diffusers.AutoencoderKL(block_out_channels=(16,), norm_num_groups=8)
    missing: dict[str, Any] = {"tokenizer": None, "scheduler": diffusers.DDIMScheduler(), "vae": vae}
    if family == "sdxl":
        missing |= {"tokenizer_2": None, "add_watermarker": False}
    else:
        missing |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return getattr(diffusers, PIPELINES[family])(**parts, **missing)


@torch.no_grad()
def compute_outputs(parts: dict[str, Any], inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every text encoder's states (and projection), and the U-Net's prediction from given states."""
    outputs = {}
    for part in parts.keys() - {"unet"}:
        found = parts[part](inputs["ids"], output_hidden_states=True)
        outputs[f"{part}.last"] = found.last_hidden_state
        outputs[f"{part}.penultimate"] = found.hidden_states[-2]
        if "text_embeds" in found:
            outputs[f"{part}.projected"] = found.text_embeds
    added = {name: inputs[name] for name in ("text_embeds", "time_ids") if name in inputs}
    predict = {"encoder_hidden_states": inputs["states"], "added_cond_kwargs": added or None}
    outputs["unet"] = parts["unet"](inputs["sample"], 3, **predict).sample
    return {name: tensor.contiguous() for name, tensor in outputs.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
