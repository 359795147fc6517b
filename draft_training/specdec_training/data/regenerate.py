"""Has the target answer prompts itself: a draft head predicts the target, so it learns from it.

What is answered in which batch with which seed follows from the input and the options alone. So a
run that was killed goes on where it stopped and ends with the same file.
"""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from tqdm import tqdm

from specdec.api import augmented
from specdec.errors import ConfigError
from specdec.loading import TOY, load_model
from specdec_training.data.answers import AnswerFile, open_answers
from specdec_training.data.bad_rows import BadRow, Tally
from specdec_training.data.chat import ChatFormat
from specdec_training.data.conversations import Row
from specdec_training.data.generation import Sampling, Writer
from specdec_training.data.options import DataRegenerateOptions
from specdec_training.data.prepare import check_reading
from specdec_training.data.row_files import Inputs
from specdec_training.data.target import DataTarget, open_target
from specdec_training.data.turns import Turn

FORMAT_VERSION = 2
_ID_DIGITS = 24  # of a content's hash


@dataclass
class Task:
    """A prompt, or a conversation, to be answered.

    Attributes:
        key: Hash of what is asked; an answered key is not asked again.
        group: Number of its row; turns of one conversation share it.
        prompt_ids: Ids of the first prompt; later ones follow from the answers.
        messages: Turns before the next answer; grows as answers come. Empty for plain prompts.
        following: For each answer but the last the turns that come before the next; None stands for
            the answer itself.
        tools: What the assistant may call.
    """

    key: str
    group: str
    prompt_ids: list[int]
    messages: list[Turn] = field(default_factory=list)
    following: list[list[Turn | None]] = field(default_factory=list)
    tools: tuple[dict[str, Any], ...] = ()

    @property
    def answers(self) -> int:
        """How many answers it takes."""
        return len(self.following) + 1


@dataclass(frozen=True)
class Regenerated:
    """What a run did.

    Attributes:
        tally: What became of the rows.
        rows: Answers in the file.
        written: Answers that this run wrote.
        new_tokens: Tokens of the answers written now.
        seconds: Time of generating them.
        finishes: How they ended -> how many.
    """

    tally: Tally
    rows: int
    written: int
    new_tokens: int
    seconds: float
    finishes: dict[str, int]


def regenerate(options: DataRegenerateOptions) -> Regenerated:
    """Writes answers to `options.output`, or goes on with it.

    Raises:
        SpecdecError: An option is wrong, the target or an input cannot be read, too many rows are
            bad, or the file was made with other options.
    """
    _check_options(options)
    target = open_target(options.target)
    chat = target.chat(options.chat_template, options.template_option)
    if options.output is None:
        raise ConfigError("--output is missing; give the .jsonl file to write")
    threads = 1 if options.threads is None and options.target == TOY else options.threads
    if threads is not None:
        torch.set_num_threads(threads)
    inputs = Inputs(options)
    with open_answers(options.output, _made_with(options, target, chat, inputs.hash())) as answers:
        model = load_model(options.target, options.dtype, options.device)
        pad = target.tokenizer.pad_token_id
        sampling = Sampling(
            options.max_new_tokens, options.temperature, options.top_p, options.drop_loops
        )
        writer = Writer(model, target.stop_ids, 0 if pad is None else pad, sampling)
        tally = Tally()
        asker = Asker(chat, writer, options.max_prompt)
        tasks = list(_tasks(inputs, asker, tally))
        tally.check(options.max_bad_fraction)
        drafting = nullcontext() if options.method == "none" else augmented(model, options.method)
        with drafting:
            run = _Run(writer, asker, options.seed, answers)
            return run.all(_batches(tasks, options), tally)


