"""How adapters lie in files: dialects spell names, plans understand headers, the codec carries tensors."""
