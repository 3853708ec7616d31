"""`storm compose`: joins a vision encoder and a language model by a new temporal projector."""

from typing import Annotated

import typer

from storm_vlm.cli.options import OutOption, OverwriteOption


def compose(
    vision: Annotated[str, typer.Option("--vision", help="Hub id or folder of a vision encoder.")],
    llm: Annotated[
        str, typer.Option("--llm", help="Hub id or folder of a causal language model, or a GGUF file.")
    ],
    out: OutOption,
    projector: Annotated[str, typer.Option(help="linear (STORM) or mlp (the VILA baseline).")] = "linear",
    mamba_layers: Annotated[int, typer.Option(min=0, help="Residual Mamba layers.")] = 1,
    unidirectional: Annotated[
        bool, typer.Option("--unidirectional", help="Scan forward only, for streams.")
    ] = False,
    identity: Annotated[
        bool, typer.Option("--identity", help="Begin as if there were no Mamba layers.")
    ] = False,
    downsample: Annotated[int, typer.Option(min=1, help="Patches merged into one token.")] = 4,
    temporal_pool: Annotated[int, typer.Option(min=1, help="Default temporal pooling.")] = 1,
    spatial_pool: Annotated[int, typer.Option(min=1, help="Default spatial pooling.")] = 1,
    temporal_sample: Annotated[int, typer.Option(min=1, help="Default temporal sampling.")] = 1,
    frames: Annotated[int, typer.Option(min=1, help="Default number of frames.")] = 32,
    frame_separator: Annotated[str, typer.Option(help="none, newline or timestamp.")] = "timestamp",
    image_size: Annotated[
        int | None, typer.Option(min=1, help="Side of the frames in pixels [default: the encoder's].")
    ] = None,
    feature_layer: Annotated[
        int | None, typer.Option(help="Hidden state of the encoder to use, such as -2 [default: its output].")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the new projector's weights.")] = 0,
    overwrite: OverwriteOption = False,
) -> None:
    """Compose a STORM model from any vision encoder and any language model."""
    from storm_vlm.cli.terminal import output_console, spinner
    from storm_vlm.model.compose import ComposeOptions
    from storm_vlm.model.compose import compose as compose_to_folder

    options = ComposeOptions(
        projector={
            "projector_type": projector,
            "num_mamba_layers": mamba_layers,
            "bidirectional": not unidirectional,
            "zero_init_residual": identity,
            "downsample": downsample,
        },
        temporal_pool=temporal_pool,
        spatial_pool=spatial_pool,
        temporal_sample=temporal_sample,
        num_frames=frames,
        frame_separator=frame_separator,  # type: ignore[arg-type]  # the processor checks it
        vision_feature_layer=feature_layer,
        seed=seed,
    )
    size = None if image_size is None else (image_size, image_size)
    with spinner("composing"):
        folder = compose_to_folder(vision, llm, out, options=options, image_size=size, overwrite=overwrite)
    output_console.print(f"model: {folder}", highlight=False)
