"""The figures of a profile as tables: for the terminal, Markdown and the page, and as values for JSON."""

from dataclasses import asdict, dataclass
from typing import Any

from storm_vlm.profiling.measure import MODEL_PARTS, Measurement, Spread
from storm_vlm.profiling.paper import MACHINE, TABLE_13
from storm_vlm.profiling.request import PARTS, Setting
from storm_vlm.profiling.settings import compression_factor, compression_name

_MIB = 2**20
_COUNTED = ("vision", "projector", "compression", "prefill", "token")
_MOST_COMPRESSED = 8


@dataclass(frozen=True, slots=True)
class Skipped:
    """A setting that was not measured.

    Attributes:
        setting: Frames and compression.
        reason: Why, in one line.
    """

    setting: Setting
    reason: str

    def line(self) -> str:
        """Returns what was skipped and why."""
        return f"skipped {self.setting.num_frames} frames, {compression_name(self.setting.compression)}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of cells under columns."""

    title: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True, slots=True)
class ProfileReport:
    """All that was measured.

    Attributes:
        facts: Model, machine, video and settings.
        measurements: One for each setting that fits.
        skipped: The settings that do not.
    """

    facts: dict[str, dict[str, Any]]
    measurements: list[Measurement]
    skipped: list[Skipped]

    def tables(self) -> list[Table]:
        """Returns the figures, the paper's beside ours where it has the same setting."""
        if not self.measurements:
            return []
        tables = [
            self._latency(),
            self._ranges(),
            self._flops(),
            self._memory(),
            self._paper(),
            self._ratios(),
        ]
        return [table for table in tables if table.rows]

    def ratio(self, num_frames: int, parts: tuple[str, ...] = MODEL_PARTS) -> float | None:
        """Returns how many times faster 8x compression is than none; None unless both were measured."""
        plain, compressed = self._found(num_frames, 1), self._found(num_frames, _MOST_COMPRESSED)
        if plain is None or compressed is None:
            return None
        return plain.total(parts).median / compressed.total(parts).median

    def to_dict(self) -> dict[str, Any]:
        """Returns everything as values that JSON knows; times are seconds, one for each repeat."""
        return {
            **self.facts,
            "measurements": [
                asdict(measurement)
                | {
                    "setting": _named(measurement.setting),
                    "total_seconds": asdict(measurement.total()),
                    "model_seconds": asdict(measurement.total(MODEL_PARTS)),
                    "shares": {part: measurement.share(part) for part in PARTS},
                }
                for measurement in self.measurements
            ],
            "skipped": [_named(skipped.setting) | {"reason": skipped.reason} for skipped in self.skipped],
        }

    def to_markdown(self) -> str:
        """Returns the tables, what was skipped, and the facts."""
        lines = [f"# Profile of {self.facts['model']['name']}", ""]
        for table in self.tables():
            lines += [f"## {table.title}", "", _row(table.columns), "|" + "---|" * len(table.columns)]
            lines += [*map(_row, table.rows), ""]
        lines += [f"- {skipped.line()}" for skipped in self.skipped]
        lines += [""] * bool(self.skipped)
        for name, facts in self.facts.items():
            lines += [f"## {name.capitalize()}", ""]
            lines += [f"- {key}: {value}" for key, value in facts.items() if value is not None]
            lines.append("")
        return "\n".join(lines)

    def _found(self, num_frames: int, factor: int) -> Measurement | None:
        """Returns the measurement whose tokens the paper's kind of compression made fewer by this factor."""
        for measurement in self.measurements:
            if measurement.setting.num_frames == num_frames and _paper_factor(measurement) == factor:
                return measurement
        return None

    def _latency(self) -> Table:
        columns = ["frames", "compression", "visual tokens", "first token", *PARTS, "each token after"]
        rows = [
            [
                *_labels(measurement),
                f"{measurement.num_visual_tokens}",
                _ms(measurement.total().median),
                *(
                    f"{_ms(measurement.part(part).median)} ({100 * measurement.share(part):.1f}%)"
                    for part in PARTS
                ),
                _ms(Spread.of(measurement.token_seconds).median),
            ]
            for measurement in self.measurements
        ]
        return Table("Latency in ms, median, and share of the time to the first token", columns, rows)

    def _ranges(self) -> Table:
        rows = [
            [
                *_labels(measurement),
                _range(measurement.total()),
                *(_range(measurement.part(part)) for part in PARTS),
                _range(Spread.of(measurement.token_seconds)),
            ]
            for measurement in self.measurements
        ]
        columns = ["frames", "compression", "first token", *PARTS, "each token after"]
        return Table("Latency in ms, least to most", columns, rows)

    def _flops(self) -> Table:
        rows = [
            [
                *_labels(measurement),
                *(
                    f"{measurement.flops[part] / 1e9:.4g} ({measurement.flops_per_second(part) / 1e9:.4g})"
                    for part in _COUNTED
                ),
            ]
            for measurement in self.measurements
        ]
        columns = ["frames", "compression", *_COUNTED[:-1], "each token after"]
        return Table("GFLOP, and in brackets GFLOP/s reached", columns, rows)

    def _memory(self) -> Table:
        rows = [
            [
                *_labels(measurement),
                _mebibytes(measurement.peak_over_idle_bytes),
                _mebibytes(measurement.kv_cache_bytes),
                f"{measurement.num_visual_tokens} of {measurement.num_uncompressed_tokens}",
                f"{measurement.num_prompt_tokens}",
            ]
            for measurement in self.measurements
        ]
        columns = [
            "frames",
            "compression",
            "peak over idle",
            "KV of visual tokens",
            "visual tokens",
            "prompt tokens",
        ]
        return Table("Memory in MiB, and tokens", columns, rows)

    def _paper(self) -> Table:
        """Sets the model's time, without decoding the video, beside the paper's."""
        rows = []
        for measurement in self.measurements:
            paper = TABLE_13.get((measurement.setting.num_frames, _paper_factor(measurement) or 0))
            if paper is None:
                continue
            ours = (
                measurement.total(MODEL_PARTS),
                measurement.part("prefill"),
                measurement.part("vision"),
                measurement.part("projector"),
            )
            theirs = (paper.total, paper.language_model, paper.vision, paper.projector)
            cells = [
                cell
                for our, their in zip(ours, theirs, strict=True)
                for cell in (_ms(our.median), str(their))
            ]
            rows.append([*_labels(measurement), *cells])
        columns = ["frames", "compression"]
        for name in ("total", "prefill", "vision", "projector"):
            columns += [name, f"{name}, paper"]
        return Table(
            f"Latency in ms without decoding, beside the paper's Table 13 ({MACHINE})", columns, rows
        )

    def _ratios(self) -> Table:
        rows = []
        for num_frames in dict.fromkeys(measurement.setting.num_frames for measurement in self.measurements):
            plain = self._found(num_frames, 1)
            if plain is None:
                continue
            theirs, compressed = TABLE_13.get((num_frames, 1)), TABLE_13.get((num_frames, _MOST_COMPRESSED))
            paper_ratio = theirs.total / compressed.total if theirs and compressed else None
            cells = [self.ratio(num_frames), self.ratio(num_frames, PARTS), paper_ratio]
            shares = [
                plain.share("projector", MODEL_PARTS),
                plain.share("projector"),
                theirs.projector / theirs.total if theirs else None,
            ]
            rows.append([str(num_frames), *map(_times, cells), *map(_percent, shares)])
        columns = ["frames", "none / 8x", "with decoding", "paper"]
        columns += ["projector's share of none", "with decoding", "paper"]
        return Table("How many times faster 8x compression is, and what the projector costs", columns, rows)


def _paper_factor(measurement: Measurement) -> int | None:
    """Returns the factor of a compression as Table 13 has it: over time alone, and of whole groups of frames."""
    compression = measurement.setting.compression
    factor = compression_factor(compression)
    is_whole = measurement.num_visual_tokens * factor == measurement.num_uncompressed_tokens
    return factor if compression.spatial_pool == 1 and is_whole else None


def _named(setting: Setting) -> dict[str, Any]:
    return {"num_frames": setting.num_frames, "compression": compression_name(setting.compression)}


def _labels(measurement: Measurement) -> list[str]:
    return [str(measurement.setting.num_frames), compression_name(measurement.setting.compression)]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _range(spread: Spread) -> str:
    return f"{_ms(spread.low)} to {_ms(spread.high)}"


def _ms(seconds: float) -> str:
    """Returns milliseconds with three digits that matter, or all of them above 1000."""
    milliseconds = 1000 * seconds
    digits = 2 if milliseconds < 10 else 1 if milliseconds < 100 else 0
    return f"{milliseconds:.{digits}f}"


def _mebibytes(num_bytes: int | None) -> str:
    return "not known" if num_bytes is None else f"{num_bytes / _MIB:.1f}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}x"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}%"
