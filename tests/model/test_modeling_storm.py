"""The model over many families of parts: losses, gradients, batches, placeholders, as a caller sees them."""

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from storm_vlm.model import ComposeOptions, TokenCompression, compose_model
from tests.model.tiny import (
    LLM_FAMILIES,
    ask,
    byte_tokenizer,
    causal_lm,
    encode,
    make_image,
    make_model,
    make_video,
    vision_tower,
)
from tests.numerics import assert_matches

FAMILIES = [
    ("siglip", "qwen3"),
    ("clip", "llama"),
    ("dinov2", "smollm2"),
    ("dinov2_registers", "smollm2"),
    ("dinov3", "qwen2"),
    ("siglip2", "qwen2"),
    ("efficientnet_lite", "llama"),
    ("efficientnet", "llama"),
    ("convnext", "phi"),
]
# What these encoders compute beside their patches: a pooled output, a token for masked patches.
UNUSED = ("pooler", "vision_tower.post_layernorm", "vision_tower.layernorm", "mask_token")


@pytest.fixture(scope="module", params=FAMILIES, ids="-".join)
def family(request):
    return make_model(*request.param, temporal_pool=2)


@pytest.fixture(scope="module")
def tiny():
    return make_model(temporal_pool=2)


def mixed_conversations():
    return [
        ask(make_video(5, 1), "what?"),
        ask("and now no picture at all"),
        ask(make_image(2), "between", make_video(3, 3), make_image(4), "why?"),
    ]


def last_logits(model, inputs):
    """The scores after each sample's last token, whichever side is padded."""
    last = inputs["attention_mask"].cumsum(1).argmax(1)
    with torch.no_grad():
        return model(**inputs).logits[torch.arange(len(last)), last]


def test_every_weight_learns(family):
    model, processor = family
    inputs = encode(processor, [ask(make_video(5), make_image(1), "what?"), ask(make_video(3), "why is it?")])
    model.train()
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    model.eval()
    assert torch.isfinite(loss)
    for name, parameter in model.named_parameters():
        if not any(part in name for part in UNUSED):
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
            assert parameter.grad.any() or "vision_tower" in name, name
    assert any(
        parameter.grad.any() for parameter in model.vision_tower.parameters() if parameter.grad is not None
    )
    model.zero_grad()


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_batch_gives_what_its_samples_give_alone(family, padding_side):
    model, processor = family
    together = last_logits(model, encode(processor, mixed_conversations(), padding_side=padding_side))
    for i, conversation in enumerate(mixed_conversations()):
        alone = last_logits(model, encode(processor, [conversation]))
        torch.testing.assert_close(together[i : i + 1], alone, atol=2e-5, rtol=1e-4)


def test_saved_and_loaded_it_is_the_same(family, tmp_path):
    model, processor = family
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    inputs = encode(processor, mixed_conversations())
    inputs_again = encode(AutoProcessor.from_pretrained(tmp_path), mixed_conversations())
    assert inputs.keys() == inputs_again.keys()
    for name, value in inputs.items():
        assert torch.equal(value, inputs_again[name]), name
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    with torch.no_grad():
        kept = inputs["attention_mask"].bool()
        assert_matches("logits", loaded(**inputs).logits[kept], model(**inputs).logits[kept])


def test_it_writes(family):
    model, processor = family
    inputs = encode(processor, mixed_conversations())
    ids = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert ids.shape == (3, inputs["input_ids"].shape[1] + 4)


@pytest.mark.parametrize("llm", LLM_FAMILIES)
def test_text_alone_scores_as_the_language_model_does(llm):
    language_model, tokenizer = causal_lm(llm), byte_tokenizer()
    tokenizer.pad_token = "</s>"
    inputs = tokenizer(["some text", "more text than that"], return_tensors="pt", padding=True)
    with torch.no_grad():
        want = language_model(**inputs).logits
        model, _ = compose_model(vision_tower(), language_model, tokenizer, ComposeOptions())
        got = model(**inputs).logits
    kept = inputs["attention_mask"].bool()
    assert torch.equal(got[kept], want[kept])


