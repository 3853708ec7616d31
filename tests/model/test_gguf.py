import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from storm_vlm.errors import ModelError
from storm_vlm.model.demo_parts import LANGUAGE_MODEL, find_part
from storm_vlm.model.gguf import load_gguf_language_model

gguf = pytest.importorskip("gguf")

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "Ċ Ċ"]
TOKENS = [*SPECIAL_TOKENS, *bytes_to_unicode().values(), *(merge.replace(" ", "") for merge in MERGES)]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


def tiny_llama(*, tie_word_embeddings: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tie_word_embeddings,
    )
    return LlamaForCausalLM(config).eval()


def interleave_rope(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """GGUF keeps the two halves of each rotary pair side by side."""
    return weight.reshape(num_heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    *,
    architecture: str = "llama",
    pre: str = "smollm",
    tokens: list[str] = TOKENS,
    padding: bool = True,
    leave_out: tuple[str, ...] = (),
) -> Path:
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL_TOKENS) + [1] * (len(tokens) - len(SPECIAL_TOKENS)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    if padding:
        writer.add_pad_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = tensor.numpy()
        if "q_proj" in name:
            array = interleave_rope(array, config.num_attention_heads)
        if "k_proj" in name:
            array = interleave_rope(array, config.num_key_value_heads)
        gguf_name = names.get_name(name, try_suffixes=(".weight",))
        if gguf_name not in leave_out:
            writer.add_tensor(gguf_name, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def tiny_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(path, tiny_llama(tie_word_embeddings=True))


@pytest.mark.parametrize("tie_word_embeddings", [True, False], ids=["tied", "untied"])
def test_logits_are_those_of_the_same_weights(tmp_path: Path, tie_word_embeddings: bool) -> None:
    want = tiny_llama(tie_word_embeddings=tie_word_embeddings)
    model, _ = load_gguf_language_model(write_gguf(tmp_path / "tiny.gguf", want))
    assert model.config.tie_word_embeddings == tie_word_embeddings
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie_word_embeddings
    input_ids = torch.randint(0, len(TOKENS), (2, 20))
    torch.testing.assert_close(model(input_ids).logits, want(input_ids).logits)


def test_saved_and_reloaded_is_the_same(tiny_file: Path, tmp_path: Path) -> None:
    model, tokenizer = load_gguf_language_model(tiny_file)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert not hasattr(model.config, "quantization_config")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    input_ids = torch.randint(0, len(TOKENS), (1, 20))
    assert torch.equal(reloaded(input_ids).logits, model(input_ids).logits)
    assert reloaded.generation_config.eos_token_id == model.generation_config.eos_token_id
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "hello\n\n42 <|im_end|>"
    assert again.encode(text) == tokenizer.encode(text)
    assert again.chat_template == tokenizer.chat_template
    assert again.special_tokens_map == tokenizer.special_tokens_map


def test_the_model_trains(tiny_file: Path) -> None:
    model, _ = load_gguf_language_model(tiny_file)
    assert not model.training
    input_ids = torch.randint(0, len(TOKENS), (1, 20))
    model(input_ids, labels=input_ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_dtype_is_the_one_asked_for(tiny_file: Path) -> None:
    model, _ = load_gguf_language_model(tiny_file, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_special_tokens_and_chat_template(tiny_file: Path) -> None:
    model, tokenizer = load_gguf_language_model(tiny_file)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    for config in (model.config, model.generation_config):
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "hello"}], tokenize=False)
    assert text == "<|im_start|>user\nhello<|im_end|>\n"
    ids = tokenizer.encode(text)
    assert ids[0] == 1
    assert ids.count(2) == 1
    assert tokenizer.decode(ids) == text


def test_a_file_without_padding_pads_with_the_end_token(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(tie_word_embeddings=True), padding=False)
    model, tokenizer = load_gguf_language_model(path)
    assert tokenizer.pad_token_id == model.generation_config.pad_token_id == 2


@pytest.mark.parametrize(
    ("pre", "tokens"),
    [("smollm", ["ĊĊ", "4", "2"]), ("default", ["Ċ", "Ċ", "4", "2"])],
)
def test_digits_stand_alone_where_the_file_says_so(tmp_path: Path, pre: str, tokens: list[str]) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", tiny_llama(tie_word_embeddings=True), pre=pre)
    _, tokenizer = load_gguf_language_model(path)
    assert tokenizer.tokenize("\n\n42") == tokens


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"missing\.gguf is not a file"):
        load_gguf_language_model(tmp_path / "missing.gguf")


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.gguf"
    path.write_bytes(b"PK\x03\x04 a zip file")
    with pytest.raises(ModelError, match=r"not a GGUF file: it begins with b'PK"):
        load_gguf_language_model(path)


@pytest.mark.parametrize("size_bytes", [4, 20, 300, -100], ids=["magic", "header", "metadata", "tensors"])
def test_a_truncated_file_is_refused(tiny_file: Path, tmp_path: Path, size_bytes: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_file.read_bytes()[:size_bytes])
    with pytest.raises(ModelError, match=r"cut\.gguf"):
        load_gguf_language_model(path)


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "other.gguf", tiny_llama(tie_word_embeddings=True), architecture="wavenet")
    with pytest.raises(ModelError, match="architecture 'wavenet'"):
        load_gguf_language_model(path)


def test_a_missing_tensor_is_named_and_not_made_up(tmp_path: Path) -> None:
    model = tiny_llama(tie_word_embeddings=True)
    path = write_gguf(tmp_path / "tiny.gguf", model, leave_out=("blk.1.ffn_up.weight",))
    with pytest.raises(ModelError, match=r"lacks weights: .*layers\.1\.mlp\.up_proj\.weight"):
        load_gguf_language_model(path)


def test_a_vocabulary_larger_than_the_embeddings_is_refused(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "tiny.gguf", tiny_llama(tie_word_embeddings=True), tokens=[*TOKENS, "extra", "more"]
    )
    with pytest.raises(ModelError, match=f"the model's {len(TOKENS)} embeddings"):
        load_gguf_language_model(path)


def test_a_missing_gguf_package_names_the_extra(tiny_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"storm-vlm\[gguf\]"):
        load_gguf_language_model(tiny_file)


def test_smollm2_answers_and_survives_saving(tmp_path: Path) -> None:
    path = find_part(LANGUAGE_MODEL)
    if path is None:
        pytest.skip(f"{LANGUAGE_MODEL.requirement} is neither cached nor installed")
    model, tokenizer = load_gguf_language_model(path)
    assert model.config.tie_word_embeddings
    assert model.generation_config.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    generated = model.generate(**inputs, max_new_tokens=20, do_sample=False)[
        0, inputs["input_ids"].shape[1] :
    ]
    assert "Paris" in tokenizer.decode(generated)
    assert generated[-1] == tokenizer.eos_token_id
    model.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(reloaded(**inputs).logits, model(**inputs).logits)
