"""The attacks: tables of hostile values times the commands and options that take them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from transformers import AutoTokenizer

from attack import tables
from attack.forks import BROKEN_PIPE
from attack.places import CONTENT, Variants, headers
from attack.tables import GENERATE
from specdec.cli.main import _COMMANDS, _GROUPS, _load
from specdec.registry import methods

Streams = Mapping[str, Any]
_OK = (0,)
_JUDGED = (0, 1)  # 1: the command looked, and what it was shown is not good


@dataclass(frozen=True)
class Attack:
    """One run.

    Attributes:
        kind: What is hostile about it; `messages.EXPECTED` says which answers are fine.
        arguments: Of the command line.
        codes: Exit codes that are fine besides 2.
        streams: As `forks.run` takes them.
        environment: As `forks.run` takes it.
        silent: An exit code of 0 needs no output.
    """

    kind: str
    arguments: tuple[str, ...]
    codes: tuple[int, ...] = ()
    streams: Streams = field(default_factory=dict)
    environment: Mapping[str, str | None] = field(default_factory=dict)
    silent: bool = False


@dataclass(frozen=True)
class World:
    """What the attacks name.

    Attributes:
        root: A folder for more.
        good: By the words in capitals that stand for them: models, a head, data, results.
        files: Hostile files by name.
        locked: A folder in which nothing can be written.
    """

    root: Path
    good: Mapping[str, Path]
    files: Mapping[str, Path]
    locked: Path

    def words(self, template: str, name: str = "") -> tuple[str, ...]:
        """A command line; words in capitals, also behind a sign, are filled in."""
        return tuple(self._word(word, name) for word in template.split())

    def _word(self, word: str, name: str) -> str:
        start, sign, last = word.rpartition("=")
        filled = name if last == "NAME" else str(self.good.get(last, last))
        return f"{start}{sign}{filled}"


def all_attacks(world: World) -> Iterator[Attack]:
    """Every attack, in an order that does not change."""
    for part in (_usage, _numbers, _names, _method_options, _budgets, _model_configs, _model_files,
                 _weights, _tokenizers, _head_configs, _head_files, _input_files, _outputs,
                 _streams, _homes):  # fmt: skip
        yield from part(world)


def _usage(world: World) -> Iterator[Attack]:
    for words in tables.USAGE:
        filled = tuple(str(world.good.get(word, word)) for word in words)
        # A variable of a template may be any text.
        yield Attack("usage", filled, _OK if "--template-option" in filled else ())


def _numbers(world: World) -> Iterator[Attack]:
    """Every option that takes a number, with hostile ones."""
    values = itertools.cycle(tables.NUMBERS)
    for command, base in tables.BASES.items():
        for option, takes_pair in _number_options(command):
            for value in itertools.islice(values, 2):
                if option in tables.WORK and value in ("4097", "2147483647"):
                    continue  # that is much to do, and may be done
                flag = "--" + option.replace("_", "-")
                given = (flag, value or "x", value or "x") if takes_pair else (f"{flag}={value}",)
                yield Attack("number", (*world.words(f"{command} {base}"), *given), _JUDGED)


def _number_options(command: str) -> Iterator[tuple[str, bool]]:
    """(option, whether it takes two numbers at once)."""
    group, _, name = command.partition(" ")
    kind = _load((_GROUPS[group][name] if name else _COMMANDS[group])[0])
    types = get_type_hints(kind)
    for one in fields(kind):
        inner = [t for t in (get_args(types[one.name]) or (types[one.name],)) if t is not NoneType]
        if set(inner) - {Ellipsis} <= {int, float} and bool not in inner:
            yield one.name, inner == [float, float]


def _names(world: World) -> Iterator[Attack]:
    places = [*tables.NAMES, *(str(world.files[n]) for n in ("binary", "loop", "dangling", "fifo"))]
    takers = itertools.cycle(tables.NAME_TAKERS)
    for name in places:
        for taker in itertools.islice(takers, 5):  # 5 and the takers' number share no divisor
            is_tree = taker.endswith(("--input=NAME", "--data=NAME")) and not name.strip("/.~")
            if not is_tree:  # a whole file system may be read, and takes long
                yield Attack("name", world.words(taker, name))


def _method_options(world: World) -> Iterator[Attack]:
    values = itertools.cycle(("-1", "0", "nan", "inf", "9" * 12, "x", "", "none", "true", "1.5"))
    for method in methods.names():
        config = getattr(methods.load(method), "Config", None)
        known = [] if config is None else [one.name for one in fields(config)]
        for option in known:
            for value in itertools.islice(values, 2):
                words = (
                    *world.words(f"{GENERATE} --method={method}"),
                    f"--option={option}={value}",
                )
                if "draft" in known and option != "draft":
                    draft = world.good["HEAD" if method == "eagle3" else "MODEL"]
                    words += (f"--option=draft={draft}",)
                yield Attack("method option", words, _OK)


def _budgets(world: World) -> Iterator[Attack]:
    for method in ("none", "lookahead", "prompt_lookup", "jacobi"):
        for budget in ("4096", "4097", "1000000", "2147483647"):
            words = world.words(f"{GENERATE} --method={method} --budget={budget}")
            yield Attack("budget", words, _OK)


def _given(
    world: World, kind: str, takers: Sequence[str], folders: Iterator[Path], each: int = 1
) -> Iterator[Attack]:
    """The folders, each given to the next `each` of the commands that load such a one."""
    turns = itertools.cycle(takers)
    for folder in folders:
        for taker in itertools.islice(turns, each):
            yield Attack(kind, world.words(taker, str(folder)), _JUDGED)


def _model_configs(world: World) -> Iterator[Attack]:
    variants = Variants(world.good["MODEL"], world.root / "configs")
    values = itertools.cycle(tables.SIZES)

    def folders() -> Iterator[Path]:
        for name in tables.MODEL_FIELDS:
            for value in itertools.islice(values, 2):
                yield variants.with_value(name, value)
        for name in ("num_hidden_layers", "max_position_embeddings", "vocab_size", "hidden_size"):
            for value in (-1, 0, 10**9):
                yield variants.with_value(name, value)

    yield from _given(world, "model config", tables.MODEL_TAKERS, folders())


def _model_files(world: World) -> Iterator[Attack]:
    variants = Variants(world.good["CHAT"], world.root / "files_of_models")

    def folders() -> Iterator[Path]:
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json",
                     "generation_config.json"):  # fmt: skip
            for name, content in CONTENT.items():
                yield variants.with_file(file, content, name)
            for kind in ("folder", "fifo", "sparse"):
                yield variants.with_special(file, kind)
            yield variants.with_link(file, file, "loop")
            yield variants.with_link(file, "/dev/zero", "zero")
            yield variants.with_file(file, None, "missing")
        for name, value in tables.GENERATION_SETTINGS:
            yield variants.with_value(name, value, "generation_config.json")
        for name, value in tables.TOKENIZER_SETTINGS:
            yield variants.with_value(name, value, "tokenizer_config.json")

    yield from _given(world, "model file", tables.MODEL_TAKERS, folders())


def _weights(world: World) -> Iterator[Attack]:
    variants = Variants(world.good["MODEL"], world.root / "weights")
    good = (world.good["MODEL"] / "model.safetensors").read_bytes()
    heads = (world.good["HEAD"] / "model.safetensors").read_bytes()
    embedding, layer = "model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight"

    def broken() -> Iterator[Path]:
        for name, content in headers(good).items():
            yield variants.with_file("model.safetensors", content, name)
        for kind in ("folder", "fifo", "sparse"):
            yield variants.with_special("model.safetensors", kind)
        yield variants.with_file("model.safetensors", None, "missing")
        yield variants.with_file("model.safetensors", heads, "head")
        yield variants.with_tensors("less", lambda t: t.pop(layer))
        yield variants.with_tensors("none", lambda t: [t.pop(n) for n in list(t) if n != embedding])
        yield variants.with_tensors("short", lambda t: t.update({layer: t[layer][:9].clone()}))
        yield world.good["HEAD"]

    def poisoned() -> Iterator[Path]:
        for value in (float("nan"), float("inf"), float("-inf")):
            for name in (embedding, layer, "lm_head.weight", "model.norm.weight"):
                yield variants.with_tensors(
                    f"{value}-{name}", lambda t, n=name, v=value: t[n].fill_(v)
                )
        yield variants.with_tensors("once", lambda t: t[layer].view(-1)[7:8].fill_(float("nan")))

    yield from _given(world, "weights", tables.MODEL_TAKERS, broken(), 2)
    yield from _given(world, "not finite", tables.MODEL_TAKERS, poisoned(), 2)


def _tokenizers(world: World) -> Iterator[Attack]:
    """A tokenizer with more tokens than the model has embeddings for."""
    variants = Variants(world.good["MODEL"], world.root / "tokenizers")
    folder = variants.with_file("x", b"", "more")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["abc", "def", "a", "ab"])
    tokenizer.save_pretrained(folder)
    for taker in tables.MODEL_TAKERS:
        yield Attack("tokenizer", world.words(taker, str(folder)), _JUDGED)


def _head_configs(world: World) -> Iterator[Attack]:
    variants = Variants(world.good["HEAD"], world.root / "heads")
    values = itertools.cycle(tables.SIZES)

    def folders() -> Iterator[Path]:
        for name in tables.HEAD_FIELDS:
            for value in itertools.islice(values, 2):
                yield variants.with_value(name, value)
        for name, value in tables.SIDECAR_SETTINGS:
            yield variants.with_value(name, value, "specdec_config.json")

    yield from _given(world, "head config", tables.HEAD_TAKERS, folders())


def _head_files(world: World) -> Iterator[Attack]:
    variants = Variants(world.good["HEAD"], world.root / "files_of_heads")
    good = (world.good["HEAD"] / "model.safetensors").read_bytes()

    def folders() -> Iterator[Path]:
        for file in ("config.json", "specdec_config.json"):
            for name in ("empty", "binary", "deep", "list", "nan", "twice", "digits", "utf16"):
                yield variants.with_file(file, CONTENT[name], name)
            for kind in ("folder", "fifo", "sparse"):
                yield variants.with_special(file, kind)
            yield variants.with_link(file, "/dev/zero", "zero")
        for name, content in headers(good).items():
            yield variants.with_file("model.safetensors", content, name)
        yield variants.with_file("model.safetensors", None, "missing")
        for value in (float("nan"), float("inf")):
            for tensor in ("fc.weight", "lm_head.weight"):
                yield variants.with_tensors(
                    f"{value}-{tensor}", lambda t, n=tensor, v=value: t[n].fill_(v)
                )
        yield world.good["MODEL"]

    yield from _given(world, "head file", tables.HEAD_TAKERS, folders())


def _input_files(world: World) -> Iterator[Attack]:
    for number, (name, path) in enumerate(world.files.items()):
        for index, taker in enumerate(tables.FILE_TAKERS):
            # Data to train on may have ten gigabytes, and are read.
            endless = name == "sparse" and taker.endswith(("--input=NAME", "--data=NAME"))
            if not endless and (index + 5 * number) % len(tables.FILE_TAKERS) < 5:
                yield Attack("input file", world.words(taker, str(path)), _JUDGED)


def _outputs(world: World) -> Iterator[Attack]:
    places = {
        "LOCKED/x": f"{world.locked}/x", "FILE/x": f"{world.good['ROWS']}/x",
        "LOOP": str(world.files["loop"]), "FIFO": str(world.files["fifo"]),
        "MODEL": str(world.good["MODEL"]), "LINK": str(world.files["dangling"]),
    }  # fmt: skip
    for number, output in enumerate(tables.OUTPUTS):
        for index, taker in enumerate(tables.OUTPUT_TAKERS):
            if (index + number) % 3 == 0:
                yield Attack("output", world.words(taker, places.get(output, output)), _OK)
    for output in ("/proc/self/x", f"{world.locked}/x", str(world.good["ROWS"]), "a\0b", "x" * 300):
        words = world.words(f"{GENERATE} --method=suffix --option=store=NAME", output)
        yield Attack("output", words, _OK)


def _streams(world: World) -> Iterator[Attack]:
    chat = world.words("generate --chat --max-new-tokens=4 --model=CHAT --method=none")
    read = world.words("generate --file=- --max-new-tokens=4 --model=MODEL --method=none")
    for given in (None, b"", b"\n\n", b"\xff\xfe", b"\0\0", Path("/dev/zero"), Path("/dev/null"),
                  b"hello\n" * 60, b"x" * 100_000, world.files["sparse"]):  # fmt: skip
        for words in (read, chat):
            # An empty chat is no failure, and says nothing.
            yield Attack("stdin", words, _OK, {"stdin": given}, silent=words is chat)
    for taker in tables.QUIET_TAKERS:
        for place in (None, Path("/dev/full"), BROKEN_PIPE):
            words = world.words(taker)
            yield Attack("stdout", words, (141,), {"stdout": place}, silent=True)


def _homes(world: World) -> Iterator[Attack]:
    for home in tables.HOMES:
        place = str(world.locked) if home == "LOCKED" else home
        environment = {"HOME": place, "XDG_CACHE_HOME": None}
        takers = [*tables.HOME_READERS, *(tables.HOME_WRITERS if home else ())]
        for taker in takers:
            yield Attack("home", world.words(taker), _OK, environment=environment)
