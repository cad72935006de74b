"""An evaluation from end to end: plan, pipelines, rewards, pictures, figures; in a folder it can be cut off and go on.

Batches depend on the plan alone, so a run that was cut off, or several processes that each draw a share, end with the
pictures and figures of one that was neither.
"""

import json
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from texforce_hub.errors import FileError
from texforce_hub.evaluate.diversity import shrink
from texforce_hub.evaluate.drawing import Batch, Easel, Job, Variant
from texforce_hub.evaluate.evaluation import DIVERSITY, Evaluation, describe
from texforce_hub.evaluate.folder import IMAGES, EvaluationFolder, Key, Line
from texforce_hub.evaluate.plan import GROUPS, Plan
from texforce_hub.evaluate.requirement import Requirement
from texforce_hub.evaluate.tables import write_markdown
from texforce_hub.evaluate.tally import Tally
from texforce_hub.evaluate.variants import OnImages, report_images, say_cut_prompts, score_jobs
from texforce_hub.files.writing import writing
from texforce_hub.generate.images.png import a1111_parameters, encode_png
from texforce_hub.generate.images.sheet import as_picture
from texforce_hub.generate.log import saying_once
from texforce_hub.pipelines.load import load_pipeline
from texforce_hub.pipelines.pin import pin_base
from texforce_hub.reading import first_line
from texforce_hub.rewards.reward import Reward, resolve_rewards

logger = logging.getLogger("texforce_hub")

_FEW = 12
"""Below so many prompts a bootstrap interval covers the truth less often than it says."""


