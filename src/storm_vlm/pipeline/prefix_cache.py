"""Keys and values kept between questions: what two prompts have in common is read once."""

from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from storm_vlm.pipeline.identity import WeightsState
from storm_vlm.pipeline.video_tokens import VideoTokens


@dataclass(slots=True)
class PrefixCache:
    """The cache of the last prompt and answer, and the tokens it stands for.

    Attributes:
        text_config: Config of the language model.
        video_token_id: Placeholder of video tokens, which mean nothing without the video they stand for.
    """

    text_config: PreTrainedConfig
    video_token_id: int
    _token_ids: list[int] = field(default_factory=list)
    _video: VideoTokens | None = None
    _weights: WeightsState | None = None
    _cache: DynamicCache | None = None

    @property
    def num_bytes(self) -> int:
        """Memory of the keys and values that are kept."""
        return 0 if self._cache is None else cache_bytes(self._cache)

    def clear(self) -> None:
        """Forgets what is kept."""
        self._token_ids, self._video, self._weights, self._cache = [], None, None, None

    def take(
        self, token_ids: list[int], video: VideoTokens | None, weights: WeightsState
    ) -> tuple[DynamicCache, int]:
        """Takes the cache for a new prompt, cut back to what the prompt has in common with the last one.

        Args:
            token_ids: The new prompt.
            video: The video that its placeholders stand for.
            weights: State of the language model's weights: other weights make other keys.

        Returns:
            A cache, and how many tokens of the prompt it holds: fewer than all, and all of the video or none of it.
        """
        cache = self._cache
        length = self._common_length(token_ids, video) if weights == self._weights else 0
        self.clear()  # whoever fails while generating leaves nothing behind
        if cache is None or length == 0 or not can_be_cut(cache):
            return DynamicCache(config=self.text_config), 0
        surplus = cache.get_seq_length() - length
        if surplus > 0:
            cache.crop(-surplus)
        return cache, length

    def keep(
        self, cache: DynamicCache, sequence: list[int], video: VideoTokens | None, weights: WeightsState
    ) -> None:
        """Keeps the cache of a prompt and its answer.

        Args:
            cache: The cache after generation.
            sequence: Tokens of prompt and answer.
            video: The video of the prompt.
            weights: State of the weights that made the cache.
        """
        self._cache, self._video, self._weights = cache, video, weights
        self._token_ids = sequence[: cache.get_seq_length()]

    def _common_length(self, token_ids: list[int], video: VideoTokens | None) -> int:
        pairs = zip(token_ids[:-1], self._token_ids, strict=False)
        length = next((i for i, (new, old) in enumerate(pairs) if new != old), None)
        if length is None:
            length = min(len(token_ids) - 1, len(self._token_ids))
        if self.video_token_id not in token_ids:
            return length
        first = token_ids.index(self.video_token_id)
        last = len(token_ids) - 1 - token_ids[::-1].index(self.video_token_id)
        if length <= first or (length > last and _is_same(video, self._video)):
            return length
        return first


def cache_bytes(cache: DynamicCache) -> int:
    """Returns the memory of the keys and values in a cache."""
    tensors = [
        tensor
        for layer in cache.layers
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
    ]
    return sum(
        tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, torch.Tensor)
    )


def _is_same(one: VideoTokens | None, other: VideoTokens | None) -> bool:
    """Whether two encoded videos hold the same tokens, such as a file that was loaded twice."""
    if one is None or other is None or one is other:
        return one is other
    return one.tokens.device == other.tokens.device and torch.equal(one.tokens, other.tokens)


def can_be_cut(cache: DynamicCache) -> bool:
    """Whether every layer keeps all its tokens: sliding windows and recurrent layers forget."""
    return all(type(layer) is DynamicLayer for layer in cache.layers)
