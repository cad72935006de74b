"""Environments of rewards, made before a command starts: what is installed is said, and asked for."""

import sys
from collections.abc import Iterable

import typer

from texforce_hub.cli.console import say
from texforce_hub.errors import RewardError


def prepare_rewards(specs: Iterable[str], *, yes: bool) -> None:
    """Make the environment of each reward that runs in one and has none yet, if that is wished.

    Args:
        yes: install without a question.

    Raises:
        RewardError: nobody said yes, or it cannot be made.
    """
    for spec in dict.fromkeys(specs):
        if spec.startswith("env:"):
            _prepare(spec, yes=yes)


def _prepare(spec: str, *, yes: bool) -> None:
    from texforce_hub.rewards.environment.build import build_environment, environment_folder, is_built
    from texforce_hub.rewards.environment.spec import EnvironmentRef
    from texforce_hub.rewards.ref import RewardRef

    ref = EnvironmentRef.parse(RewardRef.parse(spec).name)
    requirements = ref.requirements()
    if is_built(requirements):
        return
    folder = environment_folder(requirements)
    packages = ", ".join(requirements.packages) + ("" if requirements.only_these else " and what they need")
    plan = f"{ref.name} runs in an environment of its own, which is not there yet: {packages}, in {folder}"
    if not yes:
        if not sys.stdin.isatty():
            raise RewardError(f"{plan}; --yes installs it")
        say(plan)
        if not typer.confirm("Install it?", err=True):
            raise RewardError(f"{ref.name} was not installed")
    say(f"{plan}; pip installs it once" if yes else "pip installs it once")
    build_environment(requirements, say)
