"""Several documents in one sequence: attention that stays inside of each, with positions that restart. B sequences, S tokens."""

import torch
from torch import Tensor


def documents_of(ids_BS: Tensor, targets_BS: Tensor, end: int, ignore: int = -100) -> tuple[Tensor, Tensor]:
    """Which document of its sequence each token is of, int64 (B, S), and the targets without those that begin a document.

    `end` is the id of the mark that ends a document and belongs to it.
    """
    ends_BS = ids_BS == end
    return ends_BS.cumsum(1) - ends_BS.long(), targets_BS.masked_fill(ends_BS, ignore)


def positions_of(documents_BS: Tensor) -> Tensor:
    """int64 (B, S): the place of each token in its document, from 0; the first of a sequence may be cut off in front."""
    places_S = torch.arange(documents_BS.shape[1], device=documents_BS.device)
    begins_BS = torch.ones_like(documents_BS, dtype=torch.bool)
    begins_BS[:, 1:] = documents_BS[:, 1:] != documents_BS[:, :-1]
    return places_S - torch.where(begins_BS, places_S, 0).cummax(1).values


def same_document(documents_BS: Tensor) -> Tensor:
    """Booleans (B, 1, S, S): which tokens are of one document."""
    return (documents_BS[:, :, None] == documents_BS[:, None, :]).unsqueeze(1)
