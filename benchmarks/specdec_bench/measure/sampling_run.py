"""`--check-sampling`: gives the arms of a run to the test of distributions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import torch

from specdec_bench.arm_names import BASELINE
from specdec_bench.checks.sampling import SampledArm, SamplingPlan, check_sampling
from specdec_bench.contracts import Arm, Unit, Workbench
from specdec_bench.measure.arms import GenerateArm, fill_stores
from specdec_bench.measure.units import padded
from specdec_bench.results.records import SamplingRecord, UnitRecord

_PROMPTS = 4
_TEMPERATURE = 1.0  # where the setting is greedy


def sampling_records(
    index: int,
    bench: Workbench,
    units: Sequence[Unit],
    arms: Sequence[Arm],
    known: Collection[str],
    seed: int,
) -> list[SamplingRecord]:
    """Tests every arm that generates in this process, one prompt at a time.

    Args:
        index: Of the setting, for the records.
        bench: The model; its temperature is taken, or 1 where it is greedy.
        units: Give the prompts.
        arms: Of the run.
        known: Names of arms that were tested before.
        seed: Of the test.
    """
    temperature = bench.setting.temperature or _TEMPERATURE
    hot = replace(bench, setting=replace(bench.setting, temperature=temperature, batch=1))
    prompts = [unit.prompt_ids[0] for unit in units[:_PROMPTS]]
    spaces = {tuple(unit.prompt_ids[0]): unit.index for unit in units[:_PROMPTS]}
    whole = bench.setting.dtype in ("float32", "float64")
    own = [
        arm
        for arm in arms
        if isinstance(arm, GenerateArm) and arm.name != BASELINE and arm.name not in known
    ]
    if not own:
        return []
    if any(arm.spec.store for arm in own):
        fill_stores(hot, units)
    sampled = [
        SampledArm(
            arm.name,
            _sampler(GenerateArm(arm.spec, hot), spaces),
            whole and arm.spec.promises_text(temperature),
        )
        for arm in own
    ]
    plan = SamplingPlan(prompts, temperature, setting=index, seed=seed)
    return check_sampling(hot.model, _plain(hot), sampled, plan)


def _sampler(
    arm: GenerateArm, spaces: dict[tuple[int, ...], int]
) -> Callable[[Sequence[int], int, int], list[int]]:
    def sample(prompt: Sequence[int], seed: int, tokens: int) -> list[int]:
        unit = _one_row(arm.bench.model, prompt, seed, tokens, spaces.get(tuple(prompt), 0))
        return arm.run(unit)[0]

    return sample


def _plain(bench: Workbench) -> Callable[[Sequence[int], int, int], list[int]]:
    def sample(prompt: Sequence[int], seed: int, tokens: int) -> list[int]:
        model: Any = bench.model
        ids, mask = padded([prompt], model)
        torch.manual_seed(seed)
        output = type(model).generate(
            model, ids, attention_mask=mask, max_new_tokens=tokens, **bench.sampling()
        )
        row: list[int] = output[0, ids.shape[1] :].tolist()
        return row

    return sample


def _one_row(model: Any, prompt: Sequence[int], seed: int, tokens: int, index: int) -> Unit:
    ids, mask = padded([prompt], model)
    record = UnitRecord(0, "sampling", "", "", seed, [len(prompt)], tokens, 0.0, "")
    return Unit(record, index, [prompt], [], ids, mask)
