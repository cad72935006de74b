"""The trained parameters: what a learner remembers, the learning rate, the layers, an adapter to begin with."""

import pytest
import torch

from tests.support.training import run, short_config
from texforce_hub.errors import ConfigError, TrainingError
from texforce_hub.hub.read import read_adapter
from texforce_hub.train.learner import Learner, learning_rate_share
from texforce_hub.train.run_folder import ADAPTER


def test_a_learner_restores_what_it_saw():
    parameters = {"a": torch.nn.Parameter(torch.ones(2, 2))}
    learner = Learner(parameters, short_config("unused"))
    parameters["a"].grad = torch.ones(2, 2)
    learner.optimizer.step()
    learner.finish_step()
    learner.note_validation(0.5)
    state = learner.snapshot()
    parameters["a"].grad = -torch.ones(2, 2)
    learner.optimizer.step()
    learner.finish_step()
    learner.restore(state)
    again = learner.snapshot()
    assert (again.step, again.facts) == (state.step, state.facts)
    assert again.tensors.keys() == state.tensors.keys()
    assert all(torch.equal(again.tensors[n], t) for n, t in state.tensors.items())


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_the_learning_rate_warms_up_and_decays_whatever_the_runs_length(decay):
    config = short_config("unused", steps=10, decay_steps=10, warmup=4, decay=decay)
    shares = [learning_rate_share(config, step) for step in range(20)]
    assert shares[0] == pytest.approx(0.25)
    assert all(0 < share <= 1 for share in shares)
    assert (shares[-1] == 1) == (decay == "constant")
    longer = short_config("unused", steps=20, decay_steps=10, warmup=4, decay=decay)
    assert [learning_rate_share(longer, step) for step in range(20)] == shares  # an extended run does not jump


def test_a_run_goes_on_from_an_adapter(whole, tmp_path):
    start = read_adapter(whole / ADAPTER)
    began = run(tmp_path / "same", init=str(whole), steps=1, learning_rate=1e-12, weight_decay=0.0, rank=6)
    for name in start.layers:
        torch.testing.assert_close(began.delta(name), start.delta(name), rtol=1e-5, atol=1e-7)
    assert began.layers[next(iter(start.layers))].rank == 6  # a lower rank can grow
    with pytest.raises(TrainingError, match=r"rank 4 .*expected at most rank 2 .*--rank 4"):
        run(tmp_path / "small", init=str(whole), rank=2)
    with pytest.raises(TrainingError, match="is not trained here"):
        run(tmp_path / "other", init=str(whole), target="mlp")


def test_the_layers_that_are_trained_and_their_ranks_can_be_chosen(tmp_path):
    patterns = {"rank_pattern": ("layers.0.self_attn.q_proj=2",), "alpha_pattern": ("fc1=3",)}
    adapter = run(tmp_path, target="all", steps=1, **patterns)
    assert len(adapter.layers) == 3 * 6
    ranks = {name: layer.rank for name, layer in adapter.layers.items()}
    assert [name for name, rank in ranks.items() if rank == 2] == [
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    ]
    with pytest.raises(ConfigError, match="expected PATTERN=NUMBER"):
        run(tmp_path / "bad", rank_pattern=("layers.0",))
