"""Records from files as they are published, and what is said about wrong ones."""

import json

import datasets
import pytest

from storm_vlm.data import read_records
from storm_vlm.data.chat import parse_chat
from storm_vlm.data.llava import parse_llava
from storm_vlm.errors import DataError
from tests.data.corpus import llava, write_json


def shape(record):
    return [(turn.role, [(item.type, item.value) for item in turn.items]) for turn in record.turns]


def test_llava_places_files_at_their_placeholders(tmp_path):
    row = llava("1", "<image>\nand <video>\nthen <image>", "x", image=["a.png", "b.png"], video="c.mp4")
    at = {name: str(tmp_path / name) for name in ("a.png", "b.png", "c.mp4")}
    assert shape(parse_llava(row, tmp_path)) == [
        ("user", [("image", at["a.png"]), ("text", "and "), ("video", at["c.mp4"]), ("text", "then "), ("image", at["b.png"])]),
        ("assistant", [("text", "x")]),
    ]  # fmt: skip


def test_llava_image_placeholder_stands_for_a_video(tmp_path):
    record = parse_llava(llava("1", "<image>\nwhat?", "x", video="c.mp4"), tmp_path)
    assert shape(record)[0] == ("user", [("video", str(tmp_path / "c.mp4")), ("text", "what?")])


def test_llava_without_placeholder_shows_first(tmp_path):
    record = parse_llava(llava("1", "what?", "x", video="c.mp4"), tmp_path)
    assert shape(record)[0] == ("user", [("video", str(tmp_path / "c.mp4")), ("text", "what?")])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (llava("1", "<image> <image>", "x", image="a.png"), "more <image> than files"),
        (llava("1", "<image>", "x", image=["a.png", "b.png"]), "1 image file more"),
        (llava("1", "<video>", "x"), "more <video> than files"),
        (llava("1", "q", "x", image=3), "image: expected a path"),
        ({"id": 1}, "conversations: expected a list"),
        ({"conversations": [{"from": "cat", "value": "x"}]}, "conversations.from: .*'cat'"),
        ({"conversations": [{"from": "human"}]}, "conversations.value"),
    ],
)
def test_wrong_llava_records(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        parse_llava(row, tmp_path)


def test_chat_messages(tmp_path):
    content = [
        {"type": "video", "path": "c.mp4"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "text", "text": "q"},
    ]
    record = parse_chat(
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "x"}]}, tmp_path
    )
    assert shape(record) == [
        ("user", [("video", str(tmp_path / "c.mp4")), ("image", str(tmp_path / "a.png")), ("text", "q")]),
        ("assistant", [("text", "x")]),
    ]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: expected"),
        ([{"role": "cat", "content": "x"}], "messages.role: .*'cat'"),
        ([{"role": "user", "content": 3}], "messages.content: .*int"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "messages.content.type: .*'audio'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "needs 'path'"),
    ],
)
def test_wrong_chat_records(tmp_path, messages, message):
    with pytest.raises(DataError, match=message):
        parse_chat({"messages": messages}, tmp_path)


def test_files_are_recognised(tmp_path):
    records = [llava("1", "q", "x"), llava("2", "q", "y")]
    chats = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "x"}]}]
    for name, rows, count in (("a.json", records, 2), ("a.jsonl", records, 2), ("b.jsonl", chats, 1)):
        (found,) = read_records("s", write_json(tmp_path / name, rows))
        assert len(found) == count
        assert found[0].turns[1].text == "x"


def test_llava_video_178k(tmp_path):
    for folder, kind in (("0_30_s_academic_v0_1", "mc"), ("0_30_s_academic_v0_1", "cap"), ("nextqa", "oe")):
        (tmp_path / folder).mkdir(exist_ok=True)
        rows = [llava(kind, "<image>\nq", kind, video="academic_source/x.mp4")]
        write_json(tmp_path / folder / f"{folder}_{kind}_processed.json", rows)
    assert len(read_records("s", tmp_path)) == 3
    (found,) = read_records("s", tmp_path, subsets=["0_30_s_academic_v0_1", "mc"])
    assert found[0].turns[1].text == "mc"
    assert found[0].paths("video") == [tmp_path / "0_30_s_academic_v0_1" / "academic_source" / "x.mp4"]
    with pytest.raises(DataError, match=r"has no 1_2_m, only .*cap.*nextqa"):
        read_records("s", tmp_path, subsets=["1_2_m"])


def test_llava_cc3m(tmp_path):
    write_json(tmp_path / "chat.json", [llava("1", "<image>\nq", "x", image="GCC_1.jpg")])
    (tmp_path / "images.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="not unpacked"):
        read_records("s", tmp_path)
    (tmp_path / "images").mkdir()
    (found,) = read_records("s", tmp_path)
    assert found[0].paths("image") == [tmp_path / "images" / "GCC_1.jpg"]


@pytest.mark.parametrize("kind", ["saved", "splits", "parquet"])
def test_hugging_face_datasets(tmp_path, kind):
    rows = [llava("1", "<video>\nq", "x", video="c.mp4"), llava("2", "q", "y", video=None)]
    table = datasets.Dataset.from_list(rows)
    if kind == "saved":
        table.save_to_disk(tmp_path / "d")
    elif kind == "splits":
        datasets.DatasetDict({"test": table.select([1]), "train": table}).save_to_disk(tmp_path / "d")
    else:
        (tmp_path / "d").mkdir()
        table.to_parquet(tmp_path / "d" / "train-00000-of-00001.parquet")
    (found,) = read_records("s", tmp_path / "d")
    assert [record.turns[1].text for record in map(found.__getitem__, range(2))] == ["x", "y"]
    assert found[0].paths("video") == [tmp_path / "d" / "c.mp4"]
    if kind != "saved":
        with pytest.raises(DataError, match="split 'dev' is not there"):
            read_records("s", tmp_path / "d", split="dev")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[", "a.json: line 1 is no JSON"),
        ("a.jsonl", '{"messages": []}\n{', "a.jsonl: line 2 is no JSON"),
        ("a.json", "[]", "a.json: expected a list"),
        ("a.json", json.dumps(["x"]), "a.json: expected a list"),
        ("a.txt", "x", "a.txt: expected .json"),
    ],
)
def test_wrong_files(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read_records("s", tmp_path / name)
