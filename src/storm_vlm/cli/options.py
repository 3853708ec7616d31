"""Options that several subcommands share."""

from pathlib import Path
from typing import Annotated

import typer

VideoArgument = Annotated[
    str, typer.Argument(help="Video file, folder of pictures, GIF, picture, or URL with --allow-urls.")
]
ModelOption = Annotated[
    str | None, typer.Option("--model", "-m", help="Folder or hub id of a STORM model [default: storm-smol].")
]
FramesOption = Annotated[
    int | None, typer.Option("--frames", min=1, help="Frames to sample, uniformly over the whole video.")
]
FpsOption = Annotated[float | None, typer.Option("--fps", help="Frames per second to sample instead.")]
TokenBudgetOption = Annotated[
    int | None, typer.Option("--token-budget", min=1, help="Most visual tokens for the language model.")
]
TemporalPoolOption = Annotated[
    int | None, typer.Option("--temporal-pool", min=1, help="Average this many consecutive frames.")
]
SpatialPoolOption = Annotated[
    int | None, typer.Option("--spatial-pool", min=1, help="Average this many tokens of a frame: 4 or 16.")
]
TemporalSampleOption = Annotated[
    int | None, typer.Option("--temporal-sample", min=1, help="Keep every n-th frame group.")
]
StartOption = Annotated[float | None, typer.Option("--start", min=0, help="Begin at this second.")]
EndOption = Annotated[float | None, typer.Option("--end", min=0, help="End at this second.")]
AllowUrlsOption = Annotated[bool, typer.Option("--allow-urls", help="Read videos from the network.")]
DeviceOption = Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, mps or auto.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="float32, bfloat16, float16 or auto.")]
MaxMemoryOption = Annotated[
    float | None, typer.Option("--max-memory", min=0, help="Refuse what needs more memory than this, in GiB.")
]
CacheOption = Annotated[
    bool, typer.Option("--cache/--no-cache", help="Keep encoded videos on disk for the next question.")
]
MaxNewTokensOption = Annotated[
    int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")
]
TemperatureOption = Annotated[
    float, typer.Option("--temperature", min=0, help="0 for the likeliest answer, more for variety.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="Folder to write; it must not exist.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it exists.")]