def test_visual_tokens_stand_where_their_placeholders_are(tiny):
    model, processor = tiny
    inputs = encode(processor, mixed_conversations())
    seen = {}
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        out = model(**inputs)
        images = model.get_image_features(inputs["pixel_values"], inputs["image_compression"]).pooler_output
        videos = model.get_video_features(
            inputs["pixel_values_videos"], inputs["video_grid_thw"], inputs["video_compression"]
        ).pooler_output
    handle.remove()
    assert [len(tokens) for tokens in images] == [4, 4]
    assert [len(tokens) for tokens in videos] == [3 * 4, 2 * 4]
    embeds, ids = seen["inputs_embeds"], inputs["input_ids"]
    assert torch.equal(embeds[0][ids[0] == model.config.video_token_id], videos[0])
    assert torch.equal(embeds[2][ids[2] == model.config.video_token_id], videos[1])
    assert torch.equal(embeds[2][ids[2] == model.config.image_token_id], torch.cat(images))
    text = (ids != model.config.video_token_id) & (ids != model.config.image_token_id)
    assert torch.equal(embeds[text], model.get_input_embeddings()(ids[text]))
    assert torch.equal(out.video_hidden_states, torch.cat(videos))
    assert torch.equal(out.image_hidden_states, torch.cat(images))


def test_an_image_is_a_video_of_one_frame(tiny):
    model, processor = tiny
    image = make_image(7)
    as_image = encode(processor, [ask(image, "what?")])
    as_video = encode(processor, [ask(image[None], "what?")])
    with torch.no_grad():
        tokens = model(**as_image).image_hidden_states
        assert_matches("tokens", model(**as_video).video_hidden_states, tokens)


@pytest.mark.parametrize("modality", ["image", "video"])
@pytest.mark.parametrize("change", [-1, 1], ids=["fewer", "more"])
def test_placeholders_and_visual_tokens_must_agree(tiny, modality, change):
    model, processor = tiny
    inputs = encode(processor, [ask(make_video(4), make_image(1), "what?")])
    token_id = getattr(model.config, f"{modality}_token_id")
    first = int((inputs["input_ids"][0] == token_id).nonzero()[0])
    if change < 0:
        inputs["input_ids"][0, first] = 5
    else:
        inputs["input_ids"][0, -1] = token_id
    count = {"image": 4, "video": 8}[modality]
    message = f"{count + change} {modality} placeholders in the text but {count} {modality} tokens"
    with pytest.raises(ValueError, match=message):
        model(**inputs)


@pytest.mark.parametrize("modality", ["image", "video"])
def test_placeholders_without_any_pixels_are_an_error(tiny, modality):
    model, processor = tiny
    inputs = encode(processor, [ask(make_video(4), make_image(1), "what?")])
    for name in ("pixel_values", "image_compression") if modality == "image" else (
        "pixel_values_videos", "video_grid_thw", "video_compression"
    ):  # fmt: skip
        del inputs[name]
    with pytest.raises(ValueError, match=f"{modality} placeholders in the text but 0 {modality} tokens"):
        model(**inputs)


def test_frames_that_the_grids_do_not_announce_are_an_error(tiny):
    model, processor = tiny
    inputs = encode(processor, [ask(make_video(4), "what?")])
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"][:3]
    with pytest.raises(ValueError, match="announces 4 frames, pixel_values_videos holds 3"):
        model(**inputs)


def test_pixels_of_videos_need_their_grids(tiny):
    model, processor = tiny
    inputs = encode(processor, [ask(make_video(4), "what?")])
    del inputs["video_grid_thw"]
    with pytest.raises(ValueError, match="needs video_grid_thw"):
        model(**inputs)


def test_sampling_frames_in_training_is_explained():
    model, processor = make_model(temporal_sample=2)
    inputs = encode(processor, [ask(make_video(4), "what?")])
    model.eval()
    assert torch.isfinite(model(**inputs).logits).all()
    model.train()
    with pytest.raises(
        ValueError, match=r"8 video placeholders .* 16 video tokens .*process training samples with"
    ):
        model(**inputs)
    inputs = encode(processor, [ask(make_video(4), "what?")], temporal_sample=1)
    assert torch.isfinite(model(**inputs, labels=inputs["input_ids"]).loss)


