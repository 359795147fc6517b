"""`speculation_profile.json`: measured acceptance in the form that serving simulators read.

The format is that of NVIDIA Model-Optimizer's specdec_bench, schema 1.0: one reader wants marginal
rates (vLLM's synthetic sampler), another conditional ones (Dynamo's mocker), so both are there and
are checked against the mean. Position i is the (i + 1)-th drafted token, or that depth of a tree.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from specdec.artifacts.atomic_files import make_folder, replace_file
from specdec.artifacts.places import Kind
from specdec.errors import ConfigError, SpecdecError
from specdec_bench.summary.acceptance import Acceptance, Counts

SCHEMA_VERSION = "1.0"
FILE_NAME = "speculation_profile.json"

_LENGTHS = ("depth", "num_draft_tokens", "max_depth", "block")  # how options call a draft's length
_TOLERANCE = 1e-9


@dataclass(frozen=True)
class Measured:
    """What a profile describes, besides its rates.

    Attributes:
        method: Drafting method.
        num_speculative_tokens: Length of a draft, or depth of a tree, that the method was set to.
        target: Name of the target; of a path, its last two parts only, for profiles travel.
        draft: Name of the draft head or model, the same way; None without one.
        by_category: Acceptance by category.
        conditions: What is needed to read the figures: data set, dtype, batch, temperature, device.
        drafts_with: What drafts token by token, so that a shorter draft begins a longer one.
    """

    method: str
    num_speculative_tokens: int
    target: str | None = None
    draft: str | None = None
    by_category: Mapping[str, Acceptance] = field(default_factory=dict)
    conditions: Mapping[str, Any] = field(default_factory=dict)
    drafts_with: Kind | None = None


def draft_length(config: object) -> int:
    """Length of a draft that a method's options ask for; 0 where they do not say."""
    return next((int(found) for name in _LENGTHS if (found := getattr(config, name, None))), 0)


def build_profile(acceptance: Acceptance, measured: Measured) -> dict[str, Any]:
    """The profile as plain JSON types.

    Args:
        acceptance: Over all requests.
        measured: What it is the acceptance of.

    Raises:
        SpecdecError: A round accepted more drafts than `num_speculative_tokens`: the rates would be
            cut short and describe a weaker draft.
    """
    length = measured.num_speculative_tokens
    if length < max(acceptance.positions, 1):
        raise SpecdecError(
            f"a profile of {length} speculative tokens cannot hold rounds that accepted "
            f"{acceptance.positions}; give at least that"
        )
    marginal = _padded(acceptance.marginal, length)
    # Chains of a model that drafts token by token; a copying method chooses its draft anew.
    analytic = acceptance.chain and measured.drafts_with is not None
    return {
        "schema_version": SCHEMA_VERSION,
        "measured": True,
        "producer": "specdec",
        "method": measured.method,
        "draft_checkpoint": _identity(measured.draft),
        "target_model": _identity(measured.target),
        "num_speculative_tokens": length,
        "block_size": None,
        "max_supported_k": length,
        "verification_method": "longest_prefix",
        "conditional_accept_rates": _padded(acceptance.conditional, length),
        "marginal_accept_rates": marginal,
        "mean_accept_length": acceptance.tau_per_step,
        "mean_accept_length_per_request": acceptance.tau_per_request,
        "accept_length_model": "chain_analytic" if analytic else "measured_per_k",
        "accept_length_by_k": {str(length): acceptance.tau_per_step},
        "acceptance_length_histogram": {str(n): c for n, c in acceptance.histogram.items()},
        "per_category": {
            name: {
                "mean_accept_length": found.tau_per_step,
                "mean_accept_length_per_request": found.tau_per_request,
                "num_requests": found.requests,
            }
            for name, found in measured.by_category.items()
        }
        or None,
        "measurement_conditions": dict(measured.conditions) or None,
        "validation": _validation(acceptance.tau_per_step, marginal),
    }


