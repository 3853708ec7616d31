"""VideoQA: load a model once, encode a video once, ask many times."""

import hashlib
import json
import logging
import math
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, TextIteratorStreamer

from storm_vlm.errors import BudgetError, ModelError, StormError
from storm_vlm.model import (
    FramePlan,
    StormForConditionalGeneration,
    StormProcessor,
    TokenCompression,
    visual_grid,
)
from storm_vlm.model.image_processing_storm import check_size
from storm_vlm.model.vision_features import extract_features
from storm_vlm.pipeline.answer import AnswerReport, AnswerStream, GenerationWatch
from storm_vlm.pipeline.memory import CHUNK_FRAMES, MIX_CHUNK_TOKENS, check_memory
from storm_vlm.pipeline.prefix_cache import PrefixCache
from storm_vlm.pipeline.video_tokens import Provenance, VideoTokens, VideoTokensCache
from storm_vlm.storage import cache_directory
from storm_vlm.video import VideoReader, content_hash, open_video

logger = logging.getLogger(__name__)

VideoSource = str | Path | bytes
Progress = Callable[[str, int, int], None]
Message = dict[str, Any]


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
        self._fingerprint: tuple[Any, str] | None = None
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
            The pipeline, ready for questions.

        Raises:
            ModelError: There is no such model, or it is not a STORM model.
        """
        chosen_device = _device(device)
        options: dict[str, Any] = {"dtype": _dtype(dtype, chosen_device)}
        if attn_implementation is not None:
            options["attn_implementation"] = attn_implementation
        try:
            config = AutoConfig.from_pretrained(path)
            if config.model_type != "storm":
                raise ModelError(
                    f"{path} is a {config.model_type} model, not a STORM model: see `storm compose`"
                )
            model = AutoModelForImageTextToText.from_pretrained(path, **options)
            processor = AutoProcessor.from_pretrained(path)
        except ModelError:
            raise
        except (OSError, ValueError, KeyError) as error:
            raise ModelError(f"cannot load the model {path}: {str(error).strip().splitlines()[0]}") from error
        folder = cache_directory() / "video-tokens" if use_cache else None
        return cls(model.to(chosen_device), processor, cache_folder=folder, max_memory_bytes=max_memory_bytes)

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
            allow_urls: Whether ``video`` may be on the network.
            progress: Called with the part, what is done and what there is to do.

        Returns:
            The encoded video.

        Raises:
            BudgetError: It does not fit the memory or the budget, or ``temporal_pool`` exceeds the frames.
        """
        processor = self.processor.video_processor
        compression = _override(processor.compression, temporal_pool, spatial_pool, temporal_sample)
        self._visual_grid(
            (1, *self._patch_grid_hw), compression
        )  # a bad spatial_pool is an error before any work
        with open_video(
            video, allow_urls=allow_urls, start_seconds=start_seconds, end_seconds=end_seconds
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
            key = _cache_key(provenance, targets, plan, processor.frame_size)
            if (known := self._known(key)) is not None:
                return known
            check_memory(
                self.model, processor.frame_size, plan.num_frames, plan.compression, self.max_memory_bytes
            )
            encoded = self._encode(reader, targets, plan, provenance, progress)
        if self._cache is not None and provenance.content_sha256 is not None:
            self._cache.put(key, encoded)
        self._last_encoded = (key, encoded)
        return encoded

    def ask(
        self,
        video: VideoTokens | VideoSource | None,
        question: str,
        *,
        system: str | None = None,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        **encode_options: Any,
    ) -> AnswerStream:
        """Asks one question.

        Args:
            video: An encoded video, something to encode, or None for a question about no video.
            question: The question.
            system: A system message.
            max_new_tokens: Longest answer.
            temperature: 0 for the likeliest answer.
            top_p: Sample among the likeliest tokens that make up this probability.
            **encode_options: Options of `encode`.

        Returns:
            The answer, written while you iterate over it. An empty question is a StormError, a prompt longer than the
            model's context a BudgetError.
        """
        seconds: dict[str, float] = {}
        if video is not None and not isinstance(video, VideoTokens):
            video = self.encode(video, **encode_options)
            seconds = {} if video.is_from_cache else dict(video.seconds)
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append(self._user_message(question, with_video=video is not None))
        stream = self._answer(messages, video, max_new_tokens, temperature, top_p)
        stream.add_seconds(seconds)
        return stream

    def chat(self, video: VideoTokens | VideoSource | None, *, system: str | None = None) -> "Chat":
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

    @property
    def _patch_grid_hw(self) -> tuple[int, int]:
        processor = self.processor.video_processor
        return check_size(processor.size, processor.patch_size)

    def _visual_grid(
        self, patch_grid: tuple[int, int, int], compression: TokenCompression
    ) -> tuple[int, int, int]:
        return visual_grid(patch_grid, self.model.config.projector_config.downsample, compression)

    def _known(self, key: str) -> VideoTokens | None:
        """Returns an encoded video from this process or from the disk."""
        if self._last_encoded is not None and self._last_encoded[0] == key:
            return self._last_encoded[1]
        if self._cache is None or (known := self._cache.get(key, self.model.device)) is None:
            return None
        self._last_encoded = (key, known)
        return known

    @torch.inference_mode()
    def _encode(
        self,
        reader: VideoReader,
        targets: tuple[float, ...],
        plan: FramePlan,
        provenance: Provenance,
        progress: Progress | None,
    ) -> VideoTokens:
        """Reads and encodes frames piece by piece, then mixes and compresses all tokens."""
        stopwatch = _Stopwatch(self.model.device)
        tokens, times = self._project_frames(reader, targets, stopwatch, progress)
        with stopwatch.part("projector"):
            mixed = self.model.temporal_projector.mix([tokens], chunk_size=MIX_CHUNK_TOKENS)[0]
            del tokens
        with stopwatch.part("compression"):
            compressed = self.model.model.compress(mixed, plan.compression).clone()
        patch_grid = (len(times), *self._patch_grid_hw)
        return VideoTokens(
            tokens=compressed,
            timestamps_seconds=times,
            patch_grid=patch_grid,
            num_uncompressed_tokens=math.prod(self._visual_grid(patch_grid, TokenCompression())),
            compression=plan.compression,
            provenance=provenance,
            seconds=stopwatch.seconds,
        )

    def _project_frames(
        self,
        reader: VideoReader,
        targets: tuple[float, ...],
        stopwatch: "_Stopwatch",
        progress: Progress | None,
    ) -> tuple[torch.Tensor, tuple[float, ...]]:
        """Returns the projected tokens of all frames and the frames' times; pixels live for one piece only."""
        config, processor = self.model.config, self.processor.video_processor
        projector = self.model.temporal_projector
        tokens: torch.Tensor | None = None
        times: list[float] = []
        chunks = reader.iter_chunks(targets, chunk_frames=CHUNK_FRAMES, resize=processor.decode_size)
        while True:
            with stopwatch.part("read"):
                chunk = next(chunks, None)
                if chunk is None:
                    break
                pixels = processor.to_pixel_values(chunk.frames)
            with stopwatch.part("vision"):
                features = extract_features(
                    self.model.vision_tower,
                    pixels,
                    patch_size=config.vision_patch_size,
                    feature_layer=config.vision_feature_layer,
                )
            with stopwatch.part("projector"):
                projected = projector.project(features.to(self.model.model.temporal_projector_device))
                if tokens is None:
                    tokens = projected.new_empty(len(targets), *projected.shape[1:])
                tokens[len(times) : len(times) + len(projected)] = projected
            times.extend(chunk.timestamps_seconds)
            if progress is not None:
                progress("frames", len(times), len(targets))
        if tokens is None:
            raise StormError(f"{reader.metadata.source} has no frames")
        # A file that was cut short has fewer frames than it promised.
        return tokens[: len(times)], tuple(times)

    def _provenance(self, video: VideoSource, reader: VideoReader) -> Provenance:
        is_remote = isinstance(video, str) and "://" in video and not video.startswith("file://")
        return Provenance(
            source=reader.metadata.source,
            content_sha256=None if is_remote else content_hash(video),
            duration_seconds=reader.metadata.duration_seconds,
            model_fingerprint=self._model_fingerprint(),
            dtype=str(self.model.dtype).removeprefix("torch."),
            version=version("storm-vlm"),
        )

    def _model_fingerprint(self) -> str:
        """Returns a hash of every weight that a video's tokens depend on; computed again when a weight changed."""
        parts = (self.model.vision_tower, self.model.temporal_projector)
        tensors = [(name, tensor) for part in parts for name, tensor in part.state_dict().items()]
        state = tuple((tensor.data_ptr(), tensor._version) for _, tensor in tensors)
        if self._fingerprint is not None and self._fingerprint[0] == state:
            return self._fingerprint[1]
        digest = hashlib.sha256(self.model.config.to_json_string().encode())
        for name, tensor in tensors:
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        self._fingerprint = (state, digest.hexdigest())
        return self._fingerprint[1]

    def _user_message(self, text: str, *, with_video: bool) -> Message:
        if not text.strip():
            raise StormError("the question is empty")
        for token in (self.processor.image_token, self.processor.video_token):
            if token in text:
                raise StormError(f"the question contains {token}, which stands for a picture: leave it out")
        content = [{"type": "video"}] if with_video else []
        return {"role": "user", "content": [*content, {"type": "text", "text": text}]}

    def _prompt_ids(self, messages: list[Message], video: VideoTokens | None) -> list[int]:
        """Returns the tokens of a conversation, with one placeholder for each visual token."""
        prompt = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        if video is not None:
            text = self.processor.video_text(video.patch_grid, video.compression, video.timestamps_seconds)
            prompt = prompt.replace(self.processor.video_token, text, 1)
        tokenizer = self.processor.tokenizer
        has_bos = tokenizer.bos_token is not None and prompt.startswith(tokenizer.bos_token)
        return tokenizer(prompt, add_special_tokens=not has_bos)["input_ids"]

    def _answer(
        self,
        messages: list[Message],
        video: VideoTokens | None,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
    ) -> AnswerStream:
        """Returns the answer to the last message."""
        token_ids = self._prompt_ids(messages, video)
        room = self.context_length - len(token_ids)
        if room < 1:
            num_visual = 0 if video is None else video.num_visual_tokens
            raise BudgetError(
                f"the prompt has {len(token_ids)} tokens ({num_visual} of them visual) and the language model takes "
                f"{self.context_length}: ask a shorter question, or take fewer frames or a token_budget of at most "
                f"{max(0, self.context_length - (len(token_ids) - num_visual) - max_new_tokens)}"
            )
        if room < max_new_tokens:
            logger.warning("the context leaves room for an answer of %d tokens only", room)
        report = AnswerReport.of(video, is_projector_trained=self.is_projector_trained)
        report.num_prompt_tokens = len(token_ids)
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
        options = {"max_new_tokens": min(room, max_new_tokens), **sampling}

        def generate(streamer: TextIteratorStreamer, watch: GenerationWatch) -> None:
            with self._lock:
                self._generate(token_ids, video, options, report, streamer, watch)

        return AnswerStream(generate, self.processor.tokenizer, report)

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
        cache, num_cached = self._prefix.take(token_ids, video)
        input_ids = torch.tensor([token_ids], device=self.model.device)
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        if video is not None and self.processor.video_token_id in token_ids[num_cached:]:
            inputs["video_features"] = video.tokens.flatten(0, 2)
        sequence = self.model.generate(
            **inputs, **options, past_key_values=cache, streamer=streamer, stopping_criteria=[watch]
        )
        self._prefix.keep(cache, sequence[0].tolist(), video)
        report.num_cached_tokens = num_cached
        report.num_new_tokens = watch.num_tokens
        report.time_to_first_token_seconds = watch.first_token_seconds - watch.started_seconds
        report.seconds["prefill"] = report.time_to_first_token_seconds
        report.seconds["decode"] = watch.last_token_seconds - watch.first_token_seconds


class Chat:
    """A conversation about one video; each question sees the questions and answers before it.

    Args:
        video_qa: The pipeline.
        video: The encoded video, or None.
        system: A system message.
    """

    def __init__(self, video_qa: VideoQA, video: VideoTokens | None, *, system: str | None = None) -> None:
        self._video_qa = video_qa
        self.video = video
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]

    def ask(
        self, question: str, *, max_new_tokens: int = 128, temperature: float = 0.0, top_p: float = 1.0
    ) -> AnswerStream:
        """Asks the next question; it joins the history, with its answer, once the answer is complete.

        Args:
            question: The question.
            max_new_tokens: Longest answer.
            temperature: 0 for the likeliest answer.
            top_p: Sample among the likeliest tokens that make up this probability.

        Returns:
            The answer, written while you iterate over it.
        """
        is_first = not any(message["role"] == "user" for message in self.messages)
        message = self._video_qa._user_message(question, with_video=is_first and self.video is not None)
        stream = self._video_qa._answer(
            [*self.messages, message], self.video, max_new_tokens, temperature, top_p
        )
        stream.when_finished(lambda answer: self._remember(message, answer))
        return stream

    def _remember(self, message: Message, answer: str) -> None:
        self.messages += [message, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]


