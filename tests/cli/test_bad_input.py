"""Input that was made to hurt: one sentence with the name of what is wrong, and exit code 2."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.heads import head_for
from specdec import augment, register_drafter
from specdec.artifacts import hub
from specdec.artifacts.input_files import MOST_TEXT, check_input_file, read_input, read_input_text
from specdec.artifacts.places import DRAFT_HEAD, DRAFT_MODEL, MODEL, head_path, locate, target_path
from specdec.artifacts.target_fingerprint import TargetFingerprint
from specdec.cli.options import GenerateOptions, check_ranges
from specdec.drafters.row import RowDrafter
from specdec.errors import ConfigError, SpecdecError
from specdec.heads.checkpoints.load import locate_head
from specdec.heads.checkpoints.save import save_head
from specdec.registry import methods
from specdec.round.tree import MAX_NODES

ROOT = Path(__file__).parents[2]
Run = Callable[..., SimpleNamespace]
NAN, INFINITY = float("nan"), float("inf")


def refusal(failed: SimpleNamespace) -> str:
    """The one sentence of a command that refused its input."""
    assert (failed.code, failed.out) == (2, ""), failed.err
    assert failed.err.count("\n") == 1
    assert failed.err.startswith("specdec: error: ")
    return str(failed.err.removeprefix("specdec: error: ").rstrip("\n"))


@pytest.fixture
def changed(model_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """Copies of the tiny model with other configuration fields, or other tensors."""

    def write(change: Callable[[dict[str, Any]], object] | None = None, **fields: Any) -> Path:
        folder = Path(
            shutil.copytree(model_folder, tmp_path / f"model-{len(list(tmp_path.iterdir()))}")
        )
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
        if change is not None:
            tensors = load_file(folder / "model.safetensors")
            change(tensors)
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return write


@pytest.fixture(scope="module")
def head_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A head of the tiny model."""
    folder = tmp_path_factory.mktemp("heads") / "head"
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    fingerprint = TargetFingerprint.of(model.config, tokenizer)
    save_head(head_for(model), folder, fingerprint=fingerprint, num_target_layers=2)
    return folder


def generate(run: Run, model: Path, *more: object) -> SimpleNamespace:
    return run("generate", "--model", model, "--prompt", "abcab", "--max-new-tokens", 4, *more)