class Asker:
    """Makes prompts of rows.

    Args:
        chat: Tokenizer and chat template of the target.
        writer: Knows how much room there is.
        max_prompt: Longest prompt; None for those that leave room for the longest answer.

    Raises:
        ConfigError: No prompt does.
    """

    def __init__(self, chat: ChatFormat, writer: Writer, max_prompt: int | None) -> None:
        self.chat, self._writer = chat, writer
        self._most = writer.longest_prompt if max_prompt is None else max_prompt
        if self._most is not None and self._most < 1:
            raise ConfigError("--max-new-tokens leaves no room for a prompt in the context")

    def task(self, row: Row) -> Task:
        """What a row asks.

        Raises:
            BadRow: Nothing, or too much.
            ConfigError: It is a conversation, and there is no template.
        """
        key, group = row.key()[:_ID_DIGITS], row.belongs_to()
        row.check_plain()
        if row.kind != "chat":
            return Task(key, group, self._checked(self._plain(row)))
        self._check_turns(row)
        last = row.messages[-1]
        if last.role not in ("user", "tool", "assistant"):
            raise BadRow("no_assistant_turn", f"the last turn is of {last.role}")
        at = [index for index, turn in enumerate(row.messages) if turn.is_answer]
        if last.role != "assistant":
            at.append(len(row.messages))
        if not at:
            raise BadRow("no_assistant_turn", row.speakers())
        if at[0] == 0:
            raise BadRow("no_prompt", "the assistant speaks first")
        messages = list(row.messages[: at[0]])
        task = Task(key, group, [], messages, tools=row.tools)
        for this, following in pairwise(at):
            # Tools answered the calls that the row has, so those stay, whatever the target calls.
            own = row.messages[this] if row.messages[this].calls_tools else None
            task.following.append([own, *row.messages[this + 1 : following]])
        task.prompt_ids = self._checked(self._rendered(task))
        return task

    def next_prompt(self, task: Task) -> list[int] | None:
        """The prompt of the next answer of a conversation; None where it got too long."""
        try:
            return self._checked(self._rendered(task))
        except BadRow:
            return None

    def _check_turns(self, row: Row) -> None:
        """Refuses what cannot be rendered; of answers that are replaced only the text counts."""
        kept = [
            turn._replace(fields=()) if turn.is_answer and not turn.calls_tools else turn
            for turn in row.messages
        ]
        self.chat.check_turns(kept, row.tools)
        self.chat.conversation(kept, row.tools).check_fields(())

    def _rendered(self, task: Task) -> list[int]:
        text = self.chat.render(task.messages, add_generation_prompt=True, tools=task.tools)
        return self.chat.tokens(text)

    def _plain(self, row: Row) -> list[int]:
        if row.kind == "tokens":
            return list(row.prompt_ids)
        self.chat.check_text((row.prompt,))
        return list(self.chat.tokenizer(row.prompt)["input_ids"])

    def _checked(self, ids: list[int]) -> list[int]:
        too_long = self._most is not None and len(ids) > self._most
        if too_long or self._writer.room(len(ids)) < 1:
            raise BadRow("prompt_too_long", f"{len(ids):,} tokens")
        if not ids:
            raise BadRow("no_prompt")
        if not 0 <= min(ids) <= max(ids) < self._writer.vocab_size:
            raise BadRow("token_out_of_vocabulary", f"{max(ids)} of {self._writer.vocab_size}")
        return ids


