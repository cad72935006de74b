"""The path of a GPU, tried on a pretended one in a process of its own.

Torch knows one accelerator a process, and with one autograd starts threads, which no fork survives, and autocast asks
it what it can: tests beside these would feel it.
"""

import re
import subprocess
import sys
from pathlib import Path

CASES = Path(__file__).with_name("pretended_device.py")
LIMIT = 300  # seconds, only so that a hang ends


def test_reading_applying_merging_resizing_and_training_wait_for_a_device_only_where_they_must():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(CASES)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, check=False)
    assert answer.returncode == 0, answer.stdout[-6000:]
    passed = re.search(r"(\d+) passed", answer.stdout)
    assert passed is not None
    assert int(passed[1]) >= CASES.read_text().count("\ndef test_")
