"""What the subcommands print with: answers on the output stream, progress and errors on the error stream."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

output_console = Console(soft_wrap=True)
errors_console = Console(stderr=True, soft_wrap=True)


@contextmanager
def progress_bars(*, enabled: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """Yields a callback ``(part, done, total)`` that draws one bar for each part and wipes them at the end."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=errors_console, transient=True, disable=not enabled) as progress:
        bars: dict[str, TaskID] = {}

        def report(part: str, done: int, total: int) -> None:
            if part not in bars:
                bars[part] = progress.add_task(part, total=total)
            progress.update(bars[part], completed=done, total=total)

        yield report


def hide_library_progress() -> None:
    """Switches off the progress bars of transformers: ours say what is under way."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


@contextmanager
def spinner(text: str, *, enabled: bool = True) -> Iterator[None]:
    """Shows that something is under way while the block runs."""
    if not enabled:
        yield
        return
    with errors_console.status(text):
        yield


def write_pieces(pieces: Iterable[str]) -> None:
    """Writes text to the output stream as it comes, and ends the line."""
    for piece in pieces:
        output_console.print(piece, end="", markup=False, highlight=False)
    output_console.print()