# Arguments are checked before anything heavy is imported.


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope"], "unknown command 'nope'"),
        (["generate", "--methd", "x"], "perhaps you meant --method"),
        (["generate", "--prompt", "x", "--method", "nope"], "unknown method 'nope'"),
        (["generate", "--file", "/no/such"], "cannot read --file /no/such"),
        (["generate", "--prompt", "x", "--model", "/no/such"], "there is no folder '/no/such'"),
        (["generate", "--prompt", "x", "--budget", "4097"], "--budget must be at most 4096"),
        (["generate", "--prompt", "x", "--seed", "1"], "--seed needs --sample"),
        (["demo", "--prompts", "0"], "--prompts must be 1 to"),
        (["inspect", "/no/such"], "there is no folder '/no/such'"),
        (["convert", "/no/such", "x"], "there is no folder '/no/such'"),
        (["train"], "--data is missing"),
        (["train", "--data", "/no/such", "--output", "y"], "there is no folder '/no/such'"),
        (["data", "prepare", "--input", "/no/such"], "there is no file or folder '/no/such'"),
        (["bench", "replay", "/no/such", "--tokenizer", "demo"], "cannot read FILE /no/such"),
        (["train", "--data", ".", "--output", "y", "--init-from", ""], "name is empty"),
        (["data", "prepare", "--target", "a/b/c"], "there is no folder 'a/b/c'"),
        (["data", "regenerate", "--method", "nope"], "unknown method 'nope'"),
        (["bench", "run", "--draft", "/no/such"], "give the draft model's folder"),
        (["bench", "tune"], "--output is missing"),
        (["bench", "replay"], "no FILE"),
        (["bench", "report", "/no/such"], "cannot read RESULTS /no/such"),
        (["bench", "gate", "/no/such", "/no/such"], "cannot read BASE /no/such"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_wrong_arguments_are_answered_without_torch(arguments: list[str], said: str) -> None:
    code = (
        "import sys; from specdec.cli.main import main; code = main(sys.argv[1:]);"
        "print(code, sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.returncode) == ("2 []", 0), done.stderr
    assert said in done.stderr


def test_the_largest_budget_is_that_of_a_tree() -> None:
    check_ranges(GenerateOptions(budget=MAX_NODES))
    with pytest.raises(ConfigError, match="--budget must be at most 4096, got 4097"):
        check_ranges(GenerateOptions(budget=MAX_NODES + 1))


# Configurations.


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("num_hidden_layers", -1, "num_hidden_layers"),
        ("num_hidden_layers", 10**9, "must be a whole number from 1 to 4,096, got 1000000000"),
        ("num_hidden_layers", "2", "got '2'"),
        ("max_position_embeddings", 0, "max_position_embeddings"),
        ("max_position_embeddings", -5, "from 1 to 2,147,483,647, got -5"),
        ("hidden_size", 10**12, "hidden_size"),
        ("vocab_size", 0, "vocab_size"),
        ("head_dim", -16, "head_dim"),
        ("intermediate_size", True, "got True"),
        ("model_type", ["llama"], "model_type"),
        ("architectures", -1, "architectures in config.json"),
        ("architectures", [[]], "a list of names"),
        ("layer_types", 1.5, "make no sense to transformers"),
        ("vocab_size", 999, "other shapes than its config.json says"),
    ],
    ids=str,
)
def test_a_configuration_that_makes_no_sense(
    field: str, value: object, said: str, changed: Callable[..., Path], run: Run
) -> None:
    begin = time.monotonic()
    message = refusal(generate(run, changed(**{field: value}), "--method", "none"))
    assert said in message
    assert "model-" in message  # which file
    assert time.monotonic() - begin < 60  # nothing was built by it


@pytest.mark.parametrize("command", ["doctor", "draft", "prepare", "bench", "inspect"])
def test_every_command_refuses_such_a_configuration(
    command: str, changed: Callable[..., Path], model_folder: Path, tmp_path: Path, run: Run
) -> None:
    folder = changed(num_hidden_layers=10**9)
    arguments = {
        "doctor": ("doctor", "--model", folder),
        "draft": ("generate", "--prompt", "abc", "--model", model_folder, "--method",
                  "draft_model", "--option", f"draft={folder}"),
        "prepare": ("data", "prepare", "--input", "demo", "--output", tmp_path / "o", "--target",
                    folder),
        "bench": ("bench", "run", "--output", tmp_path / "r.jsonl", "--target", folder),
        "inspect": ("inspect", "demo", "--target", folder),
    }[command]  # fmt: skip
    failed = run(*arguments)
    assert failed.code == 2
    assert "num_hidden_layers in config.json of" in failed.err


@pytest.mark.parametrize(
    "content",
    [b"", b"\0\xff", b"[1]", b"null", b'{"a": ', b"[" * 100_000 + b"]" * 100_000],
    ids=["empty", "binary", "list", "null", "open", "deep"],
)
def test_a_configuration_that_is_none(
    content: bytes, changed: Callable[..., Path], run: Run
) -> None:
    folder = changed()
    (folder / "config.json").write_bytes(content)
    assert "config" in refusal(generate(run, folder))


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json"]
)
@pytest.mark.parametrize("kind", ["endless", "pipe", "folder", "loop", "sparse"])
def test_what_stands_where_a_file_of_a_model_is_expected(
    name: str, kind: str, changed: Callable[..., Path], run: Run
) -> None:
    path = changed() / name
    path.unlink()
    if kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    else:
        with path.open("wb") as stream:
            stream.truncate(10 * 2**30)
    assert name in refusal(generate(run, path.parent))


# Weights.


@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize(
    "tensor", ["model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"]
)
def test_weights_that_are_not_finite_are_named(
    value: float, tensor: str, changed: Callable[..., Path], run: Run
) -> None:
    folder = changed(lambda tensors: tensors[tensor].view(-1)[3:4].fill_(value))
    message = refusal(generate(run, folder, "--method", "prompt_lookup"))
    assert message.startswith(f"parameter {tensor!r} of ")
    assert f"holds {'NaN' if value != value else 'inf'}, so that no text can come of it" in message


