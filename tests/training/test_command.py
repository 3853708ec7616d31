"""`storm train` as a user runs it: a dry run, a run, and one line for each mistake."""

from tests.cli.test_cli import storm_here  # noqa: F401 (a fixture)


def test_dry_run_writes_nothing(storm_here, write_recipe, tmp_path):  # noqa: F811
    result = storm_here("train", write_recipe(), "--dry-run", "--set", "learning_rates.language_model=null")
    assert result.returncode == 0, result.stderr
    for expected in (
        "temporal_projector",
        "frozen",
        "0.01",
        "tokens a step:",
        "steps:",
        "4 (4 batches)",
        "GiB",
    ):
        assert expected in result.stdout, result.stdout
    assert not (tmp_path / "run").exists()


def test_run_says_what_it_wrote(storm_here, write_recipe, tmp_path):  # noqa: F811
    result = storm_here("train", write_recipe(), "--cpu", "--set", "schedule.max_steps=2")
    assert result.returncode == 0, result.stderr
    assert "trained: 2 steps, loss " in result.stdout
    assert str(tmp_path / "run" / "model") in result.stdout
    assert (tmp_path / "run" / "training_curve.png").is_file()


def test_mistakes_are_one_line(storm_here, write_recipe, tmp_path):  # noqa: F811
    for recipe, arguments, message in (
        (write_recipe(), ("--set", "schedule.steps=1"), "unknown setting schedule.steps"),
        (write_recipe(), ("--set", f"data.mixture={tmp_path / 'no.json'}"), "no.json: no such file"),
        (write_recipe(), ("--set", "model.path=nowhere"), "cannot load the model nowhere"),
        (write_recipe(), ("--set", "output.report_to=[diary]"), "diary is no tracker that is installed"),
        (write_recipe(), ("--set", "video.spatial_pool=9"), "video: spatial_pool=9"),
        (
            write_recipe(),
            ("--set", "schedule.lr_scheduler=cosinus"),
            "cosinus is not a valid SchedulerType",
        ),
    ):
        result = storm_here("train", recipe, "--cpu", *arguments)
        assert result.returncode == 2, message
        assert message in result.stderr, message
        assert result.stderr.strip().count("\n") == 0, result.stderr
