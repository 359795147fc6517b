"""Units: the requests that every arm answers, and how much of each answer is counted.

Plain `generate` writes the text first. It is cut where it ends, where it begins to repeat itself,
or at the limit; then every arm writes exactly that many tokens, with the end of text switched off,
so that all divide the same text by their time. The second turn of a prompt contains plain's answer
to the first, for the same reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from specdec.audit.loops import loop_start
from specdec.errors import ConfigError, SpecdecError
from specdec.hf.compat import input_device
from specdec.loading import check_ids, sentence
from specdec_bench.contracts import Unit
from specdec_bench.results.records import Setting, SkippedRecord, UnitRecord

SHORTEST = 16
"""New tokens below which a text is too short to time."""
_LOOKED_AT = 8  # tokens between two looks at whether a text still counts
_Tick = Callable[[], object]
MIXED = "mixed"
"""Category of a batch that was filled with what was left over of several."""


@dataclass
class Maker:
    """Makes the units of one setting.

    Attributes:
        model: The target; only its plain `generate` is used.
        tokenizer: Its tokenizer.
        setting: The conditions.
        sampling: Arguments of `generate` for the setting's temperature.
        new_tokens: Limit of new tokens.
        ends: Token ids that end a text.
        seed: Seeds of the units are drawn from it.
        only_counted: Plain stops writing soon after its text ends or begins to loop: the units are
            the same, and the records' share of looping text is not known.
    """

    model: Any
    tokenizer: Any
    setting: Setting
    sampling: Mapping[str, Any]
    new_tokens: int
    ends: frozenset[int]
    seed: int = 0
    only_counted: bool = False
    _shortened: int = field(default=0, init=False)
    _short: int = field(default=0, init=False)

    def make(
        self, index: int, prompts: Sequence[Any], tick: _Tick = lambda: None
    ) -> tuple[list[Unit], SkippedRecord]:
        """All units, and what became none.

        Args:
            index: Of the setting.
            prompts: `tasks.Prompt`s.
            tick: Called after every text.
        """
        self._shortened = self._short = 0
        asked = sum(len(prompt.turns) for prompt in prompts)
        answered: list[tuple[Any, list[_Answer]]] = []
        for prompt in prompts:
            turns = self._converse(prompt, tick)
            kept = [turn for turn in turns if turn.cut >= SHORTEST]
            self._short += len(prompt.turns) - len(kept)
            if kept:
                answered.append((prompt, kept))
        if self.setting.batch == 1:
            groups = [([prompt], [[turn] for turn in turns]) for prompt, turns in answered]
            ungrouped = 0
        else:
            groups, ungrouped = _group(answered, self.setting.batch)
        made: list[tuple[Unit, list[str]]] = []
        for members, rows_of_turns in groups:
            clusters = list(dict.fromkeys(member.cluster for member in members))
            for rows in rows_of_turns:
                unit = self._unit(index, members, rows, tick)
                made += [] if unit is None else [(unit, clusters)]
        units = _with_own_names(_joined_clusters(made))
        return units, SkippedRecord(index, asked, self._short, ungrouped, self._shortened)

    def _converse(self, prompt: Any, tick: _Tick) -> list[_Answer]:
        """Plain's answers, turn by turn, row by row."""
        found: list[_Answer] = []
        said: list[tuple[str, str]] = []
        for number, text in enumerate(prompt.turns):
            ids = self._encode(said, text, prompt)
            seed = self._seed(prompt.id, number)
            row = self._plain([ids], seed, self.new_tokens)[0]
            answer = _Answer(number, prompt.category, ids, seed, *self._cut(row))
            found.append(answer)
            kept = self.tokenizer.decode(answer.row[: answer.cut], skip_special_tokens=True)
            said.append((text, kept))
            tick()
        return found

    def _encode(self, said: Sequence[tuple[str, str]], text: str, prompt: Any) -> list[int]:
        """Ids of a conversation up to where the model is to speak; its beginning may be cut."""
        if prompt.chat and self.tokenizer.chat_template:
            messages = [
                {"role": role, "content": words}
                for pair in said
                for role, words in zip(("user", "assistant"), pair, strict=True)
            ]
            ids = self._templated([*messages, {"role": "user", "content": text}], prompt.id)
        else:
            before = "".join(f"{question}{answer}\n\n" for question, answer in said)
            ids = list(self.tokenizer(before + text).input_ids)
        if not ids:
            raise ConfigError(f"prompt {prompt.id!r} has no tokens; leave it out of the task")
        check_ids(torch.tensor(ids), self.model, f"prompt {prompt.id!r}")
        room = self._room()
        if room is not None and len(ids) > room:
            self._shortened += 1
            ids = self._end_of(ids, room)
        return ids

    def _end_of(self, ids: list[int], room: int) -> list[int]:
        """The last `room` ids; a token that begins every text stays in front."""
        begin = getattr(self.tokenizer, "bos_token_id", None)
        if begin is None or ids[0] != begin or room < 2:
            return ids[-room:]
        return [begin, *ids[1 - room :]]

    def _templated(self, messages: list[dict[str, str]], name: str) -> list[int]:
        try:
            encoded = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True
            )
        except Exception as problem:  # a program that came with the model
            raise SpecdecError(
                f"the chat template fails on prompt {name!r}: {sentence(problem)}"
            ) from problem
        return list(encoded["input_ids"])

    def _room(self) -> int | None:
        """Tokens that a prompt may have."""
        limit = self.setting.prompt_tokens
        config = self.model.config.get_text_config()
        context = getattr(config, "max_position_embeddings", None)
        if not isinstance(context, int) or context <= 0:
            return limit
        room = context - self.new_tokens
        if room < 1:
            raise ConfigError(
                f"--max-new-tokens {self.new_tokens} leaves no room for a prompt: the target's "
                f"context is {context} tokens"
            )
        return room if limit is None else min(room, limit)

    def _seed(self, name: str, turn: int) -> int:
        digest = hashlib.sha256(f"{self.seed} {name} {turn}".encode()).digest()
        return int.from_bytes(digest[:4], "big")

    def _plain(self, prompts: Sequence[Sequence[int]], seed: int, limit: int) -> list[list[int]]:
        ids, mask = padded(prompts, self.model)
        if self.sampling.get("do_sample"):
            torch.manual_seed(seed)
        more: dict[str, Any] = dict(self.sampling)
        if self.only_counted:
            more["stopping_criteria"] = StoppingCriteriaList([_Past(self, ids.shape[1])])
        output = type(self.model).generate(
            self.model, ids, attention_mask=mask, max_new_tokens=limit, **more
        )
        rows: list[list[int]] = output[:, ids.shape[1] :].tolist()
        return rows

    def _cut(self, row: list[int]) -> tuple[list[int], int, int]:
        """(text up to its end, how much of it counts, how much of it was looping)."""
        end = next((at + 1 for at, token in enumerate(row) if token in self.ends), len(row))
        text = row[:end]
        cut = loop_start(text) or end
        return text, cut, end - cut

    def is_past(self, row: list[int]) -> bool:
        """Whether a text has gone on after its end, or into a loop."""
        return self._cut(row)[1] < len(row)

    def _unit(
        self,
        index: int,
        members: Sequence[Any],
        rows: Sequence[_Answer],
        tick: _Tick,
    ) -> Unit | None:
        """A unit of one row or several, which plain answers together; None if it got too short."""
        seed, texts = rows[0].seed, [list(row.row) for row in rows]
        cuts, looped = [row.cut for row in rows], [row.looping for row in rows]
        if len(rows) > 1:  # rounding, and the noise of a row, differ from those of a lone row
            together = self._plain([row.ids for row in rows], seed, self.new_tokens)
            texts, cuts, looped = (
                list(part) for part in zip(*(self._cut(row) for row in together), strict=True)
            )
            tick()
        cut = min(cuts)
        if cut < SHORTEST:
            self._short += len(rows)
            return None
        turn = rows[0].turn
        several = any(len(member.turns) > 1 for member in members)
        names = [f"{member.id}.{turn + 1}" if several else member.id for member in members]
        categories = {member.category for member in members}
        ids, mask = padded([row.ids for row in rows], self.model)
        kept = tuple(tuple(text[:cut]) for text in texts)  # no arm may change what it is judged by
        record = UnitRecord(
            setting=index,
            unit="+".join(names),
            cluster="",
            category=categories.pop() if len(categories) == 1 else MIXED,
            seed=seed,
            prompt_tokens=[len(row.ids) for row in rows],
            new_tokens=cut,
            looping=sum(looped) / max(sum(map(len, texts)), 1),
            text_sha256=text_hash(kept),
        )
        return Unit(record, 0, [row.ids for row in rows], kept, ids, mask)


