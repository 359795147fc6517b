"""The commands `generate` and `doctor`, the frozen list of options, and bad input."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, T5Config

import specdec
from specdec import register_drafter
from specdec.api import augment
from specdec.cli import generate as generate_command
from specdec.cli import main as main_module
from specdec.cli.main import main
from specdec.cli.options import DemoOptions, DoctorOptions, GenerateOptions
from specdec.drafters.row import RowDrafter
from specdec.errors import ConfigError
from specdec.loading import method_options
from specdec.registry import methods
from specdec.stats import GenerationStats
from specdec_training.data.options import (
    DataDoctorOptions,
    DataPrepareOptions,
    DataRegenerateOptions,
)

ROOT = Path(__file__).parents[2]
Run = Callable[..., SimpleNamespace]

FROZEN_OPTIONS = {
    "demo": {
        "max_new_tokens": 96, "prompts": 6, "repetitions": 3, "sample": False, "seed": 0,
        "dtype": "float32", "device": "cpu", "threads": 1, "no_colour": False,
    },
    "generate": {
        "model": None, "prompt": None, "file": None, "chat": False, "max_new_tokens": None,
        "sample": False, "temperature": None, "top_p": None, "top_k": None, "seed": None,
        "dtype": "auto", "device": "auto", "method": None, "budget": None, "option": (),
        "kernels": "auto", "stats": False, "compare": False,
    },
    "doctor": {"model": None, "dtype": "auto", "device": "auto", "kernels": "auto"},
    "data prepare": {
        "input": (), "split": "train", "subset": None, "limit": None, "as_chat": False,
        "ignore_field": (), "min_lines": 4, "max_lines": 24, "seed": 0, "max_bad_fraction": 0.01,
        "target": "demo",
        "output": None, "overwrite": False, "max_length": 2048, "draft_vocab": 32000,
        "draft_vocab_of": None, "held_out": 64, "held_out_input": (), "chat_template": None,
        "template_option": (),
        "turns": "all", "num_proc": 1, "cache_dir": None,
    },
    "data regenerate": {
        "input": (), "split": "train", "subset": None, "limit": None, "as_chat": False,
        "ignore_field": (), "min_lines": 4, "max_lines": 24, "seed": 0, "max_bad_fraction": 0.01,
        "target": "demo",
        "output": None, "batch_size": 32, "max_new_tokens": 256, "temperature": 0.7, "top_p": 1.0,
        "max_prompt": None, "drop_loops": False, "chat_template": None, "template_option": (),
        "method": "none", "dtype": "auto", "device": "auto", "threads": None,
    },
    "data doctor": {
        "data": None, "target": None, "max_length": 2048, "chat_template": None,
        "template_option": (), "as_chat": False, "ignore_field": (), "examples": 8, "sample": 1,
        "sample_tokens": 400, "dtype": "auto", "device": "auto", "no_colour": False,
    },
}  # fmt: skip
"""Subcommand -> option -> default; those of `train` stand in tests/training."""
OPTIONS = {
    "demo": DemoOptions, "generate": GenerateOptions, "doctor": DoctorOptions,
    "data prepare": DataPrepareOptions, "data regenerate": DataRegenerateOptions,
    "data doctor": DataDoctorOptions,
}  # fmt: skip


@pytest.mark.parametrize("command", FROZEN_OPTIONS)
def test_options_are_frozen(command: str, run: Run) -> None:
    """Adding, renaming or dropping an option is a decision: change the list above with it."""
    assert {f.name: f.default for f in fields(OPTIONS[command])} == FROZEN_OPTIONS[command]
    shown = run(*command.split(), "--help")
    assert shown.code == 0
    flags = {"--" + name.replace("_", "-") for name in FROZEN_OPTIONS[command]} | {"--help"}
    assert set(re.findall(r"--[a-z][a-z-]*", shown.out)) == flags


def test_commands_are_frozen(run: Run) -> None:
    shown = run("--help")
    assert shown.code == 0
    assert "{demo,generate,doctor,data,bench,train,inspect,convert}" in shown.out
    group = run("data", "--help")
    assert group.code == 0
    assert "{prepare,regenerate,doctor,features}" in group.out


@pytest.mark.parametrize("command", ["train", "inspect", "convert", "data features"])
def test_every_command_has_help(command: str, run: Run) -> None:
    shown = run(*command.split(), "--help")
    assert shown.code == 0
    assert f"usage: specdec {command}" in shown.out


def test_unknown_commands_are_answered_with_the_known_ones(run: Run) -> None:
    assert "choose one of demo, generate" in run("dmeo").err
    shown = run("data", "prep")
    assert shown.code == 2
    assert "choose one of prepare, regenerate, doctor, features" in shown.err


def test_errors_are_one_line_without_unicode_too(run: Run) -> None:
    """tyro draws its frames with other characters where the terminal's encoding is not UTF-8."""
    for box in (
        "╭─ Value error ─────╮\n│ Error parsing --x: is │\n│ bad. │\n│ ───── │\n│ More │\n╰──╯\n",
        " Value error \n ----- \n  Error parsing --x: is \n  bad. \n  -----\n  More \n",
    ):
        assert main_module._one_line(box, "specdec demo") == "--x: is bad (see specdec demo --help)"


