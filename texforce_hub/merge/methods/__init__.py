"""Merge methods: one function each, with its formula, its paper and the laws it keeps.

``METHODS`` maps names to methods. A method takes one layer's changes, one for each source that has the
layer, and the sources' weights, and returns the merged change.
"""

from texforce_hub.merge.methods import linear, sparse, spectral
from texforce_hub.merge.methods.registry import (
    METHODS,
    Context,
    Law,
    Mergeable,
    Method,
    Option,
    find_method,
    merge_method,
)

__all__ = [
    "METHODS",
    "Context",
    "Law",
    "Mergeable",
    "Method",
    "Option",
    "find_method",
    "linear",
    "merge_method",
    "sparse",
    "spectral",
]
