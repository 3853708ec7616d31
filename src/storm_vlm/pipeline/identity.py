"""What the tokens of a video depend on: the content of the file, the weights, and the choices; and hashes of them."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from storm_vlm.model import StormForConditionalGeneration, StormVideoProcessor, TokenCompression
from storm_vlm.pipeline.video_tokens import Provenance, tensor_bytes
from storm_vlm.video import content_hash

WeightsState = tuple[tuple[int, int], ...]


def weights_state(*modules: torch.nn.Module) -> WeightsState:
    """Returns what tells within this process whether a weight was changed or replaced, without reading the weights."""
    return tuple(
        # Tensors made in inference mode count no versions; they cannot be trained either.
        (tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version)
        for module in modules
        for tensor in (*module.parameters(), *module.buffers())
    )


def weights_hash(settings: str, *parts: torch.nn.Module) -> str:
    """Returns a hash of settings and of every weight of some parts: names, types, shapes and bytes."""
    digest = hashlib.sha256(settings.encode())
    for part in parts:
        for name, tensor in part.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


@dataclass(slots=True)
class EncoderFingerprint:
    """Hash of every weight that a video's tokens depend on, and of the config; computed again when a weight changed.

    All bytes are read, about a second for 400 million weights and once in a process: names, times and samples of
    weights can stay the same while the weights change.

    Attributes:
        model: The model.
    """

    model: StormForConditionalGeneration
    _state: WeightsState | None = None
    _digest: str = ""

    def __call__(self) -> str:
        """Returns 64 hexadecimal digits."""
        parts = [self.model.vision_tower, self.model.temporal_projector]
        if self.model.config.projector_config.vocabulary_readout:
            parts.append(self.model.get_input_embeddings())
        state = weights_state(*parts)
        if state != self._state:
            self._state, self._digest = state, weights_hash(self.model.config.to_json_string(), *parts)
        return self._digest


@dataclass(slots=True)
class ContentHashes:
    """Hashes of videos; a file that has not changed since is not read again."""

    _known: dict[Path, tuple[tuple[int, ...], str]] = field(default_factory=dict)

    def __call__(self, video: str | Path | bytes) -> str | None:
        """Returns the hash of a video's content, or None for one on the network."""
        if isinstance(video, str) and "://" in video and not video.lower().startswith("file://"):
            return None
        if isinstance(video, bytes) or not Path(video).is_file():
            return content_hash(video)
        path = Path(video).resolve()
        stat = path.stat()
        # The time of the last change of the entry itself cannot be set back by a program that copies files.
        signature = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
        known = self._known.get(path)
        if known is None or known[0] != signature:
            known = self._known[path] = (signature, content_hash(video))
        return known[1]


def cache_key(
    provenance: Provenance,
    targets: tuple[float, ...],
    compression: TokenCompression,
    processor: StormVideoProcessor,
) -> str | None:
    """Returns a hash of everything that the tokens depend on.

    Args:
        provenance: Content, weights, dtype and version.
        targets: Times of the frames in seconds.
        compression: Token compression.
        processor: How frames are scaled and normalised.

    Returns:
        64 hexadecimal digits; None if the content is not known, as for a stream.
    """
    if provenance.content_sha256 is None:
        return None
    facts = [
        provenance.content_sha256,
        # The same pictures of a folder last longer or shorter, as their rate is given.
        provenance.duration_seconds,
        provenance.model_fingerprint,
        provenance.dtype,
        provenance.version,
        targets,
        asdict(compression),
        processor.to_json_string(),
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
