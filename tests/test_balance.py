import math

import pytest
import torch

from training.balance import EVERY, Balance

EMBEDDING = torch.tensor([[3.0, 4.0]])


def losses(embedding: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of length 2 and of length 8, whatever the embedding is."""
    return {"reconstruct": 2 * embedding[0, 0] + 1, "predict": 8 * embedding[0, 1]}


def trained(balance: Balance, steps: int) -> Balance:
    embedding = EMBEDDING.clone().requires_grad_()
    for _ in range(steps):
        balance({name: loss for name, loss in losses(embedding).items() if name in balance.fixed}, embedding)
    return balance


def test_weights_that_are_set_are_kept():
    balance = trained(Balance({"reconstruct": 2.0, "predict": 0.5}, "gradient"), 3)
    assert balance.weights() == {"reconstruct": 2.0, "predict": 0.5}
    assert balance(losses(EMBEDDING), EMBEDDING).item() == 2 * 7 + 0.5 * 32


def test_without_balance_each_has_its_usual_weight():
    balance = Balance({"reconstruct": "auto", "contrast": "auto", "predict": "auto", "co_engage": "auto"}, "none")
    assert balance.weights() == {"reconstruct": 1.0, "contrast": 0.1, "predict": 1.0, "co_engage": 0.1}


def test_one_objective_alone_has_nothing_to_be_balanced_with():
    assert trained(Balance({"reconstruct": "auto"}, "gradient"), 3).weights() == {"reconstruct": 1.0}
    assert not list(Balance({"reconstruct": "auto", "contrast": 0.1}, "uncertainty").parameters())


def test_gradients_are_made_as_long_as_that_of_the_first():
    # 2 : 8, so the second counts a quarter; it is known from the second step on.
    balance = Balance({"reconstruct": "auto", "predict": "auto"}, "gradient")
    embedding = EMBEDDING.clone().requires_grad_()
    assert balance(losses(embedding), embedding).item() == 7 + 32
    assert balance(losses(embedding), embedding).item() == 7 + 32 / 4
    assert balance.weights() == {"reconstruct": 1.0, "predict": 0.25}


def test_lengths_of_gradients_are_remembered_over_looks():
    balance = trained(Balance({"reconstruct": "auto", "predict": "auto"}, "gradient"), EVERY)
    embedding = EMBEDDING.clone().requires_grad_()
    balance({"reconstruct": 2 * embedding[0, 0], "predict": 18 * embedding[0, 1]}, embedding)
    assert balance.weights()["predict"] == pytest.approx(2 / (0.7 * 8 + 0.3 * 18))


def test_evaluation_changes_no_weight():
    balance = Balance({"reconstruct": "auto", "predict": "auto"}, "gradient").eval()
    assert trained(balance, 3).weights() == {"reconstruct": 1.0, "predict": 1.0}


def test_uncertainty_finds_one_over_the_loss():
    # loss e^-s + s is least where e^-s = 1 / loss.
    balance = Balance({"reconstruct": "auto", "predict": "auto"}, "uncertainty")
    optimizer = torch.optim.Adam(balance.parameters(), lr=0.01)
    for _ in range(500):
        optimizer.zero_grad()
        balance(losses(EMBEDDING), EMBEDDING).backward()
        optimizer.step()
    assert balance.weights() == {
        "reconstruct": pytest.approx(1 / 7, rel=1e-3),
        "predict": pytest.approx(1 / 32, rel=1e-3),
    }
    assert balance(losses(EMBEDDING), EMBEDDING).item() == pytest.approx(2 + math.log(7) + math.log(32), rel=1e-4)


def test_epochs_are_compared_by_weights_that_stay():
    balance = trained(Balance({"reconstruct": "auto", "predict": "auto", "contrast": 0.5}, "gradient"), 3)
    assert balance.compared({"reconstruct": 0.6, "predict": 0.4, "contrast": 2.0}) == pytest.approx(0.6 + 0.4 + 1.0)
