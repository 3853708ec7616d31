import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from storm_vlm.errors import ModelError, StormError
from storm_vlm.model.convert import convert

VISION_SIZE, TEXT_SIZE, PATCH_SIZE, NUM_SCALES = 24, 32, 8, 3
SPECIAL_TOKENS = ["<unk>", "<|im_start|>", "<|im_end|>", "<vila/sentinel>", "<image>", "<vila/video>"]
# Two newlines in a row are one token, as in Qwen's tokenizer.
MERGES = [("Ċ", "Ċ"), ("e", "r")]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTION = "What happens after the red car leaves?"
TSP = {"_target_": "llava.model.encoders.TSPVideoEncoder", "pool_sizes": [[2, 2, 2]]}


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*letters, *("".join(pair) for pair in MERGES)])}
    tokenizer = Tokenizer(models.BPE(vocab, MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )


def projector_tensors(num_scales: int) -> dict[str, torch.Tensor]:
    merged_size = 4 * num_scales * VISION_SIZE
    return {
        "layers.1.weight": 1 + 0.2 * torch.randn(merged_size),
        "layers.1.bias": 0.2 * torch.randn(merged_size),
        "layers.2.weight": torch.randn(TEXT_SIZE, merged_size) / merged_size**0.5,
        "layers.2.bias": 0.2 * torch.randn(TEXT_SIZE),
        "layers.4.weight": torch.randn(TEXT_SIZE, TEXT_SIZE) / TEXT_SIZE**0.5,
        "layers.4.bias": 0.2 * torch.randn(TEXT_SIZE),
    }


def write_source(folder: Path, *, patches_per_side: int = 4, num_scales: int = 1, **config: Any) -> Path:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    text_config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_SIZE,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    vision_config = SiglipVisionConfig(
        hidden_size=VISION_SIZE,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=patches_per_side * PATCH_SIZE,
        patch_size=PATCH_SIZE,
        vision_use_head=False,
    )
    # Weights of unit size, so that what is computed depends on them visibly.
    for model, part in (
        (Qwen2ForCausalLM(text_config), "llm"),
        (SiglipVisionModel(vision_config), "vision_tower"),
    ):
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder / part)
    # Released checkpoints have the names of the transformers of their time.
    weights = load_file(folder / "vision_tower/model.safetensors")
    weights = {f"vision_model.{name}": tensor for name, tensor in weights.items()}
    save_file(weights, folder / "vision_tower/model.safetensors", {"format": "pt"})
    tokenizer.save_pretrained(folder / "llm")
    side = patches_per_side * PATCH_SIZE
    write_json(
        folder / "vision_tower/preprocessor_config.json",
        {
            "image_processor_type": "SiglipImageProcessor",
            "image_mean": [0.5, 0.4, 0.5],
            "image_std": [0.5, 0.5, 0.3],
            "resample": 3,
            "size": {"height": side, "width": side},
        },
    )
    write_json(
        folder / "mm_projector/config.json",
        {"model_type": "v2l_projector", "mm_projector_type": "mlp_downsample"},
    )
    save_file(projector_tensors(num_scales), folder / "mm_projector/model.safetensors")
    defaults = {
        "architectures": ["LlavaLlamaModel"],
        "model_type": "llava_llama",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "cls_patch",
        "image_aspect_ratio": "resize",
        "num_video_frames": 8,
        "num_time_tokens": 0,
        "dynamic_s2": num_scales > 1,
        "s2_scales": ",".join(str(side * (i + 1)) for i in range(num_scales)),
    }
    write_json(folder / "config.json", defaults | config)
    return folder


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("vila"))


def load(folder: Path) -> tuple[Any, Any]:
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def frames(num_frames: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (num_frames, 40, 56, 3), dtype=np.uint8)


def inputs_of(processor: Any, media: Any, kind: str = "video") -> Any:
    content = [{"type": kind, kind: medium} for medium in (media if isinstance(media, list) else [media])]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": QUESTION}]}]
    return processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )


# What follows is VILA's computation, as its repository does it.


def vila_vision_features(vision: SiglipVisionModel, pixels: torch.Tensor) -> torch.Tensor:
    """vision_encoder.py: the hidden states before the last layer, of all tokens."""
    states = [vision.embeddings(pixels)]
    for layer in vision.encoder.layers:
        states.append(layer(states[-1], attention_mask=None))
    return states[-2]


