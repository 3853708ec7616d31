"""Tables, values and page of a fixed profile."""

import json
import re

import pytest

from storm_vlm.profiling import ProfileReport, write_profile
from storm_vlm.profiling.output import page
from storm_vlm.profiling.paper import TABLE_13
from storm_vlm.profiling.request import PARTS


def tables_of(report):
    return {table.title.split(",")[0]: table for table in report.tables()}


def test_latency(report):
    table = report.tables()[0]
    assert table.columns == [
        "frames",
        "compression",
        "visual tokens",
        "first token",
        *PARTS,
        "each token after",
    ]
    # Median of 3.5, 3.1 and 4.0 seconds; prefill has 7.3 of 10.6 seconds in all.
    assert table.rows[0][:4] == ["256", "none", "65536", "3500"]
    assert table.rows[0][8] == "2400 (68.9%)"
    assert table.rows[0][-1] == "20.0"
    assert table.rows[1][1] == "T.pool4+T.sample2"


def test_ranges(report):
    row = report.tables()[1].rows[0]
    assert row[2] == "3100 to 4000"
    assert row[7] == "2000 to 2900"
    assert row[-1] == "10.0 to 30.0"


def test_flops(report):
    table = next(table for table in report.tables() if table.title.startswith("GFLOP"))
    # 2 GFLOP in 0.5 s, 1 in 0.09 s, none, 3 in 2.4 s, 1 in 0.02 s.
    assert table.rows[0][2:] == ["2 (4)", "1 (11.11)", "0 (0)", "3 (1.25)", "1 (50)"]


def test_memory(report):
    table = next(table for table in report.tables() if table.title.startswith("Memory"))
    assert table.rows[0][2:] == ["3.0", "64.0", "65536 of 65536", "65576"]


def test_the_paper_beside_ours(report):
    table = next(table for table in report.tables() if "A100-80G" in table.title)
    # Vision 0.5, projector 0.09, compression 0.01 and prefill; spatial pooling and 4 frames have no figure there.
    assert table.rows == [
        ["256", "none", "3000", "10340", "2400", "7960", "500", "2030", "90.0", "348"],
        ["256", "T.pool4+T.sample2", "1000", "3000", "400", "623", "500", "2030", "90.0", "349"],
    ]


def test_ratios(report):
    table = report.tables()[-1]
    # 3.0 / 1.0 s without decoding, 3.5 / 1.5 s with it; the projector has 3 * 0.09 of 9.1 and of 10.6 s.
    assert table.rows[0] == ["256", "3.00x", "2.33x", "3.45x", "3.0%", "2.5%", "3.4%"]
    assert report.ratio(256) == pytest.approx(3.0)
    # 4 frames in groups of 8 leave a quarter of the tokens and not an eighth.
    assert report.ratio(4) is None
    assert table.rows[1] == ["4", "", "", "", "11.2%", "6.9%", ""]


def test_the_papers_parts_are_its_totals():
    """They are rounded to three digits there."""
    for latency in TABLE_13.values():
        parts = latency.language_model + latency.vision + latency.projector
        assert parts == pytest.approx(latency.total, rel=0.01)


def test_markdown(report):
    text = report.to_markdown()
    assert text.startswith("# Profile of A & B <tiny>\n\n## Latency in ms")
    assert "| 256 | none | 3000 | 10340 |" in text
    assert "- skipped 512 frames, none: it does not fit\n" in text
    assert "- threads: 2\n" in text
    assert "gpu" not in text


def test_values(report):
    values = json.loads(json.dumps(report.to_dict()))
    first = values["measurements"][0]
    assert first["setting"] == {"num_frames": 256, "compression": "none"}
    assert first["seconds"]["prefill"] == [2.4, 2.0, 2.9]
    assert first["total_seconds"] == pytest.approx({"median": 3.5, "low": 3.1, "high": 4.0})
    assert first["model_seconds"]["median"] == pytest.approx(3.0)
    assert first["shares"]["prefill"] == pytest.approx(7.3 / 10.6)
    assert values["skipped"] == [{"num_frames": 512, "compression": "none", "reason": "it does not fit"}]


def test_files(report, tmp_path):
    files = write_profile(report, tmp_path / "out")
    assert [file.name for file in files] == [
        "index.html", "latency_by_compression.png", "latency_by_frames.png", "latency_by_part.png",
        "profile.json", "profile.md",
    ]  # fmt: skip
    assert all(file.is_file() for file in files)
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files if file.suffix == ".png")
    html = files[0].read_text()
    assert html.count('src="data:image/png;base64,') == 3
    assert not re.search(r"https?://|<link|<script", html)
    assert "<td>10340</td>" in html
    assert "Profile of A &amp; B &lt;tiny&gt;" in html


def test_nothing_fits(report, tmp_path):
    empty = ProfileReport(report.facts, [], report.skipped)
    files = write_profile(empty, tmp_path / "out")
    assert [file.name for file in files] == ["index.html", "profile.json", "profile.md"]
    assert "it does not fit" in page(empty, {})
