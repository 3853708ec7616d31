"""What a world is made of: its splits, sizes and sprite styles."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from storm_vlm.data.world.script import DIFFICULTIES, Difficulty
from storm_vlm.data.world.sprites import STYLES
from storm_vlm.errors import StormError

Split = Literal["train", "test_in_vocabulary", "test_unseen_objects", "test_unseen_style", "test_long"]
SPLITS: tuple[Split, ...] = get_args(Split)
LONG_FACTOR = 4
_LONGEST_SECONDS = 3600
_SHORTEST_SECONDS = 5
# Ten events at most, within quarters of the video, each of two frames or more.
_FEWEST_FRAMES = 32
# Eight in a video, and distractors of their kind that it does not show.
_FEWEST_NAMES = 16
# One of each task.
_MOST_QUESTIONS = 8


@dataclass(frozen=True, slots=True)
class WorldConfig:
    """Everything that a generated world depends on.

    Attributes:
        seed: Sample ``i`` of a split depends on this, the split, ``i`` and the settings below; not on other samples.
        num_videos: Number of videos of each split; a split that is absent has none.
        width: Picture width in pixels, even.
        height: Picture height in pixels, even.
        fps: Frames per second.
        min_seconds: Shortest video, in seconds; four times as long in ``test_long``.
        max_seconds: Longest video, in seconds; four times as long in ``test_long``.
        questions_per_video: Multiple-choice questions of each video.
        open_per_video: Open questions of each video, beside the others.
        answer_style: How multiple-choice questions are answered: by an option's ``letter`` or the ``option``'s text.
        things: What every split but ``test_unseen_objects`` shows: the ``usual`` things, or ``other`` ones that a world
            of usual things has in no split.
        num_names: Show only so many of the things, drawn by the seed; all if None.
        difficulties: Of each video one is drawn: how large its things are, how many, and how long they are seen.
        styles: Sprite styles of every split but ``test_unseen_style``.
        unseen_style: Sprite style of ``test_unseen_style``.

    Raises:
        StormError: A field is out of range or names an unknown split or style.
    """

    seed: int = 0
    num_videos: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPLITS, 8))
    width: int = 256
    height: int = 256
    fps: int = 4
    min_seconds: int = 8
    max_seconds: int = 10
    questions_per_video: int = 4
    open_per_video: int = 1
    answer_style: Literal["letter", "option"] = "letter"
    things: Literal["usual", "other"] = "usual"
    num_names: int | None = None
    difficulties: tuple[Difficulty, ...] = DIFFICULTIES
    styles: tuple[str, ...] = ("openmoji",)
    unseen_style: str = "openmoji-grey"

    def __post_init__(self) -> None:
        for split, count in self.num_videos.items():
            if split not in SPLITS or count < 0:
                raise StormError(f"num_videos: {split}={count}; splits are {', '.join(SPLITS)}, counts >= 0")
        for style in (*self.styles, self.unseen_style):
            if style not in STYLES:
                raise StormError(f"styles: {style!r} is unknown; there are {', '.join(STYLES)}")
        if not self.styles or self.unseen_style in self.styles:
            raise StormError(f"unseen_style: {self.unseen_style!r} must not be among styles, which has >= 1")
        for name in ("width", "height"):
            value = getattr(self, name)
            if value < 64 or value % 2:
                raise StormError(f"{name}: {value} must be even and at least 64 pixels")
        self._check_choices()
        self._check_lengths()

    def _check_choices(self) -> None:
        if self.answer_style not in ("letter", "option"):
            raise StormError(f"answer_style: {self.answer_style!r} must be letter or option")
        if self.things not in ("usual", "other"):
            raise StormError(f"things: {self.things!r} must be usual or other")
        if not self.difficulties or not set(self.difficulties) <= set(DIFFICULTIES):
            expected = ", ".join(DIFFICULTIES)
            raise StormError(f"difficulties: {list(self.difficulties)!r} must be one or more of {expected}")
        if self.num_names is not None and self.num_names < _FEWEST_NAMES:
            raise StormError(f"num_names: {self.num_names} must be at least {_FEWEST_NAMES}")

    def _check_lengths(self) -> None:
        if not _SHORTEST_SECONDS <= self.min_seconds <= self.max_seconds <= _LONGEST_SECONDS:
            raise StormError(
                f"min_seconds, max_seconds: {self.min_seconds}, {self.max_seconds} must be in this order and "
                f"within {_SHORTEST_SECONDS} to {_LONGEST_SECONDS}"
            )
        if self.min_seconds * self.fps < _FEWEST_FRAMES:
            raise StormError(
                f"fps: {self.fps} over {self.min_seconds} s is too few frames for the events; "
                f"min_seconds x fps must be at least {_FEWEST_FRAMES}"
            )
        numbers = (self.questions_per_video, self.open_per_video)
        if not all(0 <= number <= _MOST_QUESTIONS for number in numbers) or not any(numbers):
            raise StormError(
                f"questions_per_video, open_per_video: {numbers[0]}, {numbers[1]} must be within 0 to "
                f"{_MOST_QUESTIONS}, not both 0"
            )
