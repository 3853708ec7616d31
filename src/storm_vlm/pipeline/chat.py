"""Chat: a conversation about one video."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from storm_vlm.pipeline.answer import AnswerStream
from storm_vlm.pipeline.prompt import Message, answer_message, text_message
from storm_vlm.pipeline.video_tokens import VideoTokens

if TYPE_CHECKING:
    from storm_vlm.pipeline.video_qa import VideoQA


class Chat:
    """A conversation about one video; each question sees the questions and answers before it.

    Args:
        video_qa: The pipeline.
        video: The encoded video, or None.
        system: A system message.
    """

    def __init__(self, video_qa: "VideoQA", video: VideoTokens | None, *, system: str | None = None) -> None:
        self._video_qa = video_qa
        self.video = video
        self.messages = [text_message(video_qa.processor, "system", system)] if system else []

    def ask(
        self,
        question: str,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
    ) -> AnswerStream:
        """Asks the next question; it joins the history, with its answer, once the answer is complete.

        Args:
            question: The question.
            max_new_tokens: Longest answer.
            temperature: 0 for the likeliest answer.
            top_p: Sample among the likeliest tokens that make up this probability.
            stop: Texts that end the answer; they are not part of it.

        Returns:
            The answer, written while you iterate over it.
        """
        is_first = not any(message["role"] == "user" for message in self.messages)
        message = text_message(
            self._video_qa.processor, "user", question, with_video=is_first and self.video is not None
        )
        stream = self._video_qa.answer_messages(
            [*self.messages, message],
            self.video,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            stop=stop,
        )
        stream.when_finished(lambda answer: self._remember(message, answer))
        return stream

    def _remember(self, message: Message, answer: str) -> None:
        self.messages += [message, answer_message(self._video_qa.processor, answer)]