class _Stopwatch:
    """Adds up the time of each part; on a GPU, after its work is done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}

    def part(self, name: str) -> "_Lap":
        """Returns a context whose time is added to ``name``."""
        return _Lap(self, name)

    def synchronize(self) -> None:
        """Waits for the GPU."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class _Lap:
    """One stretch of a stopwatch."""

    def __init__(self, stopwatch: _Stopwatch, name: str) -> None:
        self._stopwatch, self._name = stopwatch, name

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._stopwatch.synchronize()
        seconds = self._stopwatch.seconds
        seconds[self._name] = seconds.get(self._name, 0.0) + time.perf_counter() - self._started


def _cache_key(
    provenance: Provenance, targets: tuple[float, ...], plan: FramePlan, frame_size: tuple[int, int]
) -> str:
    """Returns a hash of everything that the tokens depend on."""
    facts = [
        provenance.content_sha256,
        provenance.model_fingerprint,
        provenance.dtype,
        provenance.version,
        targets,
        asdict(plan.compression),
        frame_size,
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _override(
    compression: TokenCompression,
    temporal_pool: int | None,
    spatial_pool: int | None,
    temporal_sample: int | None,
) -> TokenCompression:
    given = {"temporal_pool": temporal_pool, "spatial_pool": spatial_pool, "temporal_sample": temporal_sample}
    return replace(compression, **{name: value for name, value in given.items() if value is not None})


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise StormError(f"device {name!r} is not available here: {str(error).splitlines()[0]}") from error
    return device


def _dtype(name: str, device: torch.device) -> torch.dtype:
    """Returns the type to compute in; ``auto`` is bfloat16 on GPUs and on CPUs with instructions for it."""
    if name == "auto":
        has_bfloat16 = device.type == "cuda" or (device.type == "cpu" and _cpu_has_bfloat16())
        return torch.bfloat16 if has_bfloat16 else torch.float32
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise StormError(f"dtype must be auto, {', '.join(known)}, got {name!r}")
    return known[name]


def _cpu_has_bfloat16() -> bool:
    return torch.cpu._is_avx512_bf16_supported()