def write_profile(
    path: Path, measured: Measured, by_category: Mapping[str, Sequence[Counts]]
) -> None:
    """Writes the profile of some requests.

    Args:
        path: Where to; its folder is made.
        measured: Of what; its length becomes at least what was accepted, its categories are filled.
        by_category: What was counted in each request; those without a round are left out.

    Raises:
        SpecdecError: No request has a round.
        ConfigError: It cannot be written.
    """
    whole = Acceptance.of_requests([one for found in by_category.values() for one in found])
    categories = {
        name: Acceptance.of_requests(found)
        for name, found in by_category.items()
        if any(any(one.histogram.values()) for one in found)
    }
    length = max(measured.num_speculative_tokens, whole.positions, 1)
    measured = replace(measured, num_speculative_tokens=length, by_category=categories)
    save_profile(path, build_profile(whole, measured))


def save_profile(path: Path, profile: Mapping[str, Any]) -> None:
    """Checks a profile and writes it, whole or not at all.

    Raises:
        SpecdecError: It contradicts itself.
        ConfigError: It cannot be written.
    """
    check_profile(profile)
    text, where = json.dumps(profile, indent=2, allow_nan=False) + "\n", path.expanduser()
    try:
        make_folder(where.absolute().parent)
        replace_file(where, text.encode("utf-8"))
    except OSError as problem:
        raise ConfigError(f"cannot write {path}: {problem.strerror or problem}") from problem


def check_profile(profile: Mapping[str, Any]) -> None:
    """Holds every figure of a profile against its histogram.

    Raises:
        SpecdecError: A field is missing or contradicts another; names it.
    """
    if profile.get("schema_version") != SCHEMA_VERSION:
        raise SpecdecError(
            f"a profile of schema {profile.get('schema_version')!r}; only {SCHEMA_VERSION} is known"
        )
    missing = sorted(_REQUIRED - set(profile))
    if missing:
        raise SpecdecError(f"a profile without {', '.join(missing)}")
    length = profile["num_speculative_tokens"]
    wanted = Acceptance.of(profile["acceptance_length_histogram"])
    for name, rates in (
        ("marginal_accept_rates", wanted.marginal),
        ("conditional_accept_rates", wanted.conditional),
    ):
        expected = _padded(rates, length)
        got = profile[name]
        if len(got) != length or not all(map(_close, got, expected)):
            raise SpecdecError(
                f"{name} {got} do not follow from the histogram; it gives {expected}"
            )
    if not _close(profile["mean_accept_length"], wanted.tau_per_step):
        raise SpecdecError(
            f"mean_accept_length {profile['mean_accept_length']} does not follow from the "
            f"histogram; it gives {wanted.tau_per_step}"
        )
    again = _validation(profile["mean_accept_length"], profile["marginal_accept_rates"])
    failed = [name for name, found in again.items() if not found["passed"]]
    if failed:
        raise SpecdecError(f"the profile fails its own check of {' and '.join(failed)}: {again}")


_REQUIRED = frozenset(
    {
        "conditional_accept_rates", "marginal_accept_rates", "mean_accept_length",
        "mean_accept_length_per_request", "acceptance_length_histogram", "accept_length_model",
        "num_speculative_tokens", "validation",
    }
)  # fmt: skip


def _validation(mean: float, marginal: Sequence[float]) -> dict[str, Any]:
    implied = 1 + math.fsum(marginal)
    risen = [
        {"position": at, "value": after, "previous": before}
        for at, (before, after) in enumerate(pairwise(marginal), 1)
        if after > before + _TOLERANCE
    ]
    return {
        "mean_consistency": {
            "implied_mean_accept_length": implied,
            "reported_mean_accept_length": mean,
            "abs_delta": abs(implied - mean),
            "tolerance": _TOLERANCE * mean,
            "passed": _close(implied, mean),
        },
        "marginal_monotonicity": {"passed": not risen, "violations": risen},
    }


def _close(got: float, wanted: float) -> bool:
    return abs(got - wanted) <= _TOLERANCE * max(1.0, abs(wanted))


def _padded(rates: Sequence[float], length: int) -> list[float]:
    return [*rates, *[0.0] * (length - len(rates))]


def _identity(name: str | None) -> str | None:
    """A name without the folders of the machine that measured it."""
    if name is None:
        return None
    parts = [part for part in name.replace("\\", "/").split("/") if part]
    return "/".join(parts[-2:]) or None
