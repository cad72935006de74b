import math

import pytest
import torch

from texforce_hub.adapter.dense import Vector
from texforce_hub.adapter.low_rank import LowRank
from texforce_hub.adapter.value import Adapter
from texforce_hub.errors import ConfigError, MergeError
from texforce_hub.generate.images.heatmap import draw_comparison
from texforce_hub.hub.read import read_adapter
from texforce_hub.hub.refs.adapter import AdapterRef
from texforce_hub.merge.compare import compare_adapters

NAME = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def one(up, down, scale=1.0, name=NAME):
    return Adapter({name: LowRank(torch.tensor(down), torch.tensor(up), scale)})


A = one([[1.0], [0.0], [0.0]], [[1.0, 0.0]])
B = one([[0.0], [1.0], [0.0]], [[0.0, 1.0]])
TILTED = one([[1.0], [1.0], [0.0]], [[1.0, 0.0]])


def random(seed, rank=3):
    generator = torch.Generator().manual_seed(seed)
    return Adapter(
        {NAME: LowRank(torch.randn(rank, 9, generator=generator), torch.randn(8, rank, generator=generator))}
    )


def test_an_adapter_against_itself_its_double_and_its_negative():
    adapter = random(0)
    for factor, cosine in ((1.0, 1.0), (2.0, 1.0), (-1.0, -1.0)):
        comparison = compare_adapters(adapter, adapter.scaled(factor)).layers[0]
        assert comparison.cosine == pytest.approx(cosine)
        assert comparison.overlap == pytest.approx(1.0, abs=1e-4)
        assert max(comparison.angles) < 0.2
    assert compare_adapters(adapter, adapter.scaled(-1.0)).interference == pytest.approx(1.0, abs=1e-6)
    assert compare_adapters(adapter, adapter).interference == pytest.approx(1 - math.sqrt(2))


def test_orthogonal_changes_do_not_touch():
    comparison = compare_adapters(A, B).layers[0]
    assert (comparison.cosine, comparison.interference, comparison.overlap) == (0.0, 0.0, 0.0)
    assert comparison.angles == pytest.approx((90.0, 90.0))


def test_a_tilted_change_has_the_angle_it_was_given():
    comparison = compare_adapters(A, TILTED).layers[0]
    assert comparison.angles == pytest.approx((0.0, 45.0), abs=0.05)
    assert comparison.cosine == pytest.approx(math.sqrt(0.5))
    assert comparison.overlap == pytest.approx(0.5)


def test_numbers_are_those_of_the_dense_changes():
    a, b = random(1), random(2, rank=2)
    x, y = a.delta(NAME).double(), b.delta(NAME).double()
    comparison = compare_adapters(a, b)
    layer = comparison.layers[0]
    assert layer.norms == pytest.approx((float(x.norm()), float(y.norm())), rel=1e-5)
    assert layer.cosine == pytest.approx(float((x * y).sum() / x.norm() / y.norm()), abs=1e-6)
    lost = 1 - float((x + y).norm()) / math.hypot(float(x.norm()), float(y.norm()))
    assert layer.interference == pytest.approx(lost, abs=1e-6)
    assert comparison.cosine == pytest.approx(layer.cosine)


def test_layers_of_one_side_are_named_and_vectors_have_a_cosine():
    bias = f"{NAME}.bias"
    a = Adapter({**random(1).layers, bias: Vector(torch.tensor([1.0, 0.0]))})
    b = Adapter({bias: Vector(torch.tensor([1.0, 1.0])), f"{NAME}x": random(1).layers[NAME]})
    comparison = compare_adapters(a, b)
    assert comparison.missing == ((NAME,), (f"{NAME}x",))
    assert comparison.layers[0].cosine == pytest.approx(math.sqrt(0.5))


def test_nothing_in_common_and_other_shapes_are_refused():
    with pytest.raises(MergeError, match="no layer in common"):
        compare_adapters(A, one([[1.0]], [[1.0]], name="unet.a"))
    with pytest.raises(MergeError, match="shapes"):
        compare_adapters(A, random(0))


def test_the_heat_map_is_coloured_by_its_numbers():
    picture = draw_comparison({"a": (1.0, 0.5, -1.0), "b": (1.0, 0.5, -1.0)}, title="t").convert("RGB")
    colours = {picture.getpixel((x, y)) for x in range(0, picture.width, 3) for y in range(0, picture.height, 3)}
    reds = [c for c in colours if isinstance(c, tuple) and c[0] > 90 and c[1] < 40]
    blues = [c for c in colours if isinstance(c, tuple) and c[2] > 90 and c[0] < 40]
    assert reds
    assert blues


def test_references_are_compared_as_the_adapters_that_they_name():
    adapters = [read_adapter("shapes-colour"), read_adapter("shapes-shape")]
    compared = compare_adapters(*adapters)
    assert compare_adapters("shapes-colour", "shapes-shape") == compared
    assert compare_adapters(adapters[0], AdapterRef("shapes-shape")) == compared


def test_the_weight_of_a_reference_is_compared_with():
    half, whole = compare_adapters("shapes-colour:0.5", "shapes-colour:text_encoder=-1").layers[0].norms
    assert half == pytest.approx(whole / 2)
    with pytest.raises(ConfigError, match="its weight changes over the denoising steps"):
        compare_adapters("shapes-colour[0-0.5]", "shapes-shape")
