"""Does an adapter help, and by how much? The same prompts and noise with and without it, intervals over prompts.

python examples/05_evaluate.py --adapter shapes-colour --output demo/evaluate
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from texforce_hub import Sampling, Variant, evaluate_variants, load_pipeline
from texforce_hub.evaluate.evaluation import describe
from texforce_hub.rewards.reward import resolve_rewards
from texforce_hub.shapes.grammar import sample_prompts


def main(adapters: Sequence[str], output: Path, *, prompts: int = 16, steps: int = 10) -> Path:
    """Measure, print, and give the file with all figures."""
    texts = sample_prompts(prompts, 0, split="test", noisy={"colour"})  # never trained on
    variants = {"base": Variant(), **{name: Variant(name) for name in adapters}}
    rewards = resolve_rewards(["alignment"])
    result = evaluate_variants(load_pipeline("shapes"), variants, texts, rewards, sampling=Sampling((0,), steps))
    for name in adapters:
        against = result.compare(name, "base")
        verdict = "helps" if against.difference.low > 0 else "harms" if against.difference.high < 0 else "not resolved"
        print(f"{name}: {against.difference} on {prompts} prompts, better on {against.wins.mean:.0%}: {verdict}")
        print(f"  so many prompts show a difference of {against.resolvable:.3f} four times in five")
    output.mkdir(parents=True, exist_ok=True)
    figures = output / "figures.json"
    figures.write_text(json.dumps(describe(result), indent=1))
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--adapter", action="append", default=[])
    parser.add_argument("--output", type=Path, default=Path("demo/05_evaluate"))
    options = parser.parse_args()
    print(main(options.adapter or ["shapes-colour", "shapes-shape"], options.output))
