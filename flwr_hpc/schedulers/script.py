"""Job scripts from templates: a pure function of the fields."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import flwr_hpc


def render(template_name: str, fields: Mapping[str, Any]) -> str:
    """Return a job script.

    Parameters
    ----------
    template_name : str
        File in ``slurm_templates/``.
    fields : mapping
        Every name the template uses; one too few is an error, not an empty string.
    """
    env = Environment(
        loader=FileSystemLoader(_templates()),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.filters["sh"] = lambda value: shlex.quote(str(value))
    return env.get_template(template_name).render(fields)


def _templates() -> Path:
    package = Path(flwr_hpc.__file__).resolve().parent
    installed = package / "slurm_templates"
    return installed if installed.is_dir() else package.parent / "slurm_templates"
