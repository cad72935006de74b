"""Whether an adapter fits a base, layer by layer, before anything is loaded."""

from texforce_hub.check.base import Base, read_base
from texforce_hub.check.fit import Fit, check_adapter

__all__ = ["Base", "Fit", "check_adapter", "read_base"]
