"""Arms: everything that can answer a unit, under one interface.

Each call starts fresh. Our methods get a new `SpecConfig`, Hugging Face's assistant gets its
settings back, and options that would carry something from one answer to the next are refused: an
arm that has seen a text before would draft it perfectly.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from specdec.api import last_stats
from specdec.artifacts.tokenizers import tokenizer_fingerprint
from specdec.config import SpecConfig
from specdec.errors import ConfigError, SpecdecError
from specdec.loading import method_options, with_tokenizer
from specdec.registry import methods
from specdec.sources.suffix_store import SuffixStore
from specdec.stats import GenerationStats, RoundRecord
from specdec_bench.measure.units import Unit
from specdec_bench.results.records import PLAIN, Setting, repeated_arm

BASELINE = "loop0"
"""Our loop without speculation, which speed-ups are relative to."""
AGAIN = repeated_arm(BASELINE)
_HF = {  # arm -> its options, and what Hugging Face calls them
    PLAIN: {},
    "hf_prompt_lookup": {
        "num_tokens": "prompt_lookup_num_tokens",
        "max_ngram": "max_matching_ngram_size",
    },
    "hf_assisted": {"num_tokens": "num_assistant_tokens"},
}
_LOOKUP_TOKENS = 10  # what Hugging Face's documentation gives
_REMEMBERS = ("keep_pool", "keep_matrix", "store", "store_update", "space")
_STORE = "+store"
_MOST_FOLDS = 8  # of the prompts, when stores are filled from all but one of them
_MOST_BUDGET, _MOST_DIGITS = 65536, 10
_OWN_CLASS = re.compile(r"([A-Za-z_][\w.]*:[A-Za-z_]\w*)(?::(.*))?")  # my_module:Mine:depth=3


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


@dataclass(frozen=True)
class ArmSpec:
    """An arm as the user wrote it, checked.

    Attributes:
        name: As in the records: the user's text without spaces.
        method: "hf", "hf_prompt_lookup", "hf_assisted", "server", or a drafting method.
        options: Of the method, converted; for a server its "url".
        budget: Nodes a round may verify; None for the method's own size.
        store: A suffix store is filled from the texts of other prompts.
    """

    name: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: int | None = None
    store: bool = False

    @property
    def needs_draft(self) -> bool:
        """Whether a head or draft model must be given besides the arm."""
        if self.method in _HF or self.method == "server":
            return self.method == "hf_assisted"
        return takes(self.method, "draft") and "draft" not in self.options


def parse_arm(spec: str) -> ArmSpec:
    """Reads `hf`, `loop0`, `eagle3:depth=3,top_k=1`, `suffix+store`, `server:URL`, `module:Class`
    and the like.

    Raises:
        ConfigError: The method or an option is unknown, out of range, or would remember answers.
    """
    name = "".join(spec.split())
    method, _, rest = name.partition(":")
    if method == "server":
        if not rest.startswith(("http://", "https://")):
            raise ConfigError(f"arm {spec!r}: server takes an address, as server:http://host:8000")
        if "@" in rest.partition(",")[0].partition("://")[2].partition("/")[0]:
            raise ConfigError(  # without the name, which would show the password
                "leave user and password out of a server's address: it is written to result files; "
                "a bearer token goes in a file, as server:http://host:8000,key_file=FILE"
            )
        return ArmSpec(name, "server", {"url": rest})
    own = None if method in (*_HF, BASELINE, *methods.names()) else _OWN_CLASS.fullmatch(name)
    if own is not None:
        method, rest = own[1], own[2] or ""
    pairs = tuple(pair for pair in rest.split(",") if pair)
    if method in _HF:
        return ArmSpec(name, method, _hf_options(spec, method, pairs))
    store = method.endswith(_STORE)
    method = "none" if method in (BASELINE, AGAIN) else method.removesuffix(_STORE)
    try:
        methods.require(method)
    except ConfigError as problem:
        known = ", ".join([*_HF, BASELINE, "server:URL"])
        raise ConfigError(f"arm {spec!r}: {problem}; besides, {known}") from problem
    if store and method != "suffix":
        raise ConfigError(f"arm {spec!r}: only suffix has a store")
    budget, pairs = _take_budget(spec, pairs)
    options = _own_options(spec, method, pairs)
    return ArmSpec(name, method, options, budget, store)


def _hf_options(spec: str, method: str, pairs: Sequence[str]) -> dict[str, Any]:
    known, found = _HF[method], {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        if name not in known or not _is_digits(text) or not int(text):
            takes = " and ".join(f"{option}=N" for option in known) or "no options"
            raise ConfigError(f"arm {spec!r}: {method} takes {takes}, got {pair!r}")
        found[known[name]] = int(text)
    return found


def _take_budget(spec: str, pairs: tuple[str, ...]) -> tuple[int | None, tuple[str, ...]]:
    given = [pair.partition("=")[2] for pair in pairs if pair.startswith("budget=")]
    if not given:
        return None, pairs
    if not _is_digits(given[-1]) or int(given[-1]) > _MOST_BUDGET:
        raise ConfigError(
            f"arm {spec!r}: budget must be a whole number up to {_MOST_BUDGET}, got {given[-1]!r}"
        )
    return int(given[-1]), tuple(pair for pair in pairs if not pair.startswith("budget="))


def _is_digits(text: str) -> bool:
    """Whether `int` takes it; "²" is a digit, too."""
    return text.isascii() and text.isdigit() and len(text) < _MOST_DIGITS


def _own_options(spec: str, method: str, pairs: tuple[str, ...]) -> dict[str, Any]:
    """Options of our method, without the draft that the workbench will add."""
    names = [pair.partition("=")[0].strip().replace("-", "_") for pair in pairs]
    kept = next((name for name in names if name in _REMEMBERS), None)
    if kept is not None:
        raise ConfigError(
            f"arm {spec!r}: {kept} keeps texts from answer to answer, and each prompt is answered "
            "several times; a store that is filled from other prompts is suffix+store"
        )
    added = takes(method, "draft") and "draft" not in names
    try:
        options = method_options(method, (*pairs, "draft=later") if added else pairs)
    except ConfigError as problem:
        raise ConfigError(f"arm {spec!r}: {problem}") from problem
    if added:
        del options["draft"]
    return options


def takes(method: str, option: str) -> bool:
    """Whether a drafting method has such an option."""
    return option in methods.options(method)


@dataclass
class Workbench:
    """What arms of one setting share.

    Attributes:
        model: The target, augmented, in the setting's dtype; ends of text switched off.
        tokenizer: Its tokenizer.
        setting: The conditions.
        drafts: Method -> its head or draft model; called when first needed.
        stores: Folder for stores; emptied with the setting.
        folds: Unit's number -> the part of its store that it may see, see `fill_stores`.
    """

    model: Any
    tokenizer: Any
    setting: Setting
    drafts: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    stores: Path = Path("stores")
    folds: dict[int, int] = field(default_factory=dict)

    def draft(self, method: str, arm: str) -> Any:
        """Head or draft model of a method.

        Raises:
            ConfigError: None was given.
        """
        self.check_draft(method, arm)
        return self.drafts[method]()

    def check_draft(self, method: str, arm: str) -> None:
        """Raises `ConfigError` where no head or draft model was given for a method."""
        if method not in self.drafts:
            flag = "--head" if method == "eagle3" else "--draft"
            raise ConfigError(f"arm {arm!r} needs {flag}: a folder or hub id")

    def space_of(self, unit: Unit) -> str:
        """The part of the store that a unit may see."""
        return f"without{self.folds.get(unit.index, 0)}"

    def sampling(self) -> dict[str, Any]:
        """Arguments of `generate` for the setting's temperature; no other warper is on."""
        temperature = self.setting.temperature
        if not temperature:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}


