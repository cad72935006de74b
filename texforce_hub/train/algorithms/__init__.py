"""How a reward changes the weights: one file each."""
