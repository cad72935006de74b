"""A result carries its recipe, and a plan is what the merge then does."""

import math

import pytest
import torch

from tests.support.merging import Q0, V1, A, C, low, writable, write_files
from texforce_hub.adapter.decomposed import Decomposed
from texforce_hub.adapter.dense import Vector
from texforce_hub.adapter.kronecker import Kronecker
from texforce_hub.adapter.value import Adapter, Layer
from texforce_hub.errors import MergeError, RecipeError, RefError
from texforce_hub.files.container import open_header
from texforce_hub.hub.read import open_adapter, read_adapter
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.hub.write import write_adapter
from texforce_hub.merge.merge import merge_adapters, run_request
from texforce_hub.merge.plan import plan_merge
from texforce_hub.merge.replay import read_recipe, recipe_of, request_of, run_recipe, verify_merge
from texforce_hub.merge.request import MergeRequest
from texforce_hub.recipe import METADATA_KEY, Recipe


@pytest.fixture
def files(tmp_path):
    return write_files(tmp_path)


def test_a_result_carries_its_recipe_and_the_recipe_gives_the_result(files, tmp_path):
    merged = merge_adapters([(files[0], 0.7), (files[1], -0.3)], "dare_ties", space="core", density=0.4, seed=5)
    path = write_adapter(merged.adapter, tmp_path / "merged.safetensors")
    recipe = read_recipe(path)
    assert [source.source for source in recipe.sources] == files
    assert all(len(source.sha256) == 64 for source in recipe.sources)
    assert (recipe.method, recipe.seed, recipe.options["density"]) == ("dare_ties", 5, 0.4)
    again = run_recipe(recipe)
    assert again.adapter.metadata == merged.adapter.metadata
    for name in merged.adapter.layers:
        assert torch.equal(again.adapter.delta(name), merged.adapter.delta(name))
    assert verify_merge(path).same


@pytest.mark.parametrize("options", [{"rank": 3}, {"method": "dare_ties", "space": "core", "seed": 4}])
def test_the_same_recipe_gives_the_same_bytes(files, tmp_path, options):
    merged = merge_adapters([(files[0], 0.7), (files[1], -0.3)], dtype=torch.float16, **options)
    first = write_adapter(merged.adapter, tmp_path / "first.safetensors")
    for number in range(3):
        again = write_adapter(run_recipe(read_recipe(first)).adapter, tmp_path / f"{number}.safetensors")
        assert again.read_bytes() == first.read_bytes()


def test_verify_sees_a_changed_result_a_changed_source_and_a_missing_layer(files, tmp_path):
    merged = merge_adapters([(files[0], 0.7), (files[1], -0.3)]).adapter
    changed = Adapter({**merged.layers, Q0: merged.layers[Q0].scaled(1.01)}, merged.metadata)
    path = write_adapter(changed, tmp_path / "changed.safetensors")
    answer = verify_merge(path)
    assert (answer.same, answer.worst) == (False, Q0)
    assert answer.difference == pytest.approx(0.01, rel=0.01)
    path = write_adapter(Adapter({Q0: merged.layers[Q0]}, merged.metadata), tmp_path / "less.safetensors")
    assert verify_merge(path).missing == (V1,)
    write_adapter(C, files[1], dialect="kohya")
    with pytest.raises(RecipeError, match="it changed"):
        verify_merge(path)


def test_rounding_of_the_files_dtype_is_no_difference(files, tmp_path):
    merged = merge_adapters([(files[0], 0.7), (files[1], -0.3)]).adapter
    for dtype in (torch.float16, torch.bfloat16):
        assert verify_merge(write_adapter(merged, tmp_path / f"{dtype}.safetensors", dtype=dtype)).same


def test_a_recipe_asks_for_what_the_call_asked_for(files):
    asked = MergeRequest(
        [(files[0], 0.7), (files[1], {"text_encoder": -0.3})],
        "ties",
        {"space": "core"},
        rank=3,
        energy=0.9,
        part_weights={"text_encoder": 0.5},
        seed=2,
        dtype=torch.float16,
    )
    read = request_of(recipe_of(run_request(asked).adapter))
    names = ("method", "options", "settings", "limits", "seed", "dtype")
    assert {name: getattr(read, name) for name in names} == {name: getattr(asked, name) for name in names}
    assert [(ref.source, ref.weight, dict(ref.parts)) for ref in read.sources] == [
        (files[0], 0.7, {}),
        (files[1], 1.0, {"text_encoder": -0.3}),
    ]
    assert run_request(read).adapter.metadata == run_request(asked).adapter.metadata


