"""The trained parameters: what a learner remembers, the learning rate, the layers, an adapter to begin with."""

import pytest
import torch

from tests.support.training import make_policy, run, short_config
from texforce_hub.errors import ConfigError, TrainingError
from texforce_hub.hub.read import read_adapter
from texforce_hub.train.learner import Learner, learning_rate_share
from texforce_hub.train.lora import read_scales
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


def test_a_pattern_gives_the_layers_inside_what_it_names_their_rank_and_alpha():
    policy, parameters = make_policy(
        rank_pattern=("layers.0=2", r".*\.1\..*q_proj=3"), alpha_pattern=("v_proj=5",), disturbed=False
    )
    ranks = {name: len(tensor) for name, tensor in parameters.items() if ".lora_A." in name}
    assert all(rank == 2 for name, rank in ranks.items() if ".layers.0." in name)
    assert all(rank == (3 if "q_proj" in name else 4) for name, rank in ranks.items() if ".layers.1." in name)
    assert {2, 3, 4} == set(ranks.values())
    scales = {name: scale for name, scale in read_scales(policy.encoders).items() if ".layers.2." in name}
    assert all(scale == (5 / 4 if "v_proj" in name else 8 / 4) for name, scale in scales.items())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank_pattern": ("layers.77=8",)}, "'layers.77=8' is of no trained layer; they are such as .*_proj"),
        ({"alpha_pattern": ("fc1=8",)}, "'fc1=8' is of no trained layer"),
        ({"alpha_pattern": ("(=8",)}, "is no regular expression"),
        ({"rank_pattern": ("layers.0=2.5",)}, "expected a whole number for a rank"),
        ({"rank_pattern": ("layers.0=0.5",)}, "expected a whole number for a rank"),
    ],
)
def test_a_pattern_that_no_layer_matches_or_that_cannot_be_read_is_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        make_policy(**settings)
