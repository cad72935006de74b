"""Which stack is better, and by how much."""
