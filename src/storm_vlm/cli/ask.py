"""`storm ask`: one question about one video, answered as it is written."""

import json

import typer

from storm_vlm.cli import options as opt


def ask(
    video: opt.VideoArgument,
    question: str = typer.Argument(help="The question."),
    model: opt.ModelOption = None,
    frames: opt.FramesOption = None,
    fps: opt.FpsOption = None,
    token_budget: opt.TokenBudgetOption = None,
    temporal_pool: opt.TemporalPoolOption = None,
    spatial_pool: opt.SpatialPoolOption = None,
    temporal_sample: opt.TemporalSampleOption = None,
    start: opt.StartOption = None,
    end: opt.EndOption = None,
    max_new_tokens: opt.MaxNewTokensOption = 128,
    temperature: opt.TemperatureOption = 0.0,
    allow_urls: opt.AllowUrlsOption = False,
    device: opt.DeviceOption = "auto",
    dtype: opt.DtypeOption = "auto",
    max_memory: opt.MaxMemoryOption = None,
    cache: opt.CacheOption = True,
    as_json: opt.JsonOption = False,
) -> None:
    """Ask a question about a video."""
    from storm_vlm.cli.session import load_video_qa, warn_if_untrained
    from storm_vlm.cli.terminal import errors_console, progress_bars, write_pieces

    video_qa = load_video_qa(
        model, device=device, dtype=dtype, max_memory_gib=max_memory, cache=cache, quiet=as_json
    )
    with progress_bars(enabled=not as_json) as progress:
        answer = video_qa.ask(
            video,
            question,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            num_frames=frames,
            fps=fps,
            token_budget=token_budget,
            temporal_pool=temporal_pool,
            spatial_pool=spatial_pool,
            temporal_sample=temporal_sample,
            start_seconds=start,
            end_seconds=end,
            allow_urls=allow_urls,
            progress=progress,
        )
    if as_json:
        text = answer.text()
        typer.echo(
            json.dumps({"answer": text, "video": video, "question": question, **answer.report.to_dict()})
        )
        return
    warn_if_untrained(is_trained=video_qa.is_projector_trained)
    write_pieces(answer)
    errors_console.print(answer.report.line(), style="dim", highlight=False)
