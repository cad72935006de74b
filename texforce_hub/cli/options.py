"""The base whose weights DoRA layers need: loaded where one is named, so that other files need no pipeline."""

from typing import Any


def load_base(base: str | None, *, device: Any = None) -> Any:
    """The pipeline that ``--base`` names; ``None`` without one.

    Raises:
        PipelineError: it is none, or cannot be found.
    """
    if base is None:
        return None
    from texforce_hub.pipelines.load import load_pipeline

    return load_pipeline(base, device=device)
