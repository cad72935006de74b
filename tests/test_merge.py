import copy
import json
import logging
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests import reference
from texforce_hub.adapter import Adapter, Decomposed, Dense, Hadamard, Kronecker, Layer, LowRank, Vector
from texforce_hub.apply import apply_adapter
from texforce_hub.cli import app, merge_methods
from texforce_hub.cli.merge_methods import METHODS as LISTED
from texforce_hub.dialects import DIALECTS
from texforce_hub.errors import MergeError, RecipeError, RefError
from texforce_hub.header import read_header
from texforce_hub.merge import merge_adapters
from texforce_hub.merge.plan import plan_merge
from texforce_hub.merge.replay import read_recipe, recipe_of, run_recipe, verify_merge
from texforce_hub.methods import METHODS
from texforce_hub.methods.listing import LAWS, render_markdown, render_module
from texforce_hub.recipe import METADATA_KEY, Recipe
from texforce_hub.refs import AdapterRef
from texforce_hub.shapes.models import make_text_encoder, make_tokenizer
from texforce_hub.sources import read_adapter, read_outline, write_adapter

ENCODER = "text_encoder.text_model.encoder.layers"
Q0, V1 = f"{ENCODER}.0.self_attn.q_proj", f"{ENCODER}.1.self_attn.v_proj"


def low(seed, rank=4, size=96, scale=0.01):
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, size, generator=generator), torch.randn(size, rank, generator=generator), scale)


def adapter(seed, rank=4, names=(Q0, V1), **metadata):
    return Adapter({name: low(seed + i, rank) for i, name in enumerate(names)}, metadata)


A, B, C = adapter(1), adapter(10, rank=2), adapter(20, rank=3)


