"""What the encoder is trained to do. The encoder embeds; a Task wraps it with its decoder and turns a batch into a
loss.

- `reconstruct`: read every column of the clean item back from the embedding of a damaged one (Vincent et al. 2008);
- `contrast`: two damaged copies of one item find each other among those of all others (Chen et al. 2020).

Both see the same damaged copies, so a step runs the encoder once. A column's loss is divided by the loss of the best
constant answer: 1 is what the marginals alone would give, 0 is perfect, and columns weigh alike whatever their kind.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from itemvec.encoder import Decoder, ItemEncoder
from itemvec.features import FIRST, BagSlot, DenseSlot, Layout
from training import losses
from training.config import TrainConfig
from training.data import Marginals, Tensors

POSITIVES = 16
"""Labels an item, on average over a batch, that a sampled column is scored on."""


class Losses(NamedTuple):
    total: Tensor
    parts: dict[str, Tensor]
    """Per objective, and per column under its name; what a constant would reach is 1 for a column."""


class Task(nn.Module):
    """Encoder and decoder with the objectives of a config. `layout` is the table's, `weights` are the schema's."""

    def __init__(
        self,
        encoder: ItemEncoder,
        decoder: Decoder,
        layout: Layout,
        marginals: Marginals,
        weights: Mapping[str, float],
        config: TrainConfig,
    ) -> None:
        super().__init__()
        self.encoder, self.decoder, self.layout, self.config = encoder, decoder, layout, config
        self.reconstruct = Reconstruct(decoder, layout, marginals, weights, config.reconstruct.negatives)

    def forward(self, damaged: Tensors, clean: Tensors) -> Losses:
        """`damaged` holds `views` copies of the B clean items, first one of each and then the other."""
        embedding = self.encoder(*damaged)
        parts: dict[str, Tensor] = {}
        total = embedding.new_zeros(())
        if self.config.reconstruct.weight:
            parts |= self.reconstruct(embedding[: len(clean[0])], clean)  # of one copy: the other would cost as much
            total = total + self.config.reconstruct.weight * parts["reconstruct"]
        if self.config.contrast.weight:
            one, other = embedding.chunk(2)
            with torch.autocast(one.device.type, enabled=False):  # differences of cosines need more than 8 bits
                parts["contrast"] = losses.info_nce(one.float(), other.float(), self.config.contrast.temperature).mean()
            total = total + self.config.contrast.weight * parts["contrast"]
        return Losses(total, parts)

    @property
    def views(self) -> int:
        """Damaged copies that a step wants of each item."""
        return 2 if self.config.contrast.weight else 1

    def table_parameters(self) -> list[nn.Parameter]:
        """What grows with the number of labels."""
        tables = (
            [self.encoder.table, self.decoder.row_weight] if self.config.reconstruct.weight else [self.encoder.table]
        )
        return [table for table in tables if table.numel()]  # type: ignore[misc]

    def layer_parameters(self) -> list[nn.Parameter]:
        tables = {id(self.encoder.table), id(self.decoder.row_weight)}
        return [p for p in self.parameters() if id(p) not in tables and p.numel()]

    def sparse_gradients(self, on: bool) -> None:
        """Gradients of the tables for the rows that a batch used; gloo can add them up over workers, NCCL cannot."""
        self.encoder.sparse_gradients = self.reconstruct.sparse_gradients = on


class Reconstruct(nn.Module):
    """The decoder's loss over all columns, each against the loss of its best constant."""

    count: Tensor
    centre: Tensor

    def __init__(
        self, decoder: Decoder, layout: Layout, marginals: Marginals, weights: Mapping[str, float], negatives: int
    ) -> None:
        super().__init__()
        self.decoder, self.layout, self.negatives, self.n = decoder, layout, negatives, marginals.n
        self.weights = dict(weights)
        self.sparse_gradients = False
        self.register_buffer("count", marginals.count, persistent=False)
        self.register_buffer("centre", marginals.centre, persistent=False)
        self.constant = constant_losses(layout, marginals)
        for slot in layout.bags:
            if self._is_sampled(slot):
                chance = losses.inclusion(self._counts(slot), negatives)
                self.register_buffer(f"chance_{layout.bags.index(slot)}", chance, persistent=False)

    def forward(self, embedding: Tensor, clean: Tensors) -> dict[str, Tensor]:
        """(B, dim) embeddings of damaged items, the B clean items -> the loss of each column, and `reconstruct`."""
        dense, indices, _, lengths = clean
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
        return parts | {"reconstruct": total / max(sum(self.weights.get(name, 1.0) for name in parts), 1e-6)}

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
    values = losses.numeric(predicted[:, read], truth[:, read])
    missing = truth[:, slot.flag]
    return torch.where(missing == 0, values, 0.0) + losses.presence(predicted[:, slot.flag], missing)


def _entropy(share: Tensor) -> Tensor:
    entropy: Tensor = -torch.special.xlogy(share, share) - torch.special.xlogy(1 - share, 1 - share)
    return entropy
