"""From a prepared call to the main loop: as many stops as ARCHITECTURE.md lists, in that order."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import specdec
from specdec.demo import load_target

ROOT = Path(__file__).resolve().parents[2]
MOST = 15
FIRST, SECOND, LAST = (
    "SpeculativeDecode.__call__",
    "SpeculativeDecode._decode",
    "speculative_generate",
)


def listed() -> list[str]:
    """The functions in the numbered list of the page."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    section = text.split("## From a call to the loop")[1].split("\n## ")[0]
    return re.findall(r"^\d+\. `([\w.]+)`", section, re.MULTILINE)


def taken(model: Any) -> list[str]:
    """The functions of the library that the way to the loop calls, in order."""
    found: list[str] = []

    def watch(frame: FrameType, event: str, _: object) -> None:
        code, caller = frame.f_code, frame.f_back
        if event != "call" or not Path(code.co_filename).is_relative_to(ROOT / "specdec"):
            return
        on_the_way = caller is not None and caller.f_code.co_qualname in (FIRST, SECOND)
        if code.co_qualname == FIRST or (on_the_way and found and found[-1] != LAST):
            found.append(code.co_qualname.removesuffix(".__init__"))

    sys.setprofile(watch)
    try:
        model.generate(torch.tensor([[5, 6, 7, 8, 5, 6, 7]]), max_new_tokens=4)
    finally:
        sys.setprofile(None)
    return found


def test_the_way_to_the_loop_is_short_and_listed() -> None:
    model = specdec.augment(load_target(), "prompt_lookup")
    way = taken(model)
    assert way[0] == FIRST
    assert way[-1] == LAST
    assert len(way) <= MOST
    assert way == listed()
