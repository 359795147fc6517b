"""What clumsy or hostile use must not do: change the text, leave memory behind, fail late."""

from __future__ import annotations

import gc
import inspect
from typing import Any

import pytest
import torch
import transformers

import specdec
from helpers.hf import ids_of, plain, prompt, tiny_llama
from helpers.names import cache_of
from specdec import RowDrafter, SpecConfig, TokenTree
from specdec.caches.tree_cache import TreeCache
from specdec.contracts import BatchState
from specdec.drafters.row import DraftRow, RowRound
from specdec.errors import ConfigError, FallbackWarning
from specdec.stats import RoundRecord
from specdec.targets.self_test import probe

CALL: dict[str, Any] = {"max_new_tokens": 20, "do_sample": False}


class Vandal(RowDrafter):
    """Keeps and edits every list that it is given."""

    class Row(DraftRow):
        def __init__(self, text: list[int], drafter: RowDrafter) -> None:
            super().__init__(text, drafter)
            text[0] = 59

        def propose(self, budget: int) -> TokenTree:
            root = self.text[-1]
            self.text += [1, 2, 3]
            del self.text[-3:]
            self.text[0] = 60
            return TokenTree.chain(root, self.text[-4:])

        def observe(self, outcome: RowRound) -> None:
            outcome.tokens.append(7)


def test_a_drafter_owns_what_it_is_given(llama: Any) -> None:
    specdec.register_drafter("vandal", Vandal)
    ids, records = prompt(rows=2), list[RoundRecord]()
    wanted = plain(llama, ids, **CALL)
    with specdec.augmented(llama, "vandal", on_round=records.append):
        assert torch.equal(llama.generate(ids, **CALL), wanted)
    for row, text in enumerate(wanted[:, ids.shape[1] :].tolist()):
        assert [token for record in records for token in record.tokens[row]] == text
    one, tokens = torch.tensor([0]), [[5, 6, 7]]
    state = BatchState(tokens, [2], [True], one, one, 64, 20, depth_limit=9)
    vandal = Vandal()
    vandal.start(state)
    assert vandal.propose(state, 4).size > 1
    assert tokens == [[5, 6, 7]]


@pytest.mark.parametrize(
    ("where", "mode"), [("trees", "chain"), ("after trees", "chain"), ("filled cache", "plain")]
)
def test_the_self_test_refuses_nan(where: str, mode: str) -> None:
    """Not a number under a tree mask, only in the step after a tree was committed, or in any
    forward of several tokens on a filled cache."""
    model = tiny_llama()
    forward = model.forward

    def poisoned(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        output = forward(*args, attention_mask=attention_mask, **kwargs)
        masked = attention_mask is not None and attention_mask.ndim == 4
        here = masked and (where != "after trees" or _tokens(kwargs) == 1)
        if where == "filled cache":
            filled = cache_of(output).get_seq_length() > 7
            here = masked or (filled and _tokens(kwargs) > 1)
        if here:
            output.logits = output.logits * float("nan")
        return output

    poisoned.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    model.forward = poisoned
    assert probe(model).mode == mode


def _tokens(kwargs: dict[str, Any]) -> int:
    return int(kwargs["input_ids"].shape[1])


def test_windows_inside_the_layers_run_plain() -> None:
    """GPT-Neo windows by cache slot, where no mask of ours reaches."""
    torch.manual_seed(0)
    config = transformers.GPTNeoConfig(
        vocab_size=64, hidden_size=32, num_layers=2, num_heads=2, window_size=20,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=128,
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model = specdec.augment(transformers.GPTNeoForCausalLM(config).double().eval(), "lookahead")
    with pytest.warns(FallbackWarning, match="window_size of 20"):
        found = model.generate(prompt(), max_new_tokens=40, do_sample=False)
    assert torch.equal(found, plain(model, prompt(), max_new_tokens=40, do_sample=False))


def test_an_early_end_needs_no_memory_for_the_limit(llama: Any) -> None:
    free = ids_of(plain(llama, prompt(), **CALL))[0, 9:].tolist()
    with specdec.augmented(llama, "lookahead"):
        found = llama.generate(prompt(), max_new_tokens=10**12, do_sample=False,
                               eos_token_id=free[3])  # fmt: skip
    assert found.shape[1] <= 9 + 4


def outcome(generate: Any, *args: Any, **kwargs: Any) -> Any:
    """The ids, or the kind of error."""
    try:
        return generate(*args, **kwargs).tolist()
    except (RuntimeError, ValueError, IndexError) as problem:
        return type(problem)


@pytest.mark.parametrize("width", [7, 13])
def test_a_mask_of_another_width_is_left_to_plain(llama: Any, width: int) -> None:
    mask = torch.ones(1, width, dtype=torch.long)
    mask[0, 0] = 0
    call = {"attention_mask": mask, **CALL}
    expected = outcome(plain, llama, prompt(), **call)
    with specdec.augmented(llama, "lookahead"), pytest.warns(FallbackWarning, match="mask is"):
        found = outcome(llama.generate, prompt(), **call)
    assert found == expected


def test_caches_are_freed_with_the_call(llama: Any) -> None:
    with specdec.augmented(llama, "lookahead"):
        gc.collect()
        gc.disable()
        try:
            for _ in range(3):
                llama.generate(prompt(), **CALL)
            alive = [thing for thing in gc.get_objects() if type(thing) is TreeCache]
        finally:
            gc.enable()
    assert alive == []


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lookahead", {"window": 1.5}),
        ("lookahead", {"guesses": True}),
        ("lookahead", {"window": "7"}),
        ("lookahead", {"keep_pool": "no"}),
        ("lookahead", {"window": 10**6}),
        ("prompt_lookup", {"num_draft_tokens": float("nan")}),
        ("prompt_lookup", {"num_draft_tokens": 10**6}),
        ("none", {"budget": True}),
        ("none", {"on_round": 5}),
        ("", {}),
    ],
)
def test_bad_options_fail_at_augment(method: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        specdec.augment(tiny_llama(), method, **options)


def test_options_without_a_method_are_not_dropped() -> None:
    with pytest.raises(ConfigError, match="needs a method"):
        specdec.augment(tiny_llama(), config=SpecConfig(options={"window": 3}))


def test_an_own_generate_of_the_instance_comes_back() -> None:
    model = tiny_llama()
    model.generate = own = lambda *args, **kwargs: "mine"
    specdec.restore(specdec.augment(model, "none"))
    assert model.generate is own
