"""Conversations about the same video in one sequence: what they show comes once, and they do not see each other.

The loss and every gradient are those of the conversations one by one; the encoder, the projector and the language model
read the video once. Shapes: ``b`` examples, ``l`` tokens.
"""

from collections.abc import Mapping, Sequence

import torch

from storm_vlm.model.modeling_storm import IGNORED_LABEL

# Conversation id of what all conversations begin with, and of padding.
SHARED, PADDING = 0, -1


def side_by_side(
    first: Mapping[str, torch.Tensor], tails: Sequence[Mapping[str, torch.Tensor]], num_shared: int
) -> dict[str, torch.Tensor]:
    """Puts conversations behind what they share.

    Args:
        first: ``input_ids`` and ``labels`` ``(l,)`` of the first conversation.
        tails: The same of the others, without what is shared.
        num_shared: Tokens of the first that are shared.

    Returns:
        ``input_ids``, ``labels`` and ``conversation_ids`` ``(l,)``: `SHARED`, then the conversation's number from 1.
    """
    pieces = [{name: first[name][num_shared:] for name in ("input_ids", "labels")}, *tails]
    shared_labels = torch.full_like(first["labels"][:num_shared], IGNORED_LABEL)
    ids = [first["input_ids"].new_full((num_shared,), SHARED)]
    ids += [piece["input_ids"].new_full((len(piece["input_ids"]),), i) for i, piece in enumerate(pieces, 1)]
    return {
        "input_ids": torch.cat([first["input_ids"][:num_shared], *(piece["input_ids"] for piece in pieces)]),
        "labels": torch.cat([shared_labels, *(piece["labels"] for piece in pieces)]),
        "conversation_ids": torch.cat(ids),
    }


def attention_inputs(conversation_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns what makes a language model read each conversation as if it were alone.

    Args:
        conversation_ids: Those of `side_by_side`, padded on the right by `PADDING`, ``(b, l)``.

    Returns:
        ``attention_mask``, bool ``(b, 1, l, l)``, true where a token attends to another, and ``position_ids``
        ``(b, l)``. Padding attends to itself alone.
    """
    length = conversation_ids.shape[1]
    query, key = conversation_ids.unsqueeze(2), conversation_ids.unsqueeze(1)
    is_seen = (key == query) | ((key == SHARED) & (query != PADDING))
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    # A token's position is the number of tokens that it sees before it.
    is_seen &= causal
    return {"attention_mask": is_seen.unsqueeze(1), "position_ids": is_seen.sum(dim=2) - 1}
