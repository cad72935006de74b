import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from texforce_hub.errors import RecipeError
from texforce_hub.recipe import Recipe, RecipeSource

text = st.text(st.characters(codec="utf-8"), max_size=12)
number = st.floats(allow_nan=False, allow_infinity=False)
setting = text | st.integers(-(2**60), 2**60) | number | st.booleans()
tables = st.dictionaries(text, setting, max_size=3)
sources = st.builds(
    RecipeSource,
    source=text.filter(bool),
    weight=number,
    name=text,
    revision=text,
    sha256=st.sampled_from(["", "0" * 64, "af" * 32]),
) | st.builds(RecipeSource, source=text.filter(bool), parts=st.dictionaries(text, number, min_size=1, max_size=3))
recipes = st.builds(
    Recipe,
    kind=st.sampled_from(["merge", "apply"]),
    sources=st.lists(sources, min_size=1, max_size=3).map(tuple),
    method=text,
    options=tables,
    settings=st.dictionaries(text, setting | tables, max_size=3),
    seed=st.integers(0, 2**60),
    versions=st.dictionaries(text, text, max_size=2),
)


@settings(deadline=None, max_examples=150)
@given(recipes)
def test_parse_and_str_are_inverse(recipe):
    assert Recipe.parse(str(recipe)) == recipe
    assert str(Recipe.parse(str(recipe))) == str(recipe)


GOOD = """
format = 1
kind = "merge"
method = "svd"
seed = 3
[[source]]
source = "runs/a"
weight = 0.7
[settings]
rank = 16
part_weights = { unet = 0.5 }
"""


def test_a_recipe_written_by_hand_is_read():
    recipe = Recipe.parse(GOOD)
    assert recipe.sources == (RecipeSource("runs/a", 0.7),)
    assert recipe.settings == {"rank": 16, "part_weights": {"unet": 0.5}}
    assert recipe.seed == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("format = 1", "format = 2"), "reads format 1"),
        (("format = 1", ""), "reads format 1"),
        (('kind = "merge"', 'kind = "shell"'), "one of merge, apply"),
        (('method = "svd"', "method = 3"), "expected a str"),
        (("seed = 3", "seed = true"), "expected a int"),
        (("seed = 3", "sed = 3"), "unknown key 'sed'"),
        (("weight = 0.7", 'weight = "much"'), "expected numbers"),
        (("weight = 0.7", "weight = nan"), "not finite"),
        (("weight = 0.7", "wieght = 0.7"), "unknown key 'wieght'"),
        (("weight = 0.7", 'sha256 = "../../etc"'), "64 hexadecimal"),
        (('source = "runs/a"', 'source = ""'), "is empty"),
        (("[[source]]", "[source]"), "expected a list"),
        (("rank = 16", "rank = "), "not TOML"),
    ],
)
def test_a_bad_recipe_is_refused_with_what_was_expected(change, words):
    with pytest.raises(RecipeError, match=words):
        Recipe.parse(GOOD.replace(*change))


def test_a_recipe_without_sources_is_refused():
    with pytest.raises(RecipeError, match="at least one"):
        Recipe("merge", ())


def test_what_toml_cannot_hold_is_not_written():
    with pytest.raises(RecipeError, match="cannot be written"):
        str(Recipe("merge", (RecipeSource("a"),), options={"x": float("inf")}))


def test_reading_recipes_needs_no_torch():
    code = "import sys, texforce_hub.recipe, texforce_hub.cli.merge; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