@pytest.mark.parametrize(
    "gone", [("model.norm.weight",), ("lm_head.weight", "model.layers.0.mlp.up_proj.weight")]
)
def test_weights_that_are_missing_are_named(
    gone: tuple[str, ...], changed: Callable[..., Path], run: Run
) -> None:
    """transformers would fill them with noise, and the text would be nonsense."""
    folder = changed(lambda tensors: [tensors.pop(name) for name in gone])
    message = refusal(generate(run, folder))
    assert f"lacks weights of the model: {gone[0]}" in message
    assert ("and 1 more" in message) == (len(gone) == 2)


def test_a_tokenizer_with_more_tokens_than_the_model(
    changed: Callable[..., Path], chat_folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = changed()
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    tokenizer.add_tokens(["abc"])
    tokenizer.save_pretrained(folder)
    message = refusal(generate(run, folder))
    assert message == (
        "the prompt has token id 257, and the model has embeddings for 257 ids; its tokenizer is "
        "another model's"
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("zabcz\n"))
    assert "the chat has token id 257" in refusal(run("generate", "--model", folder, "--chat"))
    tuned = run("bench", "tune", "--target", folder, "--output", folder / "t.json", "--methods",
                "prompt_lookup", "--tasks", _task(folder))  # fmt: skip
    assert "prompt 'task/1' has token id 257, and the model has embeddings for 257" in tuned.err
    assert (tuned.code, "this is a bug" in tuned.err) == (2, False)
    assert run("generate", "--model", folder, "--prompt", "xyz", "--max-new-tokens", 2).code == 0


def _task(folder: Path) -> Path:
    path = folder / "task.jsonl"
    path.write_text('{"prompt": "zabcz"}\n')
    return path


# Heads where models are expected, and the other way round.


def test_a_head_is_no_draft_model(model_folder: Path, head_folder: Path, run: Run) -> None:
    for head in (head_folder, head_path()):
        failed = generate(run, model_folder, "--method", "draft_model", "--option", f"draft={head}")
        message = refusal(failed)
        assert "is a draft head (LlamaForCausalLMEagle3)" in message
        assert "--method eagle3 drafts with it" in message
    assert "is a draft head" in refusal(generate(run, head_folder))


def test_a_model_is_no_head(model_folder: Path, run: Run) -> None:
    failed = generate(run, model_folder, "--method", "eagle3", "--option", f"draft={model_folder}")
    said = "holds a whole model (['LlamaForCausalLM']) and no draft head; --method draft_model"
    assert said in refusal(failed)
    for words in (
        ("inspect", model_folder),
        ("convert", model_folder, "new"),
        ("inspect", target_path()),
    ):
        assert said in refusal(run(*words))


# Names.


@pytest.mark.parametrize(
    "name",
    ["", " ", "a\0b", "a\udcff", "x" * 5000, "x" * 97, "~nosuchuser/x", "/no/such", "./nope",
     "a/b/c", "owner/na me", "owner/..", "a--b/c", "C:\\x", "http://host/x", "\n"],
)  # fmt: skip
@pytest.mark.parametrize("kind", [MODEL, DRAFT_MODEL, DRAFT_HEAD], ids=lambda kind: kind.what)
def test_names_that_lead_nowhere(name: str, kind: Any) -> None:
    with pytest.raises(ConfigError, match=kind.what) as refused:
        locate(name, kind)
    assert len(str(refused.value)) < 400


def test_names_of_the_hub_are_taken() -> None:
    for name in ("gpt2", "owner/name", "Qwen/Qwen3-0.6B", "a_b/c.d-e"):
        assert locate(name).name == name
        assert not locate(name).is_folder


def test_demo_is_the_bundled_model_or_head(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no folder has that name
    assert locate("demo").name == str(target_path())
    assert locate("demo", DRAFT_MODEL).name == str(target_path())
    assert locate_head("demo") == head_path()
    shown = run("inspect", "demo", "--target", "demo")
    assert (shown.code, "nothing differs" in shown.out) == (0, True)
    assert run("convert", "demo", tmp_path / "new").code == 0
    plain = run("generate", "--prompt", "class A:", "--max-new-tokens", 8, "--method", "none")
    for more in (
        ("--method", "eagle3", "--option", "draft=demo"),
        ("--method", "eagle3", "--model", "demo"),
        ("--method", "draft_model", "--option", "draft=demo"),
    ):
        drafted = run("generate", "--prompt", "class A:", "--max-new-tokens", 8, *more)
        assert (drafted.code, drafted.out) == (0, plain.out), drafted.err


def test_augment_takes_demo_for_the_bundled_head() -> None:
    from specdec import demo

    model = augment(demo.load_target(), "eagle3", draft="demo")
    assert model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3).shape == (1, 6)


@pytest.mark.parametrize(
    "name", ["", "my drafter", "a-b", "7up", "a:b", "x=1", None, 7, ["x"], "a.b"]
)
def test_methods_are_named_by_identifiers(name: Any) -> None:
    with pytest.raises(ConfigError, match="a method's name is an identifier"):
        register_drafter(name, RowDrafter)
    assert name not in methods.names()


def test_what_is_registered_can_make_a_drafter() -> None:
    @dataclass
    class Sizes:
        size: int = 1

    class NotADataclass(RowDrafter):
        Config = dict

    class Instance(RowDrafter):
        Config = Sizes()

    for wrong in (None, "specdec.drafters.none:NoDraft", 7, NotADataclass, Instance):
        with pytest.raises(ConfigError, match="needs a class that takes its Config"):
            register_drafter("mine", wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="is built in"):
        register_drafter("lookahead", RowDrafter)


# The hub.


def test_a_hub_that_does_not_answer_is_asked_once(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    asked: list[object] = []

    def nobody(host: object, *_: object, **__: object) -> None:
        asked.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", nobody)
    for arguments in (
        ("doctor", "--model", "owner/none"),
        ("inspect", "owner/none"),
        ("generate", "--prompt", "x", "--method", "draft_model", "--option", "draft=owner/none"),
    ):
        asked.clear()
        begin = time.monotonic()
        failed = run(*arguments)
        assert time.monotonic() - begin < 20
        message = failed.err.splitlines()[-1]
        assert failed.code == 2
        assert "the Hugging Face hub does not answer ([Errno -2] Name or service" in message
        assert "Retrying" not in failed.err
        assert 0 < len(asked) <= 2, arguments


def test_what_the_cache_holds_needs_no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "why_silent", lambda: "no network")
    with hub.from_hub("owner/name", "model") as cached_only:
        assert cached_only
    gone = pytest.raises(ConfigError, match=r"does not answer \(no network\)")
    with gone, hub.from_hub("owner/name", "model"):
        raise FileNotFoundError("not in the cache")
    other = pytest.raises(SpecdecError, match="another reason")
    with other, hub.from_hub("owner/name", "model"):
        raise SpecdecError("another reason")


# Files.


def test_files_are_read_up_to_a_bound(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"x" * 100)
    assert read_input(path, "--file", 100) == b"x" * 100
    with pytest.raises(ConfigError, match=r"--file .*text is larger than the 99 bytes"):
        read_input(path, "--file", 99)
    with path.open("wb") as stream:
        stream.truncate(10 * 2**30)
    for endless in (path, Path("/dev/zero")):
        with pytest.raises(ConfigError, match=f"larger than the {MOST_TEXT:,} bytes"):
            read_input(endless, "--file")


def test_what_is_no_text(tmp_path: Path) -> None:
    folder, pipe, loop = tmp_path / "folder", tmp_path / "pipe", tmp_path / "loop"
    folder.mkdir()
    os.mkfifo(pipe)
    loop.symlink_to(loop)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    assert read_input_text(pipe, "--file") == ""  # nobody writes to it
    for path, said in (
        (folder, "is a folder; give a file"),
        (loop, "Too many levels of symbolic links"),
        (tmp_path / "none", "No such file or directory"),
        (tmp_path / "latin", "is not UTF-8 text"),
        (Path("x" * 5000), "File name too long"),
        (Path("a\0b"), "null"),
        (Path("~nosuchuser/x"), "home"),
    ):
        with pytest.raises(ConfigError, match=said) as refused:
            read_input_text(path, "--file")
        assert len(str(refused.value)) < 400
        if path.name != "latin":
            with pytest.raises(ConfigError, match=said):
                check_input_file(path, "--file")


def test_a_pipe_that_somebody_writes_to_is_read(tmp_path: Path) -> None:
    """As `--file <(program)` gives one."""
    reader, writer = os.pipe()
    os.write(writer, b"hello")
    os.close(writer)
    path = Path(f"/dev/fd/{reader}")
    check_input_file(path, "--file")
    assert read_input_text(path, "--file") == "hello"
    os.close(reader)


@pytest.mark.parametrize("option", ["--file", "--chat-template", "--prompts"])
@pytest.mark.parametrize("path", ["/dev/zero", "SPARSE"])
def test_no_option_reads_without_end(option: str, path: str, tmp_path: Path, run: Run) -> None:
    if path == "SPARSE":
        path = str(tmp_path / "sparse.txt")
        with Path(path).open("wb") as stream:
            stream.truncate(10 * 2**30)
    words: dict[str, tuple[object, ...]] = {
        "--file": ("generate",),
        "--chat-template": ("data", "prepare", "--input", "demo", "--output", tmp_path / "o"),
        "--prompts": ("inspect", "demo", "--target", "demo", "--probe"),
    }
    failed = run(*words[option], option, path)
    assert failed.code == 2
    assert f"{option} {path} is larger than the" in failed.err


@pytest.mark.parametrize("source", [("--file", "-"), ("--chat",)])
def test_standard_input_without_an_end(
    source: tuple[str, ...], chat_folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Path("/dev/zero").open("r", encoding="utf-8") as zero:
        monkeypatch.setattr(sys, "stdin", zero)
        message = refusal(run("generate", "--model", chat_folder, *source))
    assert "is larger than the 16,777,216 bytes" in message


@pytest.mark.parametrize(
    "output", ["x" * 300, "a\0b", "a\udcff", "~nosuchuser/x"], ids=["long", "nul", "bytes", "home"]
)
@pytest.mark.parametrize(
    "words",
    [
        ("data", "features", "--data", "d", "--output"),
        ("bench", "replay", __file__, "--output"),
        ("bench", "tune", "--output"),
        ("convert", "demo"),
    ],
    ids=" ".join,
)
def test_outputs_that_the_system_cannot_name(words: tuple[str, ...], output: str, run: Run) -> None:
    message = refusal(run(*words, output))
    flag = "FOLDER" if words[0] == "convert" else "--output"
    assert message.startswith(f"cannot use {flag}")


@pytest.mark.parametrize("home", ["/dev/null", None])
def test_a_home_that_cannot_be_used(home: str | None, model_folder: Path) -> None:
    """transformers and its kin keep caches there, and nothing may depend on them."""
    environment = {k: v for k, v in os.environ.items() if k not in ("HOME", "XDG_CACHE_HOME")}
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    environment |= {} if home is None else {"HOME": home}
    done = subprocess.run(
        [sys.executable, "-m", "specdec.cli", "generate", "--model", str(model_folder), "--prompt",
         "abcab", "--max-new-tokens", "4", "--method", "none"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.strip()


@pytest.mark.parametrize(
    "path", ["\x1b[31mred", "a\x07b", "a\0b", "a\u202eb", "a\udcffb"], ids=ascii
)
def test_what_is_named_does_not_drive_the_terminal(path: str, run: Run) -> None:
    message = refusal(run("generate", "--file", path))
    assert message.isprintable()
    assert ascii(path)[1:-1] in message


def test_what_the_system_refuses_is_no_bug(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> int:
        raise PermissionError(13, "Permission denied", "/some/cache")

    monkeypatch.setattr("specdec.cli.doctor.run_doctor", fail)
    assert refusal(run("doctor")) == "the system refuses '/some/cache': Permission denied"
