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


def test_huber_is_square_near_and_linear_far():
    # Huber with threshold 1: 0.5 * 0.6^2 = 0.18; 4 - 0.5 = 3.5.
    predicted, value = torch.tensor([[0.0], [0.0]]), torch.tensor([[0.6], [-4.0]])
    assert losses.huber(predicted, value).tolist() == pytest.approx([0.18, 3.5])


def test_l2_is_half_the_square_and_l1_the_distance():
    # 0.6^2 / 2 + 4^2 / 2 = 8.18; 0.6 + 4.
    predicted, value = torch.zeros(1, 2), torch.tensor([[0.6, -4.0]])
    assert losses.l2(predicted, value).item() == pytest.approx(8.18)
    assert losses.l1(predicted, value).item() == pytest.approx(4.6)


def test_hinge_is_what_the_right_class_lacks_of_a_lead_of_one():
    # Leads by 2; leads by 0.25; is behind the best other, the third, by 3.
    logits = torch.tensor([[3.0, 1.0, 0.0], [1.0, 0.75, 0.0], [0.0, 1.0, 3.0]])
    assert losses.hinge(logits, torch.tensor([0, 0, 0])).tolist() == pytest.approx([0.0, 0.75, 4.0])


def test_gaussian_kl_is_nothing_for_the_prior_and_half_the_square_of_a_shifted_mean():
    # Of variance 1/4 around 0: (1/4 - 1 + log 4) / 2 = 0.3181.
    mean, log_variance = torch.tensor([[0.0], [3.0], [0.0]]), torch.tensor([[0.0], [0.0], [-math.log(4)]])
    assert losses.gaussian_kl(mean, log_variance).tolist() == pytest.approx([0.0, 4.5, 0.31815], abs=1e-5)


EAST, NORTH = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
NO_CLASH = torch.zeros(2, 2, dtype=torch.bool)


def softmax_of_pairs(clash=NO_CLASH, share=(0.5, 0.5), correction=0.0, temperature=1.0):
    """Two pairs, each of equal vectors, the pairs at a right angle."""
    pairs = torch.stack([EAST, NORTH])
    return losses.in_batch_softmax(pairs, pairs, clash, torch.tensor(share).log(), temperature, correction).tolist()


def test_in_batch_softmax_finds_the_own_positive_among_those_of_the_others():
    # Cosine 1 against cosine 0: e / (e + 1); at temperature 1/2 e^2 / (e^2 + 1).
    assert softmax_of_pairs() == pytest.approx([math.log(1 + math.exp(-1))] * 2)
    assert softmax_of_pairs(temperature=0.5) == pytest.approx([math.log(1 + math.exp(-2))] * 2)


def test_popularity_correction_takes_out_how_often_an_item_is_drawn():
    # Drawn with 3/4 and 1/4, logits less log q are e * 4/3 : 4 for the first and 4/3 : e * 4 for the second.
    first, second = math.log(1 + 3 / math.e), math.log(1 + 1 / (3 * math.e))
    assert softmax_of_pairs(share=(0.75, 0.25), correction=1.0) == pytest.approx([first, second])
    assert softmax_of_pairs(share=(0.75, 0.25), correction=0.0) == softmax_of_pairs()
    half = math.log(1 + math.sqrt(3) / math.e)
    assert softmax_of_pairs(share=(0.75, 0.25), correction=0.5)[0] == pytest.approx(half)


def test_a_candidate_that_is_the_positive_once_more_is_no_negative():
    # Nothing is left to be told apart from; and that the diagonal clashes too must not matter.
    assert softmax_of_pairs(clash=torch.ones(2, 2, dtype=torch.bool)) == pytest.approx([0.0, 0.0])


def test_more_candidates_than_anchors_are_more_negatives():
    # A third candidate, as far away as the second: e / (e + 2).
    three = torch.eye(3)
    loss = losses.in_batch_softmax(three[:2], three, torch.zeros(2, 3, dtype=torch.bool), torch.zeros(3), 1.0, 1.0)
    assert loss.tolist() == pytest.approx([math.log(1 + 2 / math.e)] * 2)


def test_hard_negatives_are_those_that_score_highest():
    # Cosines 1 to the own one, .8 and 0 to the others: of these one is kept, e^1 against e^.8. The second anchor has
    # cosines .8, 1 and .6.
    three = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
    loss = losses.in_batch_softmax(
        three[:2], three, torch.zeros(2, 3, dtype=torch.bool), torch.zeros(3), 1.0, 1.0, hard=1
    )
    assert loss.tolist() == pytest.approx([math.log(1 + math.exp(-0.2))] * 2)
    nobody = torch.zeros(2, 3, dtype=torch.bool)
    all_of_them, none_left_out = (
        losses.in_batch_softmax(three[:2], three, nobody, torch.zeros(3), 1.0, 1.0, hard=hard) for hard in (0, 2)
    )
    assert torch.equal(all_of_them, none_left_out)


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
