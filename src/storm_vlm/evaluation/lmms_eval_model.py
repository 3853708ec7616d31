"""A STORM model in lmms-eval: `lmms-eval --model storm --model_args pretrained=my-model,num_frames=64 --tasks ...`.

Only lmms-eval imports this file, which finds it by the entry point ``lmms_eval.models``.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from tqdm import tqdm

from storm_vlm.errors import StormError
from storm_vlm.evaluation.answering import EvaluationSettings
from storm_vlm.model.default_model import default_model_path
from storm_vlm.model.modeling_storm import IGNORED_LABEL
from storm_vlm.pipeline.loading import load_model

# Options of lmms-eval's tasks that `generate` takes under the same name.
_GENERATION_OPTIONS = ("max_new_tokens", "temperature", "top_p", "top_k", "num_beams")
_DEFAULTS = {"max_new_tokens": 128, "num_beams": 1}


class StormLmmsEval(lmms):
    """Answers lmms-eval's requests.

    Args:
        pretrained: Folder or hub id of a STORM model; the default model if empty.
        device: ``auto``, or a device of PyTorch; with several processes each takes its own.
        dtype: ``auto`` or the name of a type.
        batch_size: Requests that are answered together.
        num_frames: Frames of each video; the model's default if None, as for the next three.
        temporal_pool: See `TokenCompression`.
        spatial_pool: See `TokenCompression`.
        temporal_sample: See `TokenCompression`.
        attn_implementation: Attention of the backbones; transformers' choice if None.
        max_batch_size: Ignored; lmms-eval gives it to every model.

    Raises:
        StormError: ``batch_size`` is no number.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "",
        *,
        device: str = "auto",
        dtype: str = "auto",
        batch_size: int | str = 1,
        num_frames: int | None = None,
        temporal_pool: int | None = None,
        spatial_pool: int | None = None,
        temporal_sample: int | None = None,
        attn_implementation: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if self._world_size > 1:
            device = str(self.accelerator.device)
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise StormError(f"batch_size: expected a number from 1, got {batch_size!r}")
        self.batch_size = int(batch_size)
        self.model, self.processor = load_model(
            pretrained or default_model_path(),
            device=device,
            dtype=dtype,
            attn_implementation=attn_implementation,
        )
        self.model.eval()
        settings = EvaluationSettings(num_frames, temporal_pool, spatial_pool, temporal_sample)
        self._video_options = settings.encode_options()

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.device

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answers requests with ``doc_to_messages``, in their order.

        Args:
            requests: Their ``args`` are context, ``doc_to_messages``, generation options, document, task and split.

        Returns:
            Answers, up to the first of the task's ``until`` texts, with token counts.
        """
        results: list[GenerationResult] = []
        progress = tqdm(total=len(requests), disable=self.rank != 0, desc="answers")
        for conversations, options in self._batches(requests):
            results += self._generate(conversations, options)
            progress.update(len(conversations))
        progress.close()
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("generate_until", (request.args[0], request.args[2]), result.text)
        return results

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Scores given answers.

        Args:
            requests: Their ``args`` are context, answer (or what makes it of a document), ``doc_to_visual``, document,
                task and split.

        Returns:
            For each the mean negative log-likelihood of the answer's tokens, as lmms-eval's own models return it and
            its tasks expect, and whether greedy decoding would write the answer.
        """
        return [self._score(*request.args) for request in requests]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Raises StormError: these tasks build each question from the answers before, which no chat message has."""
        raise StormError("tasks of several rounds are not supported: choose tasks of one")

    def _batches(
        self, requests: Sequence[Instance]
    ) -> Iterator[tuple[list[ChatMessages], Mapping[str, Any]]]:
        """Yields neighbouring requests that can be answered together: same options, same part of their videos."""
        prepared = []
        for request in requests:
            _, doc_to_messages, options, doc_id, task, split = request.args
            messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][doc_id]))
            prepared.append((messages, options))
        for _, group in groupby(prepared, key=lambda entry: (entry[1], _part(entry[0]))):
            members = list(group)
            for start in range(0, len(members), self.batch_size):
                batch = members[start : start + self.batch_size]
                yield [messages for messages, _ in batch], batch[0][1]

    @torch.no_grad()
    def _generate(
        self, conversations: list[ChatMessages], options: Mapping[str, Any]
    ) -> list[GenerationResult]:
        texts = [
            self.processor.apply_chat_template(
                messages.to_hf_messages(), tokenize=False, add_generation_prompt=True
            )
            for messages in conversations
        ]
        media = [messages.extract_media() for messages in conversations]
        images, videos = [entry[0] for entry in media], [entry[1] for entry in media]
        inputs = self._encode(texts, images, videos, _part(conversations[0]))
        chosen = _DEFAULTS | {name: options[name] for name in _GENERATION_OPTIONS if name in options}
        chosen["do_sample"] = bool(options.get("do_sample", (chosen.get("temperature") or 0) > 0))
        if not chosen["do_sample"]:
            chosen |= {"temperature": None, "top_p": None, "top_k": None}
        written = self.model.generate(**inputs, **chosen)[:, inputs["input_ids"].shape[1] :]
        ends = options.get("until") or []
        pad_id = self.processor.tokenizer.pad_token_id
        return [
            GenerationResult(
                text=_cut(self.processor.tokenizer.decode(ids, skip_special_tokens=True), ends),
                token_counts=TokenCounts(output_tokens=int((ids != pad_id).sum())),
            )
            for ids in written
        ]

    @torch.no_grad()
    def _score(
        self, context: str, continuation: Any, doc_to_visual: Any, doc_id: int, task: str, split: str
    ) -> tuple[float, bool]:
        document = self.task_dict[task][split][doc_id]
        answer = continuation if isinstance(continuation, str) else continuation(document)
        visuals = doc_to_visual(document) or []
        videos = [visual for visual in visuals if isinstance(visual, str)]
        images = [visual for visual in visuals if not isinstance(visual, str)]
        content = [{"type": "video"}] * len(videos) + [{"type": "image"}] * len(images)
        messages = [{"role": "user", "content": [*content, {"type": "text", "text": context}]}]
        prompt = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = self._encode([prompt + answer], [images], [videos], (None, None))
        num_answer = len(self.processor.tokenizer(answer, add_special_tokens=False)["input_ids"])
        labels = inputs["input_ids"].clone()
        labels[:, :-num_answer] = IGNORED_LABEL
        outputs = self.model(**inputs, labels=labels)
        greedy = outputs.logits[0, -num_answer - 1 : -1].argmax(-1)
        return float(outputs.loss), bool((greedy == inputs["input_ids"][0, -num_answer:]).all())

    def _encode(
        self,
        texts: list[str],
        images: list[list[Any]],
        videos: list[list[Any]],
        part: tuple[float | None, float | None],
    ) -> dict[str, torch.Tensor]:
        """Reads pictures and videos; texts are padded on the left."""
        start, end = part
        options = self._video_options | {"start_seconds": start, "end_seconds": end}
        return self.processor(
            text=texts,
            images=images if any(images) else None,
            videos=videos if any(videos) else None,
            videos_kwargs={name: value for name, value in options.items() if value is not None},
            padding=True,
            padding_side="left",
            add_special_tokens=False,
            return_tensors="pt",
        ).to(self.model.device)


def _part(messages: ChatMessages) -> tuple[float | None, float | None]:
    """Returns the part of its videos that a conversation shows, in seconds; several parts are a StormError."""
    parts = {
        (item.start_time, item.end_time)
        for message in messages.messages
        for item in message.content
        if item.type == "video"
    }
    if len(parts) > 1:
        raise StormError(
            f"a conversation shows several parts of videos, expected one: {sorted(parts, key=str)}"
        )
    return next(iter(parts), (None, None))


def _cut(text: str, ends: Sequence[str]) -> str:
    """Returns the text before the first of the texts that end it."""
    places = [place for end in ends if end and (place := text.find(end)) >= 0]
    return text[: min(places, default=len(text))].strip()
