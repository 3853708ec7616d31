"""A generated film to decode, where no video is given."""

from pathlib import Path

import av
import numpy as np

FRAMES_PER_SECOND = 24
_HEIGHT, _WIDTH = 360, 640
_SCENE_SECONDS, _BLOCK = 10, 20
_OPTIONS = {"preset": "ultrafast", "bf": "2", "g": "250", "x264-params": "log-level=none"}
# A length that most frames of a film are left out of, as in real use, and a shortest one.
_FRAMES_PER_SAMPLE, _FEWEST_FRAMES = 2, 240


def write_film(path: Path, num_samples: int) -> None:
    """Encodes an H.264 film with slow movement and a cut every ten seconds.

    Args:
        path: File to write; its suffix names the container.
        num_samples: Most frames that will be sampled; the film has twice as many, at least ten seconds of them.
    """
    generator = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options=_OPTIONS)
        stream.width, stream.height, stream.pix_fmt = _WIDTH, _HEIGHT, "yuv420p"
        for index in range(max(_FEWEST_FRAMES, _FRAMES_PER_SAMPLE * num_samples)):
            if index % (_SCENE_SECONDS * FRAMES_PER_SECOND) == 0:
                scene = _draw_scene(generator)
            planes = np.ascontiguousarray(np.roll(scene, index // 2 % _WIDTH, axis=1))
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, "yuv420p")))
        container.mux(stream.encode(None))


def _draw_scene(generator: np.random.Generator) -> np.ndarray:
    """Returns blocks of random brightness and colour as the three planes of yuv420p, one below the other."""
    num_rows = _HEIGHT * 3 // 2
    shape = (num_rows // _BLOCK + 1, _WIDTH // _BLOCK)
    blocks = generator.integers(16, 235, shape, dtype=np.uint8)
    return np.kron(blocks, np.ones((_BLOCK, _BLOCK), np.uint8))[:num_rows]
