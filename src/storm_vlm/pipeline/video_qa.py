"""VideoQA: load a model once, encode a video once, ask many times."""

import logging
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import TextIteratorStreamer

from storm_vlm.errors import BudgetError, StormError
from storm_vlm.model import StormForConditionalGeneration, StormProcessor, TokenCompression, visual_grid
from storm_vlm.model.cache_name import CACHE_NAME
from storm_vlm.model.image_processing_storm import check_size
from storm_vlm.pipeline.answer import AnswerReport, AnswerStream, GenerationWatch
from storm_vlm.pipeline.batch import generate_batch
from storm_vlm.pipeline.chat import Chat
from storm_vlm.pipeline.encoding import Progress, encode_frames
from storm_vlm.pipeline.identity import ContentHashes, EncoderFingerprint, cache_key, weights_state
from storm_vlm.pipeline.loading import load_model
from storm_vlm.pipeline.memory import available_bytes, check_memory, check_prompt_memory
from storm_vlm.pipeline.prefix_cache import PrefixCache
from storm_vlm.pipeline.prompt import (
    Caption,
    Message,
    Prompt,
    check_context,
    prompt_token_ids,
    question_messages,
)
from storm_vlm.pipeline.scoring import score_answers
from storm_vlm.pipeline.video_tokens import Provenance, VideoTokens, VideoTokensCache
from storm_vlm.storage import cache_directory
from storm_vlm.video import VideoReader, open_video

logger = logging.getLogger(__name__)

VideoSource = str | Path | bytes


