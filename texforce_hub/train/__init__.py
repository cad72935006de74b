"""TexForce (arXiv 2311.15657): reinforcement learning of a LoRA on the text encoder; the rest stays frozen.

Read in this order: ``config`` (every knob), ``rollout`` (draw pictures and remember how), ``policy`` (the
mathematics, pure functions), ``update`` (one step of the optimiser), ``loop`` (the run).
"""
