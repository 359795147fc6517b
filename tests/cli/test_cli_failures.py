"""Odd input, odd streams and odd model folders: one line and an exit code, never a traceback."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from specdec.cli.options import DemoOptions, DoctorOptions, GenerateOptions, check_ranges
from specdec.errors import ConfigError

ROOT = Path(__file__).parents[2]
Run = Callable[..., SimpleNamespace]
LONG = "a" * 5000
QUICK = ("--method", "none", "--max-new-tokens", "8")


def assert_one_line(failed: SimpleNamespace, message: str) -> None:
    assert failed.code == 2
    assert failed.err.startswith("specdec: error: ")
    assert message in failed.err
    assert failed.err.count("\n") == 1
    assert len(failed.err) < 600


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "--prompt", "a\udcff"), "--prompt is not UTF-8 text"),
        (("generate", "--file", LONG), "File name too long"),
        (("generate", "--prompt", "x", "--model", LONG), "File name too long"),
        (("doctor", "--model", "/" + LONG), "File name too long"),
        (("doctor", "--model", "~nosuchuser/x"), "cannot look for the model '~nosuchuser/x'"),
        (("doctor", "--model", "a\udcff"), "surrogates not allowed"),
        ((LONG,), "choose one of demo"),
        (("demo", "--seed", "9" * 20), "--seed must be at most 18446744073709551615"),
        (("generate", "--prompt", "x", "--sample", "--seed", "9" * 20), "--seed must be at most"),
        (("generate", "--prompt", "x", "--budget", "9" * 20), "--budget must be at most"),
        (("demo", "--threads", "9" * 9), "--threads must be at most 1024"),
        (("demo", "--device", "meta"), "--device meta cannot be used"),
        (("doctor", "--device", "meta:0"), "--device meta cannot be used"),
        (("generate", "--prompt", "x", "--device", "meta"), "--device meta cannot be used"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_odd_arguments(arguments: tuple[str, ...], message: str, run: Run) -> None:
    failed = run(*arguments)
    assert failed.out == ""
    assert_one_line(failed, message)


def test_the_largest_seed_is_taken(model_folder: Path, run: Run) -> None:
    arguments = ("generate", "--model", model_folder, "--prompt", "x", "--sample", *QUICK)
    assert run(*arguments, "--seed", 2**64 - 1).code == 0


@pytest.mark.parametrize("source", [("--file", "-"), ("--chat",)])
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_binary_on_standard_input(
    source: tuple[str, ...],
    errors: str,
    chat_folder: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Python is lenient about it under LC_ALL=C, and not elsewhere."""
    binary = io.TextIOWrapper(io.BytesIO(b"\x80\xff\n"), "utf-8", errors)
    monkeypatch.setattr(sys, "stdin", binary)
    assert_one_line(run("generate", "--model", chat_folder, *source, *QUICK), "UTF-8 text")


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_standard_input_is_utf8_in_every_locale(
    encoding: str, model_folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("generate", "--model", model_folder, *QUICK)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("é€".encode()), encoding))
    from_stdin = run(*common, "--file", "-")
    assert from_stdin.code == 0
    assert from_stdin.out == run(*common, "--prompt", "é€").out


