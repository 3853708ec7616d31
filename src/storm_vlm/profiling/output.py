"""Writes a profile to a folder: figures as JSON and Markdown, pictures, and all of it as one page."""

import json
from base64 import b64encode
from pathlib import Path

from jinja2 import Environment

from storm_vlm.profiling.plots import draw_pictures
from storm_vlm.profiling.report import ProfileReport
from storm_vlm.storage import atomic_directory

_PAGE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<title>Profile of {{ report.facts.model.name }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; }
  table { border-collapse: collapse; display: block; margin-bottom: 1.5rem; overflow-x: auto; }
  th, td { border-bottom: 1px solid #ccc; padding: .25rem .6rem; text-align: right; white-space: nowrap; }
  img { max-width: 100%; }
</style>
<h1>Profile of {{ report.facts.model.name }}</h1>
{% for name, data in pictures.items() -%}
<img alt="{{ name.replace('_', ' ') }}" src="data:image/png;base64,{{ data }}">
{% endfor -%}
{% for table in report.tables() -%}
<h2>{{ table.title }}</h2>
<table>
<tr>{% for column in table.columns %}<th>{{ column }}</th>{% endfor %}</tr>
{% for row in table.rows -%}
<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor -%}
</table>
{% endfor -%}
{% if report.skipped -%}
<ul>
{% for skipped in report.skipped %}<li>{{ skipped.line() }}</li>
{% endfor -%}
</ul>
{% endif -%}
{% for name, facts in report.facts.items() -%}
<h2>{{ name.capitalize() }}</h2>
<ul>
{% for key, value in facts.items() if value is not none %}<li>{{ key }}: {{ value }}</li>
{% endfor -%}
</ul>
{% endfor -%}
</html>
"""


def write_profile(report: ProfileReport, out: Path, *, overwrite: bool = False) -> list[Path]:
    """Writes ``profile.json``, ``profile.md``, ``index.html`` and the pictures.

    Args:
        report: What was measured; without any measurement there are no pictures.
        out: Folder to write; it appears only when it is complete.
        overwrite: Replace it if it exists; otherwise that is a StormError.

    Returns:
        The files.
    """
    pictures = draw_pictures(report.measurements) if report.measurements else {}
    with atomic_directory(out, overwrite=overwrite) as folder:
        _write(folder / "profile.json", json.dumps(report.to_dict(), indent=1) + "\n")
        _write(folder / "profile.md", report.to_markdown())
        _write(folder / "index.html", page(report, pictures))
        for name, data in pictures.items():
            (folder / f"{name}.png").write_bytes(data)
        names = sorted(path.name for path in folder.iterdir())
    return [out / name for name in names]


def page(report: ProfileReport, pictures: dict[str, bytes]) -> str:
    """Returns the whole profile as one page of HTML that needs no other file.

    Args:
        report: What was measured.
        pictures: PNG files by name.

    Returns:
        The page.
    """
    encoded = {name: b64encode(data).decode() for name, data in pictures.items()}
    return Environment(autoescape=True).from_string(_PAGE).render(report=report, pictures=encoded)


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
