"""An adapter in a notebook and in another process: one line, and the same numbers."""

import pickle

import torch

from texforce_hub import Adapter, LowRank, Vector, read_adapter

NAME = "text_encoder.text_model.encoder.layers.{}.self_attn.q_proj"


def test_an_adapter_is_shown_in_one_line_however_many_layers_it_has():
    layers = {NAME.format(i): LowRank(torch.ones(2 + i % 2, 8), torch.ones(8, 2 + i % 2)) for i in range(1000)}
    assert repr(Adapter(layers)) == "Adapter(family unknown, text_encoder: 1000 layers, ranks 2 to 3)"
    assert repr(read_adapter("shapes-colour")) == "Adapter(shapes, text_encoder: 12 layers, rank 16)"
    assert repr(Adapter({})) == "Adapter(family unknown)"
    assert repr(Adapter({"unet.conv_in.bias": Vector(torch.ones(4))})) == "Adapter(family unknown, unet: 1 layers)"


def test_an_adapter_survives_pickling():
    before = read_adapter("shapes-colour")
    after = pickle.loads(pickle.dumps(before))
    assert after.metadata == before.metadata
    assert after.layers.keys() == before.layers.keys()
    assert all(torch.equal(before.delta(name), after.delta(name)) for name in before.layers)
