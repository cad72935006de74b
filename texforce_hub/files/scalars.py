"""The number that a one-element tensor's bytes stand for, without torch."""

import math
import struct

_STRUCTS = {"BOOL": "<?", "U8": "<B", "I8": "<b", "U16": "<H", "I16": "<h", "U32": "<I", "I32": "<i", "U64": "<Q"}
_STRUCTS |= {"I64": "<q", "F16": "<e", "F32": "<f", "F64": "<d"}


def decode_scalar(data: bytes, dtype: str) -> float | None:
    """The value of one element's bytes (little endian); ``None`` for dtypes that no alpha is stored in."""
    if dtype in _STRUCTS:
        return float(struct.unpack(_STRUCTS[dtype], data)[0])
    if dtype == "BF16":
        return float(struct.unpack("<f", b"\0\0" + data)[0])
    if dtype == "F8_E5M2":  # the upper byte of a half
        return float(struct.unpack("<e", b"\0" + data)[0])
    if dtype == "F8_E4M3":
        return _decode_e4m3(data[0])
    return None


def _decode_e4m3(byte: int) -> float:
    sign, exponent, fraction = -1.0 if byte & 0x80 else 1.0, (byte >> 3) & 0xF, byte & 0x7
    if exponent == 0xF and fraction == 0x7:
        return math.nan
    if exponent == 0:
        return sign * math.ldexp(fraction / 8, -6)
    return sign * math.ldexp(1 + fraction / 8, exponent - 7)
