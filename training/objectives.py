"""What the encoder is trained to do. The encoder embeds; a Task wraps it with the objectives of a config and turns a
batch into a loss.

- `reconstruct`: read every column of the clean item back from the embedding of a damaged one (Vincent et al. 2008),
  through noise where it is variational (Kingma and Welling 2014);
- `contrast`: two damaged copies of one item find each other among those of all others (Chen et al. 2020);
- `predict`: say a target that is no input from the embedding of a damaged item;
- `co_engage`: two items that one user liked find each other among those of other pairs (Yi et al. 2019);
- `compatible`: stay where the version that the run follows has the item (Shen et al. 2020).

All see what one pass of the encoder made. The loss of a column or a target is divided by that of the best constant
answer: 1 is what the marginals alone would give, 0 is perfect, and all weigh alike whatever their kind.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from itemvec.encoder import Decoder, EncoderConfig, ItemEncoder, fully_connected
from itemvec.errors import ConfigError
from itemvec.features import FIRST, BagSlot, DenseSlot, Layout
from training import losses
from training.balance import Balance
from training.config import CoEngageConfig, ContrastConfig, PredictConfig, ReconstructConfig, TrainConfig
from training.data import Marginals, Prepared, Tensors
from training.targets import Target, known

POSITIVES = 16
"""Labels an item, on average over a batch, that a sampled column is scored on."""

SHORTENED = 0.5
"""Share of the steps that train a nested prefix."""

FIRST_LOG_VARIANCE = -3.0
"""Of the noise of `variational`, where the variance of a number is 1."""


class Given(NamedTuple):
    """What a step's B items are, besides the damaged copies that are encoded."""

    clean: Tensors
    """The items as they are."""

    targets: Mapping[str, Tensor]
    """Per target (B,)"""

    paired: Tensor | None = None
    """(2 P + M,) the items encoded behind the copies: P anchors, their P positives, M that were drawn alike."""

    before: Tensor | None = None
    """(B, dim) the vectors that the version has which the run follows."""


class Losses(NamedTuple):
    total: Tensor
    """What is minimised."""

    parts: dict[str, Tensor]
    """Per objective under its name, and per column under `reconstruct.` and its name: 1 is what a constant reaches."""


def chosen(config: TrainConfig, data: Prepared) -> dict[str, float | Literal["auto"]]:
    """The weights of the objectives that are on and for which the data has what they need. Raises ConfigError where
    there is none."""
    possible = {
        "reconstruct": True,
        "contrast": True,
        "predict": bool(data.targets),
        "co_engage": data.interactions is not None,
    }
    weights = {name: getattr(config, name).weight for name, there in possible.items() if there}
    if data.parent is not None and data.parent.vectors is not None:
        weights["compatible"] = config.compatible
    elif data.parent is not None and config.compatible:
        raise ConfigError(
            f"compatible asks for vectors near those of version {data.parent.version}, which have another encoder.dim "
            f"than {config.encoder.dim}: take that one, or set compatible to 0"
        )
    if not any(weights.values()):
        lacking = [name for name, there in possible.items() if not there and getattr(config, name).weight]
        said = f" {' and '.join(lacking)} would need targets or interactions" if lacking else ""
        raise ConfigError(f"there is nothing to learn: {', '.join(weights)} have weight 0;{said}".rstrip(";"))
    return {name: weight for name, weight in weights.items() if weight}


