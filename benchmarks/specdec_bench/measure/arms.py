"""Arms that generate in this process, and the stores that some of them see.

Each call starts fresh. Our methods get a new `SpecConfig`, and Hugging Face's assistant gets its
settings back.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch

from specdec.api import last_stats
from specdec.artifacts.tokenizers import tokenizer_fingerprint
from specdec.config import SpecConfig
from specdec.errors import SpecdecError
from specdec.loading import with_tokenizer
from specdec.sources.suffix_store import SuffixStore
from specdec.stats import GenerationStats, RoundRecord
from specdec_bench.arm_names import ASSISTED, LOOKUP, SERVER, ArmSpec
from specdec_bench.contracts import Arm, Unit, Workbench
from specdec_bench.results.records import PLAIN

_LOOKUP_TOKENS = 10  # what Hugging Face's documentation gives
_MOST_FOLDS = 8  # of the prompts, when stores are filled from all but one of them


class GenerateArm:
    """An arm that is a `generate` call in this process.

    Args:
        spec: What to call.
        bench: Model and conditions.
    """

    in_process = True

    def __init__(self, spec: ArmSpec, bench: Workbench) -> None:
        self.name, self.spec, self.bench = spec.name, spec, bench
        self.is_ours = spec.is_ours
        self.counts_rounds = spec.method != PLAIN
        self.stats: GenerationStats | None = None
        """Of the newest answer; None for Hugging Face's own loops."""

    def run(self, unit: Unit) -> list[list[int]]:
        """New tokens of each row.

        Raises:
            SpecdecError: The call ran as plain `generate`, or gave another number of tokens.
        """
        return self.answer(unit)

    def answer(
        self,
        unit: Unit,
        streamer: Any = None,
        on_round: Callable[[RoundRecord], None] | None = None,
    ) -> list[list[int]]:
        """As `run`, watched.

        Args:
            unit: What to answer.
            streamer: Gets the tokens as they come.
            on_round: Gets the rounds; ours only.
        """
        model, wanted = self.bench.model, unit.record.new_tokens
        generate, extra = self._call(unit, on_round)
        if streamer is not None:
            extra["streamer"] = streamer
        if self.bench.setting.temperature:
            torch.manual_seed(unit.record.seed)
        output = generate(
            unit.input_ids,
            attention_mask=unit.attention_mask,
            max_new_tokens=wanted,
            **self.bench.sampling(),
            **extra,
        )
        rows: list[list[int]] = output[:, unit.input_ids.shape[1] :].tolist()
        self.stats = last_stats(model) if self.is_ours else None
        if self.stats is not None and self.stats.mode == "plain":
            raise SpecdecError(f"ran as plain generate: {self.stats.mode_reason}")
        if any(len(row) != wanted for row in rows):
            found = sorted({len(row) for row in rows})
            raise SpecdecError(f"gave {found} tokens where {wanted} were asked for")
        return rows

    def _call(
        self, unit: Unit, on_round: Callable[[RoundRecord], None] | None
    ) -> tuple[Callable[..., Any], dict[str, Any]]:
        """What to call and its own arguments."""
        model, spec = self.bench.model, self.spec
        if self.is_ours:
            config = SpecConfig(
                spec.method, self._options(unit), spec.budget, on_round, kernels=spec.kernels
            )
            return model.generate, {"specdec": config}
        plain, extra = type(model).generate.__get__(model), dict(spec.options)
        if spec.method == LOOKUP:
            extra.setdefault("prompt_lookup_num_tokens", _LOOKUP_TOKENS)
        if spec.method == ASSISTED:
            draft = self.bench.draft(spec)
            # An earlier call may have adapted how long it drafts.
            draft.generation_config = copy.deepcopy(model.generation_config)
            draft.generation_config.update(**extra)
            extra = {"assistant_model": draft}
        return plain, extra

    def _options(self, unit: Unit) -> dict[str, Any]:
        spec, bench = self.spec, self.bench
        options = dict(spec.options)
        if spec.needs_draft:
            options["draft"] = bench.draft(spec)
        if spec.store:
            options |= {
                "store": bench.stores,
                "space": bench.space_of(unit),
                "store_update": False,
            }
            options = with_tokenizer(spec.method, options, bench.tokenizer)
        return options


def make_arm(spec: ArmSpec, bench: Workbench) -> Arm:
    """The arm, ready to run.

    Raises:
        ConfigError: It needs a draft that was not given.
    """
    if spec.method == SERVER:
        from specdec_bench.measure.server_arm import ServerArm

        server: Arm = ServerArm.of(spec.options["url"], bench.model, bench.tokenizer, bench.setting)
        return server
    bench.check_draft(spec)
    return GenerateArm(spec, bench)


def fill_stores(bench: Workbench, units: Sequence[Unit]) -> None:
    """Fills the stores that units see: plain's texts of prompts that are not theirs.

    Clusters are dealt out to a few folds, and the units of a fold share a store that holds the
    texts of all other folds: never of their own clusters, and not one store for each unit.

    Args:
        bench: Its `stores` folder takes them; its `folds` then say who sees which.
        units: All units of the setting.
    """
    clusters = list(dict.fromkeys(unit.record.cluster for unit in units))
    count = min(len(clusters), _MOST_FOLDS)
    fold_of = {cluster: number % count for number, cluster in enumerate(clusters)}
    bench.folds.update((unit.index, fold_of[unit.record.cluster]) for unit in units)
    fingerprint = tokenizer_fingerprint(bench.tokenizer)
    for first in {bench.folds[unit.index]: unit for unit in units}.values():
        store = SuffixStore(bench.stores, bench.space_of(first), fingerprint)
        for other in units:
            if bench.folds[other.index] == bench.folds[first.index]:
                continue
            for text in other.text_ids:
                store.add(text)
