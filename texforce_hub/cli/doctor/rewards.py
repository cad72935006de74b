"""The environments that rewards run in: whether they are there, or could be made."""

from collections.abc import Iterator

from texforce_hub.cli.doctor.finding import Finding
from texforce_hub.errors import RewardError


def examine_rewards() -> Iterator[Finding]:
    """Every built-in reward that runs in an environment of its own."""
    from texforce_hub.rewards.built_in import BUILT_IN

    for name in BUILT_IN:
        if name.startswith("env:"):
            yield _examine(name)


def _examine(name: str) -> Finding:
    from texforce_hub.rewards.environment.build import environment_folder, is_built
    from texforce_hub.rewards.environment.spec import EnvironmentRef

    try:
        requirements = EnvironmentRef.parse(name).requirements()
    except RewardError as error:
        return Finding(f"reward {name}", "note", str(error), "nothing, unless you want this reward")
    folder = environment_folder(requirements)
    if is_built(requirements):
        return Finding(f"reward {name}", "ok", f"its environment is {folder}")
    advice = f"nothing, unless you want this reward: texforce-hub rewards check {name} --yes"
    return Finding(f"reward {name}", "note", "its environment is not there", advice)
