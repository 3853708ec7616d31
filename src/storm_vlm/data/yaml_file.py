"""YAML files that a user writes: recipes and mixtures."""

from pathlib import Path
from typing import Any

import yaml

from storm_vlm.errors import StormError


def read_yaml(path: Path, error_type: type[StormError]) -> Any:
    """Reads a YAML file.

    Args:
        path: The file.
        error_type: What is raised.

    Returns:
        What it holds.

    Raises:
        error_type: The file cannot be read, or is not YAML; the message names it.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise error_type(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise error_type(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
