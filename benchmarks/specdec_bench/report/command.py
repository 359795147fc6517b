"""`specdec bench report`: from a result file to a page and Markdown."""

from __future__ import annotations

from specdec.artifacts.atomic_files import make_folder, replace_file
from specdec.artifacts.terminal import say_next
from specdec.errors import ConfigError, SpecdecError
from specdec_bench.report.headline import stamps
from specdec_bench.report.options import ReportOptions
from specdec_bench.report.page import markdown, page
from specdec_bench.results.files import read_results
from specdec_bench.summary.summarize import summarize


def run_report(options: ReportOptions) -> int:
    """Writes the report and says where it is.

    Args:
        options: What to read, and where to write.

    Returns:
        Exit code: 0; a report on wrong texts is a good report.

    Raises:
        SpecdecError: The results cannot be read or are not whole, or the folder not written.
    """
    source = options.results.expanduser()
    results = read_results(source)
    summary = summarize(results)
    if not summary.settings:
        raise SpecdecError(f"{source} has no units, so there is nothing to report")
    folder = (options.output or source.with_name(f"{source.stem}-report")).expanduser()
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--output {folder} is a file; give a folder")
    files = {"report.html": page(summary), "report.md": markdown(summary)}
    # A token may hold half of a surrogate pair, which no encoding can write.
    content = {name: text.encode("utf-8", "replace") for name, text in files.items()}
    try:
        make_folder(folder)
        for name, data in content.items():
            replace_file(folder / name, data)
    except OSError as problem:
        raise SpecdecError(f"cannot write {folder}: {problem.strerror or problem}") from problem
    for _, words, _ in stamps(summary):
        print(f"warning: {words}")
    print(f"{folder / 'report.html'}: open it in a browser")
    print("beside it: report.md")
    target = results.header.config.get("target", "demo")
    say_next(
        "choose a method and its sizes for this device",
        *("bench", "tune", "--target", target, "--output", source.with_name("tuned.json")),
    )
    return 0
