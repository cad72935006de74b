"""What a rollout's scores say about the run itself, for nothing: signal, noise, and whether rewards agree."""

from collections.abc import Mapping

import torch
from torch import Tensor

from texforce_hub.train.judge import Judge


def describe_scores(scores: Mapping[int, Tensor], judge: Judge) -> dict[str, float]:
    """Squared signal and noise of the gradient, by denoising step and in all, and cosines between rewards' gradients.

    Every group is halved, but no antithetic pair is. Each half is judged by itself, so the halves' gradients are
    independent: their product is the squared signal, and what is left of their size is noise. One rollout's figures
    are rough and may be negative; sums over many tell.

    Shapes:
        scores: by denoising step, of this process's pictures, ``(b, numbers of a prompt's embeddings)``
    """
    facts = _cosines(scores, judge) if len(judge.rewards) > 1 else {}
    # A half of one picture has nobody to be compared with.
    return facts | (_signals(scores, judge) if judge.config.images_per_prompt >= 4 else {})


def _cosines(scores: Mapping[int, Tensor], judge: Judge) -> dict[str, float]:
    own, total = judge.scores[:, judge.own], torch.stack([*scores.values()]).sum(0)
    names, images = [reward.name for reward in judge.rewards], judge.config.images_per_prompt
    alone = [_weigh(total, judge.compare(own, only=i), images).flatten() for i in range(len(names))]
    products = torch.stack(alone) @ torch.stack(alone).T
    judge.team.add([products])
    norms = products.diagonal().sqrt().clamp(min=torch.finfo(products.dtype).tiny)
    cosines = products / norms / norms[:, None]
    return {f"cosine/{names[j]}/{names[i]}": cosines[i, j].item() for i in range(len(names)) for j in range(i)}


def _signals(scores: Mapping[int, Tensor], judge: Judge) -> dict[str, float]:
    own, images = judge.scores[:, judge.own], judge.config.images_per_prompt
    half = images // 4 * 2 if judge.config.antithetic else images // 2
    halves = torch.arange(own.shape[1], device=own.device).view(-1, images)[:, : 2 * half].chunk(2, 1)
    pairs = [[_judge_half(score, own, judge, chosen) for chosen in halves] for score in scores.values()]
    pairs.append([torch.stack(half).sum(0) for half in zip(*pairs, strict=True)])
    squares = torch.stack([_signal_and_noise(a, b) for a, b in pairs])
    judge.team.add([squares])
    facts: dict[str, float] = {}
    for name, (signal, noise) in zip([*(f"/{k}" for k in scores), ""], squares.tolist(), strict=True):
        facts |= {f"signal{name}": signal, f"noise{name}": noise}
    return facts


def _judge_half(score: Tensor, own: Tensor, judge: Judge, half: Tensor) -> Tensor:
    """The gradient of some of each prompt's pictures, ``half (prompts, images)``, compared with each other alone."""
    chosen, images = half.flatten(), half.shape[1]
    return _weigh(score[chosen], judge.compare(own[:, chosen], images=images), images)


def _weigh(score: Tensor, advantages: Tensor, images: int) -> Tensor:
    """The gradient at every prompt's embeddings, a row a prompt."""
    return (advantages.view(-1, *[1] * (score.ndim - 1)) * score).reshape(-1, images, *score.shape[1:]).mean(1)


def _signal_and_noise(a: Tensor, b: Tensor) -> Tensor:
    """Of the mean of two independent estimates: the square of what is common to both, and its variance, ``(2,)``."""
    return torch.stack([(a * b).sum(), (a - b).square().sum() / 4])
