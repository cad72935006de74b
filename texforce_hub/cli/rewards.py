"""``texforce-hub rewards``: what can be asked of pictures, and whether its weights are here and sound."""

from typing import Annotated

import typer

from texforce_hub.cli.command import App
from texforce_hub.cli.console import put, put_json
from texforce_hub.cli.environments import prepare_rewards
from texforce_hub.cli.options import AsJson, Device, Yes
from texforce_hub.cli.table import put_table


def register(app: typer.Typer) -> None:
    """Add ``rewards list`` and ``rewards check``."""
    rewards = App(name="rewards", help="List the rewards; check that one can be used.", no_args_is_help=True)
    rewards.command("list")(list_rewards)
    rewards.command("check")(check)
    app.add_typer(rewards)


def list_rewards(as_json: AsJson = False) -> None:
    """List the built-in rewards: what they measure, whose weights they need, on what terms."""
    from dataclasses import asdict

    from texforce_hub.rewards.built_in import BUILT_IN

    if as_json:
        put_json({name: asdict(row) for name, row in BUILT_IN.items()})
        return
    rows = [[name, row.summary, row.needs, row.licence or ""] for name, row in BUILT_IN.items()]
    put_table(["reward", "what it measures", "needs", "licence"], rows)


def check(
    name: Annotated[str, typer.Argument(metavar="REWARD", help="A reward, as for train --reward.")],
    as_json: AsJson = False,
    device: Device = None,
    yes: Yes = False,
) -> None:
    """Load a reward and score two made-up pictures: finite, the same again, with a gradient if it has one."""
    from texforce_hub.device import choose_device
    from texforce_hub.rewards.selftest import try_reward

    prepare_rewards([name], yes=yes)
    report = try_reward(name, choose_device(device))
    if as_json:
        put_json(report)
        return
    gradient = "none" if report["gradient"] is None else f"{report['gradient']:.3g}"
    put(f"{name}: a ramp {report['ramp']:.4f}, noise {report['noise']:.4f}, largest gradient {gradient}")
