"""What a newcomer pastes: the Python of README and quickstart runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from specdec import demo

ROOT = Path(__file__).resolve().parents[2]
NAME = re.compile(r"^name = .*$", re.MULTILINE)


def blocks(page: str) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text("utf-8"), re.M | re.S)


@pytest.fixture(autouse=True)
def fresh_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_first_example_runs_on_the_toy_by_changing_its_name(
    capsys: pytest.CaptureFixture[str],
) -> None:
    example = blocks("README.md")[0]
    assert len(NAME.findall(example)) == 1
    assert "name = specdec.demo.target_path()" in (ROOT / "README.md").read_text("utf-8")
    exec(NAME.sub("name = specdec.demo.target_path()", example), {})
    written, said = capsys.readouterr().out.split("prompt_lookup: tree, ")
    model, tokenizer = demo.load_target(), demo.load_tokenizer()
    inputs = tokenizer("class Stack:\n    def push(", return_tensors="pt")
    plain = model.generate(**inputs, max_new_tokens=128)[0, inputs.input_ids.shape[1] :]
    assert written.strip() == tokenizer.decode(plain, skip_special_tokens=True).strip()
    assert "rounds, acceptance length" in said


def test_the_first_example_asks_a_chat_model(
    chat_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its question, in the model's own template."""
    example = blocks("README.md")[0].replace("max_new_tokens=128", "max_new_tokens=8")
    found: dict[str, object] = {}
    exec(NAME.sub(f"name = {str(chat_folder)!r}", example), found)
    asked = found["tokenizer"].decode(found["inputs"].input_ids[0])  # type: ignore[attr-defined]
    assert str(found["question"]) in asked
    assert asked != found["question"]
    assert "acceptance length" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("page", "number"),
    [("README.md", n) for n in range(1, len(blocks("README.md")))]
    + [("docs/quickstart.md", n) for n in range(len(blocks("docs/quickstart.md")))],
)
def test_other_examples_run(page: str, number: int, capsys: pytest.CaptureFixture[str]) -> None:
    exec(blocks(page)[number], {})
    assert "acceptance length" in capsys.readouterr().out
