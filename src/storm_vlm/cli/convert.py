"""`storm convert`: turns a released video language model into a STORM model."""

from typing import Annotated

import typer

from storm_vlm.cli.options import OutOption, OverwriteOption


def convert(
    source: Annotated[str, typer.Argument(help="Hub id or folder of an NVILA checkpoint in VILA's layout.")],
    out: OutOption,
    mamba_layers: Annotated[
        int, typer.Option(min=0, help="Mamba layers to add; they begin as the identity.")
    ] = 0,
    unidirectional: Annotated[
        bool, typer.Option("--unidirectional", help="Scan forward only, for streams.")
    ] = False,
    temporal_pool: Annotated[
        int | None, typer.Option(min=1, help="Default temporal pooling [default: the source's].")
    ] = None,
    spatial_pool: Annotated[
        int | None, typer.Option(min=1, help="Default spatial pooling [default: the source's].")
    ] = None,
    temporal_sample: Annotated[int, typer.Option(min=1, help="Default temporal sampling.")] = 1,
    overwrite: OverwriteOption = False,
) -> None:
    """Convert an NVILA checkpoint: same outputs at the start, token compression and training from there."""
    from storm_vlm.cli.terminal import hide_library_progress, output_console, spinner
    from storm_vlm.model.convert import convert as convert_to_folder

    hide_library_progress()
    with spinner("converting"):
        folder = convert_to_folder(
            source,
            out,
            num_mamba_layers=mamba_layers,
            bidirectional=not unidirectional,
            temporal_pool=temporal_pool,
            spatial_pool=spatial_pool,
            temporal_sample=temporal_sample,
            overwrite=overwrite,
        )
    output_console.print(f"model: {folder}", highlight=False)
