"""Measures where the time and the memory of a question about a video go, over frames and token compression."""

from storm_vlm.profiling.film import write_film
from storm_vlm.profiling.measure import Measurement
from storm_vlm.profiling.output import write_profile
from storm_vlm.profiling.report import ProfileReport, Skipped, Table
from storm_vlm.profiling.request import Setting
from storm_vlm.profiling.run import profile
from storm_vlm.profiling.settings import ProfileSettings, compression_name, parse_compression
from storm_vlm.profiling.shapes import paper_shape

__all__ = [
    "Measurement",
    "ProfileReport",
    "ProfileSettings",
    "Setting",
    "Skipped",
    "Table",
    "compression_name",
    "paper_shape",
    "parse_compression",
    "profile",
    "write_film",
    "write_profile",
]
