"""An adapter in a notebook and in another process: one line, and the same numbers."""

import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

from texforce_hub import Adapter, LowRank, Vector, read_adapter

NAME = "text_encoder.text_model.encoder.layers.{}.self_attn.q_proj"


def test_an_adapter_is_shown_in_one_line_however_many_layers_it_has():
    layers = {NAME.format(i): LowRank(torch.ones(2 + i % 2, 8), torch.ones(8, 2 + i % 2)) for i in range(1000)}
    assert repr(Adapter(layers)) == "Adapter(family unknown, text_encoder: 1000 layers, ranks 2 to 3, 160.0 kB)"
    assert repr(read_adapter("shapes-colour")) == "Adapter(shapes, text_encoder: 12 layers, rank 16, 147.5 kB)"
    assert repr(Adapter({})) == "Adapter(family unknown, 0 bytes)"
    assert (
        repr(Adapter({"unet.conv_in.bias": Vector(torch.ones(4))}))
        == "Adapter(family unknown, unet: 1 layers, 16 bytes)"
    )


def test_an_adapter_survives_pickling():
    before = read_adapter("shapes-colour")
    after = pickle.loads(pickle.dumps(before))
    assert after.metadata == before.metadata
    assert after.layers.keys() == before.layers.keys()
    assert all(torch.equal(before.delta(name), after.delta(name)) for name in before.layers)


def layer(seed=0, kind=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(2, 8, generator=generator).to(kind), torch.randn(8, 2, generator=generator).to(kind))


def test_two_reads_of_one_file_are_equal():
    first, second = read_adapter("shapes-colour"), read_adapter("shapes-colour")
    assert first is not second
    assert first == second
    assert hash(first) == hash(second)
    assert len({first, second}) == 1
    assert first != read_adapter("shapes-shape")


def test_adapters_that_differ_anywhere_are_not_equal():
    adapter = Adapter({NAME.format(0): layer()}, {"a": "b"}, {"token": torch.ones(3)})
    assert adapter == Adapter({NAME.format(0): layer()}, {"a": "b"}, {"token": torch.ones(3)})
    others = [
        Adapter({NAME.format(1): layer()}, {"a": "b"}, {"token": torch.ones(3)}),
        Adapter({NAME.format(0): layer(seed=1)}, {"a": "b"}, {"token": torch.ones(3)}),
        Adapter({NAME.format(0): layer(kind=torch.float64)}, {"a": "b"}, {"token": torch.ones(3)}),
        Adapter({NAME.format(0): layer().scaled(2.0)}, {"a": "b"}, {"token": torch.ones(3)}),
        Adapter({NAME.format(0): layer()}, {"a": "c"}, {"token": torch.ones(3)}),
        Adapter({NAME.format(0): layer()}, {"a": "b"}, {"token": torch.zeros(3)}),
        Adapter({NAME.format(0): layer()}, {"a": "b"}),
    ]
    assert not any(adapter == other for other in others)
    assert adapter != "adapter"


def test_equality_is_of_bits():
    zero, minus, nan = (Adapter({"unet.a.bias": Vector(torch.tensor([x]))}) for x in (0.0, -0.0, float("nan")))
    assert zero != minus
    assert nan == Adapter({"unet.a.bias": Vector(torch.tensor([float("nan")]))})


def test_numbers_are_compared_only_where_names_and_shapes_agree(monkeypatch):
    compared = []
    monkeypatch.setattr("texforce_hub.adapter.value.same", lambda *pair: compared.append(pair))
    assert Adapter({NAME.format(0): layer()}) != Adapter({NAME.format(1): layer()})
    assert compared == []


def test_a_spawned_process_gets_the_same_adapter():
    adapter = Adapter({NAME.format(0): layer()}, {"a": "b"})
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(Adapter.scaled, adapter, 1.0).result() == adapter
