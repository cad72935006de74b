"""Rewards whose libraries do not go with ours: each in a virtual environment of its own, asked as a server is."""
