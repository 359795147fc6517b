"""Draws calls of `generate` from a seed; a call is the source of its arguments.

Source, because every run needs arguments of its own (caches, processors and streamers are used up),
and because a call that goes wrong can be printed as Python.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from fuzz import choices
from fuzz.choices import Table
from helpers.names import CACHE, OLD

_MOST_ROWS, _LONGEST, _MOST_NEW = 4, 12, 14
_DEMO_SHARE = 0.06


@dataclass(frozen=True)
class Turn:
    """One call of `generate`.

    Attributes:
        arguments: Source of each argument, by name; may name `model` and `before`, what the turn
            before this one returned.
        settings: Source of `specdec=`; may name `truth`, the text of plain's own answer.
        seed: Of the generator.
        training: Whether the model is in training mode.
        defaults: Source of options that are set on the model's own `generation_config`.
    """

    arguments: Mapping[str, str]
    settings: str
    seed: int
    training: bool = False
    defaults: Mapping[str, str] = field(default_factory=dict)

    def given(self) -> str:
        """Source of the arguments as a dictionary."""
        return f"dict({', '.join(f'{name}={text}' for name, text in self.arguments.items())})"

    def lines(self) -> list[str]:
        """The turn as Python, plain and ours."""
        options = [f"model.generation_config.{n} = {text}" for n, text in self.defaults.items()]
        return [
            f"model.train({self.training})",
            *options,
            f"arguments = lambda before: {self.given()}",
            f"given, seed = arguments(plain), {self.seed}",
            "plain = answer(model, given, seed, False)",
            "truth = told(plain, given)",
            f"ours = answer(model, arguments(ours), seed, {self.settings})",
        ]


@dataclass(frozen=True)
class Call:
    """One or more turns with one model.

    Attributes:
        seed: What the whole run was drawn from.
        number: Of the call in the run.
        family: Name of a tiny family, or "demo".
        dtype: Name of a torch dtype.
        turns: What is called, in order.
    """

    seed: int
    number: int
    family: str
    dtype: str
    turns: tuple[Turn, ...]

    def source(self) -> str:
        """The call as Python that runs in the folder `tests`."""
        lines = [
            f"# seed {self.seed}, call {self.number}",
            "from fuzz.parts import *",
            f"family, dtype = {self.family!r}, torch.{self.dtype}",
            "register()",
            "model, plain, ours = load(family, dtype), None, None",
        ]
        for turn in self.turns:
            lines += turn.lines()
        return "\n".join(lines)


def draw(seed: int, number: int, families: Sequence[str]) -> Call:
    """Call number `number` of a seed; independent of the calls before it."""
    random = Random(f"{seed}/{number}")
    small = [name for name in families if name != "demo"]
    demo = "demo" in families and (not small or random.random() < _DEMO_SHARE)
    family = "demo" if demo else random.choice(small)
    dtype = random.choice(["float64", "float64", "float32"])
    turns: list[Turn] = []
    prompt: _Prompt | None = None
    for _ in range(random.choice([1, 1, 1, 1, 2, 2, 3])):
        drawn = _Drawing(random, family)
        prompt = drawn.prompt_after(prompt, turns[-1].arguments if turns else {})
        turns.append(drawn.turn())
    return Call(seed, number, family, dtype, tuple(turns))


@dataclass(frozen=True)
class _Prompt:
    """Source of a prompt's mask, and its size."""

    mask: str
    rows: int
    width: int
    padded: bool


