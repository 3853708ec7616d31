"""The `storm` command and how it reports mistakes: one line on the error stream and exit code 2."""

import logging
import sys

import typer
from rich.logging import RichHandler

from storm_vlm.cli import (
    ask,
    chat,
    compose,
    convert,
    evaluate,
    info,
    lists,
    profile,
    setup_demo,
    train,
    world,
)
from storm_vlm.cli.terminal import errors_console
from storm_vlm.errors import StormError

_USER_ERROR, _INTERRUPTED = 2, 130

app = typer.Typer(
    name="storm",
    help="Understand long video: a Mamba temporal projector between a vision encoder and a language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("ask")(ask.ask)
app.command("chat")(chat.chat)
app.command("compose")(compose.compose)
app.command("convert")(convert.convert)
app.command("eval", cls=lists.list_command(evaluate.LIST_PATTERNS))(evaluate.evaluate)
app.command("info")(info.info)
app.command("profile", cls=lists.list_command(profile.LIST_PATTERNS))(profile.profile)
app.command("setup-demo")(setup_demo.setup_demo)
app.command("train")(train.train)
app.add_typer(world.world, name="world")


@app.callback()
def options(
    verbose: bool = typer.Option(False, "--verbose", "-v", help="Show what is chosen and why."),
) -> None:
    """Understand long video: a Mamba temporal projector between a vision encoder and a language model."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=errors_console, show_time=False, show_path=False)],
    )
    # Libraries speak up when they fail; what they do meanwhile is ours to report.
    for library in ("transformers", "huggingface_hub", "httpx", "libav"):
        logging.getLogger(library).setLevel(logging.INFO if verbose else logging.ERROR)


def run() -> None:
    """Runs the command line and turns a user's mistake into one line and exit code 2."""
    try:
        app()
    except StormError as error:
        errors_console.print(
            f"error: {' '.join(str(error).split())}", style="red", markup=False, highlight=False
        )
        sys.exit(_USER_ERROR)
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)
