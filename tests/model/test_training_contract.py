"""Training as a stranger does it: Trainer, PEFT, gradient checkpointing, frozen parts, real files."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

from tests.model.tiny import ask, encode, make_image, make_model, make_video
from tests.numerics import assert_matches
from tests.video.clips import write_clip

CONVERSATIONS = [
    ask(make_video(5, 1), make_image(2), "what?", answer="a car"),
    ask("and this?", answer="none"),
    ask(make_video(2, 3), "why?", answer="because"),
]
LORA = LoraConfig(
    r=4, target_modules=r".*language_model.*\.(q_proj|v_proj|down_proj)", init_lora_weights=False
)


@pytest.fixture
def tiny():
    return make_model(temporal_pool=2, projector={"num_mamba_layers": 2})


def make_batch(processor, conversations=CONVERSATIONS):
    """What a collator does: padding on the right, no loss on padding and placeholders."""
    inputs = encode(processor, conversations, padding_side="right")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    for token_id in (processor.image_token_id, processor.video_token_id):
        labels.masked_fill_(labels == token_id, -100)
    return {**inputs, "labels": labels}


def gradients(model, batch):
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_skipped_scores_change_neither_loss_nor_gradients(tiny):
    model, processor = tiny
    batch = make_batch(processor)
    batch["labels"][:, 2::3] = -100
    want_loss, want = gradients(model, batch)
    num_scored = []
    handle = model.lm_head.register_forward_hook(
        lambda module, args, output: num_scored.append(output.shape[:-1].numel())
    )
    got_loss, got = gradients(model, {**batch, "skip_logits": True})
    handle.remove()
    assert num_scored == [(batch["labels"][:, 1:] != -100).sum()]
    assert_matches("loss", got_loss, want_loss)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-3, msg=name)
    assert model(**batch, skip_logits=True).logits is None
    assert model(input_ids=batch["input_ids"][1:2, :4], skip_logits=True).logits.shape[1] == 4


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_memory_only(tiny, use_reentrant):
    model, processor = tiny
    model.train()
    batch = make_batch(processor)
    parts = {
        "projector": model.model.temporal_projector.layers[0].norm,
        "language model": model.language_model.layers[0].input_layernorm,
    }
    num_calls = dict.fromkeys(parts, 0)

    def count(name):
        num_calls[name] += 1

    for name, part in parts.items():
        part.register_forward_hook(lambda module, args, output, name=name: count(name))
    want_loss, want = gradients(model, batch)
    num_calls_before = dict(num_calls)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    got_loss, got = gradients(model, batch)
    # Forward once more, and once again in the backward pass.
    assert num_calls == {name: 3 * number for name, number in num_calls_before.items()}
    assert_matches("loss", got_loss, want_loss)
    assert got.keys() == want.keys()
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("frozen", "trained"),
    [
        (("vision_tower", "language_model", "lm_head"), "temporal_projector"),
        (("vision_tower",), "language_model"),
    ],
)
def test_frozen_parts(tiny, frozen, trained):
    model, processor = tiny
    model.train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    _, got = gradients(model, make_batch(processor))
    assert any(trained in name for name in got)
    assert not any(part in name for name in got for part in frozen)


def test_a_text_alone_takes_part_in_every_layer(tiny):
    """Its loss is what it is without the encoder; the projector gets a gradient, and it is zero."""
    model, processor = tiny
    batch = make_batch(processor, [CONVERSATIONS[1]])
    want = model.eval()(**batch).loss
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("temporal_projector" in name)
    loss, got = gradients(model.train(), batch)
    assert torch.equal(loss, want)
    assert got.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(not gradient.any() for gradient in got.values())


def test_lora_trains_writes_and_merges(tiny, tmp_path):
    model, processor = tiny
    batch = make_batch(processor)
    adapted = get_peft_model(model, LORA)
    adapted.train()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    _, got = gradients(adapted, batch)
    assert got
    assert all("lora_" in name for name in got)
    optimizer.step()
    adapted.eval()
    prompts = encode(processor, [ask(make_video(3), "what?")])
    answer = adapted.generate(**prompts, max_new_tokens=4, do_sample=False)
    adapted.save_pretrained(tmp_path)
    with torch.no_grad():
        want = adapted(**prompts).logits
        loaded = PeftModel.from_pretrained(
            make_model(temporal_pool=2, projector={"num_mamba_layers": 2})[0], tmp_path
        )
        assert_matches("loaded", loaded(**prompts).logits, want)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(**prompts).logits, want, atol=1e-5, rtol=1e-4)
    assert torch.equal(merged.generate(**prompts, max_new_tokens=4, do_sample=False), answer)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(again(**prompts).logits, want, atol=1e-5, rtol=1e-4)


def test_lora_beside_a_whole_projector(tiny, tmp_path):
    model, processor = tiny
    config = LoraConfig(r=2, target_modules=LORA.target_modules, modules_to_save=["temporal_projector"])
    adapted = get_peft_model(model, config)
    adapted.train()
    _, got = gradients(adapted, make_batch(processor))
    assert {"lora_" in name or "temporal_projector" in name for name in got} == {True}
    assert any("temporal_projector" in name for name in got)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    adapted.eval()
    adapted.save_pretrained(tmp_path)
    prompts = encode(processor, [ask(make_video(3), "what?")])
    with torch.no_grad():
        want = adapted(**prompts).logits
        fresh = make_model(temporal_pool=2, projector={"num_mamba_layers": 2})[0]
        assert_matches("loaded", PeftModel.from_pretrained(fresh, tmp_path)(**prompts).logits, want)


def test_lora_on_every_linear_layer(tiny):
    model, processor = tiny
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    loss, _ = gradients(adapted, make_batch(processor))
    assert torch.isfinite(loss)
    assert adapted.generate(**encode(processor, [ask(make_video(3), "?")]), max_new_tokens=2).shape[0] == 1


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    paths = []
    for i in range(4):
        paths.append(folder / f"{i}.mp4")
        write_clip(paths[-1], num_frames=10 + i, fps=10, size=(48, 64))
    return paths


def arguments(folder, **options):
    return TrainingArguments(
        output_dir=folder, learning_rate=1e-2, report_to=[], seed=0, logging_steps=1, remove_unused_columns=False,
        use_cpu=True, disable_tqdm=True, save_strategy="steps", save_steps=2,
        **{"per_device_train_batch_size": 2} | options,
    )  # fmt: skip


def make_trainer(folder, clips, **options) -> Trainer:
    model, processor = make_model(temporal_pool=2, num_frames=4)
    records = [ask(clip, "which?", answer="clip " + i * "x") for i, clip in enumerate(clips)]
    return Trainer(
        model=model,
        args=arguments(folder, **options),
        train_dataset=records,
        eval_dataset=records[:2],
        data_collator=lambda conversations: make_batch(processor, conversations),
        processing_class=processor,
    )


def test_trainer_learns_from_files(tmp_path, clips):
    trainer = make_trainer(tmp_path, clips, max_steps=8, gradient_checkpointing=True)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    assert trainer.evaluate()["eval_loss"] < losses[0]
    trainer.save_model(tmp_path / "trained")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "trained")
    batch = make_batch(trainer.processing_class, [ask(clips[0], "which?", answer="clip ")])
    with torch.no_grad():
        assert_matches("loss", loaded(**batch).loss, trainer.model.eval()(**batch).loss)


def test_trainer_resumes(tmp_path, clips):
    whole = make_trainer(tmp_path / "whole", clips, max_steps=4)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", clips, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, got), want in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4, msg=name)


def test_trainer_weighs_each_token_once(tmp_path, clips):
    """Accumulated small batches make the step of the large one, whatever their numbers of labels."""
    steps = []
    for batch_size in (4, 1):
        trainer = make_trainer(
            tmp_path / str(batch_size), clips, max_steps=1, gradient_accumulation_steps=4 // batch_size,
            per_device_train_batch_size=batch_size, optim="sgd", max_grad_norm=0,
        )  # fmt: skip
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        steps.append({name: p.detach() - before[name] for name, p in trainer.model.named_parameters()})
    for name, step in steps[0].items():
        torch.testing.assert_close(steps[1][name], step, atol=2e-6, rtol=2e-2, msg=name)
