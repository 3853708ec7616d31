"""The real command: what it prints where, its exit codes, and one line for each mistake."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import storm_vlm_console
from tests.pipeline.conftest import clip, model_folder  # noqa: F401 (fixtures)
from tests.video.clips import write_audio, write_clip

STORM = [sys.executable, "-c", "from storm_vlm_console import main; main()"]


@dataclass
class Finished:
    """What a command that ran inside this process left behind."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def storm_here(tmp_path, monkeypatch, capsys):
    """Runs the same entry point inside this process, which spares loading the libraries anew."""
    monkeypatch.setenv("STORM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["storm", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as finished:
            storm_vlm_console.main()
        return Finished(finished.value.code or 0, *capsys.readouterr())

    return run


@pytest.fixture
def storm(tmp_path):
    """Runs `storm` as a process with a cache of its own."""
    environment = os.environ | {"STORM_CACHE": str(tmp_path / "cache"), "COLUMNS": "200"}

    def run(*arguments, stdin=""):
        return subprocess.run(
            [*STORM, *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            env=environment,
            timeout=120,
        )

    return run


def assert_one_line_error(process, *fragments):
    assert process.returncode == 2, process.stderr
    assert process.stdout == ""
    lines = process.stderr.strip().splitlines()
    assert len(lines) == 1, process.stderr
    assert lines[0].startswith("error: ")
    for fragment in fragments:
        assert fragment in lines[0]


def test_help_is_light():
    """`storm --help` must not load torch."""
    code = (
        "import sys, storm_vlm_console\n"
        "sys.argv = ['storm', '--help']\n"
        "try:\n    storm_vlm_console.main()\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'av', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    for command in ("ask", "chat", "compose", "convert", "info", "setup-demo"):
        assert command in process.stdout


def test_import_registers_the_model():
    code = (
        "import storm_vlm\nfrom transformers import AutoConfig\n"
        "assert AutoConfig.for_model('storm').model_type == 'storm'"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_ask_prints_the_answer_alone(storm, model_folder, clip):  # noqa: F811
    process = storm(
        "ask", clip, "What happens?", "--model", model_folder, "--frames", 12, "--max-new-tokens", 6
    )
    assert process.returncode == 0, process.stderr
    assert "12 frames | 24 visual tokens (50% of uncompressed)" in process.stderr
    assert "not trained" in process.stderr
    assert "frames |" not in process.stdout


def test_ask_as_json(storm, model_folder, clip):  # noqa: F811
    arguments = ("ask", clip, "What?", "--model", model_folder, "--json", "--max-new-tokens", 5)
    first, second = storm(*arguments), storm(*arguments)
    assert first.stderr == ""
    report = json.loads(first.stdout)
    assert report["num_visual_tokens"] == 16
    assert report["num_new_tokens"] == 5
    assert {"read", "vision", "projector", "prefill", "decode"} <= report["seconds"].keys()
    again = json.loads(second.stdout)
    assert again["is_video_from_cache"]
    assert again["answer"] == report["answer"]


def test_chat_keeps_the_video(storm, model_folder, clip):  # noqa: F811
    process = storm("chat", clip, "--model", model_folder, "--max-new-tokens", 4, stdin="What?\nWhy?\n\n")
    assert process.returncode == 0, process.stderr
    assert process.stderr.count("new tokens") == 2
    assert "prompt tokens kept" in process.stderr


def test_compression_options(storm_here, model_folder, clip):  # noqa: F811
    process = storm_here(
        "ask", clip, "?", "--model", model_folder, "--json", "--max-new-tokens", 1,
        "--frames", 32, "--temporal-pool", 4, "--temporal-sample", 2, "--spatial-pool", 4,
    )  # fmt: skip
    report = json.loads(process.stdout)
    assert (report["num_visual_tokens"], report["num_uncompressed_tokens"]) == (4, 128)


def test_info(storm_here, model_folder, clip):  # noqa: F811
    environment = json.loads(storm_here("info", "--json").stdout)["storm-vlm"]
    assert environment["scan_backend"].split()[0] in environment["scan_backends_here"]
    assert "storm setup-demo" in environment["default_model"] or "ready" in environment["default_model"]
    described = json.loads(storm_here("info", "--json", "--video", clip, "--model", model_folder).stdout)
    assert (described["video"]["width"], described["video"]["height"]) == (64, 48)
    assert described["model"]["tokens_per_frame"] == 4
    assert "64" in storm_here("info", "--video", clip).stdout


def test_compose_from_saved_parts(storm_here, tmp_path, model_folder, clip):  # noqa: F811
    from transformers import SiglipImageProcessorPil

    from tests.pipeline.conftest import make_parts

    model, processor = make_parts()
    vision, llm = tmp_path / "vision", tmp_path / "llm"
    model.vision_tower.save_pretrained(vision)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(vision)
    from transformers import Qwen3ForCausalLM

    Qwen3ForCausalLM(model.config.text_config).save_pretrained(llm)
    processor.tokenizer.save_pretrained(llm)
    out = tmp_path / "composed"
    process = storm_here(
        "compose", "--vision", vision, "--llm", llm, "--out", out, "--temporal-pool", 4, "--frames", 8
    )
    assert process.returncode == 0, process.stderr
    answer = storm_here("ask", clip, "What?", "--model", out, "--json", "--max-new-tokens", 2)
    assert json.loads(answer.stdout)["num_visual_tokens"] == 8
    assert_one_line_error(
        storm_here("compose", "--vision", vision, "--llm", llm, "--out", out), "composed already exists"
    )
    assert_one_line_error(
        storm_here("compose", "--vision", vision, "--llm", llm, "--out", tmp_path / "b", "--spatial-pool", 9),
        "spatial_pool=9",
    )
    assert_one_line_error(
        storm_here("compose", "--vision", tmp_path / "none", "--llm", llm, "--out", tmp_path / "b"),
        "vision encoder",
    )
    assert not (tmp_path / "b").exists()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def bad_videos(folder: Path) -> dict[str, Path]:
    good = folder / "good.mp4"
    write_clip(good, num_frames=30, fps=10, size=(48, 64))
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a video")
    (folder / "truncated.mp4").write_bytes(good.read_bytes()[:400])
    (folder / "directory").mkdir()
    write_audio(folder / "audio.mp4")
    names = ("missing.mp4", "empty.mp4", "text.mp4", "truncated.mp4", "directory", "audio.mp4")
    return {name: folder / name for name in names}


@pytest.mark.parametrize(
    "name", ["missing.mp4", "empty.mp4", "text.mp4", "truncated.mp4", "directory", "audio.mp4"]
)
def test_bad_videos_are_one_line(storm_here, tmp_path, model_folder, name):  # noqa: F811
    path = bad_videos(tmp_path)[name]
    assert_one_line_error(storm_here("ask", path, "What?", "--model", model_folder), name)
    assert list((tmp_path / "cache").rglob("*.safetensors")) == []


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--spatial-pool", "9"], "spatial_pool=9"),
        (["--spatial-pool", "3"], "perfect square"),
        (["--frames", "4", "--temporal-pool", "8"], "temporal_pool=8 is larger than the 4 frames"),
        (["--token-budget", "1"], "token_budget=1"),
        (["--start", "99"], "99"),
        (["--start", "3", "--end", "1"], "3"),
        (["--fps", "-1"], "fps"),
        (["--max-memory", "0.0001"], "GiB"),
        (["--device", "abacus"], "device 'abacus'"),
        (["--dtype", "int3"], "dtype"),
        (["--model", "no/such-model-here"], "no/such-model-here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_one_line(storm_here, model_folder, clip, options, fragment):  # noqa: F811
    model = [] if "--model" in options else ["--model", model_folder]
    assert_one_line_error(storm_here("ask", clip, "What?", *model, *options), fragment)


def test_bad_questions_are_one_line(storm_here, model_folder, clip):  # noqa: F811
    assert_one_line_error(storm_here("ask", clip, " ", "--model", model_folder), "question is empty")
    assert_one_line_error(storm_here("ask", clip, "long " * 500, "--model", model_folder), "takes 600")


def test_network_videos_need_permission(storm_here, model_folder):  # noqa: F811
    process = storm_here("ask", "https://example.org/clip.mp4", "What?", "--model", model_folder)
    assert_one_line_error(process, "--allow-urls")


def test_default_model_says_how_to_get_it(storm_here, clip, monkeypatch):  # noqa: F811
    from storm_vlm.model.demo_parts import LANGUAGE_MODEL, _installed_path

    if _installed_path(LANGUAGE_MODEL) is not None:
        pytest.skip("the default model's parts are installed")
    assert_one_line_error(storm_here("ask", clip, "What?"), "storm setup-demo")