@pytest.mark.parametrize("source", [("--file", "-"), ("--chat",)])
def test_closed_standard_input(
    source: tuple[str, ...], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert_one_line(run("generate", *source), "standard input, which is closed")


@pytest.mark.parametrize("arguments", [("doctor",), ("--help",), ("--version",)])
def test_closed_standard_output(
    arguments: tuple[str, ...], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert_one_line(run(*arguments), "standard output is closed")


def test_closed_standard_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What belongs there must not end up in the text."""
    monkeypatch.setattr(sys, "stderr", None)
    failed = run("nonsense")
    assert (failed.code, failed.out) == (2, "")


class FullDisk(io.StringIO):
    """Fails as /dev/full does."""

    def write(self, _: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("command", ["doctor", "--help", "--version", "generate"])
@pytest.mark.fault
def test_a_full_disk(
    command: str, model_folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = ("--model", model_folder, "--prompt", "x", *QUICK) if command == "generate" else ()
    monkeypatch.setattr(sys, "stdout", FullDisk())
    assert_one_line(run(command, *more), "cannot write the output: No space left on device")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.fault
def test_a_full_disk_at_the_end() -> None:
    """What was buffered meets the full disk in the last flush, or when Python exits."""
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "specdec.cli", "--version"],
            cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False, timeout=120,
        )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.endswith("specdec: error: cannot write the output: "
                                "No space left on device\n")  # fmt: skip
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}",
        "{{ raise_exception('system role first') }}",
        "{{ messages[0].nothing.at.all }}",
        "{{ 'a' * (10 ** 30) }}",
        "{{ 1 // 0 }}",
        "{{ [1] + 'a' }}",
    ],
)
def test_a_broken_chat_template(
    template: str, chat_folder: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(chat_folder, tmp_path / "model")
    (folder / "chat_template.jinja").write_text(template)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n"))
    failed = run("generate", "--model", folder, "--chat", *QUICK)
    assert_one_line(failed, "the chat template of ")


@pytest.fixture
def with_settings(model_folder: Path, tmp_path: Path) -> Callable[..., Path]:
    """The tiny model with other generation settings."""

    def write(**settings: object) -> Path:
        folder = shutil.copytree(model_folder, tmp_path / "model")
        path = folder / "generation_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
        return folder

    return write


@pytest.mark.parametrize("method", ["none", "prompt_lookup"])
def test_settings_that_return_a_dictionary(
    method: str, model_folder: Path, with_settings: Callable[..., Path], run: Run
) -> None:
    folder = with_settings(return_dict_in_generate=True, output_scores=True)
    more = ("--prompt", "abcabc", "--max-new-tokens", 8, "--method", method)
    made = run("generate", "--model", folder, *more)
    assert (made.code, made.err) == (0, "")
    assert made.out == run("generate", "--model", model_folder, *more).out


@pytest.mark.parametrize("method", ["none", "prompt_lookup"])
def test_stop_strings_of_the_model(
    method: str, model_folder: Path, with_settings: Callable[..., Path], run: Run
) -> None:
    more = ("--prompt", "abcabc", "--max-new-tokens", 24, "--method", method)
    whole = run("generate", "--model", model_folder, *more).out.rstrip("\n")
    stop = next(c for c in whole[3:] if c.isascii() and c.isprintable() and not c.isspace())
    made = run("generate", "--model", with_settings(stop_strings=[stop]), *more)
    assert (made.code, made.err) == (0, "")
    assert made.out.rstrip("\n") == whole[: whole.index(stop) + 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eos_token_id": "abc"}, "eos_token_id of "),
        ({"eos_token_id": [1, "abc"]}, "must be a token id or a list of them, got [1, 'abc']"),
        ({"forced_eos_token_id": 99999}, "must be a token id below 257, got 99999"),
        ({"forced_bos_token_id": -7}, "must be a token id below 257, got -7"),
        ({"sequence_bias": [[[99999], 1.0]]}, "tokens were being biased: [99999]"),
        ({"num_beams": 2}, "num_beams"),
        ({"num_beams": "x"}, ""),
        ({"repetition_penalty": "x"}, ""),
        ({"bad_words_ids": "abc"}, ""),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["none", "prompt_lookup"])
def test_settings_that_generate_fails_on(
    method: str,
    settings: dict[str, object],
    message: str,
    with_settings: Callable[..., Path],
    run: Run,
) -> None:
    failed = run(
        "generate", "--model", with_settings(**settings), "--prompt", "abc",
        "--max-new-tokens", 8, "--method", method,
    )  # fmt: skip
    errors = [line for line in failed.err.splitlines(True) if "specdec: warning: " not in line]
    assert_one_line(SimpleNamespace(code=failed.code, err="".join(errors)), message)


@pytest.mark.parametrize(
    ("problem", "code", "line"),
    [
        (
            ZeroDivisionError("one\ntwo"),
            1,
            "unexpected ZeroDivisionError: one (this is a bug, please report it)",
        ),
        (AssertionError(), 1, "unexpected AssertionError:  (this is a bug, please report it)"),
        (MemoryError(), 2, "out of memory"),
        (OSError(errno.ENOSPC, "Full"), 2, "cannot write the output: Full"),
    ],
    ids=repr,
)
def test_the_last_resort(
    problem: Exception, code: int, line: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: object) -> int:
        raise problem

    monkeypatch.setattr("specdec.cli.doctor.run_doctor", fail)
    failed = run("doctor")
    line = " ".join(line.split())
    assert (failed.code, failed.out, failed.err) == (code, "", f"specdec: error: {line}\n")


@pytest.mark.parametrize("module", ["tyro", "specdec.cli.options", "specdec.cli.doctor"])
def test_ctrl_c_during_imports(module: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupt:
        def find_spec(self, name: str, *_: object) -> None:
            if name == module:
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Interrupt(), *sys.meta_path])
    stopped = run("doctor")
    assert (stopped.code, stopped.out, stopped.err) == (130, "", "")


_SWALLOWING = """
import os, signal, sys, time
from specdec.cli.main import main

class Swallow:
    def find_spec(self, name, *_):
        if name == "specdec.cli.doctor":
            try:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(5)
            except KeyboardInterrupt:
                raise ModuleNotFoundError("are your requirements defined correctly?") from None

signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in the background
sys.meta_path.insert(0, Swallow())
sys.exit(main(["doctor"]))
"""


def test_ctrl_c_that_a_library_swallows() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _SWALLOWING], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_an_error_that_leads_to_itself(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a library wraps our error in its own, and we take ours out again."""

    def fail(_: object) -> int:
        ours = ConfigError("no rows")
        try:
            raise ValueError("theirs") from ours
        except ValueError:
            raise ours from None

    monkeypatch.setattr("specdec.cli.doctor.run_doctor", fail)
    failed = run("doctor")
    assert (failed.code, failed.err) == (2, "specdec: error: no rows\n")


def test_ranges_hold_for_the_defaults() -> None:
    for options in (DemoOptions(), GenerateOptions(), DoctorOptions()):
        check_ranges(options)
