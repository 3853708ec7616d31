"""Our class in lmms-eval; runs where lmms-eval is installed (docs/evaluate.md)."""

import pytest
import torch
from PIL import Image

pytest.importorskip("lmms_eval")

from lmms_eval.api.instance import Instance
from lmms_eval.models import get_model

from storm_vlm.errors import StormError
from storm_vlm.pipeline import VideoQA
from tests.pipeline.conftest import clip, model_folder  # noqa: F401 (fixtures)

QUESTIONS = ("which?", "what is it, then?", "how many?")


@pytest.fixture
def documents(clip):  # noqa: F811 (the fixture)
    return [{"video": str(clip), "question": question} for question in QUESTIONS]


def messages(document, **part):
    content = [
        {"type": "video", "url": document["video"], **part},
        {"type": "text", "text": document["question"]},
    ]
    return [{"role": "user", "content": content}]


def make_model(folder, documents, **options):
    model = get_model("storm").create_from_arg_string(f"pretrained={folder},num_frames=4", options)
    model.task_dict = {"task": {"test": documents}}
    return model


def generate(model, to_messages, options, count=3):
    requests = [
        Instance(
            request_type="generate_until",
            arguments=("", to_messages, options, i, "task", "test"),
            idx=0,
            metadata={"task": "task", "doc_id": i, "repeats": 1},
        )
        for i in range(count)
    ]
    return [result.text for result in model.generate_until(requests)]


@pytest.mark.parametrize("batch_size", [1, 2])
def test_answers_are_those_of_the_pipeline(documents, model_folder, batch_size):  # noqa: F811
    qa = VideoQA.from_pretrained(model_folder, device="cpu", use_cache=False)
    want = [
        qa.ask(qa.encode(document["video"], num_frames=4), document["question"], max_new_tokens=6).text()
        for document in documents
    ]
    model = make_model(model_folder, documents, batch_size=batch_size, device="cpu")
    got = generate(model, messages, {"max_new_tokens": 6, "temperature": 0})
    assert got == [text.strip() for text in want]
    assert len(set(got)) > 1


def test_answers_end_where_the_task_says(documents, model_folder):  # noqa: F811
    model = make_model(model_folder, documents, device="cpu")
    whole = generate(model, messages, {"max_new_tokens": 6})[0]
    end = whole[2]
    assert (
        generate(model, messages, {"max_new_tokens": 6, "until": [end]})[0]
        == whole[: whole.find(end)].strip()
    )


def test_a_part_of_a_video_is_shown_as_that_part(documents, model_folder):  # noqa: F811
    qa = VideoQA.from_pretrained(model_folder, device="cpu", use_cache=False)
    part = qa.encode(documents[0]["video"], num_frames=4, start_seconds=0.0, end_seconds=0.3)
    want = qa.ask(part, QUESTIONS[0], max_new_tokens=6).text().strip()
    model = make_model(model_folder, documents, device="cpu")
    got = generate(
        model, lambda document: messages(document, start_time=0.0, end_time=0.3), {"max_new_tokens": 6}, 1
    )
    assert got == [want]


def test_likelihood_is_the_mean_over_the_answer(documents, model_folder):  # noqa: F811
    picture = Image.new("RGB", (32, 32), (200, 10, 10))
    model = make_model(model_folder, documents, device="cpu", dtype="float32")
    request = Instance(
        request_type="loglikelihood",
        arguments=("red?", "yes", lambda _: [picture], 0, "task", "test"),
        idx=0,
        metadata={"task": "task", "doc_id": 0, "repeats": 1},
    )
    ((loss, is_greedy),) = model.loglikelihood([request])
    conversation = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "red?"}]}]
    prompt = model.processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    inputs = model.processor(text=[prompt + "yes"], images=[[picture]], return_tensors="pt")
    with torch.no_grad():
        scores = model.model(**inputs).logits[0].float().log_softmax(-1)
    tokens = inputs["input_ids"][0]
    want = -sum(float(scores[i - 1, tokens[i]]) for i in range(len(tokens) - 3, len(tokens))) / 3
    assert loss == pytest.approx(want, rel=1e-4)
    assert is_greedy == all(int(scores[i - 1].argmax()) == tokens[i] for i in range(-3, 0))


def test_a_wrong_batch_size_is_named(documents, model_folder):  # noqa: F811
    with pytest.raises(StormError, match="batch_size: expected a number from 1, got 'auto'"):
        make_model(model_folder, documents, batch_size="auto", device="cpu")
