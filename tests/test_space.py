import pytest
import torch

from training.space import cross_recall, effective_rank, neighbor_overlap


def test_effective_rank_of_a_line_is_1_and_of_a_ball_its_dimension():
    line = torch.randn(200, 1) * torch.tensor([[1.0, 2.0, 3.0]])
    assert effective_rank(line) == pytest.approx(1.0)
    ball = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0))
    assert effective_rank(ball) == pytest.approx(3.0, abs=0.01)


def test_overlap_is_the_share_of_neighbors_that_two_spaces_agree_on():
    # By angle, in degrees. To item 0 the nearest two are 1 and 2 in one space, 1 and 3 in the other: half of them.
    def at(degrees):
        angle = torch.deg2rad(torch.tensor(degrees))
        return torch.stack([angle.cos(), angle.sin()], dim=1)

    one, other = at([0.0, 10.0, 20.0, 90.0]), at([0.0, 10.0, 90.0, 20.0])
    assert neighbor_overlap(one, other, queries=1, k=2) == 0.5
    assert neighbor_overlap(one, 7 * one, queries=4, k=2) == 1.0  # lengths do not count


def test_a_table_of_three_items_has_two_neighbors_to_agree_on():
    vectors = torch.eye(3)
    assert neighbor_overlap(vectors, vectors, queries=3, k=10) == 1.0


def test_cross_recall_asks_the_old_space_with_new_vectors():
    old = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    assert cross_recall(old, old, 4, 1) == 1.0
    # Mirrored, the first vector lies where the third was, so the third is what it finds there, and not the second; the
    # others likewise. Among themselves they have the neighbors that they had.
    assert cross_recall(old.flip(1), old, 4, 1) == 0.0
    assert neighbor_overlap(old.flip(1), old, 4, 1) == 1.0
