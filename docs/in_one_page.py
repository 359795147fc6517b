"""Speculative decoding on one page: greedy, one prompt, drafts from its n-grams.

    python docs/in_one_page.py [MODEL PROMPT]

For any causal language model of transformers whose cache can be cropped.
"""

import inspect
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

Ids = list[int]


def draft(ids: Ids, most: int, longest: int = 3) -> Ids:
    """What followed the newest n-gram where it stood before; the longest one."""
    for n in range(min(longest, len(ids) - 1), 0, -1):
        for start in range(len(ids) - n - 1, -1, -1):
            if ids[start : start + n] == ids[-n:]:
                return ids[start + n : start + n + most]
    return []


@torch.no_grad()
def generate(model: Any, prompt: Ids, limit: int, most: int = 8) -> tuple[Ids, int]:
    """(new ids, forwards) of a prompt; the ids of greedy `model.generate`."""
    cache = DynamicCache(config=model.config)
    known = inspect.signature(model.forward).parameters
    argument = "cache" if "cache" in known else "past_key_values"  # its older name
    end = model.generation_config.eos_token_id
    ends = end if isinstance(end, list) else [end]

    def picks(chain: Ids) -> Ids:
        """What the model writes after each of these tokens; they join the cache."""
        tokens = torch.tensor([chain], device=model.device)
        return model(tokens, **{argument: cache}).logits[0].argmax(-1).tolist()

    # 1. Read the prompt. The last pick is pending: emitted, but not in the cache.
    ids, forwards = [*prompt, picks(prompt)[-1]], 1
    while len(ids) < len(prompt) + limit and ids[-1] not in ends:
        # 2. Guess what comes; one less than is wanted, for a forward gives one.
        room = len(prompt) + limit - len(ids) - 1
        guess = draft(ids, min(most, room))
        # 3. One forward over the pending token and all guesses.
        found, forwards = picks([ids[-1], *guess]), forwards + 1
        # 4. Accept guesses as long as each is what the model itself picks there.
        right = 0
        while right < len(guess) and guess[right] == found[right]:
            right += 1
        # 5. Forget the keys and values of the others.
        if right < len(guess):
            cache.crop(right - len(guess))
        # 6. Emit them and the model's own token after them, up to an end of text.
        for token in found[: right + 1]:
            ids.append(token)
            if token in ends:
                break
    return ids[len(prompt) :], forwards


if __name__ == "__main__":
    from specdec.demo import target_path

    source, text = sys.argv[1:] or (target_path(), "class Stack:\n    def push(")
    model = AutoModelForCausalLM.from_pretrained(source, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(source)
    inputs = tokenizer(text, return_tensors="pt")
    plain = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0].tolist()
    prompt = inputs.input_ids[0].tolist()
    new, forwards = generate(model, prompt, 64)
    print(tokenizer.decode(prompt + new))
    print(f"{len(new)} tokens, {forwards} forwards, same: {prompt + new == plain}")
