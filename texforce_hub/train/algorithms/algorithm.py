"""The contract: an algorithm is an iterator of gradients at the prompts' embeddings.

The U-Net is frozen, so all that a picture can teach the LoRA passes through the embedding of its prompt. An
algorithm draws pictures, asks the judge, and yields what the loss's gradient is *there*; the learner carries it
through the text encoder, takes one optimiser step, and comes back for more.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Generator

from texforce_hub.train.judge import Judge
from texforce_hub.train.policies.policy import Leaves, Policy


@dataclass(frozen=True, eq=False)
class Update:
    """The gradient of one optimiser step's loss, and what is worth knowing about it.

    Shapes:
        cotangents: of the shapes of ``policy.encode(policy.texts(prompts))``, float32
    """

    cotangents: Leaves
    facts: dict[str, float] = field(default_factory=dict)


Algorithm = Callable[[Policy, Sequence[str], Judge, Generator], Iterator[Update]]
