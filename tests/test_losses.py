import itertools
import math

import pytest
import torch

from training import losses


def test_nominal_is_minus_log_of_the_label_s_share():
    # exp(log 3) : exp(0) = 3 : 1, so the first label has 3/4 and the second 1/4.
    logits = torch.tensor([[math.log(3), 0.0], [math.log(3), 0.0]])
    assert losses.nominal(logits, torch.tensor([0, 1])).tolist() == pytest.approx([math.log(4 / 3), math.log(4)])


def test_multi_adds_up_what_each_label_costs():
    # sigmoid(log 3) = 3/4. There and said with 3/4: log 4/3; not there and said with 3/4: log 4.
    logits = torch.full((1, 2), math.log(3))
    assert losses.multi(logits, torch.tensor([[1.0, 0.0]])).item() == pytest.approx(math.log(4 / 3) + math.log(4))


def test_ordinal_asks_once_per_step_so_that_far_misses_cost_more():
    # Three questions, "above 0?", "above 1?", "above 2?", each answered with 3/4 for yes, yes, no: label 2 is meant.
    logits = torch.tensor([[math.log(3), math.log(3), -math.log(3)]])
    right, wrong = math.log(4 / 3), math.log(4)
    costs = [losses.ordinal(logits, torch.tensor([rank])).item() for rank in range(4)]
    assert costs == pytest.approx([right + 2 * wrong, 2 * right + wrong, 3 * right, 2 * right + wrong])


def test_numeric_is_square_near_and_linear_far():
    # Huber with threshold 1: 0.5 * 0.6^2 = 0.18; 4 - 0.5 = 3.5.
    predicted, value = torch.tensor([[0.0], [0.0]]), torch.tensor([[0.6], [-4.0]])
    assert losses.numeric(predicted, value).tolist() == pytest.approx([0.18, 3.5])


def test_presence_is_binary_cross_entropy():
    logit = torch.tensor([math.log(3), math.log(3)])
    assert losses.presence(logit, torch.tensor([1.0, 0.0])).tolist() == pytest.approx([math.log(4 / 3), math.log(4)])


def sampled(logits: torch.Tensor, truth: torch.Tensor, chance: torch.Tensor, sample: list[int]) -> torch.Tensor:
    item, row = truth.nonzero(as_tuple=True)
    negative, is_positive = logits[:, sample], truth[:, sample].bool()
    return losses.sampled_multi(logits[item, row], item, 1.0, negative, chance[sample], is_positive)


LOGITS = torch.tensor([[0.3, -1.2, 2.0], [0.0, 0.7, -0.4]])
TRUTH = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])


def test_sampled_multi_of_all_labels_is_multi():
    assert torch.allclose(sampled(LOGITS, TRUTH, torch.ones(3), [0, 1, 2]), losses.multi(LOGITS, TRUTH))


def test_sampled_multi_is_multi_on_average_over_the_samples():
    chance = torch.tensor([0.9, 0.5, 0.2])
    mean = torch.zeros(2)
    for drawn in itertools.product([False, True], repeat=3):  # all eight samples, each with its probability
        probability = math.prod(float(c if d else 1 - c) for c, d in zip(chance, drawn, strict=True))
        mean += probability * sampled(LOGITS, TRUTH, chance, [i for i in range(3) if drawn[i]])
    assert torch.allclose(mean, losses.multi(LOGITS, TRUTH), atol=1e-6)


def test_sampled_nominal_of_all_labels_is_nominal():
    label = torch.tensor([2, 0])
    is_positive = torch.nn.functional.one_hot(label, 3).bool()
    loss = losses.sampled_nominal(LOGITS[torch.arange(2), label], LOGITS, torch.ones(3), is_positive)
    assert torch.allclose(loss, losses.nominal(LOGITS, label))


def test_sampled_nominal_lets_each_label_stand_for_those_that_were_not_drawn():
    # One label of logit 0 drawn with chance 1/3 stands for three: 1 / (1 + 3), so log 4.
    loss = losses.sampled_nominal(torch.zeros(1), torch.zeros(1, 1), torch.tensor([1 / 3]), torch.zeros(1, 1).bool())
    assert loss.item() == pytest.approx(math.log(4))


@pytest.mark.parametrize("sample", [1, 3, 5, 50])
def test_inclusion_adds_up_to_the_sample_and_leaves_no_label_out(sample):
    count = torch.tensor([10_000.0, 400.0, 100.0, 9.0, 1.0, 1.0, 0.0, 0.0])
    chance = losses.inclusion(count, sample)
    assert chance.sum().item() == pytest.approx(min(sample, len(count)), rel=1e-4)
    assert chance.min() > 0 and chance.max() <= 1
    assert (chance.diff() <= 1e-6).all()  # a more frequent label is never less likely


def test_info_nce_by_hand():
    # Views a = (1,0), b = (0,1) of two items, the second copies alike. Row 1 sees its partner at cosine 1 and the two
    # others at 0: -log(e / (e + 2)), and so does every row.
    views = torch.eye(2)
    expected = -math.log(math.e / (math.e + 2))
    assert losses.info_nce(views, views, temperature=1.0).tolist() == pytest.approx([expected] * 4)


def test_info_nce_partners_are_rows_of_one_number():
    one, other = torch.eye(3), torch.eye(3)[[1, 2, 0]]
    assert losses.info_nce(one, one, 0.1).mean() < losses.info_nce(one, other, 0.1).mean()
