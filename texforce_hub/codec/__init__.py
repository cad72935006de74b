"""Plan + tensors → adapter, adapter + dialect → tensors: one executor for all dialects.

``decode(encode(a))`` keeps every layer's delta to the rounding of the file's dtype; scales may fold into ``up``.
"""

from texforce_hub.codec.decoding import check_plan, decode, decode_layer
from texforce_hub.codec.encoding import Encoded, encode, encode_stored
from texforce_hub.codec.joining import join_outlines, join_stored
from texforce_hub.codec.originals import share_names
from texforce_hub.codec.spelling import find_writable
from texforce_hub.codec.stored import StoredAdapter, decode_stored

__all__ = [
    "Encoded",
    "StoredAdapter",
    "check_plan",
    "decode",
    "decode_layer",
    "decode_stored",
    "encode",
    "encode_stored",
    "find_writable",
    "join_outlines",
    "join_stored",
    "share_names",
]
