"""Adapters into one, smaller, compared, extracted."""