class _Drawing:
    """A turn while it is drawn."""

    def __init__(self, random: Random, family: str) -> None:
        self._random, self._family = random, family
        self._arguments: dict[str, str] = {}
        self._defaults: dict[str, str] = {}
        self._rows = self._width = 1
        self._has_own_cache = False

    def _is(self, probability: float) -> bool:
        return self._random.random() < probability

    def _add(self, table: Table, factor: float = 1.0) -> None:
        """Options of a table, each with its probability."""
        for name, (probability, values) in table.items():
            if self._is(probability * factor):
                self._arguments[name] = self._random.choice(values)

    # The prompt.

    def prompt_after(self, last: _Prompt | None, given: Mapping[str, str]) -> _Prompt | None:
        """Draws the prompt: another one, or what follows the last turn."""
        goes_on = given.get("return_dict_in_generate") == "True"
        if last is not None and goes_on and self._is(0.8):
            return self._following(last)
        return self._fresh()

    def _following(self, last: _Prompt) -> _Prompt:
        count, seed = self._random.randint(1, 5), self._random.randrange(1000)
        with_cache, whole = self._is(0.8), self._is(0.6)
        text = "longer" if whole or not with_cache else "new_ids"
        cut = "[:, 1:]" if self._is(0.05) else ""
        self._arguments["input_ids"] = f"{text}(before, {seed}, {count}){cut}"
        if last.padded or self._is(0.85):
            self._arguments["attention_mask"] = f"grown(before, {last.mask}, {count})"
        if with_cache:
            self._arguments[self._random.choice([CACHE, CACHE, OLD])] = "held(before)"
            self._has_own_cache = True
        self._rows, self._width = last.rows, last.width + _LONGEST
        return _Prompt(last.mask, last.rows, self._width, last.padded)

    def _fresh(self) -> _Prompt | None:
        random = self._random
        self._rows = random.choice([1, 1, 1, 2, 3, _MOST_ROWS])
        lengths = [random.randint(1, _LONGEST) for _ in range(self._rows)]
        if self._is(0.3):
            lengths = [lengths[0]] * self._rows
        if self._is(0.1):
            lengths[0] += 24  # beyond every window
        self._width, seed = max(lengths), random.randrange(1000)
        ids = f"rows({seed}, {lengths})"
        mask = self._mask(lengths)
        if self._is(0.12):
            self._arguments["inputs_embeds"] = f"model.get_input_embeddings()({ids}).detach()"
            if self._is(0.15):
                self._arguments["input_ids"] = ids
        else:
            self._arguments[random.choice(["input_ids", "input_ids", "inputs"])] = ids
        if self._is(0.9 if len(set(lengths)) > 1 else 0.4):
            self._arguments["attention_mask"] = mask + ("" if self._is(0.9) else ".bool()")
        self._positions(mask)
        self._cache(ids, mask)
        of_ids = "inputs_embeds" not in self._arguments
        padded = len(set(lengths)) > 1 or ", [(" in mask
        return _Prompt(mask, self._rows, self._width, padded) if of_ids else None

    def _mask(self, lengths: list[int]) -> str:
        holes = []
        if self._is(0.06):
            row = self._random.randrange(self._rows)
            last = max(lengths) - 1
            columns = range(max(lengths) - lengths[row], last + self._is(0.2))
            holes = [(row, self._random.choice(columns)) for _ in range(2) if columns]
        return f"padding({lengths}, {holes})" if holes else f"padding({lengths})"

    def _positions(self, mask: str) -> None:
        if self._is(0.07):
            self._arguments["position_ids"] = self._random.choice([
                f"({mask}.cumsum(-1) - 1).clamp(min=0)",
                f"({mask}.cumsum(-1) - 1).clamp(min=0) + 3",
                f"torch.arange({self._width})[None]",
                f"torch.arange({self._width}).expand({self._rows}, -1)",
                f"2 * torch.arange({self._width}).expand({self._rows}, -1)",
            ])  # fmt: skip

    def _cache(self, ids: str, mask: str) -> None:
        chosen = self._random.random()
        name = self._random.choice(choices.CACHES)
        if chosen < 0.14:
            self._arguments[self._random.choice([CACHE, CACHE, OLD])] = name
        elif chosen < 0.22 and self._width > 2 and "inputs_embeds" not in self._arguments:
            cut = self._random.randint(1, self._width - 1)
            self._arguments[CACHE] = f"filled(model, {name}, {ids}[:, :{cut}], {mask}[:, :{cut}])"
            self._arguments["attention_mask"] = mask
        else:
            self._add(choices.OWN_CACHES)
        self._has_own_cache = CACHE in self._arguments or OLD in self._arguments

    # Everything else.

    def turn(self) -> Turn:
        """Draws all that is not the prompt."""
        random = self._random
        self._limits()
        sampled = self._is(0.5)
        self._arguments["do_sample"] = str(sampled)
        self._add(choices.SAMPLING, 1.0 if sampled else 0.05)
        busy = self._is(0.5)
        self._add(choices.PROCESSORS, 1.0 if busy else 0.1)
        self._ends()
        self._add(choices.CUSTOM)
        self._add(choices.OUTPUTS)
        if self._is(0.5 if not self._has_own_cache else 0.8):
            self._arguments["return_dict_in_generate"] = "True"
        self._add(choices.REST)
        if sampled and self._is(0.08):
            self._arguments["num_return_sequences"] = random.choice(["2", "3"])
        if self._is(0.06):
            self._arguments.update(random.choice(choices.OTHER_DECODERS))
        if self._is(0.07):
            self._arguments.update(random.choice(choices.INVALID))
        self._gather()
        return Turn(
            self._arguments,
            self._settings(),
            random.randrange(10**6),
            training=self._is(0.04),
            defaults=self._defaults,
        )

    def _limits(self) -> None:
        new, chosen = self._random.randint(1, _MOST_NEW), self._random.random()
        if chosen < 0.85:
            self._arguments["max_new_tokens"] = str(new)
        if 0.8 < chosen < 0.96:
            self._arguments["max_length"] = str(self._width + new)

    def _ends(self) -> None:
        tokens = sorted(self._random.sample(range(3, 96), self._random.choice([1, 4, 12])))
        if self._is(0.6):
            self._arguments["eos_token_id"] = str(tokens if len(tokens) > 1 else tokens[0])
            if self._is(0.25):
                self._arguments["pad_token_id"] = str(tokens[0])
        if self._is(0.1):
            self._arguments["pad_token_id"] = self._random.choice(["0", "5", "95"])
        if self._is(0.08 if self._family != "demo" else 0.3):
            texts = choices.DEMO_STOPS if self._family == "demo" else choices.STOPS
            self._arguments["stop_strings"] = self._random.choice(texts)
            self._arguments["tokenizer"] = "tokenizer_of(family)"

    def _gather(self) -> None:
        """Puts some options into a `GenerationConfig`, or on the model."""
        chosen = self._random.random()
        movable = [name for name in self._arguments if name in choices.CONFIGURED]
        if chosen < 0.12:
            moved = {name: self._arguments.pop(name) for name in movable if self._is(0.8)}
            inner = ", ".join(f"{name}={text}" for name, text in moved.items())
            self._arguments["generation_config"] = f"GenerationConfig({inner})"
        elif chosen < 0.17:
            self._defaults = {n: self._arguments.pop(n) for n in movable if self._is(0.5)}

    def _settings(self) -> str:
        random, chosen = self._random, self._random.random()
        if chosen < 0.04:
            return random.choice(["None", "False", "True"])
        method = random.choice(["oracle", "random_trees", *choices.METHODS])
        if method == "device_bigrams" and self._family == "demo":
            method = "oracle"  # the other knows the tiny vocabulary alone
        options = [
            f"{name!r}: {random.choice(values)}"
            for name, (probability, values) in choices.METHODS.get(method, choices.TOLD).items()
            if self._is(probability)
        ]
        budget = f", budget={random.choice([0, 1, 2, 5, 9, 40])}" if self._is(0.35) else ""
        return f"SpecConfig({method!r}, {{{', '.join(options)}}}{budget})"