def distance(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def test_svd_without_limits_takes_the_largest_rank_and_says_what_it_kept():
    merged = merge_adapters([(A, 0.7), (B, -0.3), (C, 0.5)])
    for fact in merged.report.layers:
        wanted = reference.total([x.delta(fact.name).double() for x in (A, B, C)], [0.7, -0.3, 0.5])
        best = reference.truncated(wanted, 4)
        assert fact.rank == 4
        assert fact.sources == (4, 2, 3)
        assert fact.norm == pytest.approx(float(wanted.norm()), rel=1e-6)
        assert fact.kept == pytest.approx(float((best.norm() / wanted.norm()) ** 2), abs=1e-6)
        assert distance(merged.adapter.delta(fact.name), best) < 1e-5
    assert merged.report.kept == pytest.approx(
        sum(f.kept * f.norm**2 for f in merged.report.layers) / merged.report.norm**2
    )


def test_cat_is_exact_and_missing_layers_count_as_zero():
    other = adapter(5, names=(V1, f"{ENCODER}.2.mlp.fc1"))
    merged = merge_adapters([(A, 1.0), (other, 2.0)], "cat")
    assert list(merged.adapter.layers) == [Q0, V1, f"{ENCODER}.2.mlp.fc1"]
    assert distance(merged.adapter.delta(Q0), A.delta(Q0)) < 1e-6
    assert distance(merged.adapter.delta(V1), A.delta(V1) + 2 * other.delta(V1)) < 1e-6
    assert [fact.sources for fact in merged.report.layers] == [(4, 0), (4, 4), (0, 4)]


def test_cosines_are_those_of_the_whole_adapters():
    merged = merge_adapters([(A, 1.0), (B, 1.0)])
    flat = [torch.cat([x.delta(name).flatten() for name in (Q0, V1)]).double() for x in (A, B)]
    wanted = float(flat[0] @ flat[1] / flat[0].norm() / flat[1].norm())
    assert merged.report.cosines[0][1] == pytest.approx(wanted, abs=1e-6)
    assert merged.report.cosines[1][1] == pytest.approx(1.0)


def test_layers_that_cancel_are_removed_and_named():
    other = Adapter({Q0: A.layers[Q0], V1: low(99)})
    merged = merge_adapters([(A, 0.7), (other, -0.7)])
    assert merged.report.removed == (Q0,)
    assert list(merged.adapter.layers) == [V1]
    assert any("cancelled" in warning for warning in merged.report.warnings)


@pytest.mark.parametrize("method", ["cat", "svd", "model_stock", "prune", "iso_c"])
def test_merging_a_source_with_its_negative_leaves_no_layer(method):
    merged = merge_adapters([(A, 1.3), (A, -1.3)], method)
    assert not merged.adapter.layers
    assert set(merged.report.removed) == {Q0, V1}


def test_subtracting_a_source_from_its_sum_leaves_the_other():
    total = merge_adapters([(A, 1.0), (B, 0.5)], "cat").adapter
    left = merge_adapters([(total, 1.0), (B, 0.5)], "subtract", rank=4).adapter
    assert distance(left.delta(Q0), A.delta(Q0)) < 1e-5
    assert not merge_adapters([(A, 1.0), (A, 1.0)], "subtract").adapter.layers


@pytest.mark.parametrize("method", METHODS)
def test_every_method_merges_adapters_and_reports_them(method):
    count = METHODS[method].most or 3
    report = merge_adapters([(x, 0.5) for x in (A, B, C)[:count]], method).report
    assert json.loads(json.dumps(report.as_dict()))["method"] == method
    assert len(report.rows()) == len(report.layers) <= 2
    assert set(report.removed) | {fact.name for fact in report.layers} == {Q0, V1}


def test_a_dense_method_keeps_all_or_truncates_and_says_so():
    dense = merge_adapters([(A, 1.0), (B, 1.0)], "ties")
    assert isinstance(dense.adapter.layers[Q0], Dense)
    assert dense.report.kept == 1.0
    shrunk = merge_adapters([(A, 1.0), (B, 1.0)], "ties", rank=4)
    wanted = reference.ties([x.delta(Q0).double() for x in (A, B)], [1.0, 1.0])
    assert distance(dense.adapter.delta(Q0), wanted) < 1e-6
    assert distance(shrunk.adapter.delta(Q0), reference.truncated(wanted, 4)) < 1e-4
    assert shrunk.report.layers[0].kept == pytest.approx(
        float((reference.truncated(wanted, 4).norm() / wanted.norm()) ** 2), abs=1e-4
    )


def test_a_trim_over_the_whole_adapter_lets_a_strong_layer_keep_more():
    strong = Adapter({Q0: low(1, scale=1.0), V1: low(2, scale=1e-14)})
    merged = merge_adapters([(strong, 1.0)], "prune", density=0.5, trim="adapter")
    assert distance(merged.adapter.delta(Q0), strong.delta(Q0)) < 1e-6
    assert merged.report.removed == (V1,)


def test_budgets_and_energies_hold_over_all_layers():
    merged = merge_adapters([(A, 1.0), (B, 1.0)], max_total_rank=5)
    assert sum(fact.rank or 0 for fact in merged.report.layers) == 5
    merged = merge_adapters([(A, 1.0), (B, 1.0)], energy=0.9)
    assert all(fact.kept >= 0.9 for fact in merged.report.layers)
    merged = merge_adapters([(A, 1.0), (B, 1.0)], "ties", max_total_rank=5)
    assert sum(fact.rank or 0 for fact in merged.report.layers) == 5


def test_kinds_mix_exactly():
    g = torch.Generator().manual_seed(3)
    up1, down1, up2, down2 = (torch.randn(s, generator=g) for s in ((96, 2), (2, 96), (96, 2), (2, 96)))
    kinds: dict[str, Layer] = {
        "hadamard": Hadamard(up1, down1, up2, down2, 0.1),
        "kronecker": Kronecker(torch.randn(8, 8, generator=g), torch.randn(12, 12, generator=g)),
        "dense": Dense(torch.randn(96, 96, generator=g)),
    }
    for layer in kinds.values():
        merged = merge_adapters([(Adapter({Q0: layer}), 0.5), (A, 1.0)], "cat").adapter
        assert distance(merged.delta(Q0), 0.5 * layer.delta() + A.delta(Q0)) < 1e-5
    bias = Adapter({f"{Q0}.bias": Vector(torch.ones(96))})
    assert float(merge_adapters([(bias, 0.5), (bias, 0.25)]).adapter.delta(f"{Q0}.bias")[0]) == 0.75


def test_dora_needs_the_base_as_a_mapping_or_a_model():
    dora = Adapter({Q0: Decomposed(low(1), torch.ones(96))})
    with pytest.raises(MergeError, match=r"adapter: .*give base="):
        merge_adapters([(dora, 1.0)])
    encoder = make_text_encoder(make_tokenizer())
    weight = next(p for n, p in encoder.named_parameters() if n.endswith("layers.0.self_attn.q_proj.weight")).detach()
    for base in ({f"{Q0}.weight": weight}, encoder):
        merged = merge_adapters([(dora, 0.5)], "cat", base=base).adapter
        assert distance(merged.delta(Q0), 0.5 * dora.delta(Q0, weight)) < 1e-6
    with pytest.raises(MergeError, match="no weight for"):
        merge_adapters([(dora, 1.0)], base={"unet.a": weight})


def test_weights_by_part_block_and_pattern_multiply():
    merged = merge_adapters(
        [(A, {f"{ENCODER}.0": 2.0, "text_encoder": 1.0})],
        "cat",
        part_weights={"text_encoder": 0.5},
        layer_weights={"*.v_proj": 3.0},
    ).adapter
    assert distance(merged.delta(Q0), 1.0 * A.delta(Q0)) < 1e-6
    assert distance(merged.delta(V1), 1.5 * A.delta(V1)) < 1e-6


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        ([], {}, "expected a list"),
        ([(A,)], {}, "source of 1 entries"),
        ([(A, 1.0, 2.0)], {}, "source of 3 entries"),
        ([(A, float("nan"))], {}, "finite number"),
        ([(A, "much")], {}, "expected"),
        ([(A, 1.0), (Adapter({Q0: low(1, size=64)}), 1.0)], {}, "expected adapters of one family"),
        ([(A, 1.0)], {"method": "cat", "rank": 3}, "take 'svd'"),
        ([(A, 1.0)], {"method": "linear"}, "product of averages"),
        ([(A, 1.0)], {"method": "tyes"}, "did you mean 'ties'"),
        ([(A, 1.0)], {"density": 0.5}, "svd has no option 'density'"),
        ([(A, 1.0)], {"part_weights": {"unet": 1.0}}, "covers none"),
        ([(A, 1.0)], {"layer_weights": {"*.layers.9.*": 1.0}}, "covers none"),
        ([(A, 1.0)], {"rank": 0}, "at least 1"),
        ([(A, 1.0), (B, 1.0), (C, 1.0)], {"method": "slerp"}, "at most 2"),
    ],
)
def test_what_cannot_be_merged_is_refused_in_one_line(arguments, options, words):
    with pytest.raises(MergeError, match=words) as caught:
        merge_adapters(arguments, **options)
    assert "\n" not in str(caught.value)


