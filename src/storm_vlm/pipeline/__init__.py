"""Questions about videos: load a model once, encode a video once, ask many times."""

from storm_vlm.pipeline.answer import AnswerReport, AnswerStream
from storm_vlm.pipeline.chat import Chat
from storm_vlm.pipeline.encoding import Progress
from storm_vlm.pipeline.memory import MemoryEstimate, estimate_memory
from storm_vlm.pipeline.prompt import Caption, Prompt
from storm_vlm.pipeline.video_qa import VideoQA
from storm_vlm.pipeline.video_tokens import Provenance, VideoTokens

__all__ = [
    "AnswerReport",
    "AnswerStream",
    "Caption",
    "Chat",
    "MemoryEstimate",
    "Progress",
    "Prompt",
    "Provenance",
    "VideoQA",
    "VideoTokens",
    "estimate_memory",
]
