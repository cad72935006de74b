"""The value in the middle: an adapter is a mapping from layer names to changes. Frozen, checked, no I/O.

Layer names are ours whatever file they came from, in the published spelling of the libraries:
``text_encoder.text_model.encoder.layers.0.self_attn.q_proj``, ``unet.down_blocks.0.…attn1.to_out.0``. A
name is that of a module, and the layer changes its ``weight``; a :class:`Vector` carries the full name of
the one-dimensional parameter it changes (``….q_proj.bias``, ``….layer_norm1.weight``).
"""
