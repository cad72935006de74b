"""``texforce-hub reward-server``: rewards for other processes and machines."""

from typing import Annotated

import typer

from texforce_hub.cli.console import put, say
from texforce_hub.cli.environments import prepare_rewards
from texforce_hub.cli.options import Device, Yes


def register(app: typer.Typer) -> None:
    """Add ``reward-server``."""
    app.command("reward-server")(serve)


def serve(
    reward: Annotated[list[str], typer.Option("--reward", help="A reward, as for train; repeat for more.")],
    host: Annotated[
        str, typer.Option("--host", help="Who may ask: 127.0.0.1 this machine, 0.0.0.0 all.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 takes a free one.")] = 0,
    device: Device = None,
    yes: Yes = False,
) -> None:
    """Serve rewards over HTTP until interrupted; prints the addresses that --reward takes elsewhere."""
    from texforce_hub.device import choose_device
    from texforce_hub.rewards.reward import resolve_rewards
    from texforce_hub.rewards.server import RewardServer
    from texforce_hub.rewards.serving import as_arrays

    prepare_rewards(reward, yes=yes)
    target = choose_device(device)
    scores = {served.name: as_arrays(served, target) for served in resolve_rewards(reward, target)}
    with RewardServer(scores, host, port) as server:
        for name in server.scores:
            put(f"{server.address}/{name}")
        say("serving; Ctrl-C ends it")
        server.serve_forever()