def test_different_families_are_refused_by_name():
    one, other = (adapter(1, **{"texforce_hub.family": family}) for family in ("sd1", "sd2"))
    with pytest.raises(MergeError, match=r"was made for sd1, .* for sd2"):
        merge_adapters([(one, 1.0), (other, 1.0)])


def test_sources_are_not_changed():
    before = {name: layer.delta().clone() for name, layer in A.layers.items()}
    merge_adapters([(A, 1.0), (B, 1.0)], "ties")
    assert all(torch.equal(A.delta(name), delta) for name, delta in before.items())


def writable():
    return [name for name, dialect in DIALECTS.items() if dialect.write_name is not None]


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return make_text_encoder(make_tokenizer())


def outputs(model):
    with torch.no_grad():
        return model(torch.arange(12)[None]).last_hidden_state


@pytest.mark.parametrize("reader", writable())
def test_merged_file_attached_stack_and_fused_stack_are_one(encoder, tmp_path, reader):
    paths = [write_adapter(x, tmp_path / f"{i}", dialect=reader) for i, x in enumerate((A, B, C))]
    stack = [(str(path), weight) for path, weight in zip(paths, (0.7, -0.3, 0.5))]
    merged = merge_adapters(stack, "cat").adapter
    results = {}
    for mode in ("attach", "fuse"):
        model = copy.deepcopy(encoder)
        with apply_adapter(model, stack, mode=mode):
            results[mode] = outputs(model)
    for writer in writable():
        path = write_adapter(merged, tmp_path / f"merged-{writer}", dialect=writer)
        model = copy.deepcopy(encoder)
        with apply_adapter(model, str(path)):
            results[writer] = outputs(model)
    assert distance(results["attach"], outputs(encoder)) > 1e-3
    for name, result in results.items():
        assert distance(result, results["attach"]) < 1e-5, name