def test_recipes_that_cannot_be_replayed_say_why(files, tmp_path):
    with pytest.raises(RecipeError, match="in memory"):
        run_recipe(recipe_of(merge_adapters([(A, 1.0)]).adapter))
    with pytest.raises(RecipeError, match="carries no recipe"):
        verify_merge(files[0])
    recipe = recipe_of(merge_adapters([(files[0], 1.0)]).adapter)
    text = str(recipe)
    for old, new, words in (
        ('kind = "merge"', 'kind = "apply"', "expected 'merge'"),
        ("seed = 0", 'seed = 0\n[settings]\nrank = "x"\n', "the recipe sets rank"),
        ("seed = 0", 'seed = 0\n[settings]\noutput = "/etc/passwd"\n', "the recipe sets output"),
        ("seed = 0", 'seed = 0\n[options]\ndevice = "cuda"\n', "svd has no option 'device'"),
        (files[0], "/nowhere/x.safetensors", "no file or folder"),
    ):
        with pytest.raises((MergeError, RecipeError, RefError), match=words):
            run_recipe(Recipe.parse(text.replace(old, new, 1)))
    (tmp_path / "r.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="UTF-8"):
        read_recipe(tmp_path / "r.toml")


def test_references_and_stacks_as_text_carry_their_weights(files):
    pairs = merge_adapters([(files[0], 0.7), (files[1], -0.3)], "cat").adapter
    text = merge_adapters(f"{files[0]}:0.7 + {files[1]}:-0.3", "cat").adapter
    refs = merge_adapters([AdapterRef.parse(f"{files[0]}:0.7"), f"{files[1]}:-0.3"], "cat").adapter
    for other in (text, refs):
        assert torch.equal(other.delta(Q0), pairs.delta(Q0))
        assert other.metadata[METADATA_KEY] == pairs.metadata[METADATA_KEY]


@pytest.mark.parametrize(
    ("method", "options"),
    [("svd", {}), ("cat", {}), ("svd", {"rank": 3}), ("ties", {}), ("ties", {"space": "core"}), ("ties", {"rank": 5})],
)
def test_a_plan_is_what_the_merge_then_does(files, tmp_path, method, options):
    own = {name: options[name] for name in options if name == "space"}
    limits = {name: options[name] for name in options if name != "space"}
    plan = plan_merge(MergeRequest(files, method, own, **limits))
    merged = merge_adapters(files, method, **options).adapter
    assert plan.ranks == {name: layer.rank for name, layer in merged.layers.items()}
    path = write_adapter(merged, tmp_path / "m", dialect="kohya")
    tensors = open_header(path).tensors.values()
    assert plan.size == sum(4 * math.prod(info.shape) for info in tensors if math.prod(info.shape) > 1)
    assert [source.file for source in plan.sources] == files


def test_a_plan_is_made_from_headers_alone(files, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("texforce_hub.files.tensors.TensorFile._read_bytes", refuse)
    request = MergeRequest(files, layer_weights={"*.layers.9.*": 1.0})
    with pytest.raises(MergeError, match="covers none"):
        plan_merge(request)
    assert plan_merge(MergeRequest(files)).ranks == {Q0: 4, V1: 4}
    with pytest.raises(AssertionError, match="was read"):
        run_request(MergeRequest(files))
    g = torch.Generator().manual_seed(0)
    kinds: dict[str, Layer] = {
        "text_encoder.a": Kronecker(torch.randn(8, 8, generator=g), torch.randn(12, 12, generator=g)),
        "text_encoder.b": Decomposed(low(1), torch.ones(96)),
        "text_encoder.c.bias": Vector(torch.ones(96)),
    }
    with pytest.raises(MergeError, match="give base="):
        plan_merge(MergeRequest([(Adapter(kinds), 1.0)]))
    base = {"text_encoder.b": torch.ones(96, 96)}
    plan = plan_merge(MergeRequest([(Adapter(kinds), 1.0), (files[0], 0.5)], "cat"), base=base)
    assert plan.ranks == {"text_encoder.a": None, "text_encoder.b": None, "text_encoder.c.bias": None, Q0: 4, V1: 4}
    assert plan.size == 4 * (2 * 96 * 96 + 96 + 2 * 4 * 192)
    assert [source.layers for source in plan.sources] == [3, 2]


@pytest.mark.parametrize("dialect", writable())
def test_an_outline_has_the_adapters_names_shapes_kinds_and_ranks(tmp_path, dialect):
    path = write_adapter(A, tmp_path / dialect, dialect=dialect)
    outline, whole = open_adapter(path, checked=False).outline, read_adapter(path)
    assert dict(outline.metadata) == dict(whole.metadata)
    facts = [
        {
            name: (type(layer), layer.shape, layer.rank, getattr(layer, "scale", None))
            for name, layer in x.layers.items()
        }
        for x in (outline, whole)
    ]
    assert facts[0] == facts[1]
    assert all(layer.delta().device.type == "meta" for layer in outline.layers.values())
