"""The losses of the feature kinds and of the objectives, as plain functions. All give one number per item.

n items, K labels or rows of a column, m positives, S sampled rows, d numbers in an embedding.
"""

import torch
from torch import Tensor
from torch.nn import functional


def nominal(logits: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy. (n, K), (n,) -> (n,)

    >>> nominal(torch.zeros(1, 4), torch.tensor([2]))    # four labels, no opinion: log 4
    tensor([1.3863])
    """
    return functional.cross_entropy(logits, label, reduction="none")


def multi(logits: Tensor, truth: Tensor) -> Tensor:
    """Binary cross-entropy summed over the labels. (n, K), (n, K) of 0 and 1 -> (n,)

    >>> multi(torch.zeros(1, 3), torch.tensor([[1.0, 0.0, 1.0]]))    # 3 log 2
    tensor([2.0794])
    """
    return functional.binary_cross_entropy_with_logits(logits, truth, reduction="none").sum(1)


def ordinal(logits: Tensor, rank: Tensor) -> Tensor:
    """Cumulative link: binary cross-entropy on the K - 1 questions "is it above label j?". (n, K - 1), (n,) of 0..K-1
    -> (n,)

    A guess one step off fails one question and a guess far off fails many, so near misses cost less:

    >>> sure = torch.tensor([[9.0, 9.0, -9.0]])    # surely label 2 of 0..3
    >>> [round(float(ordinal(sure, torch.tensor([r]))), 2) for r in (2, 1, 0)]
    [0.0, 9.0, 18.0]
    """
    above = (rank[:, None] > torch.arange(logits.shape[1], device=logits.device)).to(logits.dtype)
    return functional.binary_cross_entropy_with_logits(logits, above, reduction="none").sum(1)


def huber(predicted: Tensor, value: Tensor) -> Tensor:
    """Square near and linear beyond 1, on standardised values, summed over a column's floats. (n, w), (n, w) -> (n,)

    >>> huber(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.5, 3.0]]))    # 0.5^2 / 2 + (3 - 1/2)
    tensor([2.6250])
    """
    return functional.huber_loss(predicted, value, reduction="none").sum(1)


def best_huber_constant(values: Tensor) -> float:
    """The constant with the least Huber loss (threshold 1): iterated weighted means.

    >>> best_huber_constant(torch.tensor([0.0, 0.0, 0.0, 100.0]))    # 3c = 1, where the outlier pulls with force 1
    0.333...
    """
    if len(values) == 0:
        return 0.0
    constant = values.median()
    for _ in range(50):
        weight = 1 / (values - constant).abs().clamp(min=1)
        constant = (weight * values).sum() / weight.sum()
    return float(constant)


def l2(predicted: Tensor, value: Tensor) -> Tensor:
    """Half the squared error, summed over a column's floats: the mean is the best constant. (n, w), (n, w) -> (n,)

    >>> l2(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.5, 3.0]]))    # (0.25 + 9) / 2
    tensor([4.6250])
    """
    return 0.5 * functional.mse_loss(predicted, value, reduction="none").sum(1)


def l1(predicted: Tensor, value: Tensor) -> Tensor:
    """The absolute error, summed over a column's floats: the median is the best constant. (n, w), (n, w) -> (n,)

    >>> l1(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.5, -3.0]]))
    tensor([3.5000])
    """
    return functional.l1_loss(predicted, value, reduction="none").sum(1)


def hinge(logits: Tensor, label: Tensor) -> Tensor:
    """By how much the label's logit fails to lead all others by 1 (Crammer and Singer 2001). (n, K), (n,) -> (n,)

    >>> hinge(torch.tensor([[3.0, 1.0, 0.0], [0.5, 1.0, 0.0]]), torch.tensor([0, 0]))    # leads by 2; by -0.5
    tensor([0.0000, 1.5000])
    """
    right = logits.gather(1, label[:, None])
    others = logits.scatter(1, label[:, None], float("-inf"))
    return functional.relu(1 + others.amax(1) - right[:, 0])


def presence(logit: Tensor, missing: Tensor) -> Tensor:
    """Binary cross-entropy of the missing flag. (n,), (n,) -> (n,)"""
    return functional.binary_cross_entropy_with_logits(logit, missing, reduction="none")


def inclusion(count: Tensor, sample: int) -> Tensor:
    """(K,) how likely each label is to be drawn so that about `sample` are: by the root of its count, never above 1.

    Frequent labels are always in, so only the rare ones add noise, and every label can be drawn.

    >>> inclusion(torch.tensor([100.0, 1.0, 1.0, 0.0]), sample=2)
    tensor([1.0000, 0.3333, 0.3333, 0.3333])
    """
    size = count.clamp(min=1).sqrt()
    chance = torch.zeros_like(size)
    for _ in range(20):  # what is cut off at 1 is given to the others
        certain = chance >= 1
        rest = size[~certain].sum()
        left = sample - int(certain.sum())
        if left <= 0 or rest == 0:
            break
        new = torch.where(certain, 1.0, size * (left / rest))
        if torch.equal(new.clamp(max=1), chance):
            break
        chance = new.clamp(max=1)
    return chance.clamp(min=1e-6)


def sampled_multi(
    positive: Tensor, item: Tensor, share: float, negative: Tensor, chance: Tensor, is_positive: Tensor
) -> Tensor:
    """`multi` estimated without bias from a share of the positives and a sample of the labels. -> (n,)

    positive (m,) logits of labels that items have, item (m,) whose they are, share: of all such pairs that these are;
    negative (n, S) logits of the sampled labels, chance (S,) of each to be sampled, is_positive (n, S) where the item
    has the label after all.
    """
    misses = (functional.softplus(negative).masked_fill(is_positive, 0.0) / chance).sum(1)
    return misses.index_add(0, item, functional.softplus(-positive).to(misses.dtype) / share)


def sampled_nominal(positive: Tensor, negative: Tensor, chance: Tensor, is_positive: Tensor) -> Tensor:
    """`nominal` against a sample of the labels, each standing for 1 / chance of them (Bengio and Senecal 2008). -> (n,)

    positive (n,) logit of each item's label; negative (n, S), chance (S,), is_positive (n, S) as in `sampled_multi`.
    """
    others = (negative - chance.log().to(negative.dtype)).masked_fill(is_positive, float("-inf"))
    return torch.logsumexp(torch.cat([positive[:, None], others], dim=1), dim=1) - positive


def info_nce(one: Tensor, other: Tensor, temperature: float) -> Tensor:
    """Row i of `one` has to find row i of `other` among all rows of both (van den Oord et al. 2018, Chen et al. 2020).

    (n, d) unit vectors twice -> (2n,)
    """
    n = len(one)
    both = torch.cat([one, other])
    logits = both @ both.T / temperature
    logits = logits.masked_fill(torch.eye(2 * n, dtype=torch.bool, device=one.device), float("-inf"))
    target = torch.arange(2 * n, device=one.device).roll(n)
    return functional.cross_entropy(logits, target, reduction="none")


def in_batch_softmax(
    anchor: Tensor, candidate: Tensor, clash: Tensor, log_q: Tensor, temperature: float, correction: float,
    hard: int = 0,
) -> Tensor:  # fmt: skip
    """Anchor i has to find candidate i among all of them, sampled as they are (Yi et al. 2019). -> (n,)

    anchor (n, d) and candidate (C, d), C >= n, unit vectors; clash (n, C): candidates that are no negative of the
    anchor, because they are the anchor or its positive once more; log_q (C,): the logarithm of how likely each
    candidate was to be drawn. `correction` of it is subtracted from the logits, so that a popular item, which is in
    most batches, is not pushed away for that. With `hard`, the softmax is over the positive and so many others only,
    those that score highest (hard negatives).

    >>> three = torch.eye(3)
    >>> nobody, alike = torch.zeros(2, 3, dtype=torch.bool), torch.zeros(3)
    >>> in_batch_softmax(three[:2], three, nobody, alike, temperature=1.0, correction=1.0)    # log((e + 2) / e)
    tensor([0.5514, 0.5514])
    """
    logits = anchor @ candidate.T / temperature - correction * log_q
    own = torch.eye(len(anchor), len(candidate), dtype=torch.bool, device=anchor.device)
    logits = logits.masked_fill(clash & ~own, float("-inf"))
    if 0 < hard < len(candidate) - 1:
        others = logits.masked_fill(own, float("-inf"))
        least = others.detach().topk(hard, dim=1).values[:, -1:]
        logits = logits.masked_fill((others < least) & ~own, float("-inf"))
    return functional.cross_entropy(logits, torch.arange(len(anchor), device=anchor.device), reduction="none")


def gaussian_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Divergence of independent normals from the standard one, in nats (Kingma and Welling 2014). (n, d), (n, d) ->
    (n,)

    >>> gaussian_kl(torch.tensor([[0.0, 2.0]]), torch.zeros(1, 2))    # 2^2 / 2
    tensor([2.])
    """
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