class _Past(StoppingCriteria):
    """Stops a batch when one of its rows is past what counts: no row counts further than that.

    Args:
        maker: Knows where a text is cut.
        prompt: Tokens before the texts.
    """

    def __init__(self, maker: Maker, prompt: int) -> None:
        self._maker, self._prompt = maker, prompt

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """[B] bool; looks at the texts now and then, for that takes time as well."""
        rows = input_ids[:, self._prompt :]
        past = not rows.shape[1] % _LOOKED_AT and any(map(self._maker.is_past, rows.tolist()))
        return torch.full((len(rows),), past, device=rows.device)


@dataclass(frozen=True)
class _Answer:
    """Plain's answer to one turn of one prompt."""

    turn: int
    category: str
    ids: list[int]
    seed: int
    row: list[int]
    cut: int
    looping: int


_Group = tuple[list[Any], list[list[_Answer]]]


def _group(answered: Sequence[tuple[Any, list[_Answer]]], batch: int) -> tuple[list[_Group], int]:
    """Prompts of one category and of similar length together; the rest is mixed.

    Returns:
        Groups of `batch` prompts with their common turns, and how many turns were left over.
    """
    by_category: dict[str, list[tuple[Any, list[_Answer]]]] = {}
    for prompt, turns in answered:
        by_category.setdefault(prompt.category, []).append((prompt, turns))
    full, rest = [], []
    for members in by_category.values():
        members.sort(key=lambda member: member[1][0].cut)
        whole = len(members) // batch * batch
        full += [members[at : at + batch] for at in range(0, whole, batch)]
        rest += members[whole:]
    rest.sort(key=lambda member: member[1][0].cut)
    whole = len(rest) // batch * batch
    full += [rest[at : at + batch] for at in range(0, whole, batch)]
    left_over = sum(len(turns) for _, turns in rest[whole:])
    groups: list[_Group] = []
    for members in full:
        by_turn = [{answer.turn: answer for answer in turns} for _, turns in members]
        common = sorted(set.intersection(*(set(turns) for turns in by_turn)))
        left_over += sum(len(turns) - len(common) for turns in by_turn)
        rows = [[turns[turn] for turns in by_turn] for turn in common]
        groups.append(([prompt for prompt, _ in members], rows))
    return groups, left_over