def vila_join_patches(features: torch.Tensor) -> torch.Tensor:
    """base_projector.py, flat_square: zeros to an even grid, then pairs of columns and pairs of rows."""
    n, tokens, c = features.shape
    side = int(tokens**0.5)
    x = features.reshape(n, side, side, c)
    if side % 2:
        x = torch.cat([x, torch.zeros(n, 1, side, c)], dim=1)
        x = torch.cat([x, torch.zeros(n, side + 1, 1, c)], dim=2)
        side += 1
    x = x.reshape(n, side, side // 2, 2 * c).permute(0, 2, 1, 3)
    x = x.reshape(n, side // 2, side // 2, 4 * c).permute(0, 2, 1, 3)
    return x.reshape(n, -1, 4 * c)


def vila_encode(folder: Path, pixels: torch.Tensor, num_scales: int = 1) -> torch.Tensor:
    """llava_arch.py, encode_images: one scale stands for all where dynamic S2 is given no blocks."""
    features = vila_vision_features(SiglipVisionModel.from_pretrained(folder / "vision_tower").eval(), pixels)
    x = vila_join_patches(torch.cat([features] * num_scales, dim=-1))
    w = load_file(folder / "mm_projector/model.safetensors")
    x = functional.layer_norm(x, x.shape[-1:], w["layers.1.weight"], w["layers.1.bias"])
    x = functional.gelu(x @ w["layers.2.weight"].T + w["layers.2.bias"])
    return x @ w["layers.4.weight"].T + w["layers.4.bias"]


def vila_logits(
    folder: Path, media: list[torch.Tensor], media_token: str, tokenizer: PreTrainedTokenizerFast
) -> torch.Tensor:
    """Puts the embeddings of each medium where its token is and runs the language model."""
    llm = Qwen2ForCausalLM.from_pretrained(folder / "llm").eval()
    messages = [{"role": "user", "content": media_token * len(media) + QUESTION}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    embed, queue, pieces = llm.get_input_embeddings(), list(media), []
    for token_id in tokenizer(text).input_ids:
        is_medium = token_id == tokenizer.convert_tokens_to_ids(media_token)
        pieces.append(queue.pop(0) if is_medium else embed(torch.tensor([token_id])))
    return llm(inputs_embeds=torch.cat(pieces)[None]).logits


def vila_newline(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    """encoders/video/basic.py: the tokens of each frame, and after them those of a newline."""
    llm = Qwen2ForCausalLM.from_pretrained(folder / "llm")
    newline = llm.get_input_embeddings()(torch.tensor(tiny_tokenizer()("\n").input_ids))
    return torch.cat([torch.cat([frame, newline]) for frame in tokens])


@torch.no_grad()
def assert_same_video_logits(
    folder: Path,
    converted: Path,
    *,
    num_scales: int = 1,
    pool: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> None:
    model, processor = load(converted)
    inputs = inputs_of(processor, frames(4))
    tokens = vila_encode(folder, inputs["pixel_values_videos"], num_scales)
    tokens = tokens if pool is None else pool(tokens)
    want = vila_logits(folder, [vila_newline(folder, tokens)], "<vila/video>", tiny_tokenizer())
    got = model(**inputs).logits[..., : want.shape[-1]]
    assert got.shape == want.shape
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("patches_per_side", [4, 3], ids=["even-grid", "odd-grid"])
@pytest.mark.parametrize("num_scales", [1, NUM_SCALES], ids=["one-scale", "dynamic-s2"])
def test_converted_model_gives_the_logits_of_the_source(
    tmp_path: Path, patches_per_side: int, num_scales: int
) -> None:
    folder = write_source(tmp_path / "vila", patches_per_side=patches_per_side, num_scales=num_scales)
    converted = convert(folder, tmp_path / "out")
    assert_same_video_logits(folder, converted, num_scales=num_scales)


@pytest.mark.parametrize("bidirectional", [True, False], ids=["both-ways", "forward"])
def test_new_mamba_layers_change_nothing_at_the_start(
    source: Path, tmp_path: Path, bidirectional: bool
) -> None:
    converted = convert(source, tmp_path / "out", num_mamba_layers=2, bidirectional=bidirectional)
    assert_same_video_logits(source, converted)
    projector = load(converted)[0].temporal_projector
    assert len(projector.layers) == 2
    assert projector.config.is_trained
    assert projector.config.bidirectional is bidirectional


def test_pooling_of_the_source_is_kept(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "vila", video_encoder=json.dumps(TSP))

    def pool(tokens: torch.Tensor) -> torch.Tensor:
        """encoders/video/tsp.py: means over pairs of frames, of rows and of columns."""
        x = tokens.reshape(4, 2, 2, TEXT_SIZE)
        x = x.reshape(2, 2, 2, 2, TEXT_SIZE).mean(1)
        x = x.reshape(2, 1, 2, 2, TEXT_SIZE).mean(2)
        return x.reshape(2, 1, 1, 2, TEXT_SIZE).mean(3).flatten(1, 2)

    assert_same_video_logits(folder, convert(folder, tmp_path / "out"), pool=pool)


@torch.no_grad()
def test_images_are_followed_by_a_newline_too(source: Path, tmp_path: Path) -> None:
    model, processor = load(convert(source, tmp_path / "out"))
    images = list(frames(2))
    inputs = inputs_of(processor, images, "image")
    tokens = vila_encode(source, inputs["pixel_values"])
    media = [vila_newline(source, image[None]) for image in tokens]
    want = vila_logits(source, media, "<image>", tiny_tokenizer())
    got = model(**inputs).logits[..., : want.shape[-1]]
    torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


@torch.no_grad()
def test_compression_is_on_tap(source: Path, tmp_path: Path) -> None:
    model, processor = load(convert(source, tmp_path / "out", temporal_pool=4))
    inputs = inputs_of(processor, frames(9))
    num_placeholders = (inputs["input_ids"] == model.config.video_token_id).sum()
    # Nine frames in groups of four, a grid of 4x4 patches joined to 2x2 tokens.
    assert num_placeholders == 3 * 4
    assert model(**inputs).video_hidden_states.shape == (12, TEXT_SIZE)
    assert processor.video_processor.num_frames == 8


@torch.no_grad()
def test_pixels_are_normalised_as_the_source_does(source: Path, tmp_path: Path) -> None:
    _, processor = load(convert(source, tmp_path / "out"))
    video = np.zeros((1, 32, 32, 3), dtype=np.uint8)
    pixels = inputs_of(processor, video)["pixel_values_videos"]
    torch.testing.assert_close(pixels[0, :, 0, 0], torch.tensor([-0.5 / 0.5, -0.4 / 0.5, -0.5 / 0.3]))


def test_named_chat_template_replaces_that_of_the_tokenizer(tmp_path: Path) -> None:
    folder = write_source(tmp_path / "vila", chat_template="qwen2")
    _, processor = load(convert(folder, tmp_path / "out"))
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_source_without_end_tokens_has_no_separator(tmp_path: Path) -> None:
    encoder = {"_target_": "llava.model.encoders.BasicVideoEncoder", "end_tokens": None}
    folder = write_source(tmp_path / "vila", video_encoder=encoder)
    assert load(convert(folder, tmp_path / "out"))[1].frame_separator == "none"


def test_image_tiles_are_said_to_be_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_source(tmp_path / "vila", image_aspect_ratio="dynamic")
    with caplog.at_level(logging.WARNING, logger="storm_vlm"):
        convert(folder, tmp_path / "out")
    assert "reads it at one scale" in caplog.text


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in (content | changes).items() if v is not None}))

    return edit


def edit_tensors(name: str, **changes: torch.Tensor | None) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / name) | changes
        save_file({k: v for k, v in tensors.items() if v is not None}, folder / name, {"format": "pt"})

    return edit


def remove(name: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return edit


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return edit


def pickle_only(part: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / part / "model.safetensors").rename(folder / part / "pytorch_model.bin")

    return edit


def without_chat_template(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    for path in (folder / "llm").glob("*.jinja"):
        path.unlink()
    tokenizer.save_pretrained(folder / "llm")


def beginning_token(folder: Path) -> None:
    """A tokenizer that puts a token in front of every text, as Llama's does."""
    path = folder / "llm/tokenizer.json"
    content = json.loads(path.read_text())
    start = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    start_id = tiny_tokenizer().convert_tokens_to_ids("<|im_start|>")
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            "<|im_start|>": {"id": "<|im_start|>", "ids": [start_id], "tokens": ["<|im_start|>"]}
        },
    }
    path.write_text(json.dumps(content))


ROOT, PROJECTOR = "config.json", "mm_projector/model.safetensors"
SQUARE = torch.zeros(TEXT_SIZE, TEXT_SIZE)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove(ROOT), r"config\.json is missing"),
        (write(ROOT, b"{"), r"config\.json is no JSON file"),
        (remove("llm"), r"llm is missing: .* folders llm, vision_tower, mm_projector"),
        (remove("vision_tower"), "vision_tower is missing"),
        (remove("mm_projector"), "mm_projector is missing"),
        (remove(PROJECTOR), r"mm_projector has no weights: expected \*\.safetensors"),
        (pickle_only("mm_projector"), r"pickle only \(pytorch_model\.bin\): convert them to safetensors"),
        (pickle_only("llm"), "llm has its weights as a pickle only"),
        (write(PROJECTOR, b"no tensors"), r"model\.safetensors cannot be read"),
        (write("vision_tower/model.safetensors", b"no tensors"), "vision_tower: "),
        (edit_json(ROOT, model_type="llava"), "model_type is 'llava', expected 'llava_llama' or 'vila'"),
        (edit_json(ROOT, num_time_tokens=None, dynamic_s2=None), "VILA 1.5 and older order"),
        (edit_json(ROOT, mm_vision_select_feature="patch"), "mm_vision_select_feature is 'patch', expected"),
        (edit_json(ROOT, mm_vision_select_layer=None), "mm_vision_select_layer is None, expected int"),
        (edit_json(ROOT, s2=True), "s2 is True: frames at several scales"),
        (edit_json(ROOT, ps3=True), "ps3 is True"),
        (edit_json(ROOT, video_max_tiles=4), "video_max_tiles is 4"),
        (edit_json(ROOT, image_aspect_ratio="pad"), "image_aspect_ratio is 'pad'"),
        (edit_json(ROOT, dynamic_s2=True, s2_scales=None), "s2_scales is None, expected str or list"),
        (edit_json(ROOT, chat_template="mistral"), "chat_template is 'mistral', expected null or 'qwen2'"),
        (edit_json(ROOT, video_encoder="{"), r"video_encoder is '\{', expected JSON"),
        (edit_json(ROOT, video_encoder={"_target_": "a.Other"}), "video_encoder is a Other, expected Basic"),
        (edit_json(ROOT, video_encoder=TSP | {"pool_sizes": [[1, 1, 1], [8, 2, 2]]}), "expected one entry"),
        (edit_json(ROOT, video_encoder=TSP | {"sep_tokens": "\n"}), r"and sep_tokens '\\n', expected"),
        (edit_json(ROOT, video_encoder=TSP | {"end_tokens": "</f>"}), "end_tokens '</f>', expected"),
        (edit_json("mm_projector/config.json", mm_projector_type="mlp2x_gelu"), "mm_projector_type is 'mlp2x_gelu'"),
        (edit_json("mm_projector/config.json", mm_projector_type="mlp_downsample_3x3_fix"), "'mlp_downsample_3x3_fix'"),
        (edit_json("vision_tower/config.json", model_type="radio"), "model_type is 'radio', expected 'siglip_vision"),
        (edit_json("vision_tower/preprocessor_config.json", resample=2), "resample is 2, expected 3"),
        (remove("vision_tower/preprocessor_config.json"), r"preprocessor_config\.json is missing"),
        (edit_tensors("vision_tower/model.safetensors", **{"vision_model.post_layernorm.bias": None}),
         r"missing tensors: .*post_layernorm\.bias \(1 in all\)"),
        (edit_tensors("llm/model.safetensors", **{"model.norm.weight": None}), r"llm: missing tensors: model\.norm\.weight"),
        (edit_tensors(PROJECTOR, **{"layers.4.bias": None}), r"layers\.4\.bias: found no such tensor, expected \(32,\)"),
        (edit_tensors(PROJECTOR, **{"layers.2.weight": SQUARE}), r"layers\.2\.weight: found \(32, 32\), expected \(32, 96\)"),
        (edit_tensors(PROJECTOR, **{"layers.6.bias": SQUARE}), r"layers\.6\.bias: found \(32, 32\), expected no such tensor"),
        (without_chat_template, "no chat template"),
        (beginning_token, "tokenizers that add a token to every text cannot be converted"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_one_clear_error(
    source: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = shutil.copytree(source, tmp_path / "vila")
    damage(folder)
    with pytest.raises(ModelError, match=message):
        convert(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["vila"]


def test_a_file_is_no_source(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is a file: give the folder"):
        convert(source / ROOT, tmp_path / "out")


def test_a_missing_folder_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such folder, and not available as a hub id"):
        convert(tmp_path / "nothing", tmp_path / "out")


def test_an_existing_output_stays_unless_it_may_be_replaced(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_json(out / "mine.json", {})
    with pytest.raises(ModelError, match="already exists"):
        convert(source, out)
    assert (out / "mine.json").exists()
    convert(source, out, overwrite=True)
    assert not (out / "mine.json").exists()


def test_an_impossible_compression_writes_nothing(source: Path, tmp_path: Path) -> None:
    with pytest.raises(StormError, match="spatial_pool must be a perfect square"):
        convert(source, tmp_path / "out", spatial_pool=3)
    assert list(tmp_path.iterdir()) == []