class GenerateArm:
    """An arm that is a `generate` call in this process.

    Args:
        spec: What to call.
        bench: Model and conditions.
    """

    in_process = True

    def __init__(self, spec: ArmSpec, bench: Workbench) -> None:
        self.name, self.spec, self.bench = spec.name, spec, bench
        self.is_ours = spec.method not in _HF
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
            config = SpecConfig(spec.method, self._options(unit), spec.budget, on_round)
            return model.generate, {"specdec": config}
        plain, extra = type(model).generate.__get__(model), dict(spec.options)
        if spec.method == "hf_prompt_lookup":
            extra.setdefault("prompt_lookup_num_tokens", _LOOKUP_TOKENS)
        if spec.method == "hf_assisted":
            draft = self.bench.draft("hf_assisted", self.name)
            # An earlier call may have adapted how long it drafts.
            draft.generation_config = copy.deepcopy(model.generation_config)
            draft.generation_config.update(**extra)
            extra = {"assistant_model": draft}
        return plain, extra

    def _options(self, unit: Unit) -> dict[str, Any]:
        spec, bench = self.spec, self.bench
        options = dict(spec.options)
        if spec.needs_draft:
            options["draft"] = bench.draft(spec.method, self.name)
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
    if spec.method == "server":
        from specdec_bench.server.arm import ServerArm

        server: Arm = ServerArm.of(spec.options["url"], bench.model, bench.tokenizer, bench.setting)
        return server
    if spec.needs_draft:
        bench.check_draft(spec.method, spec.name)
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
