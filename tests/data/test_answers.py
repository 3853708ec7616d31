"""Loss on answers only: hand-worked token lists, and the same rule through the templates of several families."""

import pytest
import torch

from storm_vlm.data import Item, Record, Turn, encode_record, render_with_answers
from storm_vlm.errors import DataError
from storm_vlm.model.chat_template import multimodal_chat_template
from tests.model.tiny import make_model

CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen3 writes an empty thought before the last answer only.
QWEN3 = (
    "{%- set ns = namespace(last=0) -%}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}"
    "{%- if m.role == 'assistant' and loop.index0 > ns.last -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}"
    "{{- m.content + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
LLAMA3 = (
    "{{- bos_token }}{%- for m in messages %}"
    "{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
SPECIALS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]

FIRST, SECOND = " A cat. ", "A dog?"
EXPECTED = {
    "chatml": (CHATML, [" A cat. <|im_end|>", "A dog?<|im_end|>"]),
    "qwen3": (QWEN3, [" A cat. <|im_end|>", "<think>\n\n</think>\n\nA dog?<|im_end|>"]),
    "llama3": (LLAMA3, ["A cat.<|eot_id|>", "A dog?<|eot_id|>"]),
    "llama2": (LLAMA2, ["  A cat.  </s>", " A dog? </s>"]),
    "none of its own": (None, ["  A cat. </s>", " A dog?</s>"]),
}


def conversation(folder=None):
    first = (Item("video", str(folder / "0.mp4")),) if folder else ()
    return Record(
        "r",
        (
            Turn("user", (*first, Item("text", "Which?"))),
            Turn("assistant", (Item("text", FIRST),)),
            Turn("user", (Item("text", "A dog?"),)),
            Turn("assistant", (Item("text", SECOND),)),
        ),
    )


@pytest.fixture
def processor_with():
    def make(template):
        _, processor = make_model(temporal_pool=2, num_frames=4)
        processor.tokenizer.chat_template = template
        processor.tokenizer.add_tokens(SPECIALS, special_tokens=True)
        processor.chat_template = multimodal_chat_template(processor.tokenizer)
        return processor

    return make


@pytest.mark.parametrize(("template", "expected"), EXPECTED.values(), ids=EXPECTED)
def test_each_template(processor_with, corpus, template, expected):
    processor = processor_with(template)
    record = conversation(corpus.parent)
    text, spans = render_with_answers(processor, record.to_messages())
    if template == LLAMA2:
        # Without a generation prompt, the space before the answer is not asked of the model.
        expected = [answer[1:] for answer in expected]
    assert [text[start:end] for start, end in spans] == expected
    example = encode_record(record, processor)
    labels = example["labels"]
    assert processor.tokenizer.decode(labels[labels != -100]) == "".join(expected)
    assert torch.equal(example["input_ids"][labels != -100], labels[labels != -100])
    visual = example["input_ids"] == processor.video_token_id
    assert visual.sum() == 2 * 4
    assert (labels[visual] == -100).all()


def test_hand_worked_tokens(processor_with):
    """The byte tokenizer's ids of ``A</s>``; everything before them carries no loss."""
    _, processor = make_model()
    record = Record("r", (Turn("user", (Item("text", "Q"),)), Turn("assistant", (Item("text", "A"),))))
    example = encode_record(record, processor)
    vocabulary = processor.tokenizer.get_vocab()
    want = [vocabulary[token] for token in (*"<user>Q<assistant>A", "</s>")]
    assert example["input_ids"].tolist() == want
    assert example["labels"].tolist() == [-100] * (len(want) - 2) + want[-2:]


def test_generation_marks_are_believed(processor_with):
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}<<{{ m.content }}>>{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
    )
    text, spans = render_with_answers(processor_with(template), conversation().to_messages())
    assert [text[start:end] for start, end in spans] == ["<< A cat. >>", "<<A dog?>>"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "changes the answers"),
        ("{% for m in messages %}{{ m.content if m.role == 'user' else '' }}{% endfor %}", "leaves out"),
    ],
    ids=["upper case", "no answers"],
)
def test_a_template_that_hides_answers_is_an_error(processor_with, template, message):
    with pytest.raises(DataError, match=message):
        render_with_answers(processor_with(template), conversation().to_messages())


def test_an_answer_found_in_its_question_is_not_mistaken(processor_with):
    """The second answer repeats the question before it: only the answer has loss."""
    text, spans = render_with_answers(processor_with(CHATML), conversation().to_messages())
    assert text[: spans[1][0]].endswith("assistant\n")
    assert text.count("A dog?") == 2
