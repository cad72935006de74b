"""Every on-disk layout of an adapter: how it spells names, and the plan of a file that uses one or several.

Torch-free: a header is enough. Each name is spelt by exactly one dialect, so the table's order cannot matter.
"""

from collections.abc import Mapping
from types import MappingProxyType

from texforce_hub.dialects.attention_processors import ATTENTION_PROCESSORS
from texforce_hub.dialects.comfy import COMFY
from texforce_hub.dialects.diffusers import DIFFUSERS
from texforce_hub.dialects.joining import join_plans
from texforce_hub.dialects.kinds import LayerPlan
from texforce_hub.dialects.kohya import KOHYA
from texforce_hub.dialects.layout import Dialect, Reading
from texforce_hub.dialects.lora_layers import LORA_LAYERS
from texforce_hub.dialects.omi import OMI
from texforce_hub.dialects.peft import PEFT
from texforce_hub.dialects.planning import Plan, plan_header
from texforce_hub.dialects.positional import POSITIONAL
from texforce_hub.dialects.recognition import FamilyVerdict
from texforce_hub.dialects.state_dict import STATE_DICT
from texforce_hub.header import Header

__all__ = ["DIALECTS", "Dialect", "FamilyVerdict", "LayerPlan", "Plan", "Reading", "join_plans", "plan"]

_TABLE = (DIFFUSERS, LORA_LAYERS, ATTENTION_PROCESSORS, KOHYA, COMFY, OMI, PEFT, STATE_DICT, POSITIONAL)

DIALECTS: Mapping[str, Dialect] = MappingProxyType({dialect.name: dialect for dialect in _TABLE})


def plan(header: Header, part: str | None = None, *, owns_config: bool = False) -> Plan:
    """What a file holds, by our layer names, from its header alone.

    ``part`` is the text encoder that the file's place names (``text_encoder_2/adapter_model.safetensors``); it
    counts where the tensors' names leave that open. ``owns_config`` is that the file is called as PEFT calls its
    own: then the config beside it counts whatever way its tensors are spelt, else for those that PEFT spelt.

    Raises:
        DialectError: nothing in it is an adapter's layer, or some of it is of a kind that is not read.
    """
    return plan_header(header, DIALECTS, part, owns_config=owns_config)