@pytest.fixture
def files(tmp_path):
    return [
        str(write_adapter(x, tmp_path / f"{n}.safetensors", dialect=d))
        for n, x, d in (("a", A, "diffusers"), ("b", B, "kohya"))
    ]


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
        ("seed = 0", 'seed = 0\n[options]\ndevice = "cuda"\n', "among its options"),
        (files[0], "/nowhere/x.safetensors", "no file or folder"),
    ):
        with pytest.raises((RecipeError, RefError), match=words):
            run_recipe(Recipe.parse(text.replace(old, new, 1)))
    (tmp_path / "r.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="cannot be read"):
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
    plan = plan_merge(files, method, **options)
    merged = merge_adapters(files, method, **options).adapter
    assert plan.ranks == {name: layer.rank for name, layer in merged.layers.items()}
    path = write_adapter(merged, tmp_path / "m", dialect="kohya")
    tensors = read_header(path).tensors.values()
    assert plan.size == sum(4 * math.prod(info.shape) for info in tensors if math.prod(info.shape) > 1)
    assert [source.file for source in plan.sources] == files


def test_a_plan_is_made_from_headers_alone(files, tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("texforce_hub.files._read_safetensors", refuse)
    for reader in (merge_adapters, plan_merge):
        with pytest.raises(AssertionError if reader is merge_adapters else MergeError, match=r"was read|covers none"):
            reader(files, layer_weights={"*.layers.9.*": 1.0})
    g = torch.Generator().manual_seed(0)
    kinds: dict[str, Layer] = {
        "text_encoder.a": Kronecker(torch.randn(8, 8, generator=g), torch.randn(12, 12, generator=g)),
        "text_encoder.b": Decomposed(low(1), torch.ones(96)),
        "text_encoder.c.bias": Vector(torch.ones(96)),
    }
    with pytest.raises(MergeError, match="give base="):
        plan_merge([(Adapter(kinds), 1.0)])
    base = {"text_encoder.b": torch.ones(96, 96)}
    plan = plan_merge([(Adapter(kinds), 1.0), (files[0], 0.5)], "cat", base=base)
    assert plan.ranks == {"text_encoder.a": None, "text_encoder.b": None, "text_encoder.c.bias": None, Q0: 4, V1: 4}
    assert plan.size == 4 * (2 * 96 * 96 + 96 + 2 * 4 * 192)
    assert [source.layers for source in plan.sources] == [3, 2]


@pytest.mark.parametrize("dialect", writable())
def test_an_outline_has_the_adapters_names_shapes_kinds_and_ranks(tmp_path, dialect):
    path = write_adapter(A, tmp_path / dialect, dialect=dialect)
    outline, whole = read_outline(path), read_adapter(path)
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


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_commands_merge_verify_resize_compare_and_refuse(files, tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    out = tmp_path / "m.safetensors"
    done = run("merge", f"{files[0]}:0.7", f"{files[1]}:-0.3", "--rank", 4, "--output", out, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["layers"][0]["rank"] == 4
    assert "kept" in run("merge", files[0], "--output", tmp_path / "n.safetensors").stdout
    assert run("verify", out).exit_code == 0
    again = tmp_path / "again.safetensors"
    assert run("merge", "--recipe", out, "--output", again).exit_code == 0
    assert torch.equal(read_adapter(again).delta(Q0), read_adapter(out).delta(Q0))
    plan = run("merge", *files, "--dry-run", "--json", "--output", tmp_path / "no.safetensors")
    assert json.loads(plan.stdout)["ranks"][Q0] == 4
    assert not (tmp_path / "no.safetensors").exists()
    small = run("resize", out, "--rank", 1, "--output", tmp_path / "s.safetensors", "--json")
    assert json.loads(small.stdout)["layers"][0]["after"] == 1
    picture = tmp_path / "h.png"
    alike = run("compare", files[0], out, "--json", "--output", picture)
    assert json.loads(alike.stdout)["cosine"] > 0.5
    assert picture.read_bytes().startswith(b"\x89PNG")
    for arguments in (
        ("merge", *files, "--output", out, "--method", "linear"),
        ("merge", *files),
        ("merge", *files, "--output", files[1]),
        ("merge", "--recipe", out, "--output", files[0]),
        ("merge", "--output", out),
        ("merge", *files, "--recipe", out, "--output", out),
        ("merge", "--recipe", out, "--rank", 2, "--output", again),
        ("merge", *files, "--option", "density", "--method", "ties", "--output", out),
    ):
        assert isinstance(run(*arguments).exception, (MergeError, RecipeError)), arguments


def test_verify_exits_with_one_when_the_answer_is_no(files, tmp_path):
    merged = merge_adapters([(files[0], 1.0)]).adapter
    path = write_adapter(Adapter(merged.scaled(1.5).layers, merged.metadata), tmp_path / "x.safetensors")
    done = run("verify", path)
    assert done.exit_code == 1
    assert "DIFFERS" in done.stdout


def test_the_table_behind_help_is_the_registry_written_down(tmp_path):
    written = Path(str(merge_methods.__file__)).read_text("utf-8")
    assert written == render_module(), "run python -m texforce_hub.methods.listing > texforce_hub/cli/merge_methods.py"
    assert list(LISTED) == list(METHODS)
    assert all(set(LISTED[name][1]) == set(method.options) for name, method in METHODS.items())
    listed = json.loads(run("merge", "--list-methods", "--json").stdout)
    assert set(listed) == set(METHODS)


def test_the_markdown_table_shows_every_method_and_its_laws():
    rows = render_markdown().splitlines()
    assert len(rows) == 2 + len(METHODS)
    for row, method in zip(rows[2:], METHODS.values()):
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[0] == f"`{method.name}`"
        assert {law for law, cell in zip(LAWS, cells[2:]) if cell == "✓"} == method.laws
