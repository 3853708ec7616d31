"""Compares temporal projectors and token compressions in a controlled experiment: the paper's Tables 2, 4, 5 and 7 in miniature.

    python benchmarks/comparison.py --out runs/comparison [--seeds 0 1 2] [--jobs 2] [--quick]

Everything is made from nothing, in stages: a synthetic world of few things; a small language model with a tokenizer of
its own, which learns to answer questions from texts that tell of such videos, once for all; then, for each kind of model
and each seed, a new projector on the default model's vision encoder, frozen, whose features are cached. The projector
first learns words (`comparison_words.py`), then projector and language model learn from the questions about the videos.
Every model sees the same videos for the same number of steps; the seed sets the projector's first weights and the order
of the videos. The test asks open questions, none of which sees another, about videos that no training saw, and an answer is right if
every token of it is: what greedy decoding would write. Intervals (95%) resample the test videos; a difference is taken
video by video and seed by seed.

Runs are kept, and a cut comparison goes on where it was. The result is ``comparison.json``, ``comparison.md``,
``comparison.png`` and ``comparison_differences.png`` in the folder. It needs `storm-vlm[demo,train,world]` and `storm setup-demo`.
With glibc, set ``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=8000000000`` in the environment: otherwise models as small as these spend
much of their time on returning memory and asking for it again.
"""

import argparse
import json
import multiprocessing
import shutil
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from comparison_data import (
    IMAGE_SIZE,
    QUESTIONS_KEPT,
    TEST,
    TRAIN,
    make_data,
    make_tokenizer,
    questions_file,
    reading_file,
    reading_test_file,
)
from comparison_report import ALL, write_report
from comparison_words import WordLoss, Words, teach_words
from measuring import machine
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as library_logging

from storm_vlm.data import Mixture, MixtureConfig, SetConfig, StormCollator, TrainingDataset
from storm_vlm.errors import StormError
from storm_vlm.model import (
    ComposeOptions,
    StormForConditionalGeneration,
    StormProcessor,
    TokenCompression,
    compose_model,
)
from storm_vlm.model.compose import save_model
from storm_vlm.model.default_model import load_default_vision_tower
from storm_vlm.model.modeling_storm import IGNORED_LABEL
from storm_vlm.pipeline.loading import load_model
from storm_vlm.storage import atomic_file
from storm_vlm.training import Recipe, train
from storm_vlm.training.features import cache_features
from storm_vlm.training.recipe import (
    DataRecipe,
    LearningRates,
    ModelRecipe,
    OutputRecipe,
    ScheduleRecipe,
    VideoRecipe,
)
from storm_vlm.video import read_video

TEST_BATCH_SIZE = 4
TEXT_BATCH_SIZE = 16
VILA = {"projector_type": "mlp", "num_mamba_layers": 0, "vocabulary_readout": True}
STORM = {
    "projector_type": "linear",
    "num_mamba_layers": 1,
    "bidirectional": True,
    "vocabulary_readout": True,
}
ONE_WAY = {**STORM, "bidirectional": False}


@dataclass(frozen=True, slots=True)
class Variant:
    """A model of the comparison: its projector, and the compression that it is trained with."""

    name: str
    projector: dict[str, Any]
    num_frames: int
    temporal_pool: int = 1
    spatial_pool: int = 1
    # Temporal sampling that the trained model is tested with too.
    tested_samples: tuple[int, ...] = (1,)


VARIANTS = (
    Variant("VILA", VILA, 8),
    Variant("STORM", STORM, 8),
    Variant("VILA + T.pool", VILA, 128, temporal_pool=4, tested_samples=(1, 2)),
    Variant("VILA", VILA, 32, tested_samples=(1, 8)),
    Variant("VILA + T.pool", VILA, 32, temporal_pool=4, tested_samples=(1, 2)),
    Variant("STORM", STORM, 32, tested_samples=(1, 4, 8)),
    Variant("STORM + T.pool", STORM, 32, temporal_pool=4, tested_samples=(1, 2)),
    Variant("STORM + S.pool", STORM, 32, spatial_pool=4, tested_samples=(1, 2)),
    Variant("STORM + T.pool + S.pool", STORM, 32, temporal_pool=4, spatial_pool=4, tested_samples=(1, 2)),
    Variant("uni-directional + T.pool", ONE_WAY, 32, temporal_pool=4, tested_samples=(1, 2)),
    Variant("STORM + T.pool", STORM, 128, temporal_pool=4, tested_samples=(1, 2)),
)


