"""Generation: the cache, beams and padding change how an answer is computed and never which."""

import pytest
import torch

from tests.model.tiny import ask, encode, make_image, make_model, make_video

NUM_TOKENS = 8
GREEDY = {"max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS, "do_sample": False}
BEAMS = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
CONVERSATIONS = [
    ask(make_video(5, 1), "what?"),
    ask("no picture at all"),
    ask(make_image(2), "between", make_video(3, 3), make_image(4), "why is it so?"),
]


@pytest.fixture(scope="module")
def tiny():
    return make_model(temporal_pool=2)


@pytest.fixture(scope="module")
def greedy(tiny):
    """The answers that every way of greedy decoding must give."""
    return answers(tiny, CONVERSATIONS)


def answers(tiny, conversations, **options):
    model, processor = tiny
    inputs = encode(processor, conversations)
    sequences = model.generate(**inputs, **GREEDY | options)
    return sequences[:, inputs["input_ids"].shape[1] :]


def test_the_answers_depend_on_the_pictures(tiny, greedy):
    """Otherwise the tests below would see nothing."""
    others = [
        ask(make_video(5, 7), "what?"),
        CONVERSATIONS[1],
        ask(make_image(8), "between", make_video(3, 9), make_image(4), "why is it so?"),
    ]
    got = answers(tiny, others)
    assert [torch.equal(row, want) for row, want in zip(got, greedy, strict=True)] == [False, True, False]


def test_the_cache_changes_nothing(tiny, greedy):
    assert torch.equal(answers(tiny, CONVERSATIONS, use_cache=False), greedy)


def test_a_static_cache_changes_nothing(tiny, greedy):
    got = answers(tiny, CONVERSATIONS, cache_implementation="static", disable_compile=True)
    assert torch.equal(got, greedy)


def test_padding_changes_nothing(tiny, greedy):
    for i, conversation in enumerate(CONVERSATIONS):
        assert torch.equal(answers(tiny, [conversation]), greedy[i : i + 1])


def test_absolute_positions_begin_after_the_padding():
    tiny = make_model("siglip", "gpt2")
    together = answers(tiny, CONVERSATIONS)
    for i, conversation in enumerate(CONVERSATIONS):
        assert torch.equal(answers(tiny, [conversation]), together[i : i + 1])


@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_of_a_batch_are_those_of_its_samples(tiny, use_cache):
    together = answers(tiny, CONVERSATIONS, **BEAMS, use_cache=use_cache)
    assert together.shape == (6, NUM_TOKENS)
    for i, conversation in enumerate(CONVERSATIONS):
        assert torch.equal(answers(tiny, [conversation], **BEAMS), together[2 * i : 2 * i + 2])


def test_samples_depend_on_the_seed(tiny):
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append(answers(tiny, CONVERSATIONS, do_sample=True, num_return_sequences=3))
    assert drawn[0].shape == (9, NUM_TOKENS)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert not torch.equal(drawn[0][0], drawn[0][1])


@pytest.mark.parametrize("options", [GREEDY, BEAMS], ids=["greedy", "beams"])
def test_embeddings_in_place_of_ids(tiny, options):
    model, processor = tiny
    inputs = encode(processor, CONVERSATIONS)
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert torch.equal(model.generate(**inputs, **options), answers(tiny, CONVERSATIONS, **options))


def test_an_assistant_model_changes_nothing(tiny, greedy):
    assert torch.equal(answers(tiny, CONVERSATIONS[:1], assistant_model=tiny[0]), greedy[:1])


def test_the_cache_of_one_answer_continues_it(tiny, greedy):
    model, processor = tiny
    inputs = encode(processor, CONVERSATIONS[:1])
    half = {"max_new_tokens": NUM_TOKENS // 2, "min_new_tokens": NUM_TOKENS // 2}
    first = model.generate(**inputs, **GREEDY | half, return_dict_in_generate=True)
    ids = first.sequences
    second = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=first.past_key_values,
        **GREEDY | half,
    )
    assert torch.equal(second[:, -NUM_TOKENS:], greedy[:1])


def test_pictures_are_encoded_once(tiny):
    model, processor = tiny
    num_frames = []
    handle = model.vision_tower.register_forward_hook(
        lambda module, args, kwargs, output: num_frames.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    model.generate(**encode(processor, CONVERSATIONS[:1]), **BEAMS)
    handle.remove()
    assert num_frames == [5]


def test_placeholders_are_never_written(tiny):
    model, processor = tiny
    placeholders = torch.tensor([model.config.image_token_id, model.config.video_token_id])
    inputs = encode(processor, CONVERSATIONS)
    bias = {(int(token),): 100.0 for token in placeholders}
    sequences = model.generate(**inputs, **GREEDY, sequence_bias=bias, use_cache=False)
    assert not torch.isin(sequences[:, inputs["input_ids"].shape[1] :], placeholders).any()


@pytest.mark.parametrize(
    "backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)]
)  # the slow one compiles C++
def test_the_language_model_compiles(tiny, greedy, backend):
    model, processor = tiny
    inputs = encode(processor, CONVERSATIONS)
    with torch.no_grad():
        want = model(**inputs).logits
        original = model.model.language_model
        model.model.language_model = torch.compile(original, backend=backend)
        got = model(**inputs).logits
        again = answers(tiny, CONVERSATIONS)
        model.model.language_model = original
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
    assert torch.equal(again, greedy)
