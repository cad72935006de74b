"""What a rollout's scores say about the run itself, for nothing: signal, noise, and whether rewards agree."""

from collections.abc import Mapping

import torch
from torch import Tensor

from texforce_hub.train.judge import Judge


def describe_scores(scores: Mapping[int, Tensor], judge: Judge) -> dict[str, float]:
    """Squared signal and noise of the gradient, by denoising step and in all, and cosines between rewards' gradients.

    Every group is halved; each half is judged by itself, so the halves' gradients are independent: their product is
    the squared signal, and what is left of their size is noise. One rollout's figures are rough and may be negative;
    sums over many tell.

    Shapes:
        scores: by denoising step ``(b, numbers of a prompt's embeddings)``
    """
    size, images = judge.scores.shape[1], judge.config.images_per_prompt
    facts: dict[str, float] = {}
    if len(judge.rewards) > 1:
        total = torch.stack([*scores.values()]).sum(0)
        names = [reward.name for reward in judge.rewards]
        gradients = [_weigh(total, judge.compare(judge.scores, only=i), images) for i in range(len(names))]
        for i, one in enumerate(gradients):
            for j in range(i):
                facts[f"cosine/{names[j]}/{names[i]}"] = _cosine(gradients[j], one)
    if images < 4:  # a half of one has nobody to be compared with
        return facts
    halves = torch.arange(size, device=judge.scores.device).view(-1, images)[:, : images // 2 * 2].chunk(2, 1)
    pairs = {k: [_half(score, judge, half.flatten()) for half in halves] for k, score in scores.items()}
    for k, (a, b) in pairs.items():
        facts[f"signal/{k}"], facts[f"noise/{k}"] = _signal_and_noise(a, b)
    whole = (torch.stack(half).sum(0) for half in zip(*pairs.values(), strict=True))
    facts["signal"], facts["noise"] = _signal_and_noise(*whole)
    return facts


def _half(score: Tensor, judge: Judge, chosen: Tensor) -> Tensor:
    images = judge.config.images_per_prompt // 2
    return _weigh(score[chosen], judge.compare(judge.scores[:, chosen], images=images), images)


def _weigh(score: Tensor, advantages: Tensor, images: int) -> Tensor:
    """The gradient at every prompt's embeddings, a row a prompt."""
    return (advantages.view(-1, *[1] * (score.ndim - 1)) * score).reshape(-1, images, *score.shape[1:]).mean(1)


def _signal_and_noise(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Of the mean of two independent estimates: the square of what is common to both, and its variance."""
    return (a * b).sum().item(), (a - b).square().sum().item() / 4


def _cosine(a: Tensor, b: Tensor) -> float:
    return torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).item()