class VideoQA:
    """Answers questions about videos.

    A video is encoded in pieces, so that memory does not grow with it but for its tokens, and kept on disk; the keys and
    values that the language model computed for it are kept between questions. One answer is written at a time: a
    second thread waits for the first.

    Args:
        model: A STORM model.
        processor: Its processor.
        cache_folder: Where encoded videos are kept; None to keep none.
        max_memory_bytes: Most memory for weights and request; what the device has free if None.
    """

    def __init__(
        self,
        model: StormForConditionalGeneration,
        processor: StormProcessor,
        *,
        cache_folder: Path | None = None,
        max_memory_bytes: int | None = None,
    ) -> None:
        self.model = model.eval()
        self.processor = processor
        self.max_memory_bytes = max_memory_bytes
        self._cache = None if cache_folder is None else VideoTokensCache(cache_folder)
        self._prefix = PrefixCache(model.config.text_config, processor.video_token_id)
        self._last_encoded: tuple[str, VideoTokens] | None = None
        self._fingerprint = EncoderFingerprint(model)
        self._content_hash = ContentHashes()
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        attn_implementation: str | None = None,
        use_cache: bool = True,
        max_memory_bytes: int | None = None,
    ) -> "VideoQA":
        """Loads a STORM model and its processor.

        Args:
            path: Folder or hub id.
            device: ``auto`` for the GPU if there is one, or a device of PyTorch.
            dtype: ``auto`` for bfloat16 where the device computes in it and float32 elsewhere, or its name.
            attn_implementation: Attention of the backbones; transformers' choice if None.
            use_cache: Keep encoded videos on disk.
            max_memory_bytes: Most memory for weights and request; what the device has free if None.

        Returns:
            The pipeline, ready for questions; what cannot be loaded is a ModelError.
        """
        model, processor = load_model(
            path, device=device, dtype=dtype, attn_implementation=attn_implementation
        )
        folder = cache_directory() / "video-tokens" if use_cache else None
        return cls(model, processor, cache_folder=folder, max_memory_bytes=max_memory_bytes)

    @property
    def is_projector_trained(self) -> bool:
        """Whether the temporal projector has been trained; if not, answers do not describe the video."""
        return bool(self.model.config.projector_config.is_trained)

    @property
    def context_length(self) -> int:
        """Most tokens that the language model takes, prompt and answer together."""
        text_config = self.model.config.text_config.get_text_config()
        return getattr(text_config, "max_position_embeddings", None) or 2**31

    def describe(self) -> dict[str, Any]:
        """Returns what the model is made of, as plain values."""
        config, parts = self.model.config, self.model.model
        rows, columns = self._patch_grid_hw
        grid = visual_grid((1, rows, columns), config.projector_config.downsample, TokenCompression())

        def millions(module: torch.nn.Module) -> str:
            return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.1f}M"

        return {
            "vision_tower": f"{config.vision_config.model_type}, {millions(parts.vision_tower)} parameters",
            "temporal_projector": f"{config.projector_config.projector_type}, "
            f"{config.projector_config.num_mamba_layers} Mamba layers, {millions(parts.temporal_projector)} parameters",
            "projector_is_trained": self.is_projector_trained,
            "language_model": f"{config.text_config.model_type}, {millions(parts.language_model)} parameters",
            "frame_size": "x".join(str(side) for side in self.processor.video_processor.frame_size),
            "tokens_per_frame": math.prod(grid),
            "compression": asdict(self.processor.video_processor.compression),
            "default_frames": self.processor.video_processor.num_frames,
            "context_tokens": self.context_length,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
        }

    def encode(
        self,
        video: VideoSource,
        *,
        num_frames: int | None = None,
        fps: float | None = None,
        token_budget: int | None = None,
        temporal_pool: int | None = None,
        spatial_pool: int | None = None,
        temporal_sample: int | None = None,
        start_seconds: float | None = None,
        end_seconds: float | None = None,
        folder_fps: float = 1.0,
        allow_urls: bool = False,
        progress: Progress | None = None,
    ) -> VideoTokens:
        """Encodes a video, or reads it from the cache.

        Args:
            video: Path of a file or of a folder of pictures, bytes of a file, or URL.
            num_frames: Frames to sample uniformly; the model's default if None.
            fps: Frames per second to sample instead.
            token_budget: Most visual tokens: as many frames as fit, or for ``num_frames`` the sampling that fits.
            temporal_pool: See `TokenCompression`; the model's default if None.
            spatial_pool: See `TokenCompression`; the model's default if None.
            temporal_sample: See `TokenCompression`; the model's default if None.
            start_seconds: Where to begin.
            end_seconds: Where to end.
            folder_fps: Pictures per second of a folder.
            allow_urls: Whether ``video`` may be on the network.
            progress: Called with the part, what is done and what there is to do.

        Returns:
            The encoded video.

        Raises:
            BudgetError: It does not fit the memory or the budget, or ``temporal_pool`` exceeds the frames.
        """
        processor = self.processor.video_processor
        compression = _override(processor.compression, temporal_pool, spatial_pool, temporal_sample)
        # A spatial_pool that does not fit is an error before any work.
        visual_grid((1, *self._patch_grid_hw), self.model.config.projector_config.downsample, compression)
        with open_video(
            video,
            allow_urls=allow_urls,
            start_seconds=start_seconds,
            end_seconds=end_seconds,
            folder_fps=folder_fps,
        ) as reader:
            targets, plan = processor.plan_video(
                reader, num_frames=num_frames, fps=fps, token_budget=token_budget, compression=compression
            )
            if temporal_pool is not None and 1 < len(targets) < temporal_pool:
                raise BudgetError(
                    f"temporal_pool={temporal_pool} is larger than the {len(targets)} frames of {reader.metadata.source}: "
                    f"choose at most {len(targets)}"
                )
            provenance = self._provenance(video, reader)
            key = cache_key(provenance, targets, plan.compression, processor)
            if (known := self._known(key)) is not None:
                return known
            self._make_room(plan.num_frames, plan.compression)
            encoded = encode_frames(self.model, processor, reader, targets, plan, provenance, progress)
        if key is not None:
            if self._cache is not None:
                self._cache.put(key, encoded)
            self._last_encoded = (key, encoded)
        return encoded

    def ask(
        self,
        video: VideoTokens | VideoSource | None,
        question: str,
        *,
        system: str | None = None,
        captions: Sequence[Caption] = (),
        answer_start: str = "",
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        **encode_options: Any,
    ) -> AnswerStream:
        """Asks one question.

        Args:
            video: An encoded video, something to encode, or None for a question about no video.
            question: The question.
            system: A system message.
            captions: Seconds and texts, such as subtitles, to write between the frames, in order.
            answer_start: How the answer begins; the model goes on from there, and it is not part of what is returned.
            max_new_tokens: Longest answer.
            temperature: 0 for the likeliest answer.
            top_p: Sample among the likeliest tokens that make up this probability.
            stop: Texts that end the answer; they are not part of it.
            **encode_options: Options of `encode`.

        Returns:
            The answer, written while you iterate over it. An empty question is a StormError, a prompt longer than the
            model's context or larger than the memory a BudgetError.

        Raises:
            StormError: Options of encoding are given where there is nothing to encode.
        """
        messages = question_messages(self.processor, question, system=system, with_video=video is not None)
        is_encoded_now = False
        if video is not None and not isinstance(video, VideoTokens):
            before = self._last_encoded
            video = self.encode(video, **encode_options)
            is_encoded_now = not video.is_from_cache and (before is None or before[1] is not video)
        elif encode_options:
            raise StormError(f"{', '.join(encode_options)}: there is no video left to encode")
        return self.answer_messages(
            messages,
            video,
            captions=captions,
            answer_start=answer_start,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            stop=stop,
            is_encoded_now=is_encoded_now,
        )

    def ask_batch(self, prompts: Sequence[Prompt], *, max_new_tokens: int = 128) -> list[str]:
        """Answers several questions at once, each with the likeliest tokens.

        Args:
            prompts: The questions, at least one. Those about one video are fastest: it is read once for all of them, and
                kept for the next call.
            max_new_tokens: Longest answer.

        Returns:
            The answers, in the order of the questions; what cannot be answered is an error as in `ask`.
        """
        sampling = _sampling(max_new_tokens, temperature=0.0, top_p=1.0)
        token_ids = [self._prompt_ids(prompt) for prompt in prompts]
        rooms = [
            check_context(
                ids, prompt.video, self.context_length, max_new_tokens, self.processor.video_token_id
            )
            for ids, prompt in zip(token_ids, prompts, strict=True)
        ]
        num_tokens, num_new_tokens = len(prompts) * max(map(len, token_ids)), min(rooms)
        self._check_prompt_memory(num_tokens, len(prompts) * num_new_tokens)
        with self._lock:
            return generate_batch(
                self.model,
                self.processor,
                self._prefix,
                token_ids,
                [prompt.video for prompt in prompts],
                sampling | {"max_new_tokens": num_new_tokens},
            )

    def score_answers(self, prompt: Prompt, answers: Sequence[str], *, with_end: bool = True) -> list[float]:
        """Tells how likely given answers are, such as the options of a question.

        Args:
            prompt: The question.
            answers: What the model might write, at least one and none of them empty.
            with_end: Whether the answer has to end there: with it ``a cat`` does not gain from ``a catfish``.

        Returns:
            For each answer the sum of the natural logarithms of its tokens' probabilities.

        Raises:
            StormError: An answer is empty, there is none, or nothing can end one; what cannot be asked is an error as in `ask`.
        """
        tokenizer = self.processor.tokenizer
        if not answers or not all(answers):
            raise StormError(f"expected answers to score, none of them empty, got {list(answers)}")
        if with_end and tokenizer.eos_token_id is None:
            raise StormError("the tokenizer has no token that ends an answer: score with with_end=False")
        end = [tokenizer.eos_token_id] if with_end else []
        spelled = [tokenizer(answer, add_special_tokens=False)["input_ids"] + end for answer in answers]
        token_ids, longest = self._prompt_ids(prompt), max(spelled, key=len)
        check_context(
            token_ids + longest, prompt.video, self.context_length, 1, self.processor.video_token_id
        )
        self._check_prompt_memory(len(answers) * len(token_ids + longest), 0)
        with self._lock:
            return score_answers(self.model, self.processor, self._prefix, token_ids, spelled, prompt.video)

    def chat(self, video: VideoTokens | VideoSource | None, *, system: str | None = None) -> Chat:
        """Begins a conversation about a video, which is encoded once.

        Args:
            video: An encoded video, something to encode, or None.
            system: A system message.

        Returns:
            The conversation.
        """
        if video is not None and not isinstance(video, VideoTokens):
            video = self.encode(video)
        return Chat(self, video, system=system)

    def answer_messages(
        self,
        messages: list[Message],
        video: VideoTokens | None,
        *,
        captions: Sequence[Caption] = (),
        answer_start: str = "",
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        is_encoded_now: bool = False,
    ) -> AnswerStream:
        """Answers the last message of a conversation: what `ask` and `Chat` do with theirs.

        Args:
            messages: The conversation; one message has the place of the video, if there is one.
            video: The encoded video, or None.
            captions: As for `ask`, like the options below.
            answer_start: See `ask`.
            max_new_tokens: See `ask`.
            temperature: See `ask`.
            top_p: See `ask`.
            stop: See `ask`.
            is_encoded_now: Whether the video was encoded for this answer, which then reports how long that took.

        Returns:
            The answer, as from `ask`.
        """
        started = time.perf_counter()
        sampling = _sampling(max_new_tokens, temperature, top_p)
        self._check_width(video)
        token_ids = prompt_token_ids(
            self.processor, messages, video, captions=captions, answer_start=answer_start
        )
        num_new_tokens = check_context(
            token_ids, video, self.context_length, max_new_tokens, self.processor.video_token_id
        )
        self._check_prompt_memory(len(token_ids), num_new_tokens)
        report = AnswerReport.of(
            video, is_encoded_now=is_encoded_now, is_projector_trained=self.is_projector_trained
        )
        report.num_prompt_tokens = len(token_ids)
        prompt_seconds = time.perf_counter() - started

        def generate(streamer: TextIteratorStreamer, watch: GenerationWatch) -> None:
            with self._lock:
                self._generate(
                    token_ids, video, sampling | {"max_new_tokens": num_new_tokens}, report, streamer, watch
                )
                report.time_to_first_token_seconds += prompt_seconds

        return AnswerStream(generate, self.processor.tokenizer, report, stop)

    @property
    def _patch_grid_hw(self) -> tuple[int, int]:
        processor = self.processor.video_processor
        return check_size(processor.size, processor.patch_size)

    def _prompt_ids(self, prompt: Prompt) -> list[int]:
        self._check_width(prompt.video)
        messages = question_messages(
            self.processor, prompt.question, system=prompt.system, with_video=prompt.video is not None
        )
        return prompt_token_ids(
            self.processor,
            messages,
            prompt.video,
            captions=prompt.captions,
            answer_start=prompt.answer_start,
        )

    def _check_prompt_memory(self, num_tokens: int, num_new_tokens: int) -> None:
        """Refuses prompts and answers that do not fit; the keys of the last question are used again or dropped."""
        free_bytes = available_bytes(self.model, self.max_memory_bytes) + self._prefix.num_bytes
        check_prompt_memory(self.model, num_tokens, num_new_tokens, free_bytes)

    def _known(self, key: str | None) -> VideoTokens | None:
        """Returns an encoded video from this process or from the disk."""
        if key is None:
            return None
        if self._last_encoded is not None and self._last_encoded[0] == key:
            return self._last_encoded[1]
        if self._cache is None or (known := self._cache.get(key, self.model.device)) is None:
            return None
        self._last_encoded = (key, known)
        return known

    def _make_room(self, num_frames: int, compression: TokenCompression) -> None:
        """Checks that a video can be encoded and asked about; forgets the last question's keys if they are in the way."""
        frame_size = self.processor.video_processor.frame_size
        try:
            check_memory(self.model, frame_size, num_frames, compression, self.max_memory_bytes)
        except BudgetError:
            with self._lock:
                num_bytes = self._prefix.num_bytes
                self._prefix.clear()
            if num_bytes == 0:
                raise
            check_memory(self.model, frame_size, num_frames, compression, self.max_memory_bytes)

    def _provenance(self, video: VideoSource, reader: VideoReader) -> Provenance:
        return Provenance(
            source=reader.metadata.source,
            content_sha256=self._content_hash(video),
            duration_seconds=reader.metadata.duration_seconds,
            model_fingerprint=self._fingerprint(),
            dtype=str(self.model.dtype).removeprefix("torch."),
            version=version("storm-vlm"),
        )

    @torch.inference_mode()
    def _generate(
        self,
        token_ids: list[int],
        video: VideoTokens | None,
        options: dict[str, Any],
        report: AnswerReport,
        streamer: TextIteratorStreamer,
        watch: GenerationWatch,
    ) -> None:
        """Writes one answer, reading only what the prompt does not share with the one before."""
        watch.start()
        weights = weights_state(self.model)
        cache, num_cached = self._prefix.take(token_ids, video, weights)
        input_ids = torch.tensor([token_ids], device=self.model.device)
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if video is not None and self.processor.video_token_id in token_ids[num_cached:]:
            inputs["video_features"] = video.tokens.flatten(0, 2)
        sequence = self.model.generate(
            **inputs, **options, **{CACHE_NAME: cache}, streamer=streamer, stopping_criteria=[watch]
        )
        self._prefix.keep(cache, sequence[0].tolist(), video, weights)
        report.num_cached_tokens = num_cached
        report.num_new_tokens = watch.num_tokens
        report.time_to_first_token_seconds = watch.first_token_seconds - watch.started_seconds
        report.seconds["prefill"] = report.time_to_first_token_seconds
        report.seconds["decode"] = watch.last_token_seconds - watch.first_token_seconds

    def _check_width(self, video: VideoTokens | None) -> None:
        """Refuses tokens that another model encoded; says so where only the weights are others."""
        if video is None:
            return
        width = self.model.config.projector_config.output_size
        if video.tokens.shape[-1] != width:
            raise StormError(
                f"{video.provenance.source}: its tokens are {video.tokens.shape[-1]} wide and this model takes {width}: "
                f"encode the video with this model"
            )
        if video.provenance.model_fingerprint != self._fingerprint():
            logger.warning("%s was encoded with other weights than this model's", video.provenance.source)


def _sampling(max_new_tokens: int, temperature: float, top_p: float) -> dict[str, Any]:
    """Returns the options of generate, after checking them."""
    if max_new_tokens < 1:
        raise StormError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise StormError(f"temperature must be 0 or more, got {temperature}")
    if not 0 < top_p <= 1:
        raise StormError(f"top_p must be above 0 and at most 1, got {top_p}")
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}


def _override(
    compression: TokenCompression,
    temporal_pool: int | None,
    spatial_pool: int | None,
    temporal_sample: int | None,
) -> TokenCompression:
    given = {"temporal_pool": temporal_pool, "spatial_pool": spatial_pool, "temporal_sample": temporal_sample}
    return replace(compression, **{name: value for name, value in given.items() if value is not None})
