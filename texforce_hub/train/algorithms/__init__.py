"""Ways to learn, one file each; the contract is in ``algorithm``."""
