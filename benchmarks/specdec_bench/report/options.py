"""What `specdec bench report` can be told; imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from specdec.artifacts.arguments import arg


@dataclass(frozen=True)
class ReportOptions:
    """Turn the results of a run into one HTML page, and Markdown."""

    results: Annotated[tyro.conf.Positional[Path], arg("RESULTS")]
    """File of a finished `specdec bench run`."""
    output: Annotated[Path | None, arg("FOLDER", "RESULTS-report beside the file")] = None
    """Folder for report.html and report.md; files of these names are replaced."""
