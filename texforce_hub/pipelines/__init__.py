"""Bases and fine-tuned U-Nets: load them, repair spoilt ones, take them away to other tools. One file each."""

from texforce_hub.pipelines.checkpoint import save_checkpoint, save_text_encoder
from texforce_hub.pipelines.frozen import frozen
from texforce_hub.pipelines.load import load_pipeline
from texforce_hub.pipelines.portable import save_pipeline
from texforce_hub.pipelines.repair import repair_pipeline

__all__ = ["frozen", "load_pipeline", "repair_pipeline", "save_checkpoint", "save_pipeline", "save_text_encoder"]
