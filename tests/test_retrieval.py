import numpy as np
import pytest
import torch

from training.retrieval import precision_at_k


def test_precision_counts_the_ten_nearest_but_not_the_item_itself():
    # Twelve items on a quarter circle. Item 0's ten nearest are 1..10, and the odd ones share its label: 5 of 10.
    angle = torch.linspace(0, torch.pi / 2, 12)
    vectors = torch.stack([angle.cos(), angle.sin()], dim=1)
    shares = torch.zeros(1, 12, dtype=torch.bool)
    shares[0, 1::2] = True  # 11 too, which is the one that is not near
    shares[0, 0] = True
    assert precision_at_k(vectors[:1] @ vectors.T, np.array([0]), shares).tolist() == pytest.approx([0.5])