def test_version(run: Run) -> None:
    assert run("--version").out == f"specdec {cli_version()}\n"


def cli_version() -> str:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["bench", "run", "--help"], ["train", "--stepz", "3"], ["convert", "--help"]],
    ids=" ".join,
)
def test_nothing_heavy_is_imported_to_answer(arguments: list[str]) -> None:
    """Help, a mistyped option and Ctrl-C must not wait seconds for torch and transformers."""
    code = (
        "import sys; from specdec.cli.main import main; main(sys.argv[1:]);"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "[]"), done.stderr


def test_every_public_name_is_there() -> None:
    for name in specdec.__all__:
        assert getattr(specdec, name) is not None
        assert name in dir(specdec)
    assert specdec.augment is augment
    assert specdec.errors.ConfigError is ConfigError  # its modules, too, without an import
    with pytest.raises(AttributeError, match="no attribute 'augmant'"):
        _ = specdec.augmant
    assert not hasattr(specdec, "errors.x")


@pytest.mark.parametrize(
    ("package", "wanted"),
    [
        ("datasets.load", "this needs the package datasets: pip install 'specdec-torch[train]'"),
        ("pyarrow", "this needs the package pyarrow: pip install pyarrow"),
    ],
)
def test_missing_packages_are_named(
    package: str, wanted: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> int:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr("specdec.cli.doctor.run_doctor", fail)
    failed = run("doctor")
    assert (failed.code, failed.err) == (2, f"specdec: error: {wanted}\n")


def plain_text(folder: Path, prompt: str, tokens: int, **sampling: object) -> str:
    """What the model's own `generate` continues with."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    torch.manual_seed(7)
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, **sampling
    )
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("method", ["none", "prompt_lookup", "lookahead"])
def test_generate_streams_the_models_own_text(method: str, model_folder: Path, run: Run) -> None:
    made = run(
        "generate", "--model", model_folder, "--prompt", "abcabcab", "--max-new-tokens", 24,
        "--method", method, "--dtype", "float32",
    )  # fmt: skip
    assert made.code == 0
    assert made.out.rstrip("\n") == plain_text(model_folder, "abcabcab", 24, do_sample=False)
    assert made.err == ""


def test_generate_samples_the_same_text_from_the_same_seed(model_folder: Path, run: Run) -> None:
    made = run(
        "generate", "--model", model_folder, "--prompt", "abcabcab", "--max-new-tokens", 24,
        "--method", "lookahead", "--option", "window=3", "--option", "ngram=3",
        "--dtype", "float32", "--sample", "--temperature", 0.7, "--top-k", 20, "--top-p", 0.9,
        "--seed", 7,
    )  # fmt: skip
    sampling = {"do_sample": True, "temperature": 0.7, "top_k": 20, "top_p": 0.9}
    assert made.out.rstrip("\n") == plain_text(model_folder, "abcabcab", 24, **sampling)


def test_generate_chooses_a_method_itself(model_folder: Path, run: Run) -> None:
    made = run("generate", "--model", model_folder, "--prompt", "abc", "--max-new-tokens", 4)
    assert made.code == 0


def test_generate_reads_a_file_and_standard_input(
    model_folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "prompt.txt"
    path.write_text("abcabcab")
    common = ("generate", "--model", model_folder, "--method", "none", "--max-new-tokens", 8)
    from_file = run(*common, "--file", path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("abcabcab"))
    from_stdin = run(*common, "--file", "-")
    assert from_file.out == from_stdin.out == run(*common, "--prompt", "abcabcab").out


def test_default_length_fits_the_context(model_folder: Path, run: Run) -> None:
    made = run("generate", "--model", model_folder, "--method", "none", "--prompt", "a" * 180)
    assert made.code == 0


def test_stats_go_to_standard_error(model_folder: Path, run: Run) -> None:
    made = run(
        "generate", "--model", model_folder, "--prompt", "abcabcab", "--max-new-tokens", 24,
        "--method", "prompt_lookup", "--stats",
    )  # fmt: skip
    assert "tree: its self-test verified a token tree" in made.err
    forwards = re.search(r"(\d+) for 24 tokens: (\d+) rounds and 1 over the prompt", made.err)
    assert forwards is not None
    assert int(forwards[1]) == int(forwards[2]) + 1
    assert "not measured: --compare does it on this text" in " ".join(made.err.split())
    for wanted in ("24 in ", "acceptance length", "tokens a round",
                   "tokens by source", "seconds by stage", "forward"):  # fmt: skip
        assert wanted in made.err
    assert "acceptance" not in made.out


def test_a_speed_is_said_only_where_it_was_measured(model_folder: Path, run: Run) -> None:
    command = ("generate", "--model", model_folder, "--prompt", "abcabcab", "--method",
               "prompt_lookup", "--max-new-tokens", 8)  # fmt: skip
    assert "plain generate on this text" not in run(*command, "--stats").err
    both = run(*command, "--stats", "--compare").err
    assert "plain generate on this text" in both
    assert "not measured" not in both


@pytest.mark.parametrize("sampled", [[], ["--sample", "--seed", 3]])
def test_plain_generate_on_the_same_text(
    model_folder: Path, run: Run, sampled: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("generate", "--model", model_folder, "--prompt", "abcabcab", "--method", "suffix",
               "--max-new-tokens", 24, *sampled)  # fmt: skip
    alone = run(*command)
    after = torch.get_rng_state()
    made = run(*command, "--compare")
    assert made.out == alone.out
    assert torch.equal(torch.get_rng_state(), after)
    assert "plain generate on this text" in made.err
    assert "identical" in made.err
    assert "not identical" not in made.err
    real = generate_command.Session._generate

    def lossy(session: Any, *args: Any, **how: Any) -> list[int]:
        text = real(session, *args, **how)
        return text if how.get("specdec", True) is False else [*text[:-1], 0]

    monkeypatch.setattr(generate_command.Session, "_generate", lossy)
    assert "not identical" in run(*command, "--compare").err


@pytest.mark.parametrize(("ratio", "said"), [
    (1.417, "1.42x of plain generate on this text"),
    (0.871, "slower than plain generate on this text: 0.87x; try another --method"),
])  # fmt: skip
def test_the_comparison_in_words(
    ratio: float, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    generate_command.print_comparison(ratio, same=True, exact=True)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("exact", "why"), [
    (False, "half precision rounds near-ties"), (True, "this is a bug, please report it"),
])  # fmt: skip
def test_another_text_has_no_speed(
    exact: bool, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    generate_command.print_comparison(1.5, same=False, exact=exact)
    said = capsys.readouterr().err
    assert f"not identical: {why}" in said
    assert "1.5" not in said


def test_stats_of_a_plain_call(capsys: pytest.CaptureFixture[str]) -> None:
    stats = GenerationStats("none", mode="plain", mode_reason="num_beams is 2")
    generate_command.print_stats(stats, 10, 0.5)
    errors = capsys.readouterr().err
    assert "plain: num_beams is 2" in errors
    assert "10 in 0.50 s, 20.0 tokens/s" in errors


def test_chat(chat_folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[dict[str, str]]] = []
    encode = generate_command.Session.encode_chat

    def spy(session: generate_command.Session, messages: list[dict[str, str]]) -> torch.Tensor:
        asked.append(list(messages))
        return encode(session, messages)

    monkeypatch.setattr(generate_command.Session, "encode_chat", spy)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\nagain\n"))
    made = run(
        "generate", "--model", chat_folder, "--chat", "--method", "none", "--max-new-tokens", 5
    )
    assert made.code == 0
    assert [m["role"] for m in asked[-1]] == ["user", "assistant", "user"]
    assert [m["content"] for m in asked[-1][::2]] == ["hello", "again"]
    assert asked[-1][1]["content"] in made.out


def test_doctor(run: Run) -> None:
    shown = run("doctor")
    assert shown.code == 0
    for wanted in ("python", "torch", "transformers", "triton", "accelerate", "cpu", "bfloat16",
                   *methods.names()):  # fmt: skip
        assert wanted in shown.out


def test_kernels_are_named(model_folder: Path, run: Run) -> None:
    cpu = ("--device", "cpu", "--dtype", "float32")
    assert "  dense masks in the model's own attention\n" in run("doctor", *cpu).out
    shown = run("doctor", "--model", model_folder, *cpu, "--kernels", "reference")
    assert "  fused tree attention, by its torch reference\n" in shown.out
    assert "verified a token tree with tree attention (reference)" in " ".join(shown.out.split())
    call = ("generate", "--model", model_folder, *cpu, "--prompt", "abc", "--max-new-tokens", "8")
    texts = [run(*call, "--method", "prompt_lookup", "--stats", "--kernels", kernels)
             for kernels in ("off", "reference")]  # fmt: skip
    assert texts[0].out == texts[1].out
    assert "with tree attention (reference)" in " ".join(texts[1].err.split())
    assert "with tree attention" not in texts[0].err


def test_doctor_tests_a_model(model_folder: Path, run: Run) -> None:
    shown = run("doctor", "--model", model_folder, "--dtype", "float32")
    assert shown.code == 0
    for wanted in ("LlamaForCausalLM", "192 tokens", "tree: ", "rounding", "default method here",
                   "1.00x"):  # fmt: skip
        assert wanted in shown.out


def test_option_values_take_the_types_of_the_method() -> None:
    @dataclass(frozen=True)
    class Config:
        draft: str
        size: int | None = None
        share: float = 0.5
        greedy: bool = True
        name: str = "x"

    class Typed(RowDrafter):
        pass

    Typed.Config = Config
    register_drafter("typed", Typed)
    pairs = ("draft=x/y", "size=3", "share=0.25", "greedy=no", "name=7")
    wanted = {"draft": "x/y", "size": 3, "share": 0.25, "greedy": False, "name": "7"}
    assert method_options("typed", pairs) == wanted
    assert method_options("typed", ("draft=x", "size=none"))["size"] is None
    with pytest.raises(ConfigError, match="needs --option draft="):
        method_options("typed", pairs[1:])
    for pair in ("size=x", "share=x", "greedy=x", "other=1", "size"):
        with pytest.raises(ConfigError) as refused:
            method_options("typed", ("draft=x", pair))
        assert "--option" not in str(refused.value)  # an arm of a benchmark has none


def write_config(folder: Path, config: dict[str, object]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def bad_folders(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders that hold no decoder-only language model."""
    root = tmp_path_factory.mktemp("bad")
    bert = BertConfig(architectures=["BertForMaskedLM"]).to_dict()
    t5 = T5Config(architectures=["T5ForConditionalGeneration"]).to_dict()
    own_code = {"model_type": "mine", "auto_map": {"AutoConfig": "x.C"}}
    folders = {
        "BERT": write_config(root / "bert", bert),
        "T5": write_config(root / "t5", t5),
        "OWN_CODE": write_config(root / "own_code", own_code),
        "UNKNOWN": write_config(root / "unknown", {"model_type": "no_such_type"}),
        "EMPTY": root / "empty",
    }
    (root / "own_code" / "x.py").write_text("raise SystemExit('this code must never run')")
    folders["EMPTY"].mkdir()
    folders["BAD_JSON"] = write_config(root / "bad_json", {})
    (root / "bad_json" / "config.json").write_text("{")
    for name, victim in (("BAD_WEIGHTS", "model.safetensors"), ("NO_TOKENIZER", None)):
        folders[name] = shutil.copytree(model_folder, root / name)
        if victim is not None:
            (folders[name] / victim).write_bytes(b"no tensors here" * 4)
    for path in folders["NO_TOKENIZER"].glob("tokenizer*"):
        path.unlink()
    return folders


PROMPT = ("generate", "--model", "MODEL", "--prompt", "abc")
BAD_INPUT = [
    ((), "expected one of"),
    (("nonsense",), "unknown command 'nonsense'"),
    (("generate", "--optoin", "x"), "perhaps you meant --option"),
    ((*PROMPT, "--max-new-tokens", "x"), "--max-new-tokens: expected INT, got 'x'"),
    (("demo", "--threads", "x"), "--threads: expected INT, got 'x'"),
    ((*PROMPT, "--dtype", "int3"), "invalid choice 'int3'"),
    (("generate", "--model", "MODEL"), "give one of --prompt, --file and --chat, got none"),
    ((*PROMPT, "--file", "x"), "got --prompt and --file"),
    (("generate", "--prompt", ""), "--prompt is empty"),
    (("generate", "--file", "/no/such/file"), "cannot read --file /no/such/file: No such file"),
    (("generate", "--file", "/dev/null"), "is empty"),
    (("generate", "--model", "MODEL", "--chat"), "needs a tokenizer with a chat template"),
    ((*PROMPT, "--method", "nope"), "unknown method 'nope'; choose one of none,"),
    ((*PROMPT, "--method", "lookahead", "--option", "wndow=1"), "no option 'wndow'; it has window"),
    ((*PROMPT, "--method", "lookahead", "--option", "window=x"), "window must be a whole number"),
    (
        (*PROMPT, "--method", "lookahead", "--option", "ngram=1"),
        "ngram must be a whole number from 2",
    ),
    ((*PROMPT, "--method", "lookahead", "--option", "window"), "an option is NAME=VALUE"),
    ((*PROMPT, "--option", "window=1"), "needs --method"),
    ((*PROMPT, "--max-new-tokens", "0"), "--max-new-tokens must be at least 1, got 0"),
    ((*PROMPT, "--max-new-tokens", "900"), "--max-new-tokens must be at most 189, got 900"),
    ((*PROMPT, "--budget", "-1"), "--budget must be at least 0, got -1"),
    ((*PROMPT, "--sample", "--temperature", "0"), "--temperature must be above 0"),
    ((*PROMPT, "--sample", "--top-p", "1.5"), "--top-p must be above 0 and at most 1"),
    ((*PROMPT, "--sample", "--top-k", "-1"), "--top-k must be at least 0"),
    ((*PROMPT, "--seed", "1"), "--seed needs --sample"),
    ((*PROMPT, "--device", "nonsense"), "--device nonsense cannot be used"),
    (("generate", "--model", "MODEL", "--prompt", "a" * 192), "the prompt is too long: it has 192"),
    (("generate", "--prompt", "x", "--model", "/no/such/folder"), "there is no folder '/no/such"),
    (("generate", "--prompt", "x", "--model", ""), "the model's name is empty"),
    (("generate", "--prompt", "x", "--model", __file__), "is a file"),
    (("generate", "--prompt", "x", "--model", "EMPTY"), "there is no config.json in it"),
    (("generate", "--prompt", "x", "--model", "BERT"), "is not a causal language model (Bert"),
    (("generate", "--prompt", "x", "--model", "T5"), "is an encoder-decoder model (T5"),
    (("generate", "--prompt", "x", "--model", "OWN_CODE"), "its own code"),
    (("generate", "--prompt", "x", "--model", "UNKNOWN"), "cannot load"),
    (("generate", "--prompt", "x", "--model", "BAD_JSON"), "is not a valid JSON file"),
    (("generate", "--prompt", "x", "--model", "BAD_WEIGHTS"), "cannot load"),
    (("generate", "--prompt", "x", "--model", "NO_TOKENIZER"), "cannot load the tokenizer of"),
    (("doctor", "--model", "T5"), "is an encoder-decoder model"),
    (("doctor", "--device", "nonsense"), "--device nonsense cannot be used"),
    ((*PROMPT, "--kernels", "cuda"), "invalid choice 'cuda'"),
    ((*PROMPT, "--device", "cpu", "--kernels", "triton"), "kernels='triton' cannot run on cpu"),
    (("doctor", "--device", "cpu", "--kernels", "triton"), "kernels='triton' cannot run on cpu"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT, ids=lambda value: str(value)[:60])
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...],
    message: str,
    run: Run,
    model_folder: Path,
    bad_folders: dict[str, Path],
) -> None:
    folders = {**bad_folders, "MODEL": model_folder}
    failed = run(*(folders.get(argument, argument) for argument in arguments))
    assert failed.code == 2
    assert failed.out == ""
    assert failed.err.startswith("specdec: error: ")
    assert message in failed.err
    assert failed.err.count("\n") == 1


