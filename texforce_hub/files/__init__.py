"""Tensor files: what one says of itself, its tensors, and writing it whole or not at all."""
