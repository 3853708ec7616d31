"""Vocabulary readout: visual tokens made of the language model's own input embeddings."""

import torch

# Tokens that are read out at once: their scores over a vocabulary of 150,000 are 0.6 GB in float32.
READOUT_CHUNK_TOKENS = 1024


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
    keys = embeddings.to(tokens)
    scale = keys.shape[-1] ** -0.5
    chunks = tokens.flatten(0, -2).split(READOUT_CHUNK_TOKENS)
    # Not torch's attention: for keys as many as a vocabulary its backward pass takes several times as long.
    return torch.cat([torch.softmax(scale * chunk @ keys.T, -1) @ keys for chunk in chunks]).view_as(tokens)
