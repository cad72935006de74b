"""One self-contained page of what was drawn, measured and trained."""
