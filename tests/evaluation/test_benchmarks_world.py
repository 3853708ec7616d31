"""The synthetic world as a benchmark, and the command."""

import json

import pytest
from PIL import Image

from storm_vlm.errors import DataError
from storm_vlm.evaluation import read_world_questions
from tests.cli.test_cli import storm_here  # noqa: F401 (fixture)
from tests.pipeline.conftest import clip, model_folder  # noqa: F401 (fixtures)


@pytest.fixture
def world(tmp_path, clip):  # noqa: F811
    """A folder as `storm world generate` leaves it, with two videos of one split."""
    folder = tmp_path / "world" / "test_long"
    (folder / "videos").mkdir(parents=True)
    records = []
    for name in ("000000", "000001"):
        (folder / "videos" / f"{name}.mp4").write_bytes(clip.read_bytes())
        for number, form in enumerate(("multiple_choice", "open", "multiple_choice")):
            question = f"<video>\nWhat {number}?\nA. a\nB. b"
            records.append({
                "id": f"{name}-{number}", "video": f"videos/{name}.mp4", "task": "needle", "form": form,
                "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "B"}],
                "options": ["a", "b"] if form == "multiple_choice" else [], "answer": "B",
            })  # fmt: skip
    (folder / "annotations.json").write_text(json.dumps(records))
    return folder.parent


def test_questions_are_those_with_options(world):
    questions = read_world_questions(world, ["test_long"])
    assert [q.identity for q in questions] == ["000000-0", "000000-2", "000001-0", "000001-2"]
    assert questions[0].prompt == "What 0?\nA. a\nB. b"
    assert (questions[0].options, questions[0].answer, questions[0].split) == (("a", "b"), "B", "test_long")
    assert all(q.video.is_file() for q in questions)
    assert len(read_world_questions(world, ["test_long"], max_videos=1)) == 2


def test_questions_ask_for_letters_or_for_texts(world):
    assert {question.answers for question in read_world_questions(world, ["test_long"])} == {None}
    file = world / "test_long" / "annotations.json"
    records = json.loads(file.read_text())
    for record in records:
        record["conversations"][1]["value"] = "b"
    file.write_text(json.dumps(records))
    assert {question.answers for question in read_world_questions(world, ["test_long"])} == {("a", "b")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": ["", "b"]}, "record 0: field 'options': expected none of them empty"),
        ({"options": []}, "record 0: field 'options': expected a list of texts"),
        ({"options": [["a"], "b"]}, "record 0: field 'options': expected a list of texts"),
        ({"conversations": []}, "record 0: field 'conversations': expected none of them empty"),
        ({"conversations": ["What?"]}, "record 0: field 'conversations': expected a list of records"),
        ({"conversations": [{"from": "human"}]}, "record 0, conversations.0.: field 'value': is missing"),
        ({"answer": "C"}, "record 0: field 'answer': expected a letter of AB"),
        ({"form": None}, "record 0: field 'form': is missing"),
    ],
)
def test_wrong_records_are_named(world, change, message):
    file = world / "test_long" / "annotations.json"
    records = json.loads(file.read_text())
    file.write_text(json.dumps([records[0] | change, *records[1:]]))
    with pytest.raises(DataError, match=message):
        read_world_questions(world, ["test_long"])


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"{}"])
def test_files_that_are_no_annotations(world, content):
    file = world / "test_long" / "annotations.json"
    file.write_bytes(content)
    with pytest.raises(DataError, match=str(file)):
        read_world_questions(world, ["test_long"])


def test_the_command_by_likelihood(world, model_folder, storm_here, tmp_path):  # noqa: F811
    """A model that writes nonsense names no option; the likeliest one is always one of them."""
    common = ["eval", "--data", world, "--splits", "test_long", "--model", model_folder]
    written = storm_here(*common, "--out", tmp_path / "written")
    assert "Answers that name no option: 4." in written.stdout
    done = storm_here(*common, "--out", tmp_path / "likeliest", "--likelihood")
    assert done.returncode == 0, done.stderr
    assert "Answers that name no option: 0." in done.stdout
    assert "Scoring: The likeliest option, in place of the one that an answer names" in done.stdout
    answers = map(json.loads, (tmp_path / "likeliest/answers.jsonl").read_text().splitlines())
    assert {answer["response"] for answer in answers} <= {"A", "B"}


def test_a_split_that_is_not_there_is_an_error(world):
    with pytest.raises(DataError, match="no questions of split test_in_vocabulary"):
        read_world_questions(world)
    with pytest.raises(DataError, match="split 'dev' is unknown"):
        read_world_questions(world, ["dev"])


def test_the_command_writes_a_table_and_goes_on(world, model_folder, storm_here, tmp_path):  # noqa: F811
    arguments = [
        "eval",
        "--data",
        world,
        "--out",
        tmp_path / "out",
        "--splits",
        "test_long",
        "--model",
        model_folder,
    ]
    done = storm_here(*arguments)
    assert done.returncode == 0, done.stderr
    assert "test_long" in done.stdout
    assert "| needle |" in done.stdout
    answers = (tmp_path / "out" / "answers.jsonl").read_bytes()
    assert storm_here(*arguments).stdout == done.stdout
    assert (tmp_path / "out" / "answers.jsonl").read_bytes() == answers
    wrong = storm_here(*arguments, "--frames", 4)
    assert wrong.returncode == 2
    assert "another num_frames" in wrong.stderr
    wrong = storm_here("eval", "--data", world, "--out", tmp_path / "x", "--task", "chess")
    assert wrong.returncode == 2
    assert "'chess' is unknown" in wrong.stderr


def test_several_numbers_of_frames(world, model_folder, storm_here, tmp_path):  # noqa: F811
    """Each is an evaluation of its own; the table and the picture have them all."""
    common = ["eval", "--data", world, "--splits", "test_long", "--model", model_folder]
    done = storm_here(*common, "--out", tmp_path / "all", "--frames", 4, 2, "--temporal-pool", 2)
    assert done.returncode == 0, done.stderr
    alone = storm_here(*common, "--out", tmp_path / "alone", "--frames", 4, "--temporal-pool", 2)
    assert alone.returncode == 0, alone.stderr
    for name in ("answers.jsonl", "settings.json", "report.json"):
        assert (tmp_path / "all/frames-4" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    reports = json.loads((tmp_path / "all/frames.json").read_text())
    assert list(reports) == ["2", "4"]
    assert reports["4"] == json.loads((tmp_path / "alone/report.json").read_text())
    value = 100 * reports["2"]["accuracies"]["test_long"]["all"]["value"]
    assert f"| 2 | {value:.1f} (" in done.stdout
    assert (tmp_path / "all/frames.md").read_text() == done.stdout
    assert Image.open(tmp_path / "all/frames.png").size[0] > 500
    wrong = storm_here(*common, "--out", tmp_path / "x", "--frames", "4,0")
    assert wrong.returncode == 2
    assert "--frames: expected numbers from 1, got '0'" in wrong.stderr


def test_splits_belong_to_the_world_alone(world, storm_here, tmp_path):  # noqa: F811
    wrong = storm_here("eval", "--data", world, "--out", tmp_path / "x", "--task", "mlvu", "--splits", "dev")
    assert wrong.returncode == 2
    assert "--splits: only for --task world" in wrong.stderr
