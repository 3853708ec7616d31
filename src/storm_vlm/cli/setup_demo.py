"""`storm setup-demo`: fetches the parts of the default model and a sample clip."""


def setup_demo() -> None:
    """Fetch what the default model is made of, about 120 MB, and two sample clips."""
    from storm_vlm.cli.terminal import errors_console, hide_library_progress, output_console
    from storm_vlm.model.default_model import setup_default_model
    from storm_vlm.model.demo_parts import CLIP_BIG_BUCK_BUNNY, CLIP_BIKES, fetch_part

    hide_library_progress()
    folder = setup_default_model(errors_console.print)
    clips = [fetch_part(part, errors_console.print) for part in (CLIP_BIKES, CLIP_BIG_BUCK_BUNNY)]
    output_console.print(f"model: {folder}", highlight=False)
    for clip in clips:
        output_console.print(f"clip:  {clip}", highlight=False)
