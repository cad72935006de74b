"""What a file is: from its header alone (:func:`inspect_file`), and from its numbers (:mod:`.weights`)."""

from texforce_hub.inspection.header import Inspection, inspect_bundle, inspect_file, inspect_files

__all__ = ["Inspection", "inspect_bundle", "inspect_file", "inspect_files"]
