"""How threads wait: asleep. A thread that spins takes the core which another process needs to finish."""

import os
from collections.abc import MutableMapping

_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""Where a user may have said how OpenMP's threads wait."""


def wait_asleep(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let OpenMP's threads sleep where they wait for each other, unless the user set something; before torch loads."""
    if not any(name in environment for name in _SETTINGS):
        environment["OMP_WAIT_POLICY"] = "PASSIVE"
