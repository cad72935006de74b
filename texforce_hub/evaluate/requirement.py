"""``both>unet``: what an evaluation has to show, or the command's answer is no.

::

    REQUIREMENT = STACK ">" STACK ["@" MEASURE]
    STACK       = the name of a variant, as the table has it | "stack" | "both"
    MEASURE     = the name of a reward | "diversity"; by default the first reward

``stack`` is the only ``--adapter`` there is, ``both`` that one over the tuned U-Net. It is met where the whole interval
of the difference, on the held-out prompts, lies above 0.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from texforce_hub.errors import ConfigError
from texforce_hub.evaluate.evaluation import Evaluation
from texforce_hub.evaluate.plan import UNET

_EXPECTED = "expected STACK>STACK or STACK>STACK@REWARD, e.g. both>unet"


@dataclass(frozen=True, slots=True)
class Requirement:
    """One variant is to be better than another, by a measure."""

    text: str
    stack: str
    other: str
    measure: str

    @classmethod
    def parse(cls, text: str, variants: Sequence[str], measures: Sequence[str]) -> "Requirement":
        """The requirement that ``text`` writes, of an evaluation of these variants and measures.

        Raises:
            ConfigError: it is none, or a name that does not exist; those that do are listed.
        """
        body, measure = text, measures[0]
        for known in measures:
            if text.endswith(f"@{known}"):
                body, measure = text.removesuffix(f"@{known}"), known
        left, mark, right = (part.strip() for part in body.partition(">"))
        if not mark or not left or not right:
            raise ConfigError(f"--require {text!r}; {_EXPECTED}")
        stack, other = (_find(name, text, variants, measures) for name in (left, right))
        if stack == other:
            raise ConfigError(f"--require {text!r} compares {stack!r} with itself; {_EXPECTED}")
        return cls(text, stack, other, measure)

    def judge(self, evaluation: Evaluation) -> dict[str, Any]:
        """Whether it is met, with the difference that says so, as JSON can hold it."""
        difference = evaluation.difference(self.stack, self.other, reward=self.measure)
        names = {"text": self.text, "stack": self.stack, "other": self.other, "reward": self.measure}
        return {**names, "difference": asdict(difference), "met": difference.low > 0}


def _find(name: str, text: str, variants: Sequence[str], measures: Sequence[str]) -> str:
    if name in variants:
        return name
    over = [variant for variant in variants if variant.startswith(f"{UNET} + ")]
    if name == "both" and len(over) == 1:
        return over[0]
    plain = [variant for variant in variants[1:] if variant != UNET and variant not in over]
    if name == "stack" and len(plain) == 1:
        return plain[0]
    raise ConfigError(
        f"--require {text!r}: no stack {name!r}; there are {', '.join(variants)}, and the measures "
        f"{', '.join(measures)}; {_EXPECTED}"
    )