def test_a_hub_model_that_cannot_be_had(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, **how: object) -> None:
        assert how == {"local_files_only": False, "trust_remote_code": False}
        raise OSError(f"There is no\nrepository {name}.")

    monkeypatch.setattr("specdec.artifacts.hub.why_silent", lambda: None)
    monkeypatch.setattr("transformers.PreTrainedConfig.get_config_dict", refuse)
    failed = run("generate", "--prompt", "x", "--model", "owner/name")
    assert failed.code == 2
    assert failed.err == (
        "specdec: error: cannot load 'owner/name': There is no repository owner/name.\n"
    )


@pytest.mark.parametrize(("problem", "code"), [(KeyboardInterrupt, 130), (BrokenPipeError, 141)])
def test_interruptions_are_quiet(
    problem: type[BaseException], code: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(_: object) -> int:
        raise problem

    monkeypatch.setattr("specdec.cli.doctor.run_doctor", stop)
    stopped = run("doctor")
    assert (stopped.code, stopped.out, stopped.err) == (code, "", "")


def test_a_closed_pipe_is_quiet() -> None:
    """As in `specdec doctor | head -1`, with a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "specdec.cli", "doctor"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert (process.wait(timeout=120), errors) == (141, b"")


def test_warnings_are_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn(_: object) -> int:
        import warnings

        from specdec.errors import FallbackWarning

        for _ in range(2):
            warnings.warn("specdec: runs as\nplain generate", FallbackWarning, stacklevel=1)
        return 0

    monkeypatch.setattr("specdec.cli.doctor.run_doctor", warn)
    assert run("doctor").err == "specdec: warning: runs as plain generate\n"


def test_console_script_calls_main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"specdec": "specdec.cli.main:main"}
    assert callable(main)
