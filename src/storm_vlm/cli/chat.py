"""`storm chat`: many questions about one video, which is encoded once."""

from storm_vlm.cli import options as opt


def chat(
    video: opt.VideoArgument,
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
) -> None:
    """Talk about a video: an empty line or the end of input ends it."""
    from storm_vlm.cli.session import load_video_qa, read_question, warn_if_untrained
    from storm_vlm.cli.terminal import errors_console, progress_bars, write_pieces

    video_qa = load_video_qa(model, device=device, dtype=dtype, max_memory_gib=max_memory, cache=cache)
    with progress_bars() as progress:
        encoded = video_qa.encode(
            video,
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
    warn_if_untrained(is_trained=video_qa.is_projector_trained)
    errors_console.print(encoded.line(), style="dim", highlight=False)
    conversation = video_qa.chat(encoded)
    while question := read_question():
        answer = conversation.ask(question, max_new_tokens=max_new_tokens, temperature=temperature)
        write_pieces(answer)
        errors_console.print(answer.report.line(), style="dim", highlight=False)
