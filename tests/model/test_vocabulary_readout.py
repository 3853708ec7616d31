"""The vocabulary readout against its definition in float64, in the model and in what depends on the model."""

import torch

from storm_vlm.model.adapter import adapter_options, save_adapter_settings
from storm_vlm.model.compose import ComposeOptions
from storm_vlm.model.vocabulary_readout import vocabulary_readout
from storm_vlm.pipeline.identity import EncoderFingerprint
from storm_vlm.profiling.flops import encoding_flops
from tests.model.tiny import make_model
from tests.numerics import assert_matches

READ_OUT = {"vocabulary_readout": True}


def definition(tokens, embeddings):
    tokens, embeddings = tokens.double(), embeddings.double()
    scores = torch.stack([(token * embeddings).sum(-1) for token in tokens]) / embeddings.shape[1] ** 0.5
    weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
    return sum(weights[:, [v]] * embeddings[v] for v in range(len(embeddings)))


def test_equals_the_definition():
    tokens, embeddings = torch.randn(10, 16), torch.randn(50, 16)
    read = vocabulary_readout(tokens.view(5, 1, 2, 16), embeddings)
    assert read.shape == (5, 1, 2, 16)
    assert_matches("readout", read.flatten(0, 2), definition(tokens, embeddings))


def test_many_tokens_are_read_out_as_few():
    tokens, embeddings = torch.randn(1030, 8), torch.randn(20, 8)
    assert_matches("readout", vocabulary_readout(tokens, embeddings), definition(tokens, embeddings))


def test_gradients_equal_those_of_the_definition():
    tokens, embeddings = torch.randn(6, 8), torch.randn(20, 8)
    upstream = torch.randn(6, 8)
    found, wanted = tokens.clone().requires_grad_(), tokens.double().requires_grad_()
    (vocabulary_readout(found, embeddings) * upstream).sum().backward()
    (definition(wanted, embeddings) * upstream).sum().backward()
    assert_matches("readout", found.grad, wanted.grad)


def test_a_token_that_is_sure_is_an_embedding():
    embeddings = torch.randn(20, 8)
    read = vocabulary_readout(
        100 * embeddings[[3, 7]] / embeddings[[3, 7]].norm(dim=-1, keepdim=True), embeddings
    )
    closest = torch.cdist(read, embeddings)
    assert closest.amin(-1).max() < 1e-3


def test_the_model_reads_out_what_compression_leaves():
    plain, _ = make_model(temporal_pool=2, spatial_pool=4)
    model, _ = make_model(temporal_pool=2, spatial_pool=4, projector=READ_OUT)
    pixels, grid = torch.rand(6, 3, 32, 32), torch.tensor([[6, 4, 4]])
    with torch.no_grad():
        (compressed,) = plain.get_video_features(pixels, grid).pooler_output
        (read,) = model.get_video_features(pixels, grid).pooler_output
    assert_matches("readout", read, definition(compressed, model.get_input_embeddings().weight))
    assert not torch.allclose(read, compressed, atol=0.1)


def test_an_adapter_says_so(tmp_path):
    model, processor = make_model(projector=READ_OUT)
    save_adapter_settings(model.config, processor, tmp_path)
    assert adapter_options(tmp_path, ComposeOptions()).projector["vocabulary_readout"]


def test_kept_tokens_depend_on_the_embeddings_only_with_it():
    for options, depends in (({}, False), (READ_OUT, True)):
        model, _ = make_model(projector=options)
        fingerprint = EncoderFingerprint(model)
        before = fingerprint()
        with torch.no_grad():
            model.get_input_embeddings().weight[5] += 1
        assert (fingerprint() != before) == depends


def test_its_operations_are_counted():
    """12 tokens are left of 6 frames; scores and mean take a multiplication and an addition for each number."""
    plain, _ = make_model(temporal_pool=2)
    model, _ = make_model(temporal_pool=2, projector=READ_OUT)
    vocabulary_size, width = model.get_input_embeddings().weight.shape
    counted = [encoding_flops(m, (32, 32), 6, m.config.compression)["compression"] for m in (plain, model)]
    assert counted[1] - counted[0] == 2 * (2 * 12 * vocabulary_size * width)
