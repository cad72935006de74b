"""From a header to a plan: which tensors make which layer, and what cannot be used."""
