"""Loads a language model and its tokenizer from a GGUF file, as an ordinary dense transformers model."""

import importlib.util
import struct
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.gguf import read_gguf_metadata

from storm_vlm.errors import ModelError

GGUF_MAGIC = b"GGUF"

# Tokenizers that make a token of each digit before the byte-level split, which transformers' GGUF reader leaves out.
# Source: llama.cpp, llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_SMOLLM.
_SINGLE_DIGIT_TOKENIZERS = {"smollm"}


def load_gguf_language_model(
    path: str | Path, *, dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a GGUF file with its weights unpacked, so that the model trains, saves and reloads like any other.

    Args:
        path: The file; its architecture must be one that transformers reads.
        dtype: Type of the loaded weights.

    Returns:
        Model in evaluation mode and tokenizer, which agree on the end and padding tokens.

    Raises:
        ModelError: The file is missing, damaged or of an architecture that transformers does not read, or the
            ``gguf`` package is missing.
    """
    path = Path(path)
    metadata = _read_metadata(path)
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"reading {path} needs the gguf package: pip install 'storm-vlm[gguf]'")
    source = {"gguf_file": path.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path.parent, **source)
        # Unpacked weights: blocks kept as they are would be neither trained nor saved.
        model, loading_info = AutoModelForCausalLM.from_pretrained(
            path.parent,
            dtype=dtype,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            **source,
        )
    except (ValueError, KeyError, NotImplementedError) as error:
        architecture = metadata["general.architecture"]
        raise ModelError(
            f"transformers cannot load {path}, architecture {architecture!r}: {error}"
        ) from error
    # transformers fills what a file lacks with random numbers and only warns.
    if loading_info["missing_keys"]:
        raise ModelError(f"{path} lacks weights: {sorted(loading_info['missing_keys'])}")
    if metadata.get("tokenizer.ggml.pre") in _SINGLE_DIGIT_TOKENIZERS:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    _align_special_tokens(model, tokenizer, path)
    return model, tokenizer


def _read_metadata(path: Path) -> dict[str, object]:
    """Returns the file's metadata, arrays as counts."""
    if not path.is_file():
        raise ModelError(f"{path} is not a file: expected a GGUF model")
    with path.open("rb") as file:
        magic = file.read(len(GGUF_MAGIC))
    if magic != GGUF_MAGIC:
        raise ModelError(f"{path} is not a GGUF file: it begins with {magic!r}, expected {GGUF_MAGIC!r}")
    try:
        return read_gguf_metadata(str(path))[0]
    except (ValueError, KeyError, IndexError, struct.error) as error:
        raise ModelError(f"{path} is not a complete GGUF file: {error}") from error


def _align_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Gives config and generation config the tokenizer's ids, and a tokenizer without padding its end token."""
    vocab_size = model.config.get_text_config().vocab_size
    if tokenizer.eos_token_id is None or len(tokenizer) > vocab_size:
        raise ModelError(
            f"{path}: the tokenizer must name an end token and fit the model's {vocab_size} embeddings, "
            f"got eos_token_id={tokenizer.eos_token_id} and {len(tokenizer)} tokens"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    for config in (model.config, model.generation_config):
        config.bos_token_id = tokenizer.bos_token_id
        config.pad_token_id = tokenizer.pad_token_id
        # Some files name several end tokens in the model's config, which the tokenizer cannot.
        if not isinstance(config.eos_token_id, list):
            config.eos_token_id = tokenizer.eos_token_id
