"""Number formats by safetensors' names: their bits, which are floating point, which torch cannot hold."""

from collections.abc import Mapping
from types import MappingProxyType

FRACTIONAL = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""The dtypes with a sign and a fraction, by safetensors' names, in which a layer's numbers are written."""
FLOATING = frozenset({*FRACTIONAL, "F8_E8M0"})
"""The dtypes, by safetensors' names, that a layer's numbers can have."""
UNREADABLE = frozenset({"F4", "F6_E2M3", "F6_E3M2"})
"""The dtypes that the format has and torch has not: whatever has one cannot be read."""
_INTEGER_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64}
_FLOAT_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F16": 16, "BF16": 16}
BITS: Mapping[str, int] = MappingProxyType({**_INTEGER_BITS, **_FLOAT_BITS, "F32": 32, "F64": 64, "C64": 64})
"""Bits of one element, by safetensors' dtype names."""
