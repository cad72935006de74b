"""From the text of a prompt to embeddings: files, tags, weights of words."""
