"""`storm info`: what runs here, and what a video or a model holds."""

import json
from typing import Annotated, Any

import typer

from storm_vlm.cli.options import JsonOption


def info(
    video: Annotated[str | None, typer.Option("--video", help="Describe this video.")] = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Describe this model.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show versions, devices, the scan backend and why it runs; or describe a video or a model."""
    from rich.table import Table

    from storm_vlm.cli.terminal import output_console

    sections: dict[str, dict[str, Any]] = {}
    if video is not None:
        sections["video"] = _video(video)
    if model is not None:
        sections["model"] = _model(model)
    if not sections:
        sections = {"storm-vlm": _environment()}
    if as_json:
        typer.echo(json.dumps(sections, indent=2))
        return
    for title, rows in sections.items():
        table = Table(title=title, show_header=False, title_justify="left")
        for name, value in rows.items():
            table.add_row(name.replace("_", " "), str(value))
        output_console.print(table)


def _environment() -> dict[str, Any]:
    import platform
    from importlib.metadata import version

    import torch

    from storm_vlm.model.default_model import DEFAULT_MODEL_NAME
    from storm_vlm.model.demo_parts import LANGUAGE_MODEL, VISION_ENCODER, find_part
    from storm_vlm.ops import available_backends, backend_choice
    from storm_vlm.storage import cache_directory

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    choice = backend_choice(device)
    parts_found = all(find_part(part) is not None for part in (LANGUAGE_MODEL, VISION_ENCODER))
    return {
        "version": version("storm-vlm"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "av": version("av"),
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
        "scan_backend": f"{choice.name} ({choice.reason})",
        "scan_backends_here": ", ".join(available_backends()),
        "cache": cache_directory(),
        "default_model": f"{DEFAULT_MODEL_NAME} ({'ready' if parts_found else 'run storm setup-demo'})",
    } | {"cache": str(cache_directory())}


def _video(source: str) -> dict[str, Any]:
    from dataclasses import asdict

    from storm_vlm.video import probe_video

    return asdict(probe_video(source))


def _model(path: str) -> dict[str, Any]:
    from storm_vlm.pipeline import VideoQA

    return VideoQA.from_pretrained(path).describe()