def test_compression_can_be_chosen_for_each_video(tiny):
    model, processor = tiny
    inputs = encode(processor, [ask(make_video(5), "a"), ask(make_video(5), "b")])
    pixels, grid = inputs["pixel_values_videos"], inputs["video_grid_thw"]
    with torch.no_grad():
        full = model.get_video_features(pixels, grid, torch.tensor([[1, 1, 1], [1, 1, 1]])).pooler_output
        mixed = model.get_video_features(pixels, grid, torch.tensor([[2, 4, 1], [1, 1, 3]])).pooler_output
        default = model.get_video_features(pixels, grid).pooler_output
    tokens = full[0].view(5, 2, 2, -1)
    assert_matches("pooled", mixed[0], TokenCompression(2, 4, 1)(tokens).flatten(0, 2))
    assert_matches("sampled", mixed[1], full[1].view(5, 2, 2, -1)[::3].flatten(0, 2))
    assert_matches("the config's", default[0], TokenCompression(2)(tokens).flatten(0, 2))


def test_visual_tokens_may_be_given_in_place_of_pixels(tiny):
    model, processor = tiny
    inputs = encode(processor, mixed_conversations())
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        want = model(**inputs)
        got = model(**text, video_features=want.video_hidden_states, image_features=want.image_hidden_states)
        assert torch.equal(got.logits, want.logits)
        with pytest.raises(ValueError, match="must not both be given"):
            model(**inputs, video_features=want.video_hidden_states)


def test_exactly_one_of_ids_and_embeddings(tiny):
    model, _ = tiny
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model()
    ids = torch.tensor([[5, 6]])
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(input_ids=ids, inputs_embeds=model.get_input_embeddings()(ids))


def test_embeddings_in_place_of_ids(tiny):
    model, processor = tiny
    inputs = encode(processor, mixed_conversations())
    with torch.no_grad():
        want = model(**inputs).logits
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
        assert torch.equal(model(**inputs).logits, want)


def test_the_loss_leaves_out_what_is_not_labelled(tiny):
    model, processor = tiny
    inputs = encode(processor, mixed_conversations(), padding_side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[labels == model.config.video_token_id] = -100
    labels[labels == model.config.image_token_id] = -100
    with torch.no_grad():
        out = model(**inputs, labels=labels)
        negative_log_likelihood = []
        for row, targets in zip(out.logits.log_softmax(-1), labels, strict=True):
            for position in range(1, len(targets)):
                if targets[position] != -100:
                    negative_log_likelihood.append(-row[position - 1, targets[position]])
    assert_matches("loss", out.loss, torch.stack(negative_log_likelihood).mean())


def test_outputs_as_transformers_names_them(tiny):
    model, processor = tiny
    inputs = encode(processor, [ask(make_video(4), "what?")])
    length = inputs["input_ids"].shape[1]
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True, use_cache=True)
        as_tuple = model(**inputs, labels=inputs["input_ids"], return_dict=False)
        last = model(**inputs, logits_to_keep=3).logits
        some = model(**inputs, logits_to_keep=torch.tensor([0, 4])).logits
        model.set_attn_implementation("eager")
        attentions = model(**inputs, output_attentions=True).attentions
        model.set_attn_implementation("sdpa")
    assert [tuple(states.shape) for states in out.hidden_states] == [(1, length, 32)] * 3
    assert out.past_key_values.get_seq_length() == length
    assert isinstance(as_tuple, tuple)
    assert as_tuple[0].ndim == 0
    assert_matches("tuple", as_tuple[1], out.logits)
    assert_matches("last", last, out.logits[:, -3:])
    assert_matches("some", some, out.logits[:, [0, 4]])
    assert len(attentions) == 2
    assert attentions[0].shape == (1, 4, length, length)


def test_keys_and_values_go_by_both_names(tiny):
    model, processor = tiny
    inputs = encode(processor, [ask(make_video(4), "what?")])
    with torch.no_grad():
        whole = model(**inputs).logits
        start = dict(
            inputs, input_ids=inputs["input_ids"][:, :-1], attention_mask=inputs["attention_mask"][:, :-1]
        )
        for name in ("past_key_values", "cache"):
            kept = model(**start, use_cache=True).past_key_values
            last = model(
                input_ids=inputs["input_ids"][:, -1:], attention_mask=inputs["attention_mask"], **{name: kept}
            )
            assert_matches(name, last.logits, whole[:, -1:])
    with pytest.raises(TypeError, match="one argument"):
        model(**inputs, past_key_values=kept, cache=kept)
