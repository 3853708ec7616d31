"""The benchmarks that `storm eval --task` knows, each read from its official annotation files."""

from storm_vlm.evaluation.benchmarks.egoschema import EGOSCHEMA
from storm_vlm.evaluation.benchmarks.longvideobench import LONGVIDEOBENCH, LONGVIDEOBENCH_SUBTITLES
from storm_vlm.evaluation.benchmarks.lvbench import LVBENCH
from storm_vlm.evaluation.benchmarks.mlvu import MLVU
from storm_vlm.evaluation.benchmarks.mvbench import MVBENCH
from storm_vlm.evaluation.benchmarks.timescope import TIMESCOPE
from storm_vlm.evaluation.benchmarks.videomme import VIDEOMME, VIDEOMME_SUBTITLES
from storm_vlm.evaluation.benchmarks.vnbench import VNBENCH
from storm_vlm.evaluation.benchmarks.world import WORLD

BENCHMARKS = {
    benchmark.name: benchmark
    for benchmark in (
        WORLD,
        VIDEOMME,
        VIDEOMME_SUBTITLES,
        MLVU,
        LONGVIDEOBENCH,
        LONGVIDEOBENCH_SUBTITLES,
        MVBENCH,
        EGOSCHEMA,
        LVBENCH,
        VNBENCH,
        TIMESCOPE,
    )
}

__all__ = ["BENCHMARKS"]