class Task(nn.Module):
    """Encoder and decoder with the objectives of a config, as far as the data has what they need."""

    def __init__(self, encoder: ItemEncoder, decoder: Decoder, data: Prepared, config: TrainConfig) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        weights = {feature.name: feature.weight for feature in data.transform.schema.features}
        self.reconstruct = Reconstruct(decoder, data.layout, data.marginals, weights, config.reconstruct)
        self.contrast = Contrast(config.contrast)
        self.predict = Predict(config.encoder, config.predict, data.targets)
        self.co_engage = None if data.interactions is None else CoEngage(config.co_engage, data.interactions.popularity)
        self.balance = Balance(chosen(config, data), config.balance)

    def forward(self, damaged: Tensors, given: Given) -> Losses:
        """`damaged` holds `views` copies of the B clean items, first one of each and then the other; then those
        paired."""
        embedding = self._shortened(self.encoder(*damaged))
        copies = self.views * len(given.clean[0])
        one, *other = embedding[:copies].chunk(self.views)
        active, parts = self.balance.fixed, dict[str, Tensor]()
        if "reconstruct" in active:
            parts |= self.reconstruct(one, given.clean)  # of one copy: the other would cost as much
        if "contrast" in active:
            parts |= self.contrast(one, *other)
        if "predict" in active:
            parts |= self.predict(one, given.targets)
        if self.co_engage is not None and given.paired is not None and "co_engage" in active:
            parts |= self.co_engage(embedding[copies:], given.paired)
        if "compatible" in active and given.before is not None:
            parts["compatible"] = 1 - (one * given.before).sum(1).mean()
        return Losses(self.balance({name: parts[name] for name in active if name in parts}, embedding), parts)

    def _shortened(self, embedding: Tensor) -> Tensor:
        """In training, and where prefixes are to be embeddings: in every other step one of them is all there is (nested
        dropout, Rippel et al. 2014), its length made 1 and zeros behind it, so that no loss need know of it."""
        nested = self.encoder.config.nested
        if not (nested and self.training and torch.rand(()) < SHORTENED):
            return embedding
        size = nested[int(torch.randint(len(nested), ()))]
        kept = functional.normalize(embedding[:, :size], dim=1)
        return functional.pad(kept, (0, embedding.shape[1] - size))

    @property
    def views(self) -> int:
        """Damaged copies that a step wants of each item."""
        return 2 if "contrast" in self.balance.fixed else 1

    def table_parameters(self) -> list[nn.Parameter]:
        """What grows with the number of labels."""
        tables = (
            [self.encoder.table, self.decoder.row_weight]
            if "reconstruct" in self.balance.fixed
            else [self.encoder.table]
        )
        return [table for table in tables if table.numel()]  # type: ignore[misc]

    def layer_parameters(self) -> list[nn.Parameter]:
        tables = {id(self.encoder.table), id(self.decoder.row_weight)}
        return [p for p in self.parameters() if id(p) not in tables and p.numel()]

    def sparse_gradients(self, on: bool) -> None:
        """Gradients of the tables for the rows that a batch used; gloo can add them up over workers, NCCL cannot."""
        self.encoder.sparse_gradients = self.reconstruct.sparse_gradients = on


class Contrast(nn.Module):
    """Two damaged copies of one item find each other."""

    def __init__(self, config: ContrastConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, one: Tensor, other: Tensor) -> dict[str, Tensor]:
        with torch.autocast(one.device.type, enabled=False):  # differences of cosines need more than 8 bits
            return {"contrast": losses.info_nce(one.float(), other.float(), self.config.temperature).mean()}


