"""Let a reward choose the weights of a stack: searched on one half of the prompts, reported on the other.

python examples/06_tune.py --adapter shapes-colour --adapter shapes-shape --output demo/tune
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from texforce_hub import Sampling, load_pipeline, tune_weights
from texforce_hub.rewards.reward import resolve_rewards
from texforce_hub.shapes.grammar import sample_prompts


def main(adapters: Sequence[str], output: Path, *, prompts: int = 16, generations: int = 4, steps: int = 8) -> Path:
    """Search, print, and give the file with the stack."""
    texts = sample_prompts(prompts, 0, split="test", noisy={"colour", "shape"})
    tuning = tune_weights(
        load_pipeline("shapes"),
        [f"{name}:0.5" for name in adapters],
        texts,
        resolve_rewards(["alignment"]),
        generations=generations,
        population=6,
        sampling=Sampling((0,), steps),
        on_generation=lambda number, g: print(f"generation {number}: best {g.best:.3f}, mean {g.mean:.3f}"),
    )
    weights = ", ".join(f"{name} {ref.weight:g}" for name, ref in zip(adapters, tuning.refs, strict=True))
    print(f"tuned: {weights}")
    for other in ("base", "equal"):
        print(f"  minus {other}, held out: {tuning.evaluation.difference('tuned', other)}")
    output.mkdir(parents=True, exist_ok=True)
    stack = output / "stack.txt"
    stack.write_text(" + ".join(f"{name}:{ref.weight:g}" for name, ref in zip(adapters, tuning.refs)) + "\n")
    return stack


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", action="append", default=[])
    parser.add_argument("--output", type=Path, default=Path("demo/06_tune"))
    options = parser.parse_args()
    print(main(options.adapter or ["shapes-colour", "shapes-shape"], options.output))
