"""Every on-disk layout of an adapter: how it spells names, and the plan of a file that uses one or several.

Torch-free: a header is enough. Each name is spelled by exactly one dialect, so the table's order cannot matter.
"""

from collections.abc import Mapping
from types import MappingProxyType

from texforce_hub.formats.dialects.attention_processors import ATTENTION_PROCESSORS
from texforce_hub.formats.dialects.comfy import COMFY
from texforce_hub.formats.dialects.diffusers import DIFFUSERS
from texforce_hub.formats.dialects.kohya import KOHYA
from texforce_hub.formats.dialects.layout import Dialect, Reading
from texforce_hub.formats.dialects.lora_layers import LORA_LAYERS
from texforce_hub.formats.dialects.omi import OMI
from texforce_hub.formats.dialects.peft import PEFT
from texforce_hub.formats.dialects.positional import POSITIONAL
from texforce_hub.formats.dialects.state_dict import STATE_DICT
from texforce_hub.formats.dialects.xlabs import XLABS

__all__ = ["DIALECTS", "Dialect", "Reading"]
_TABLE = (DIFFUSERS, LORA_LAYERS, ATTENTION_PROCESSORS, KOHYA, COMFY, OMI, PEFT, STATE_DICT, XLABS, POSITIONAL)
DIALECTS: Mapping[str, Dialect] = MappingProxyType({dialect.name: dialect for dialect in _TABLE})
