import math

import pytest
import torch

from training.config import OptimizerConfig
from training.optimize import Optimization


def optimization(epochs: int = 10, steps: int = 10, sparse: bool = False, **settings) -> Optimization:
    layer, table = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3, 2))
    return Optimization([layer], [table], OptimizerConfig(**settings), epochs, steps, sparse)


def step(optimization: Optimization) -> None:
    for parameter in (p for o in optimization.optimizers for group in o.param_groups for p in group["params"]):
        parameter.grad = torch.ones_like(parameter)
        if isinstance(parameter, torch.nn.Parameter) and parameter.dim() == 2 and optimization.sparse:
            parameter.grad = parameter.grad.to_sparse(1)
    optimization.step()


def rates(optimization: Optimization, losses: list[float], steps: int = 10) -> list[float]:
    """The layers' rate at each step, over as many epochs as there are losses."""
    seen = []
    for loss in losses:
        for _ in range(steps):
            seen.append(optimization.rate)
            step(optimization)
        optimization.epoch_ended(loss)
    return seen


def test_steps_are_shorter_where_likes_have_weighted_the_columns_unless_their_length_is_set():
    assert OptimizerConfig().rates(weighted=False) == (0.004, 0.02)
    assert OptimizerConfig().rates(weighted=True) == (0.00025, 0.00025)
    assert OptimizerConfig(learning_rate=0.1).rates(weighted=True) == (0.1, 0.00025)
    layer, table = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(3, 2))
    made = Optimization([layer], [table], OptimizerConfig(schedule="constant", warmup=0), 1, 1, False, weighted=True)
    assert [o.param_groups[0]["lr"] for o in made.optimizers] == [0.00025, 0.00025]


def test_cosine_rises_and_falls_to_nothing():
    seen = rates(optimization(learning_rate=1.0, warmup=0.05), [0.0] * 10)
    # 5 of 100 steps rise, so that the first is a sixth; at half of the steps a cosine is at a half.
    assert seen[0] == pytest.approx(1 / 6) and seen[50] == pytest.approx(0.5)
    top = seen.index(max(seen))
    assert top == 5 and seen[:6] == sorted(seen[:6]) and seen[5:] == sorted(seen[5:], reverse=True)
    assert seen[-1] == pytest.approx(0.5 * (1 + math.cos(0.99 * math.pi)))


def test_constant_stays_after_its_rise():
    seen = rates(optimization(schedule="constant", learning_rate=1.0, warmup=0.1), [0.0] * 10)
    assert seen[0] == pytest.approx(1 / 11) and seen[10:] == [1.0] * 90


def test_step_falls_by_the_factor_at_every_third_epoch():
    seen = rates(optimization(schedule="step", learning_rate=1.0, warmup=0, factor=0.5, every=3), [0.0] * 10)
    assert seen[::10] == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.125]


def test_one_cycle_is_highest_after_three_tenths_and_ends_lower_than_it_began():
    seen = rates(optimization(schedule="one_cycle", learning_rate=1.0), [0.0] * 10)
    assert seen[0] == pytest.approx(1 / 25) and max(seen) == pytest.approx(1.0)
    assert seen.index(max(seen)) == 29 and seen[-1] < seen[0] / 1000


def test_plateau_falls_after_two_epochs_that_gain_nothing():
    plateau = optimization(schedule="plateau", learning_rate=1.0, warmup=0, factor=0.1, every=2)
    seen = rates(plateau, [5.0, 4.0, 4.0, 4.0, 3.0, 3.0, 3.0, 3.0])
    assert seen[::10] == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01])


def test_plateau_rises_first_like_the_others():
    plateau = optimization(schedule="plateau", learning_rate=1.0, warmup=0.1)
    assert rates(plateau, [1.0, 0.5])[:12] == pytest.approx([*(k / 11 for k in range(1, 11)), 1.0, 1.0])


@pytest.mark.parametrize("schedule", ["cosine", "constant", "one_cycle", "step", "plateau"])
@pytest.mark.parametrize("method", ["adamw", "adam", "sgd"])
@pytest.mark.parametrize("sparse", [False, True])
def test_every_method_goes_on_from_its_state_with_every_schedule(schedule, method, sparse, tmp_path):
    settings = {"schedule": schedule, "method": method, "every": 1, "sparse": sparse}
    whole, first, second = (optimization(**settings) for _ in range(3))
    losses = [3.0, 3.0, 2.0, 2.0, 2.0]
    every = rates(whole, losses)
    assert rates(first, losses[:2]) == every[:20]
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert rates(second, losses[2:]) == every[20:]


def test_sgd_by_hand():
    # The gradient (1, 1) is cut to length 1: (0.7071, 0.7071). The rate is 0.1; by momentum 0.5 the second step is 1.5.
    sgd = optimization(method="sgd", schedule="constant", warmup=0, learning_rate=0.1, momentum=0.5, weight_decay=0)
    layer = sgd.optimizers[0].param_groups[0]["params"][0]
    step(sgd)
    assert layer.tolist() == pytest.approx([1 - 0.1 * 0.70711] * 2, abs=1e-5)
    step(sgd)
    assert layer.tolist() == pytest.approx([1 - 0.1 * 2.5 * 0.70711] * 2, abs=1e-5)


def test_rows_without_a_gradient_stay_where_they_are_when_gradients_are_sparse():
    adam = optimization(sparse=True)
    table = adam.optimizers[1].param_groups[0]["params"][0]
    adam.optimizers[0].param_groups[0]["params"][0].grad = torch.ones(2)
    table.grad = torch.sparse_coo_tensor([[1]], [[1.0, 1.0]], (3, 2), check_invariants=True)
    adam.step()
    assert table[[0, 2]].tolist() == [[1.0, 1.0]] * 2 and (table[1] < 1).all()
