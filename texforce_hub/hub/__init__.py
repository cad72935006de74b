"""Adapters by name, wherever they lie: on this disk, in the catalogue, on the Hugging Face Hub."""