class Predict(nn.Module):
    """Says targets from embeddings."""

    def __init__(self, encoder: EncoderConfig, config: PredictConfig, targets: Sequence[Target]) -> None:
        super().__init__()
        self.targets = list(targets)
        self.layers = fully_connected(encoder.dim, config.hidden, encoder)
        width = config.hidden[-1] if config.hidden else encoder.dim
        self.heads = nn.ModuleList(nn.Linear(width, target.classes or 1) for target in targets)
        self._scale = float(encoder.dim) ** 0.5

    def forward(self, embedding: Tensor, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """(B, dim), the (B,) values of each target -> its loss over the rows that have it, and `predict`."""
        parts: dict[str, Tensor] = {}
        for target, predicted in zip(self.targets, self.answers(embedding), strict=True):
            there = known(values[target.name])
            loss = target.losses(predicted[there], values[target.name][there])
            parts[target.name] = loss.sum() / max(len(loss), 1)
        weights = {target.name: target.weight for target in self.targets}
        total = sum((weights[name] * loss for name, loss in parts.items()), embedding.new_zeros(()))
        total = total / max(sum(weights.values()), 1e-6)
        return {"predict": total, **{f"predict.{name}": loss for name, loss in parts.items()}}

    def scores(self, embedding: Tensor, items: Tensor) -> dict[str, dict[str, Any]]:
        """Per target the R2 or accuracy of `items` (m,) by their embeddings (m, dim), beside that of the best constant
        answer; None where no item has the target."""
        out = {}
        for target, answers in zip(self.targets, self.answers(embedding), strict=True):
            there = target.known[items]
            truth, rows = target.values[items][there], int(there.sum())
            constant = torch.full_like(truth, target.majority)
            score = majority = None
            if rows and target.classes:
                score, majority = _accuracy(answers[there].argmax(1), truth), _accuracy(constant, truth)
            elif rows:
                score, majority = _r2(answers[there, 0], truth), _r2(constant, truth)
            metric = "accuracy" if target.classes else "R2"
            out[target.name] = {"metric": metric, "score": score, "majority": majority, "rows": rows}
        return out

    def answers(self, embedding: Tensor) -> list[Tensor]:
        """(n, dim) -> per target (n, 1) scaled values, or (n, classes) logits."""
        hidden = self.layers(embedding * self._scale)
        return [head(hidden).float() for head in self.heads]


class CoEngage(nn.Module):
    """An item finds the one that the same user liked, among the positives of the other pairs and items drawn alike."""

    log_q: Tensor

    def __init__(self, config: CoEngageConfig, popularity: Tensor) -> None:
        """`popularity` (n,): the share of all positives that each item is."""
        super().__init__()
        self.config = config
        drawn = config.pairs * popularity + config.negatives / len(popularity)
        self.register_buffer("log_q", (drawn / drawn.sum()).clamp(min=1e-12).log().float(), persistent=False)

    def forward(self, embedding: Tensor, items: Tensor) -> dict[str, Tensor]:
        """(2 P + M, dim) of `items` (2 P + M,): anchors, positives, those drawn alike."""
        n = len(items) * self.config.pairs // (2 * self.config.pairs + self.config.negatives)
        anchor, candidate = items[:n], items[n:]
        clash = (candidate == anchor[:, None]) | (candidate == candidate[:n, None])
        with torch.autocast(embedding.device.type, enabled=False):
            loss = losses.in_batch_softmax(
                embedding[:n].float(), embedding[n:].float(), clash, self.log_q[candidate], self.config.temperature,
                self.config.popularity_correction, self.config.hard,
            )  # fmt: skip
        return {"co_engage": loss.mean()}


class Reconstruct(nn.Module):
    """The decoder's loss over all columns, each against the loss of its best constant."""

    count: Tensor
    centre: Tensor

    def __init__(
        self,
        decoder: Decoder,
        layout: Layout,
        marginals: Marginals,
        weights: Mapping[str, float],
        config: ReconstructConfig,
    ) -> None:
        super().__init__()
        self.decoder, self.layout, self.negatives, self.n = decoder, layout, config.negatives, marginals.n
        self.weights = dict(weights)
        self.variational = config.variational
        self.log_variance = nn.Linear(decoder.config.dim, decoder.config.dim) if config.variational else None
        if self.log_variance is not None:
            nn.init.zeros_(self.log_variance.weight)
            nn.init.constant_(self.log_variance.bias, FIRST_LOG_VARIANCE)
        self.sparse_gradients = False
        self.register_buffer("count", marginals.count, persistent=False)
        self.register_buffer("centre", marginals.centre, persistent=False)
        self.constant = constant_losses(layout, marginals)
        for slot in layout.bags:
            if self._is_sampled(slot):
                chance = losses.inclusion(self._counts(slot), self.negatives)
                self.register_buffer(f"chance_{layout.bags.index(slot)}", chance, persistent=False)

    def forward(self, embedding: Tensor, clean: Tensors) -> dict[str, Tensor]:
        """(B, dim) embeddings of damaged items, the B clean items -> the loss of each column, and `reconstruct`."""
        dense, indices, _, lengths = clean
        embedding, divergence = self._noisy(embedding)
        hidden = self.decoder(embedding)
        bag = torch.repeat_interleave(
            torch.arange(lengths.numel(), device=indices.device), lengths.reshape(-1), output_size=len(indices)
        )
        parts: dict[str, Tensor] = {}
        for f, slot in enumerate(self.layout.bags):
            if self._weight(slot):
                mine = (bag % lengths.shape[1] == f).nonzero()[:, 0]
                item, row = bag[mine] // lengths.shape[1], indices[mine] - slot.base
                parts[slot.name] = self._bag_loss(f, slot, hidden, item, row).mean()
        if any(self._weight(slot) for slot in self.layout.dense):
            predicted = self.decoder.dense(hidden)
            for dense_slot in self.layout.dense:
                if self._weight(dense_slot):
                    parts[dense_slot.name] = dense_loss(dense_slot, predicted, dense).mean()
        parts = {name: loss / max(self.constant[name], 1e-6) for name, loss in parts.items()}
        total = sum((self.weights.get(name, 1.0) * loss for name, loss in parts.items()), embedding.new_zeros(()))
        total = total / max(sum(self.weights.get(name, 1.0) for name in parts), 1e-6)
        named = {f"reconstruct.{name}": loss for name, loss in parts.items()}
        if divergence is None:
            return {"reconstruct": total, **named}
        return {"reconstruct": total + self.variational * divergence, "variational": divergence, **named}

    def _noisy(self, embedding: Tensor) -> tuple[Tensor, Tensor | None]:
        """The embedding as the mean of a normal distribution: in training a sample of it, and its divergence from the
        prior, a number. Means are held at a variance of 1, so it is the noise that finds its width."""
        if self.log_variance is None:
            return embedding, None
        mean = embedding.float() * embedding.shape[1] ** 0.5
        log_variance = self.log_variance(embedding).float()
        divergence = losses.gaussian_kl(mean, log_variance).mean() / embedding.shape[1]
        if self.training:
            mean = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
        return functional.normalize(mean, dim=1), divergence

    def start_from_marginals(self) -> None:
        """Sets the decoder's biases so that, before the first step, it answers with the training marginals."""
        chance = ((self.count + 0.5) / (self.n + 1)).clamp(max=1 - 0.5 / (self.n + 1))
        with torch.no_grad():
            for slot in self.layout.bags:
                rows = slice(slot.base, slot.base + slot.rows)
                if slot.kind == "nominal":
                    self.decoder.row_bias[rows] = chance[rows].log()
                else:
                    self.decoder.row_bias[rows] = torch.logit(chance[rows])
                if slot.kind == "ordinal":
                    steps = slice(slot.base + FIRST, slot.base + slot.rows)
                    ranked = self.count[slot.base + FIRST]  # every item that has a rank has the first step
                    self.decoder.row_bias[steps] = torch.logit((self.count[steps] + 0.5) / (ranked + 1))
            if self.decoder.dense_head is not None:
                self.decoder.dense_head.bias.copy_(self.centre)
                flags = [dense.flag for dense in self.layout.dense]
                self.decoder.dense_head.bias[flags] = torch.logit(self.centre[flags])

    def _weight(self, slot: BagSlot | DenseSlot) -> float:
        return self.weights.get(slot.name, 1.0)

    def _counts(self, slot: BagSlot) -> Tensor:
        return self.count[slot.base : slot.base + slot.rows]

    def _is_sampled(self, slot: BagSlot) -> bool:
        return slot.kind != "ordinal" and slot.rows > 2 * self.negatives

    def _bag_loss(self, f: int, slot: BagSlot, hidden: Tensor, item: Tensor, row: Tensor) -> Tensor:
        """`item` (m,) has `row` (m,), for every label of the column in the B clean items -> (B,)"""
        if self._is_sampled(slot):
            return self._sampled_loss(f, slot, hidden, item, row)
        rows = torch.arange(slot.base, slot.base + slot.rows, device=hidden.device)
        logits = functional.linear(hidden, *self._head(rows))
        if slot.kind == "nominal":
            return losses.nominal(logits, row)
        truth = torch.zeros_like(logits)
        truth[item, row] = 1.0
        return ordinal_loss(logits, truth) if slot.kind == "ordinal" else losses.multi(logits, truth)

    def _sampled_loss(self, f: int, slot: BagSlot, hidden: Tensor, item: Tensor, row: Tensor) -> Tensor:
        chance = getattr(self, f"chance_{f}")
        sample = (torch.rand(slot.rows, device=hidden.device) < chance).nonzero()[:, 0]
        place = torch.full((slot.rows,), -1, dtype=torch.long, device=hidden.device)
        place[sample] = torch.arange(len(sample), device=hidden.device)
        at = place[row]
        has = torch.zeros(len(hidden), len(sample), dtype=torch.bool, device=hidden.device)
        has[item[at >= 0], at[at >= 0]] = True
        share = 1.0
        if slot.kind != "nominal" and len(row) > POSITIVES * len(hidden):  # of a text's hundred n-grams some will do
            share = POSITIVES * len(hidden) / len(row)
            some = torch.rand(len(row), device=row.device) < share
            item, row = item[some], row[some]
        weight, bias = self._head(slot.base + torch.cat([sample, row]))
        negative = functional.linear(hidden, weight[: len(sample)], bias[: len(sample)])
        positive = (hidden[item] * weight[len(sample) :]).sum(1) + bias[len(sample) :]
        if slot.kind == "nominal":
            return losses.sampled_nominal(positive, negative, chance[sample], has)
        return losses.sampled_multi(positive, item, share, negative, chance[sample], has)

    def _head(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """What `Decoder.rows` multiplies and adds, with gradients for these rows only where that pays."""
        weight = functional.embedding(rows, self.decoder.row_weight, sparse=self.sparse_gradients)
        return weight, self.decoder.row_bias[rows]


def constant_losses(layout: Layout, marginals: Marginals) -> dict[str, float]:
    """Per column the loss of the best constant answer, per training item: the entropy of its marginals."""
    constant = {
        slot.name: float(marginals.spread[slot.start : slot.start + slot.targets].sum() + marginals.spread[slot.flag])
        for slot in layout.dense
    }
    for slot in layout.bags:
        count = marginals.count[slot.base : slot.base + slot.rows].double()
        share = count / marginals.n
        if slot.kind == "nominal":
            loss = -torch.special.xlogy(share, share).sum()
        elif slot.kind == "ordinal":
            ranked = count[FIRST].clamp(min=1)
            loss = _entropy(share[:FIRST]).sum() + ranked / marginals.n * _entropy(count[FIRST + 1 :] / ranked).sum()
        else:
            loss = _entropy(share).sum()
        constant[slot.name] = float(loss)
    return constant


def ordinal_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """An ordinal column: unseen and missing as flags; the steps of its thermometer only where it has a rank. -> (n,)"""
    flags = losses.multi(logits[:, :FIRST], truth[:, :FIRST])
    rank = truth[:, FIRST:].sum(1).long() - 1
    steps = losses.ordinal(logits[:, FIRST + 1 :], rank)
    return flags + torch.where(rank >= 0, steps, 0.0)


def dense_loss(slot: DenseSlot, predicted: Tensor, truth: Tensor) -> Tensor:
    """A dense column's floats where it is present, and its missing flag. -> (n,)"""
    read = slice(slot.start, slot.start + slot.targets)
    values = losses.huber(predicted[:, read], truth[:, read])
    missing = truth[:, slot.flag]
    return torch.where(missing == 0, values, 0.0) + losses.presence(predicted[:, slot.flag], missing)


def _entropy(share: Tensor) -> Tensor:
    entropy: Tensor = -torch.special.xlogy(share, share) - torch.special.xlogy(1 - share, 1 - share)
    return entropy


def _accuracy(answer: Tensor, truth: Tensor) -> float:
    return float((answer == truth).float().mean())


def _r2(answer: Tensor, truth: Tensor) -> float:
    """Of values that are scaled to a mean of 0 over the training rows: that mean is what it is measured against."""
    return float(1 - (truth - answer).square().sum() / truth.square().sum().clamp(min=1e-12))