class _Run:
    """Answers batches and writes them down."""

    def __init__(self, writer: Writer, asker: Asker, seed: int, answers: AnswerFile) -> None:
        self._writer, self._asker, self._seed, self._answers = writer, asker, seed, answers
        self._tokenizer = asker.chat.tokenizer
        self._tokens, self._seconds = 0, 0.0
        self._finishes: dict[str, int] = {}

    def all(self, batches: Sequence[Sequence[Task]], tally: Tally) -> Regenerated:
        """Everything that is not in the file yet."""
        before = len(self._answers.done)
        with tqdm(total=sum(map(len, batches)), desc="answering", unit="row") as progress:
            for index, batch in enumerate(batches):
                if not all(self._is_done(task) for task in batch):
                    self._answers.append(self._batch(batch, index))
                    speed = self._tokens / max(self._seconds, 1e-9)
                    progress.set_postfix_str(f"{speed:.0f} tokens/s")
                progress.update(len(batch))
        rows = len(self._answers.done)
        return Regenerated(
            tally, rows, rows - before, self._tokens, self._seconds, dict(self._finishes)
        )

    def _is_done(self, task: Task) -> bool:
        """Whether its last answer is there; a conversation that ended early says so."""
        return f"{task.key}-{task.answers - 1}" in self._answers.done

    def _batch(self, batch: Sequence[Task], index: int) -> list[dict[str, Any]]:
        """The rows of a batch, task by task; all turns of a conversation in order."""
        rows: list[list[dict[str, Any]]] = [[] for _ in batch]
        prompts = {at: task.prompt_ids for at, task in enumerate(batch)}
        turn = 0
        while prompts:
            start = time.perf_counter()
            seed = _seed(self._seed, index, turn)
            answers = self._writer.answer(list(prompts.values()), seed)
            self._seconds += time.perf_counter() - start
            for (at, prompt), answer in zip(list(prompts.items()), answers, strict=True):
                task = batch[at]
                self._tokens += len(answer.token_ids)
                self._finishes[answer.finish] = self._finishes.get(answer.finish, 0) + 1
                rows[at].append(self._row(task, turn, prompt, answer))
                following = self._follow(task, turn, answer.token_ids)
                if following is None:
                    del prompts[at]
                else:
                    prompts[at] = following
            turn += 1
        for task, found in zip(batch, rows, strict=True):
            # The last row gets the last id, so that a resume knows that no more will come.
            found[-1]["id"] = f"{task.key}-{task.answers - 1}"
        return [row for found in rows for row in found]

    def _follow(self, task: Task, answered: int, answer: list[int]) -> list[int] | None:
        """The next prompt, after `answered` answers and this; None when there is none to come."""
        if answered == len(task.following):
            return None
        text = self._tokenizer.decode(answer, skip_special_tokens=True)
        new = Turn("assistant", text)
        task.messages.extend(turn or new for turn in task.following[answered])
        return self._asker.next_prompt(task)

    def _row(self, task: Task, turn: int, prompt: list[int], answer: Any) -> dict[str, Any]:
        decode = self._tokenizer.decode
        return {
            "id": f"{task.key}-{turn}",
            "group": task.group,
            "finish": answer.finish,
            "prompt_ids": prompt,
            "completion_ids": answer.token_ids,
            "decoded_prompt": decode(prompt),
            "decoded_completion": decode(answer.token_ids),
        }


def _tasks(inputs: Inputs, asker: Asker, tally: Tally) -> Iterator[Task]:
    """The good rows' tasks, each key once; the others are counted."""
    for found in inputs.rows():
        problem, task = found.problem, None
        if found.row is not None:
            try:
                task = asker.task(found.row)
            except BadRow as refused:
                problem = refused
        tally.add(problem.reason if problem else "", found.where, problem.detail if problem else "")
        if task is not None:
            yield task


def _batches(tasks: Sequence[Task], options: DataRegenerateOptions) -> list[list[Task]]:
    """Prompts of like length together; in an order that leaves a stopped run representative."""
    ordered = sorted(tasks, key=lambda task: (task.answers, len(task.prompt_ids), task.key))
    size = options.batch_size
    batches = [ordered[at : at + size] for at in range(0, len(ordered), size)]
    random.Random(options.seed).shuffle(batches)
    return batches


def _seed(seed: int, batch: int, turn: int) -> int:
    digest = hashlib.sha256(f"{seed} {batch} {turn}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def _made_with(
    options: DataRegenerateOptions, target: DataTarget, chat: ChatFormat, inputs: str
) -> dict[str, Any]:
    """What decides the answers. The drafting method does not: it only changes the speed."""
    names = (
        "batch_size", "max_new_tokens", "temperature", "top_p", "max_prompt", "drop_loops", "dtype",
        "seed", "as_chat", "ignore_field",
    )  # fmt: skip
    return {
        "format_version": FORMAT_VERSION,
        "inputs": inputs,
        "target": target.fingerprint.to_dict(),
        "chat_template": chat.hash(),
        **{name: getattr(options, name) for name in names},
    }


def _check_options(options: DataRegenerateOptions) -> None:
    for name in ("batch_size", "max_new_tokens", "max_prompt", "threads"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not 0 <= options.temperature < float("inf"):
        raise ConfigError(f"--temperature must be at least 0, got {options.temperature}")
    if not 0 < options.top_p <= 1:
        raise ConfigError(f"--top-p must be above 0 and at most 1, got {options.top_p}")
    check_reading(options.limit, options.max_bad_fraction)
