"""The documentation's code is as wide as a page: what is wider is cut off where it is read."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("*/README.md"),
    ]
)
COLUMNS = 84  # of a code block, beside the two side bars of the documentation


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_code_fits_the_page(page: Path) -> None:
    inside, wide = False, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            inside = not inside
        elif inside and len(line) > COLUMNS:
            wide.append(f"{number}: {line}")
    assert not inside, "a code block without its end"
    assert not wide, "\n".join(wide)
