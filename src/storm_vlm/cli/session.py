"""What `ask` and `chat` begin with: a loaded model, and a word of warning where one is due."""

from storm_vlm.cli.terminal import errors_console, hide_library_progress, spinner
from storm_vlm.pipeline import VideoQA

_GIB = 2**30


def load_video_qa(
    model: str | None,
    *,
    device: str,
    dtype: str,
    max_memory_gib: float | None,
    cache: bool,
    quiet: bool = False,
) -> VideoQA:
    """Loads the model asked for, or the default one.

    Args:
        model: Folder or hub id; the default model if None.
        device: Device, or ``auto``.
        dtype: Type to compute in, or ``auto``.
        max_memory_gib: Most memory for weights and request; no limit but the machine's if None.
        cache: Keep encoded videos on disk.
        quiet: Show nothing while loading.

    Returns:
        The pipeline.
    """
    from storm_vlm.model.default_model import default_model_path

    hide_library_progress()

    with spinner("loading the model", enabled=not quiet):
        return VideoQA.from_pretrained(
            model if model is not None else default_model_path(),
            device=device,
            dtype=dtype,
            use_cache=cache,
            max_memory_bytes=None if max_memory_gib is None else int(max_memory_gib * _GIB),
        )


def warn_if_untrained(*, is_trained: bool) -> None:
    """Says so where answers cannot describe the video."""
    if not is_trained:
        errors_console.print(
            "note: this model's temporal projector is not trained, so its answers do not describe the video",
            style="yellow",
        )


def read_question() -> str:
    """Reads a question from the terminal; an empty string at the end of the conversation."""
    try:
        return errors_console.input("[bold]> [/]").strip()
    except EOFError:
        return ""
