"""Every way to end a text, inside a block and across block borders, without overshoot."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    MaxLengthCriteria,
    MaxTimeCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)

import specdec
from helpers.hf import (
    LETTERS,
    fallbacks,
    left_padded,
    letter_tokenizer,
    oracle,
    plain,
    prompt,
    run_both,
    tiny_llama,
)

NEW = 24


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One character a token, for the tiny models' 64 ids."""
    return letter_tokenizer()


class Counting(StoppingCriteria):
    """Ends a text after `length` new ids; remembers what it was asked."""

    def __init__(self, length: int, width: int = 9) -> None:
        self.limit = length + width
        self.asked: list[list[int]] = []
        self.scores: list[Any] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.asked.append(input_ids[0].tolist())
        self.scores.append(scores)
        done = input_ids.shape[1] >= self.limit
        return torch.full((len(input_ids),), done, dtype=torch.bool)


class Unsure(StoppingCriteria):
    """Ends a text when the newest processed score is low."""

    def __init__(self, bound: float) -> None:
        self.bound, self.lengths = bound, []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.lengths.append(len(scores))
        return scores[-1].log_softmax(-1).max(-1).values < self.bound


def text(model: Any, **kwargs: Any) -> list[int]:
    """What the model says when nothing stops it."""
    return plain(model, prompt(), max_new_tokens=NEW, **kwargs)[0, 9:].tolist()


@pytest.mark.parametrize("index", range(12))
def test_eos_at_every_depth_of_a_block(llama: Any, index: int) -> None:
    free = text(llama, do_sample=True, top_k=0)
    both = run_both(llama, input_ids=prompt(), max_new_tokens=NEW, eos_token_id=free[index])
    assert both.stats.new_tokens == both.ours.shape[1] - 9
    torch.manual_seed(1)
    free = plain(llama, prompt(), max_new_tokens=NEW, do_sample=True, top_k=0)[0, 9:].tolist()
    ends = {"do_sample": True, "top_k": 0, "eos_token_id": free[index]}
    both = run_both(llama, input_ids=prompt(), max_new_tokens=NEW, **ends)
    assert both.ours.shape[1] - 9 == free.index(free[index]) + 1


def test_several_eos_ids(llama: Any) -> None:
    free = text(llama)
    for ends in ([free[9], free[4]], [free[2], free[17], 63], free[6]):
        run_both(llama, input_ids=prompt(), max_new_tokens=NEW, eos_token_id=ends)
        run_both(llama, **left_padded((9, 9, 4, 2)), max_new_tokens=NEW, eos_token_id=ends)
    config = GenerationConfig(max_new_tokens=NEW, eos_token_id=[free[9], free[4]], pad_token_id=0)
    run_both(llama, input_ids=prompt(), generation_config=config)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 6, 7, 11])
def test_custom_criterion_does_not_overshoot(llama: Any, length: int) -> None:
    made: list[Counting] = []

    def fresh() -> dict[str, Any]:
        made.append(Counting(length))
        return {"stopping_criteria": StoppingCriteriaList([made[-1]])}

    both = run_both(llama, fresh, input_ids=prompt(), max_new_tokens=NEW)
    assert both.ours.shape[1] == 9 + length
    assert made[1].asked == made[0].asked
    assert made[1].scores == made[0].scores == [None] * length


@pytest.mark.parametrize("sampled", [{}, {"do_sample": True, "temperature": 2.0}])
def test_custom_criterion_that_reads_scores(llama: Any, sampled: dict[str, Any]) -> None:
    made: list[Unsure] = []
    wanted = {"output_scores": True, "return_dict_in_generate": True}
    free = run_both(llama, input_ids=prompt(), max_new_tokens=NEW, **wanted, **sampled)
    certainty = [float(score.log_softmax(-1).max()) for score in free.plain.scores]
    bound = sorted(certainty[3:14])[0] + 1e-6

    def fresh() -> dict[str, Any]:
        made.append(Unsure(bound))
        return {"stopping_criteria": StoppingCriteriaList([made[-1]])}

    both = run_both(llama, fresh, input_ids=prompt(), max_new_tokens=NEW, **wanted, **sampled)
    steps = both.ours.sequences.shape[1] - 9
    assert steps < NEW
    assert made[1].lengths == made[0].lengths == list(range(1, steps + 1))
    assert len(both.ours.scores) == steps


