"""What people see who type a result's name, in a terminal and in a notebook."""

from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import texforce_hub
from tests.support.pipelines_tiny import random_adapter, tiny_pipeline
from texforce_hub import Adapter, Sampling
from texforce_hub.evaluate.evaluation import Evaluation
from texforce_hub.notebook import Bar, table, write_size

HOSTILE = "<script>alert('&')</script>"


class Cells(HTMLParser):
    """The texts of a page, and the tags that are open at its end."""

    def __init__(self, page):
        super().__init__()
        self.texts, self.open, self.tags = [], [], set()
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())


def cells(page):
    parsed = Cells(page)
    assert parsed.open == []
    assert "script" not in parsed.tags
    return [text for text in parsed.texts if text]


def evaluation(names=("base", "style"), prompts=3):
    scores = {name: np.full((prompts, 2), float(index)) for index, name in enumerate(names)}
    return Evaluation(tuple(f"prompt {i}" for i in range(prompts)), Sampling((0, 1)), {"colour": scores})


def test_a_table_escapes_every_text():
    page = table(HOSTILE, [HOSTILE], [[HOSTILE], [Bar(HOSTILE, 0.5)]])
    assert cells(page) == [HOSTILE] * 4


def test_a_bar_stays_in_its_cell():
    assert "left:0.0%;width:100.0%" in Bar("", 7.0, -1.0).html()
    assert "left:25.0%;width:25.0%" in Bar("", 0.5, 0.25).html()
    assert "width:0.0%" in Bar("", 0.2, 0.4).html()


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 bytes"), (999, "999 bytes"), (48_200, "48.2 kB"), (151_063_000, "151.1 MB")]
)
def test_a_size_is_written_in_decimal_units(size, text):
    assert write_size(size) == text


def test_an_adapter_is_a_table_of_its_parts():
    pipe = tiny_pipeline("sdxl")
    adapter = random_adapter(pipe)
    texts = cells(adapter._repr_html_())
    assert set(adapter.parts) <= set(texts)
    assert "LowRank" in texts
    hostile = Adapter(adapter.layers, {"texforce_hub.family": HOSTILE})
    assert HOSTILE in " ".join(cells(hostile._repr_html_()))
    assert cells(Adapter({})._repr_html_()) == ["Adapter, family unknown, 0 bytes"]


def test_a_stack_on_a_pipeline_is_one_line_that_says_how_it_lies_there():
    pipe = tiny_pipeline("sd1")
    adapter = random_adapter(pipe, parts=("text_encoder",))
    count = len(adapter.layers)
    with texforce_hub.apply_adapter(pipe, [(adapter, 0.5), (adapter, {"text_encoder": 0.2})]) as applied:
        layers = f"{2 * count} of {2 * count} layers in text_encoder"
        assert repr(applied) == f"Applied(adapter:0.5 + adapter-2:text_encoder=0.2 ({layers}), attached)"
        assert f"{count} of {count}" in cells(applied._repr_html_())
        applied.disable()
        assert repr(applied).endswith("disabled)")
    assert repr(applied).endswith("taken off)")


def test_a_fused_stack_says_so():
    pipe = tiny_pipeline("sd1")
    with texforce_hub.apply_adapter(pipe, random_adapter(pipe), mode="fuse") as applied:
        assert repr(applied).endswith("fused)")
    assert repr(applied).endswith("taken off or made permanent)")


def test_a_merge_is_two_lines_and_two_tables():
    merged = texforce_hub.merge_adapters([("shapes-colour", 0.5), ("shapes-shape", 0.5)], rank=4)
    first, second = repr(merged).splitlines()
    assert first.startswith("Merged(Adapter(shapes, text_encoder: 12 layers, rank 4, ")
    assert second.strip().startswith("MergeReport(svd of shapes-colour, shapes-shape: 12 layers, ")
    texts = cells(merged._repr_html_())
    assert "svd of shapes-colour, shapes-shape" in texts
    assert f"{merged.report.kept:.2%}" in texts


def test_results_of_many_layers_are_one_line():
    pipe, tuned = tiny_pipeline("sd1"), tiny_pipeline("sd1", seed=1)
    adapter = random_adapter(pipe)
    results = [
        texforce_hub.resize_adapter(adapter, rank=1),
        texforce_hub.extract_adapter(tuned, pipe, rank=1),
        texforce_hub.compare_adapters(adapter, adapter),
        texforce_hub.measure_fold(adapter, pipe, dtype=torch.bfloat16),
        texforce_hub.check_adapter("shapes-colour", base="shapes"),
    ]
    for result in results:
        assert repr(result).startswith(f"{type(result).__name__}(")
        assert "\n" not in repr(result)
        assert len(repr(result)) < 250


def test_an_evaluation_is_at_most_three_lines_with_intervals():
    assert repr(evaluation()) == (
        "Evaluation(3 prompts, 2 seeds, colour:\n  base +0.000 [+0.000, +0.000], style +1.000 [+1.000, +1.000])"
    )
    many = repr(evaluation([f"v{i}" for i in range(50)], prompts=200))
    assert many.endswith("and 48 variants more)")
    assert len(many.splitlines()) <= 3
    assert len(many) < 250


def test_an_evaluations_table_has_every_variant_and_its_difference_from_the_first():
    texts = cells(evaluation(["base", HOSTILE])._repr_html_())
    assert texts.count("+1.000 [+1.000, +1.000]") == 2
    assert {"base", HOSTILE, "minus base", "100%"} <= set(texts)