def _joined_clusters(made: Sequence[tuple[Unit, Sequence[str]]]) -> list[Unit]:
    """Batches that share a cluster become one cluster: their times are not independent.

    Args:
        made: Units, each with the clusters of its rows.
    """
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.setdefault(name, name) != name:
            name = leader[name]
        return name

    for _, names in made:
        for name in names:
            leader[find(name)] = find(names[0])
    members: dict[str, list[str]] = {}
    for name in leader:
        members.setdefault(find(name), []).append(name)
    return [
        replace(
            unit,
            index=position,
            record=replace(unit.record, cluster="+".join(members[find(names[0])])),
        )
        for position, (unit, names) in enumerate(made)
    ]


def _with_own_names(units: Sequence[Unit]) -> list[Unit]:
    """Of equal names the later ones get a number: turn 2 of "a" and a prompt "a.2" are two."""
    taken: set[str] = set()
    found = []
    for unit in units:
        name, number = unit.record.unit, 2
        while name in taken:
            name, number = f"{unit.record.unit}#{number}", number + 1
        taken.add(name)
        found.append(replace(unit, record=replace(unit.record, unit=name)))
    return found


def padded(prompts: Sequence[Sequence[int]], model: Any) -> tuple[Tensor, Tensor]:
    """[B, S] ids, padded on the left, and their mask, on the model's device."""
    width, pad = max(map(len, prompts)), model.generation_config.pad_token_id or 0
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    device = input_device(model)
    return ids.to(device), mask.to(device)


def text_hash(rows: Sequence[Sequence[int]]) -> str:
    """SHA-256 over the ids of all rows."""
    text = ";".join(",".join(map(str, row)) for row in rows)
    return hashlib.sha256(text.encode("ascii")).hexdigest()
