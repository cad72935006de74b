"""Pipelines as stochastic policies, one file each; the contract is in ``policy``."""
