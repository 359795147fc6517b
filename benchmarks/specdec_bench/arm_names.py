"""Arms by name: what can be measured, as a user writes it.

Options that would carry something from one answer to the next are refused: an arm that has seen a
text before would draft it perfectly.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, get_args

from specdec.artifacts.places import DRAFT_MODEL, Kind
from specdec.config import Kernels
from specdec.errors import ConfigError
from specdec.loading import method_options
from specdec.registry import methods
from specdec_bench.results.records import PLAIN, repeated_arm

BASELINE = "loop0"
"""Our loop without speculation, which speed-ups are relative to."""
AGAIN = repeated_arm(BASELINE)
LOOKUP, ASSISTED, SERVER = "hf_prompt_lookup", "hf_assisted", "server"
"""What a user would pick without specdec, and an engine in another process."""
_HF: Mapping[str, Mapping[str, str]] = {  # arm -> its options, and what Hugging Face calls them
    PLAIN: {},
    LOOKUP: {"num_tokens": "prompt_lookup_num_tokens", "max_ngram": "max_matching_ngram_size"},
    ASSISTED: {"num_tokens": "num_assistant_tokens"},
}
_REMEMBERS = ("keep_pool", "keep_matrix", "store", "store_update", "space")
_STORE = "+store"
_MOST_BUDGET, _MOST_DIGITS = 65536, 10
_OWN_CLASS = re.compile(r"([A-Za-z_][\w.]*:[A-Za-z_]\w*)(?::(.*))?")  # my_module:Mine:depth=3


@dataclass(frozen=True)
class ArmSpec:
    """An arm as the user wrote it, checked.

    Attributes:
        name: As in the records: the user's text without spaces.
        method: "hf", "hf_prompt_lookup", "hf_assisted", "server", or a drafting method.
        options: Of the method, converted; for a server its "url".
        budget: Nodes a round may verify; None for the method's own size.
        store: A suffix store is filled from the texts of other prompts.
        kernels: What computes the attention of token trees.
    """

    name: str
    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    budget: int | None = None
    store: bool = False
    kernels: Kernels = "auto"

    @property
    def is_ours(self) -> bool:
        """Whether it is one of our drafting methods, and runs in this process."""
        return ":" in self.method or self.method in methods.names()

    @property
    def draft_kind(self) -> Kind | None:
        """What it drafts with, besides the target; None for text alone."""
        if not self.is_ours:
            return DRAFT_MODEL if self.method == ASSISTED else None
        return methods.draft_kind(self.method)

    @property
    def needs_draft(self) -> bool:
        """Whether a head or draft model must be given besides the arm."""
        return self.draft_kind is not None and "draft" not in self.options

    def promises_text(self, temperature: float) -> bool:
        """Whether its text is plain's, so that it can be checked.

        Greedy decoding's is, and that of our methods with the same seed. Hugging Face's assisted
        decoding and sampled drafts keep the distribution only (`--check-sampling` tests that), and
        another process draws its own noise.
        """
        if temperature == 0 or self.method == PLAIN:
            return True
        switch = methods.sampling_option(self.method) if self.is_ours else None
        return self.is_ours and not (switch and self.options.get(switch))


def parse_arm(spec: str) -> ArmSpec:
    """Reads `hf`, `loop0`, `eagle3:depth=3,top_k=1`, `suffix+store`, `server:URL`, `module:Class`
    and the like.

    Raises:
        ConfigError: The method or an option is unknown, out of range, or would remember answers.
    """
    name = "".join(spec.split())
    method, _, rest = name.partition(":")
    if method == SERVER:
        if not rest.startswith(("http://", "https://")):
            raise ConfigError(f"arm {spec!r}: server takes an address, as server:http://host:8000")
        if "@" in rest.partition(",")[0].partition("://")[2].partition("/")[0]:
            raise ConfigError(  # without the name, which would show the password
                "leave user and password out of a server's address: it is written to result files; "
                "a bearer token goes in a file, as server:http://host:8000,key_file=FILE"
            )
        return ArmSpec(name, SERVER, {"url": rest})
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
    if store and "store" not in methods.options(method):
        raise ConfigError(f"arm {spec!r}: {method} has no store")
    budget, pairs = _take_budget(spec, pairs)
    kernels, pairs = _take_kernels(spec, pairs)
    options = _own_options(spec, method, pairs)
    return ArmSpec(name, method, options, budget, store, kernels)


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


def _take_kernels(spec: str, pairs: tuple[str, ...]) -> tuple[Kernels, tuple[str, ...]]:
    given = [pair.partition("=")[2] for pair in pairs if pair.startswith("kernels=")]
    if given and given[-1] not in get_args(Kernels):
        raise ConfigError(
            f"arm {spec!r}: kernels must be one of {', '.join(get_args(Kernels))}, "
            f"got {given[-1]!r}"
        )
    rest = tuple(pair for pair in pairs if not pair.startswith("kernels="))
    return cast(Kernels, given[-1] if given else "auto"), rest


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
            f"several times; a store that is filled from other prompts is {method}{_STORE}"
        )
    added = methods.draft_kind(method) is not None and "draft" not in names
    try:
        options = method_options(method, (*pairs, "draft=later") if added else pairs)
    except ConfigError as problem:
        raise ConfigError(f"arm {spec!r}: {problem}") from problem
    if added:
        del options["draft"]
    return options
