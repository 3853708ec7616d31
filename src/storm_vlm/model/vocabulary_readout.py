"""Vocabulary readout: visual tokens made of the language model's own input embeddings."""

import torch
from torch.nn import functional


def vocabulary_readout(tokens: torch.Tensor, embeddings: torch.Tensor) -> torch.Tensor:
    """Returns the mean of the input embeddings that each token chooses: ``softmax(tokens @ E.T / sqrt(d)) @ E``.

    A small language model that learns from few videos reads what looks like text at once, and has to learn to read
    anything else. Tokens attend to the vocabulary: a token that is sure is long.

    Args:
        tokens: Compressed visual tokens, ``(..., d)``.
        embeddings: Input embeddings of the language model, ``E``, ``(vocabulary, d)``; moved to the tokens' device and
            dtype.

    Returns:
        Tokens of the same shape, within the convex hull of the embeddings.

    Source:
        AlignVLM (arXiv 2502.01341), with attention's scores in place of a head of its own.
    """
    keys = embeddings.to(tokens)[None, None]
    queries = tokens.flatten(0, -2)[None, None]
    # Attention without heads: the scores of a long video over a whole vocabulary are never held at once.
    return functional.scaled_dot_product_attention(queries, keys, keys).view_as(tokens)
