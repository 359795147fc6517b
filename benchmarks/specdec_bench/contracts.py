"""What all parts of the harness speak of: a request, what answers it, and the model they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from specdec.artifacts.places import DRAFT_HEAD, DRAFT_MODEL, Kind
from specdec.errors import ConfigError
from specdec_bench.arm_names import ArmSpec
from specdec_bench.results.records import Setting, UnitRecord


@dataclass(frozen=True, eq=False)
class Unit:
    """One request, or `batch` of them, ready to run.

    Attributes:
        record: What the result file keeps.
        index: Position among the units of its setting.
        prompt_ids: Ids of each row, without padding.
        text_ids: Plain's new tokens of each row, cut.
        input_ids: [B, S] int64, padded on the left.
        attention_mask: [B, S] int64.
    """

    record: UnitRecord
    index: int
    prompt_ids: Sequence[Sequence[int]]
    text_ids: Sequence[Sequence[int]]
    input_ids: Tensor
    attention_mask: Tensor


class Arm(Protocol):
    """Answers units.

    Attributes:
        name: As in the records.
        counts_rounds: Its rounds and what they emitted are known.
        in_process: It runs here, so that processor time means something.
    """

    name: str
    counts_rounds: bool
    in_process: bool

    def run(self, unit: Unit) -> list[list[int]]:
        """New tokens of each row; exactly `unit.record.new_tokens` of them."""
        ...


@dataclass
class Workbench:
    """What arms of one setting share.

    Attributes:
        model: The target, augmented, in the setting's dtype; ends of text switched off.
        tokenizer: Its tokenizer.
        setting: The conditions.
        drafts: What arms draft with, by kind; called when first needed.
        stores: Folder for stores; emptied with the setting.
        folds: Unit's number -> the part of its store that it may see, see `fill_stores`.
    """

    model: Any
    tokenizer: Any
    setting: Setting
    drafts: Mapping[Kind, Callable[[], Any]] = field(default_factory=dict)
    stores: Path = Path("stores")
    folds: dict[int, int] = field(default_factory=dict)

    def draft(self, spec: ArmSpec) -> Any:
        """Head or draft model of an arm.

        Raises:
            ConfigError: None was given.
        """
        self.check_draft(spec)
        return self.drafts[spec.draft_kind or DRAFT_MODEL]()

    def check_draft(self, spec: ArmSpec) -> None:
        """Raises `ConfigError` where an arm's head or draft model was not given."""
        if spec.needs_draft and spec.draft_kind not in self.drafts:
            flag = "--head" if spec.draft_kind is DRAFT_HEAD else "--draft"
            raise ConfigError(f"arm {spec.name!r} needs {flag}: a folder or hub id")

    def space_of(self, unit: Unit) -> str:
        """The part of the store that a unit may see."""
        return f"without{self.folds.get(unit.index, 0)}"

    def sampling(self) -> dict[str, Any]:
        """Arguments of `generate` for the setting's temperature; no other warper is on."""
        temperature = self.setting.temperature
        if not temperature:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
