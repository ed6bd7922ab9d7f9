"""The loss of each feature kind, as plain functions of logits and targets. All give one number per item.

n items, K labels or rows of a column, m positives, S sampled rows.
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


def numeric(predicted: Tensor, value: Tensor) -> Tensor:
    """Huber loss with threshold 1 on standardised values, summed over a column's floats. (n, w), (n, w) -> (n,)

    >>> numeric(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.5, 3.0]]))    # 0.5^2 / 2 + (3 - 1/2)
    tensor([2.6250])
    """
    return functional.huber_loss(predicted, value, reduction="none").sum(1)


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
