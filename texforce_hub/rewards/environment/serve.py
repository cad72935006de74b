"""Inside a reward's own environment: its function is served to the process that started this one, and to its end."""

import json
import os
import signal
import sys
import threading
from typing import Any

from texforce_hub.errors import RewardError
from texforce_hub.reading import first_line
from texforce_hub.rewards.functions import check_function, import_function
from texforce_hub.rewards.server import RewardServer

PATH = "score"
"""Under which the function is served."""


def serve(name: str, function: str) -> None:
    """Say on stdout at which port, then answer until stdin ends, as it does when whoever holds it ends or is killed.

    Args:
        name: of the reward, for messages.
        function: ``python:module:function`` or ``python:./file.py:function``.
    """
    out = os.dup(1)
    os.dup2(2, 1)  # what a reward prints is no answer
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run decides when it has no more questions
    try:
        server = RewardServer({PATH: check_function(name, import_function(function))})
    except RewardError as error:
        _say(out, {"error": first_line(error, 1000)})  # paths may be long, and what is wrong stands at the end
        sys.exit(1)
    threading.Thread(target=_end_with_the_run, daemon=True).start()
    _say(out, {"port": server.server_address[1]})
    server.serve_forever()


def _say(out: int, content: dict[str, Any]) -> None:
    os.write(out, json.dumps(content).encode() + b"\n")


def _end_with_the_run() -> None:
    while os.read(0, 4096):
        pass
    os._exit(0)
