"""Answers from several machines: workers of a Ray cluster, each with the model."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from storm_vlm.errors import StormError
from storm_vlm.evaluation.answering import Job, LocalAnswerer, jobs_by_clip
from storm_vlm.evaluation.report import Answer
from storm_vlm.pipeline import VideoQA

try:
    import ray
    from ray.exceptions import RayTaskError
    from ray.util import ActorPool
except ImportError:  # an extra
    ray = None


class RayAnswerer:
    """Does jobs on workers of the cluster that ``RAY_ADDRESS`` names, or of one begun on this machine.

    Videos and the model must lie under the same paths on all machines. Each worker takes a CPU, and a GPU if there are
    enough, for as long as this object lives; workers that find none free wait for it.

    Args:
        load: Makes the model, on a worker.
        num_workers: Workers.

    Raises:
        StormError: Ray is not installed, or the cluster is too small.
    """

    def __init__(self, load: Callable[[], VideoQA], num_workers: int) -> None:
        if ray is None:
            raise StormError("workers on several machines need Ray: pip install 'storm-vlm[ray]'")
        if not ray.is_initialized():
            ray.init(log_to_driver=False, configure_logging=False)
        resources = ray.cluster_resources()
        if resources.get("CPU", 0) < num_workers:
            raise StormError(
                f"{num_workers} workers asked for, the cluster has {resources.get('CPU', 0):g} CPUs"
            )
        num_gpus = 1 if resources.get("GPU", 0) >= num_workers else 0
        worker = ray.remote(num_cpus=1, num_gpus=num_gpus)(_Worker)
        self._workers = [worker.remote(load) for _ in range(num_workers)]

    def describe(self) -> dict[str, Any]:
        """Returns what the model is made of, as plain values; an error of a worker's is raised here."""
        with _raised_by_workers():
            return ray.get([worker.describe.remote() for worker in self._workers])[0]

    def answer(self, jobs: Sequence[Job]) -> Iterator[list[Answer]]:
        """Yields the answers of each job, as workers are done with a clip."""
        pool = ActorPool(self._workers)
        with _raised_by_workers():
            for answers in pool.map_unordered(
                lambda worker, group: worker.answer.remote(group), jobs_by_clip(jobs)
            ):
                yield from answers


@contextmanager
def _raised_by_workers() -> Iterator[None]:
    """Raises a user's mistake that a worker found as it is, without the worker's traceback."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, StormError):
            raise error.cause from error
        raise


class _Worker:
    """Loads the model when it is first needed: what fails there is raised to whoever asks."""

    def __init__(self, load: Callable[[], VideoQA]) -> None:
        self._load = load
        self._answerer: LocalAnswerer | None = None

    def describe(self) -> dict[str, Any]:
        return self._loaded().describe()

    def answer(self, jobs: Sequence[Job]) -> list[list[Answer]]:
        return list(self._loaded().answer(jobs))

    def _loaded(self) -> LocalAnswerer:
        if self._answerer is None:
            self._answerer = LocalAnswerer(self._load())
        return self._answerer