class EvaluationRun:
    """One evaluation: everything that can be refused without the pipeline is refused when it is made.

    Args:
        plan: what is drawn, from :func:`~texforce_hub.evaluate.plan.make_plan`.
        pairs: compare every stack with every other, not with the base alone.
        require: requirements, see :mod:`texforce_hub.evaluate.requirement`.

    Raises:
        RewardError, RefError: a reward that does not exist.
        ConfigError: a requirement that names nothing that is measured.
    """

    def __init__(self, plan: Plan, *, device: Any = None, pairs: bool = False, require: Sequence[str] = ()) -> None:
        request = plan.request
        self.plan, self.pairs = plan, pairs
        self.rewards: list[Reward] = resolve_rewards((*request.rewards, *request.held_out_rewards), device or "cpu")
        names = [reward.name for reward in self.rewards]
        measures = [*names, *([DIVERSITY] if len(request.sampling.seeds) > 1 else [])]
        named = [variant.name for variant in plan.variants if variant.sweep is None]
        self.requirements = [Requirement.parse(text, named, measures) for text in require]
        self.pipe: Any = None
        self._easel: Easel | None = None

    def load(self, *, device: str | None = None, dtype: str | None = None) -> None:
        """Load the base, and the tuned U-Net if there is one; from here on the plan names a base's commit.

        Raises:
            PipelineError: one of them cannot be loaded.
        """
        request = self.plan.request
        self.pipe = load_pipeline(request.base, device=device, dtype=dtype)
        request = replace(request, base=pin_base(request.base))
        self.plan = replace(self.plan, request=request)
        unet = load_pipeline(request.base, unet=request.unet, device=device, dtype=dtype).unet if request.unet else None
        variants = {
            variant.name: Variant([entry.item for entry in variant.entries], unet if variant.unet else None)
            for variant in self.plan.variants
        }
        self._easel = Easel(self.pipe, variants, request.sampling, strict=request.strict)

    @property
    def easel(self) -> Easel:
        """The variants on the pipeline, once that is loaded."""
        assert self._easel is not None, "load() comes first"
        return self._easel

    def measure(self, on_images: OnImages | None = None) -> dict[str, Any]:
        """Draw and score everything, keep no picture; the results as JSON can hold them.

        Raises:
            MatchError: a stack that does not fit.
            RewardError: a reward that cannot be used.
        """
        tally = self._tally()
        for jobs, pictures, scores in self._draw(self._batches(), on_images):
            for job, picture, row in zip(jobs, pictures, scores, strict=True):
                tally.note(job, row, shrink(as_picture(picture)))
        return self._results(tally.evaluation())

    def draw_share(self, folder: EvaluationFolder, count: int = 1, on_images: OnImages | None = None) -> None:
        """Draw what is missing of this process's share: every ``count``-th batch, from the folder's ``rank`` on."""
        self._fill(folder, self._batches()[folder.rank :: count], on_images)

    def finish(self, folder: EvaluationFolder, count: int = 1) -> dict[str, Any]:
        """The results, once all shares are drawn: what another process left out is drawn here.

        Writes ``scores.jsonl`` in order, ``results.md`` and ``results.json``.
        """
        for rank in range(1, count):
            folder.wait_for(rank)
        if count > 1 and (missing := self.count_missing(folder)):
            logger.warning("%d pictures of another process's share are missing; they are drawn here", missing)
        self._fill(folder, self._batches(), None)
        scores, tally = self._read(folder), self._tally()
        for line in scores.values():
            tally.note(line.job, [line.rewards[reward.name] for reward in self.rewards], _read_small(folder, line))
        results = self._results(tally.evaluation())
        folder.finish(list(self._in_order(scores)), results, write_markdown(results))
        return results

    def begin(self, folder: EvaluationFolder, *, force: bool = False) -> None:
        """Write the plan into the folder, or see that the one there is the same."""
        folder.begin(self.plan.describe(self.easel.same), force=force)

    def count_missing(self, folder: EvaluationFolder) -> int:
        """How many pictures are still to be drawn."""
        there = self._read(folder)
        return sum(_key(job) not in there for batch in self._batches() for job in batch.jobs)

    def _read(self, folder: EvaluationFolder) -> dict[Key, Line]:
        """The folder's lines that are of this plan and whole; what is neither is drawn again."""
        wanted = {_key(job): job for batch in self._batches() for job in batch.jobs}
        names = {reward.name for reward in self.rewards}
        return {
            key: line
            for key, line in folder.read_scores().items()
            if line.job == wanted.get(key) and line.rewards.keys() == names and _are_numbers(line.rewards.values())
        }

    def _batches(self) -> list[Batch]:
        return self.easel.plan(dict(enumerate(self.plan.texts)))

    def _tally(self) -> Tally:
        names = [reward.name for reward in self.rewards]
        return Tally(self.easel.same, self.plan.texts, names, self.plan.request.sampling)

    def _draw(
        self, batches: Iterable[Batch], on_images: OnImages | None
    ) -> Iterator[tuple[tuple[Job, ...], Tensor, list[list[float]]]]:
        with saying_once():
            say_cut_prompts(self.pipe, (*self.plan.texts, self.plan.request.sampling.negative_prompt))
            for jobs, pictures in self.easel.draw(batches):
                yield jobs, pictures, score_jobs(self.rewards, jobs, pictures)
                report_images(self.easel.same, jobs, on_images)

    def _fill(self, folder: EvaluationFolder, batches: Sequence[Batch], on_images: OnImages | None) -> None:
        """Draw the batches of which something is missing, and write that."""
        there, missing = self._read(folder), list[Batch]()
        for batch in batches:
            if any(_key(job) not in there for job in batch.jobs):
                missing.append(batch)
            else:
                report_images(self.easel.same, batch.jobs, on_images)
        for jobs, pictures, scores in self._draw(missing, on_images):
            lines = []
            for job, picture, row in zip(jobs, pictures, scores, strict=True):
                if _key(job) not in there:
                    lines.append(self._line(job, row))
                    self._write_picture(folder.path / lines[-1].image, job, as_picture(picture))
            folder.append(lines)

    def _line(self, job: Job, scores: Sequence[float]) -> Line:
        names = [reward.name for reward in self.rewards]
        folder = next(variant.folder for variant in self.plan.variants if variant.name == job.variant)
        image = f"{IMAGES}/{folder}/{job.index:04d}-{job.seed}.png"
        return Line(job.variant, job.index, job.prompt, job.seed, job.noise, dict(zip(names, scores)), image)

    def _write_picture(self, path: Path, job: Job, picture: Image.Image) -> None:
        sampling = self.plan.request.sampling
        parameters = a1111_parameters(
            job.prompt,
            sampling.negative_prompt,
            steps=sampling.inference_steps,
            sampler=type(self.pipe.scheduler).__name__.removesuffix("Scheduler"),
            guidance=sampling.guidance,
            seed=job.noise,
            size=picture.size,
        )
        facts = {"prompt": job.prompt, "seed": job.noise, "base": self.plan.request.base, "stack": job.variant}
        with writing(path) as part:
            part.write_bytes(encode_png(picture, {"parameters": parameters, "texforce_hub": json.dumps(facts)}))

    def _in_order(self, scores: dict[Key, Line]) -> Iterator[Line]:
        """A line for every variant, prompt and seed, of those too that share another's picture."""
        for index in range(len(self.plan.texts)):
            for name, other in self.easel.same.items():
                for seed in self.plan.request.sampling.seeds:
                    line = scores[other, index, seed]
                    yield Line(name, index, line.prompt, seed, line.noise, line.rewards, line.image)

    def _say_few(self) -> None:
        """Say of which groups the intervals are not to be trusted."""
        for group in GROUPS:
            if 0 < (count := len(self.plan.numbers(group))) < _FEW:
                prompts = "1 prompt" if count == 1 else f"{count} prompts"
                logger.warning("%s: intervals over %s are too narrow; take %d or more", group, prompts, _FEW)

    def _results(self, evaluation: Evaluation) -> dict[str, Any]:
        plan = self.plan
        self._say_few()
        groups = {group: numbers for group in GROUPS if (numbers := plan.numbers(group))}
        apart = [[v.name for v in plan.variants if v.sweep == number] for number in range(len(plan.sweeps))]
        described = {
            group: describe(evaluation.only(numbers), pairs=self.pairs, apart=apart)
            for group, numbers in groups.items()
        }
        judged = evaluation.only(next(iter(groups.values())))
        return {
            **plan.describe(self.easel.same),
            "pairs": self.pairs,
            "groups": described,
            "requirements": [requirement.judge(judged) for requirement in self.requirements],
        }


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(isinstance(value, int | float) and math.isfinite(value) for value in values)


def _key(job: Job) -> Key:
    return job.variant, job.index, job.seed


def _read_small(folder: EvaluationFolder, line: Line) -> np.ndarray:
    """A picture of the folder as it is compared with others.

    Raises:
        FileError: it is damaged.
    """
    path = folder.path / line.image
    try:
        with Image.open(path) as picture:
            return shrink(picture)
    except (OSError, ValueError, SyntaxError) as error:
        raise FileError(
            f"{path}: no picture: {first_line(error)}; delete it and start again, to draw it anew"
        ) from error
