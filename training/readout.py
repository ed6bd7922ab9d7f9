"""What reads numbers from the finished vectors, fitted once more by least squares.

While the encoder learns, columns are swapped and taken away, and a decoder that is told a doubtful year rightly answers
between it and what the other columns suggest. That would be paid for by every item that is whole, so at the end the
last layer for numbers is fitted to whole training items, and with less weight to the same items without the column.
"""

import torch
from torch import Tensor

from itemvec.encoder import Decoder
from training.judged import Judged, Rows, Views

FITTED = 10_000
"""Training items that it is fitted to at most."""

WITHOUT = 0.2
"""What an item without the column counts beside one that has it: about as often as it is missing in training."""

RIDGE = 1e-6
"""Share of the mean square of what is read that is added to each."""


@torch.no_grad()
def refit_numbers(model: Judged, items: Rows) -> None:
    """Sets the rows of `Decoder.dense_head` that read values back, but not those of the missing flags. `items` are
    training rows; of each column those take part that have it."""
    decoder, views = model.decoder, Views(model, items)
    if decoder.dense_head is None:
        return
    values = model.table.dense[torch.from_numpy(items)]
    whole = _read(decoder, views.whole)
    for slot in model.layout.dense:
        there = values[:, slot.flag] == 0
        told = slice(slot.start, slot.start + slot.targets)
        parts = [(whole[there], 1.0), (_read(decoder, views.without(slot.name))[there], WITHOUT)]
        if len(parts[0][0]) <= whole.shape[1]:  # fewer items than unknowns would be learned by heart
            continue
        truth = values[there][:, told].double()
        inner = sum((share * x.T @ x for x, share in parts), torch.zeros(()))
        ridge = RIDGE * inner.diagonal().mean() * torch.eye(len(inner), dtype=inner.dtype)
        found = torch.linalg.solve(inner + ridge, sum((share * x.T @ truth for x, share in parts), torch.zeros(())))
        decoder.dense_head.weight[told] = found[:-1].T.float()
        decoder.dense_head.bias[told] = found[-1].float()


def _read(decoder: Decoder, vectors: Tensor) -> Tensor:
    """(n, dim) -> (n, H + 1) what the last layer reads, and a one."""
    hidden = torch.cat([decoder(part) for part in torch.split(vectors, 4096)]).double()
    return torch.cat([hidden, hidden.new_ones(len(hidden), 1)], dim=1)
