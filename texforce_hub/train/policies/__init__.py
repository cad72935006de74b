"""What is trained: one file a kind of pipeline."""
