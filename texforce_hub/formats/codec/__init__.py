"""Plan + tensors → adapter, adapter + dialect → tensors: one executor for all dialects.

``decode(encode(a))`` keeps every layer's delta to the rounding of the file's dtype; scales may fold into ``up``.
"""
