"""Bases and fine-tuned U-Nets: load them, repair spoilt ones, take them away to other tools. One file each."""