@dataclass(frozen=True, slots=True)
class Scale:
    """How large the comparison is."""

    train_videos: int = 1200
    test_videos: int = 200
    texts: int = 20000
    # Steps of the language model on texts, and of each model on words and on questions.
    text_steps: int = 6000
    word_steps: int = 1000
    steps: int = 400
    text_batch_size: int = 4
    word_batch_size: int = 8
    # Videos of a step, each with all its questions.
    batch_size: int = 4
    hidden_size: int = 192
    num_layers: int = 4
    num_names: int = 16


QUICK = Scale(
    train_videos=32,
    test_videos=8,
    texts=64,
    text_steps=4,
    word_steps=4,
    steps=4,
    hidden_size=48,
    num_layers=1,
)


@dataclass(frozen=True, slots=True)
class Job:
    """One model to train and test, in a process of its own."""

    out: Path
    scale: Scale
    variant: Variant
    seed: int
    threads: int
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        name = f"{self.variant.name} {self.variant.num_frames}f seed {self.seed}".replace(" ", "-")
        object.__setattr__(self, "folder", self.out / "runs" / name)

    @property
    def result(self) -> Path:
        """File of what came of it."""
        return self.folder / "result.json"


def train_language_model(out: Path, scale: Scale) -> Path:
    """Trains the language model on texts, and returns the folder of the model that it is part of."""
    folder = out / "language-model"
    if (folder / "model").is_dir():
        return folder / "model"
    tokenizer = make_tokenizer(out)
    torch.manual_seed(0)
    language_model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=scale.hidden_size,
            intermediate_size=4 * scale.hidden_size,
            num_hidden_layers=scale.num_layers,
            num_attention_heads=scale.hidden_size // 48,
            num_key_value_heads=scale.hidden_size // 48,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).eval()
    options = ComposeOptions(projector=VILA, num_frames=8)
    model, processor = compose_model(
        load_default_vision_tower(IMAGE_SIZE), language_model, tokenizer, options
    )
    save_model(model, processor, folder / "composed")
    recipe = Recipe(
        model=ModelRecipe(path=str(folder / "composed")),
        data=DataRecipe(mixture=reading_file(out), num_workers=0),
        video=VideoRecipe(),
        learning_rates=LearningRates(language_model=1.5e-3),
        schedule=_schedule(scale.text_steps, scale.text_batch_size, seed=0),
        output=OutputRecipe(folder=folder, save_steps=1000, report_to=()),
    )
    train(recipe, use_cpu=True)
    return folder / "model"


@torch.no_grad()
def test_language_model(out: Path) -> dict[str, float]:
    """Asks the test's questions about texts in place of videos: what the best projector could be worth to this language model.

    Returns:
        The share of right answers of each task, and of all.
    """
    model, processor = load(out / "language-model" / "model")
    mixture = Mixture(MixtureConfig((SetConfig("texts", reading_test_file(out)),)))
    right: list[bool] = []
    for batch in batches(TrainingDataset(mixture, processor), processor, TEXT_BATCH_SIZE):
        right += answered(model, batch)
    by_task: dict[str, list[bool]] = defaultdict(list)
    records = json.loads(reading_test_file(out).read_text(encoding="utf-8"))
    for record, is_right in zip(records, right, strict=True):
        by_task[record["task"]].append(is_right)
    by_task[ALL] = right
    return {task: statistics.mean(answers) for task, answers in by_task.items()}


