"""TexForce (arXiv 2311.15657): reinforcement learning of a LoRA on the text encoder; the rest stays frozen.

Read in this order: ``config`` (every knob), ``algorithms/streaming`` (how a rollout becomes a gradient at the
embeddings), ``policies/ddim`` (which steps have something to teach), ``judge`` (advantages), ``learner`` (one step of
the optimiser), ``training_run`` (one step of a run), ``run`` (from start to finish).
"""
