"""A model card's YAML and its text, apart and together, as ``huggingface_hub`` reads and writes them."""

from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData


def split_card(card: str) -> tuple[dict[str, Any], str]:
    """What a card's YAML says, and its text; without YAML, an empty table.

    Raises:
        ValueError: the YAML is none, or no table.
    """
    import yaml

    if not card.lstrip().startswith("---"):
        return {}, card
    try:
        read = ModelCard(card)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    return _table(read.data), read.text


def join_card(values: Mapping[str, Any], text: str) -> str:
    """A card of YAML and text, read once more as the Hub does it.

    Raises:
        ValueError: values that no card can have.
    """
    return str(ModelCard(f"---\n{ModelCardData(**values).to_yaml()}\n---\n{text}"))


def describe_metrics(name: str, metrics: Sequence[tuple[str, float]]) -> Mapping[str, Any]:
    """The ``model-index`` of an adapter with the means of some rewards on held-out prompts."""
    results = [
        EvalResult(
            task_type="text-to-image",
            dataset_type="prompts",
            dataset_name="held-out prompts",
            metric_type=metric,
            metric_name=f"{metric}, mean",
            metric_value=value,
        )
        for metric, value in metrics
    ]
    return {"model-index": _table(ModelCardData(model_name=name, eval_results=results))["model-index"]}


def _table(data: Any) -> dict[str, Any]:
    values: dict[str, Any] = data.to_dict()
    return values