def batches(
    examples: TrainingDataset, processor: StormProcessor, batch_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    """Yields a test's examples in order, as the model takes them."""
    for batch in DataLoader(examples, batch_size=batch_size, collate_fn=StormCollator(processor)):
        batch.pop("bad_samples")
        yield batch


def _schedule(steps: int, batch_size: int, seed: int) -> ScheduleRecipe:
    return ScheduleRecipe(
        num_epochs=1000, max_steps=steps, batch_size=batch_size, warmup_ratio=0.05, seed=seed
    )


def load(folder: Path) -> tuple[StormForConditionalGeneration, StormProcessor]:
    """Loads a saved model to compute with on the CPU."""
    return load_model(folder, device="cpu", dtype="float32", attn_implementation=None)


def compose_variant(job: Job) -> tuple[StormForConditionalGeneration, StormProcessor]:
    """Puts a new projector between the vision encoder and the language model that has learned from texts."""
    reader, _ = load(job.out / "language-model" / "model")
    language_model = LlamaForCausalLM(reader.config.text_config)
    language_model.model.load_state_dict(reader.language_model.state_dict())
    variant = job.variant
    options = ComposeOptions(
        projector=variant.projector,
        temporal_pool=variant.temporal_pool,
        spatial_pool=variant.spatial_pool,
        num_frames=variant.num_frames,
        frame_separator="newline",
        seed=job.seed,
    )
    tower = load_default_vision_tower(IMAGE_SIZE)
    return compose_model(tower, language_model.eval(), make_tokenizer(job.out), options)


def examples_of(
    job: Job, split: str, model: StormForConditionalGeneration, processor: StormProcessor, **settings: int
) -> TrainingDataset:
    """Returns a split's examples with cached features, a video each with all its questions, which do not see each other."""
    sets = MixtureConfig((SetConfig(split, questions_file(job.out, split)),))
    mixture = Mixture(sets, conversations_per_example=QUESTIONS_KEPT[split])
    examples = TrainingDataset(mixture, processor, **settings)
    examples.features = cache_features(
        examples, model, job.out / "features", device=torch.device("cpu"), bf16=False, num_workers=0
    )
    return examples


def learn_words(job: Job) -> tuple[Path, float]:
    """Trains the projector of a new model on words; returns where the model is saved, and the last loss."""
    model, processor = compose_variant(job)
    examples = examples_of(job, TRAIN, model, processor)
    video = job.out / "world" / TRAIN / "videos" / "000000.mp4"
    variant, scale = job.variant, job.scale
    empty = processor.tokenizer.encode("\n", add_special_tokens=False)[0]
    words = Words(
        examples,
        job.out / "world",
        read_video(video, num_frames=variant.num_frames).timestamps_seconds,
        variant.temporal_pool,
        processor.tokenizer,
        empty,
    )
    compression = TokenCompression(variant.temporal_pool, variant.spatial_pool)
    loss = teach_words(
        WordLoss(model, compression, empty),
        words,
        job.folder / "words",
        steps=scale.word_steps,
        batch_size=scale.word_batch_size,
        learning_rate=2e-3,
        seed=job.seed,
    )
    save_model(model, processor, job.folder / "composed")
    return job.folder / "composed", loss


def make_recipe(job: Job, model: Path) -> Recipe:
    """Returns the recipe of a job; all are alike but for the model, its frames and its pooling."""
    variant, scale = job.variant, job.scale
    return Recipe(
        model=ModelRecipe(path=str(model)),
        data=DataRecipe(
            mixture=questions_file(job.out, TRAIN),
            num_workers=0,
            feature_cache=job.out / "features",
            conversations_per_example=QUESTIONS_KEPT[TRAIN],
        ),
        video=VideoRecipe(variant.num_frames, variant.temporal_pool, variant.spatial_pool),
        learning_rates=LearningRates(temporal_projector=2e-4, language_model=1e-3),
        schedule=_schedule(scale.steps, scale.batch_size, job.seed),
        output=OutputRecipe(folder=job.folder / "training", save_steps=scale.steps, report_to=()),
    )


def run_job(job: Job) -> Job:
    """Trains and tests one model, writes what came of it, and returns the job."""
    # A cut run begins anew: a model of words whose questions were cut would be another model.
    shutil.rmtree(job.folder, ignore_errors=True)
    library_logging.disable_progress_bar()
    torch.set_num_threads(job.threads)
    start = time.perf_counter()
    composed, word_loss = learn_words(job)
    trained = train(make_recipe(job, composed), use_cpu=True)
    training_seconds = time.perf_counter() - start
    model, processor = load(job.folder / "training" / "model")
    tests = [test_model(job, model.eval(), processor, sample) for sample in job.variant.tested_samples]
    result = {
        "variant": job.variant.name,
        "num_frames": job.variant.num_frames,
        "seed": job.seed,
        "word_loss": word_loss,
        "final_loss": trained.final_loss,
        "training_seconds": training_seconds,
        "tests": tests,
    }
    with atomic_file(job.result) as path:
        path.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return job


@torch.no_grad()
def test_model(job: Job, model: Any, processor: Any, temporal_sample: int) -> dict[str, Any]:
    """Asks the test's questions; tells who is right about what, the tokens and the time of a video."""
    examples = examples_of(job, TEST, model, processor, temporal_sample=temporal_sample)
    right: list[bool] = []
    seconds = []
    for batch in batches(examples, processor, TEST_BATCH_SIZE):
        start = time.perf_counter()
        right += answered(model, batch)
        seconds.append((time.perf_counter() - start) / len(batch["input_ids"]))
    records = json.loads(questions_file(job.out, TEST).read_text(encoding="utf-8"))
    by_task: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for record, is_right in zip(records, right, strict=True):
        by_task[record["task"]][record["video"]].append(is_right)
    return {
        "temporal_sample": temporal_sample,
        "visual_tokens": int((examples[0]["input_ids"] == processor.video_token_id).sum()),
        "seconds_per_video": statistics.median(seconds),
        "right": {task: dict(videos) for task, videos in by_task.items()},
    }


def answered(model: Any, batch: dict[str, torch.Tensor]) -> Iterator[bool]:
    """Tells for each answer whether greedy decoding writes it: whether each of its tokens is the likeliest."""
    labels = batch.pop("labels")[:, 1:]
    is_wrong = model(**batch).logits[:, :-1].argmax(-1) != labels
    is_label = labels != IGNORED_LABEL
    starts = is_label.clone()
    starts[:, 1:] &= ~is_label[:, :-1]
    # Questions stand between the answers about a video: each run of labels is one.
    numbers = starts.cumsum(1)
    for row in range(len(labels)):
        for number in range(1, int(numbers[row, -1]) + 1):
            yield not bool(is_wrong[row][is_label[row] & (numbers[row] == number)].any())


def claim(out: Path, scale: Scale) -> None:
    """Takes a folder for runs of this scale; one that holds those of another is a StormError."""
    file, described = out / "scale.json", json.dumps(asdict(scale), indent=1) + "\n"
    try:
        out.mkdir(parents=True, exist_ok=True)
        if file.is_file():
            if file.read_text(encoding="utf-8") != described:
                raise StormError(f"{out} holds runs of another scale, choose another folder")
        else:
            with atomic_file(file) as path:
                path.write_text(described, encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StormError(f"{out} cannot be used: {error}") from error


def main() -> None:
    """Trains, tests and reports."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for everything")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="models that train at once")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument(
        "--quick", action="store_true", help="a few steps of tiny models, to see that it runs"
    )
    options = parser.parse_args()
    if min(options.jobs, options.threads) < 1:
        parser.error("--jobs and --threads must be at least 1")
    scale = QUICK if options.quick else Scale()
    try:
        claim(options.out, scale)
    except StormError as error:
        parser.error(f"--out: {error}")
    num_videos = {TRAIN: scale.train_videos, TEST: scale.test_videos}
    make_data(options.out, num_videos, scale.num_names, scale.texts)
    train_language_model(options.out, scale)
    from_texts = test_language_model(options.out)
    jobs = [
        Job(options.out, scale, variant, seed, options.threads)
        for seed in options.seeds
        for variant in VARIANTS
    ]
    to_run = [job for job in jobs if not job.result.is_file()]
    # A process for each job: what one leaves behind in libraries does not reach the next.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context, max_tasks_per_child=1) as pool:
        running = [pool.submit(run_job, job) for job in to_run]
        for number, future in enumerate(as_completed(running), start=1):
            print(f"{number}/{len(to_run)} {future.result().folder.name}")
    results = [json.loads(job.result.read_text(encoding="utf-8")) for job in jobs]
    write_report(results, from_texts, options.out, machine())


if __name__ == "__main__":
    main()
