"""The reward in an environment of its own, ready to be asked."""

import logging
from pathlib import Path

from texforce_hub.errors import RewardError
from texforce_hub.rewards.environment.build import environment_folder, find_python, is_built
from texforce_hub.rewards.environment.serve import PATH
from texforce_hub.rewards.environment.spec import EnvironmentRef
from texforce_hub.rewards.environment.worker import EnvironmentWorker
from texforce_hub.rewards.remote import Remote

logger = logging.getLogger("texforce_hub")

_BOOT = Path(__file__).with_name("boot.py")


def environment_reward(ref: EnvironmentRef) -> Remote:
    """The score by as many processes as are asked for; the first is started to see that it can be.

    Raises:
        RewardError: its environment is not there, or the function cannot be loaded in it.
    """
    requirements = ref.requirements()
    if not is_built(requirements):
        raise RewardError(
            f"reward {ref.name!r} runs in an environment of its own that is not there yet; "
            f"'texforce-hub rewards check {ref.name} --yes' makes it"
        )
    python = find_python(environment_folder(requirements))
    command = [str(python), "-I", str(_BOOT), ref.name, ref.function]
    workers = [EnvironmentWorker(ref.name, command, PATH) for _ in range(ref.workers)]
    workers[0].locate()
    logger.info("reward %s: licence %s", ref.name, requirements.licence or "not stated in its file")
    return Remote(workers)