def test_plain_list_of_criteria(llama: Any) -> None:
    run_both(
        llama, lambda: {"stopping_criteria": [Counting(6)]}, input_ids=prompt(), max_new_tokens=NEW
    )


@pytest.mark.parametrize("start", [0, 1, 2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_stop_strings_across_block_borders(
    llama: Any, tokenizer: PreTrainedTokenizerFast, start: int, size: int
) -> None:
    free = text(llama)
    string = "".join(LETTERS[token] for token in free[start : start + size])
    both = run_both(
        llama, input_ids=prompt(), max_new_tokens=NEW, stop_strings=["no such", string],
        tokenizer=tokenizer,
    )  # fmt: skip
    assert both.ours.shape[1] - 9 <= start + size


def test_stop_strings_from_every_source(llama: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    free = text(llama)
    early = "".join(LETTERS[token] for token in free[3:5])
    late = "".join(LETTERS[token] for token in free[8:11])
    own = GenerationConfig(max_new_tokens=NEW, stop_strings=early, pad_token_id=0)
    before = own.to_dict()
    run_both(llama, input_ids=prompt(), generation_config=own, tokenizer=tokenizer)
    call = {"input_ids": prompt(), "generation_config": own, "tokenizer": tokenizer}
    both = run_both(llama, **call, stop_strings=[late])
    assert both.ours.shape[1] - 9 > 5, "the keyword overrides the configuration"
    assert own.to_dict() == before
    llama.generation_config.stop_strings = [late]
    try:
        both = run_both(llama, input_ids=prompt(), max_new_tokens=NEW, tokenizer=tokenizer)
        assert both.ours.shape[1] - 9 < NEW
        both = run_both(llama, **call)
        assert both.ours.shape[1] - 9 <= 5
        run_both(
            llama, input_ids=prompt(), max_new_tokens=NEW, tokenizer=tokenizer, stop_strings=early
        )
        assert llama.generation_config.stop_strings == [late]
        with pytest.raises(ValueError, match="tokenizer"):
            llama.generate(prompt(), max_new_tokens=NEW)
    finally:
        llama.generation_config.stop_strings = None


def test_stop_strings_beside_other_criteria(llama: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    free = text(llama)
    string = "".join(LETTERS[token] for token in free[8:10])
    for length in (5, 20):
        run_both(
            llama, lambda: {"stopping_criteria": StoppingCriteriaList([Counting(length)])},  # noqa: B023
            input_ids=prompt(), max_new_tokens=NEW, stop_strings=string, tokenizer=tokenizer,
        )  # fmt: skip
        given = StoppingCriteriaList([Counting(length)])
        llama.generate(prompt(), max_new_tokens=4, stop_strings=string, tokenizer=tokenizer,
                       stopping_criteria=given)  # fmt: skip
        assert len(given) == 1, "the user's list grew"


def test_stop_strings_in_a_batch(llama: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    inputs = left_padded((9, 4, 6))
    free = plain(llama, **inputs, max_new_tokens=NEW)[:, 9:].tolist()
    strings = [
        "".join(LETTERS[token] for token in free[row][3 + row : 6 + row]) for row in (0, 1, 2)
    ]
    call = {"max_new_tokens": NEW, "stop_strings": strings, "tokenizer": tokenizer}
    run_both(llama, **inputs, **call, eos_token_id=63)


def test_tokenizer_without_stop_strings_is_harmless(
    llama: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    run_both(llama, input_ids=prompt(), max_new_tokens=NEW, tokenizer=tokenizer)


def test_max_time(llama: Any) -> None:
    """A limit of zero seconds leaves one token; a generous one changes nothing."""
    free = plain(llama, prompt(), max_new_tokens=NEW)
    call = {"max_new_tokens": NEW, "max_time": 1e-9}
    expected = plain(llama, prompt(), **call)
    with fallbacks() as texts:
        got = llama.generate(prompt(), **call, specdec=oracle(free, 9))
    assert not texts
    assert torch.equal(got, expected)
    assert got.shape[1] == 10
    run_both(llama, input_ids=prompt(), max_new_tokens=NEW, max_time=60.0)
    begin = time.monotonic()
    many = llama.generate(prompt(), max_new_tokens=4000, max_time=0.3)
    assert time.monotonic() - begin < 3
    assert 10 < many.shape[1] < 4009
    criteria = StoppingCriteriaList([MaxTimeCriteria(1e-9)])
    assert llama.generate(prompt(), max_new_tokens=NEW, stopping_criteria=criteria).shape[1] == 10


class Pieces(TextStreamer):
    """Records the order of events."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer)
        self.tokens: list[int] = []
        self.sizes: list[int] = []
        self.text = ""

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()
        self.sizes.append(value.numel())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text


def test_text_streamer_gets_token_by_token(llama: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    made: list[Pieces] = []

    def fresh() -> dict[str, Any]:
        made.append(Pieces(tokenizer))
        return {"streamer": made[-1]}

    end = text(llama)[10]
    for settings in ({}, {"eos_token_id": end}, {"do_sample": True, "top_k": 0}):
        both = run_both(llama, fresh, input_ids=prompt(), max_new_tokens=NEW, **settings)
        theirs, ours = made[-2:]
        assert ours.tokens == both.ours[0].tolist()
        assert ours.sizes == theirs.sizes == [9] + [1] * (both.ours.shape[1] - 9)
        assert ours.text == theirs.text == tokenizer.decode(both.ours[0])


def test_streamer_of_a_batch(llama: Any) -> None:
    class Columns:
        def __init__(self) -> None:
            self.columns: list[Tensor] = []
            self.ended = 0

        def put(self, value: Tensor) -> None:
            self.columns.append(value if value.ndim == 2 else value[:, None])

        def end(self) -> None:
            self.ended += 1

    made: list[Columns] = []

    def fresh() -> dict[str, Any]:
        made.append(Columns())
        return {"streamer": made[-1]}

    both = run_both(
        llama, fresh, **left_padded((9, 9, 4, 2)), max_new_tokens=NEW, eos_token_id=[5, 17, 40, 11]
    )
    for columns in made:
        assert torch.equal(torch.cat(columns.columns, 1), both.ours)
        assert columns.ended == 1


def test_iterator_streamer_in_a_thread(llama: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    expected = plain(llama, prompt(), max_new_tokens=NEW)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60.0)
    call = {"inputs": prompt(), "max_new_tokens": NEW, "streamer": streamer}
    call["specdec"] = oracle(expected, 9)
    thread = threading.Thread(target=llama.generate, kwargs=call)
    thread.start()
    got = "".join(streamer)
    thread.join()
    assert got == tokenizer.decode(expected[0, 9:])
    assert specdec.last_stats(llama).rounds < NEW // 2


def test_exception_in_a_criterion_leaves_the_model_usable() -> None:
    class Broken(StoppingCriteria):
        def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            if input_ids.shape[1] > 12:
                raise RuntimeError("the user's criterion fails")
            return torch.zeros(len(input_ids), dtype=torch.bool)

    model = specdec.augment(tiny_llama(), "prompt_lookup")
    with pytest.raises(RuntimeError, match="the user's criterion"):
        model.generate(prompt(), max_new_tokens=NEW, stopping_criteria=[Broken()])
    run_both(model, input_ids=prompt(), max_new_tokens=NEW)


def test_a_users_length_criterion_replaces_the_option(llama: Any) -> None:
    """`generate` drops its own length limit for one of the user's."""
    for limit, ends in ((20, None), (20, 5), (10, None)):
        run_both(
            llama, input_ids=prompt(),
            stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(limit)]),
            max_new_tokens=30, eos_token_id=ends,
        )  # fmt: skip
