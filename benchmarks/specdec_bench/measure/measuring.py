"""Clocks around an answer, and the instrumented pass that is made apart from the timed ones."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from specdec.errors import SpecdecError
from specdec.hf.compat import input_device
from specdec.stats import RoundRecord
from specdec_bench.contracts import Arm, Unit, Workbench
from specdec_bench.measure.arms import GenerateArm
from specdec_bench.results.records import PassRecord, ViewRecord

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RAPL = Path("/sys/class/powercap")
_RESET_PEAK = "5"  # what Linux takes to mean: forget the highest resident size
ResultT = TypeVar("ResultT")


@dataclass(frozen=True, slots=True)
class Seconds:
    """How long something took.

    Attributes:
        wall: By the clock on the wall.
        cpu: Processor time of this process, over all its threads.
    """

    wall: float
    cpu: float


def timed(call: Callable[[], ResultT], device: torch.device) -> tuple[ResultT, Seconds]:
    """Runs `call` between clocks; waits for a GPU before and after."""
    settle(device)
    collects = gc.isenabled()
    gc.disable()  # a collection would hit whoever allocates next
    try:
        cpu, wall = time.process_time(), time.perf_counter()
        result = call()
        settle(device)
        taken = Seconds(time.perf_counter() - wall, time.process_time() - cpu)
    finally:
        if collects:
            gc.enable()
    return result, taken


def settle(device: torch.device) -> None:
    """Waits until a GPU has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class BurstWatch:
    """A streamer that notes when tokens come; those between two target forwards are one burst.

    Watches the model's forwards as well, while it is entered.
    """

    def __init__(self, model: Any, batch: int) -> None:
        self._model, self._batch = model, batch
        self.widths: list[int] = []
        """Tokens a row of every target forward, in order."""
        self.bursts: list[tuple[int, float]] = []
        """(tokens a row, when the first of them came) of every burst."""
        self._forwards_at_burst = -1
        self._prompt_seen = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[BurstWatch]:
        """Counts forwards for the length of a `with` block."""
        handle = self._model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        try:
            yield self
        finally:
            handle.remove()

    def _before_forward(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        ids = kwargs.get("inputs_embeds") if ids is None else ids
        self.widths.append(0 if ids is None else int(ids.shape[1]))

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt first, then tokens."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        tokens = value.numel() // self._batch
        if self._forwards_at_burst == len(self.widths):
            before, moment = self.bursts[-1]
            self.bursts[-1] = (before + tokens, moment)
            return
        self._forwards_at_burst = len(self.widths)
        self.bursts.append((tokens, time.perf_counter()))

    def end(self) -> None:
        """Nothing more comes."""


@dataclass
class Looked:
    """What the rounds of one answer looked like; the answer also warms up.

    Attributes:
        chain: All proposals were chains.
        rounds: Emitted tokens of the first row, round by round; the first is the prefill's.
    """

    chain: bool = True
    rounds: list[list[int]] = field(default_factory=list)

    def on_round(self, record: RoundRecord) -> None:
        """Takes a round."""
        self.rounds.append(list(record.tokens[0]))
        for tree in record.trees or ():
            self.chain &= all(parent == node - 1 for node, parent in enumerate(tree.parents))


def warm_up(arm: Arm, unit: Unit) -> tuple[list[list[int]], Looked]:
    """The untimed answer that comes before all others, with a look at the rounds."""
    looked = Looked()
    if isinstance(arm, GenerateArm) and arm.is_ours:
        return arm.answer(unit, on_round=looked.on_round), looked
    return arm.run(unit), looked


def instrumented(
    arm: Arm, unit: Unit, bench: Workbench, chain: bool, is_largest: bool = False
) -> PassRecord | None:
    """One answer with everything switched on that would disturb a timed one.

    Args:
        arm: Any arm; one that is neither ours nor Hugging Face's says itself what it measured, by
            a method `instrumented(unit)`.
        unit: What to answer.
        bench: The model.
        chain: What `warm_up` saw.
        is_largest: On a CPU the peak of memory is measured, in one more answer.

    Returns:
        None for an arm that cannot be looked into.
    """
    if not isinstance(arm, GenerateArm):
        own = getattr(arm, "instrumented", None)
        found: PassRecord | None = None if own is None else own(unit)
        mine = (unit.record.setting, unit.record.unit, arm.name)
        if found is not None and (found.setting, found.unit, found.arm) != mine:
            raise SpecdecError("looked into another answer than the one it was asked about")
        return found
    device, batch = input_device(bench.model), bench.setting.batch
    watch, energy, memory = BurstWatch(bench.model, batch), EnergyMeter(device), PeakMemory(device)
    on_cpu = device.type == "cpu"
    settle(device)
    with watch.watching():
        if not on_cpu:
            memory.start()
        energy.start()
        start = time.perf_counter()
        arm.answer(unit, streamer=watch)
        settle(device)
        seconds = time.perf_counter() - start
        joules, peak = energy.stop(), memory.stop()
    if on_cpu and is_largest:
        peak = _peak_of_another(arm, unit, memory)
    times = [moment for _, moment in watch.bursts]
    first = times[0] - start if times else seconds
    counted = _counted(arm, watch, batch)
    return PassRecord(
        setting=unit.record.setting,
        unit=unit.record.unit,
        arm=arm.name,
        histogram={str(n): times for n, times in sorted(counted.histogram.items())},
        rounds=counted.rounds,
        drafted=counted.drafted,
        chain=chain,
        stages={"prefill": first, **counted.stages} if counted.stages else {},
        seconds=seconds,
        first_token=first,
        gaps=_gaps(watch.bursts),
        peak_bytes=peak,
        joules=joules,
        sizes={str(q): n for q, n in sorted(counted.sizes.items())},
        first_tokens=watch.bursts[0][0] if watch.bursts else 1,
    )


def _peak_of_another(arm: GenerateArm, unit: Unit, memory: PeakMemory) -> int | None:
    """Peak of an answer without clocks: one that has to ask for all its memory anew is slower."""
    memory.start()
    arm.answer(unit)
    return memory.stop()


def _gaps(bursts: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Tokens of every burst after the first, and the seconds since the one before."""
    pairs = zip(bursts[1:], bursts, strict=False)
    return [(tokens, moment - earlier) for (tokens, moment), (_, earlier) in pairs]


@dataclass
class _Counted:
    histogram: Counter[int]
    rounds: int
    drafted: int
    stages: dict[str, float]
    sizes: Counter[int]


def _counted(arm: GenerateArm, watch: BurstWatch, batch: int) -> _Counted:
    """Rounds and proposals: from our loop's own count, or from what Hugging Face's emitted."""
    stats = arm.stats
    if stats is not None:
        sizes = Counter(watch.widths[stats.prefill_forwards :])
        return _Counted(
            stats.histogram, stats.rounds, stats.drafted_nodes, dict(stats.seconds), sizes
        )
    widths = watch.widths[1:]  # the first forward holds the prompt
    histogram: Counter[int] = Counter()
    if arm.counts_rounds:
        histogram.update({n: batch * t for n, t in Counter(b for b, _ in watch.bursts[1:]).items()})
    drafted = batch * sum(width - 1 for width in widths)
    return _Counted(histogram, len(widths), drafted, {}, Counter(widths))


def view(unit: Unit, arm: str, looked: Looked, tokenizer: Any) -> ViewRecord:
    """One answer of the first row as text, round by round."""
    prompt = tokenizer.decode(list(unit.prompt_ids[0]), skip_special_tokens=False)
    shown, ids = "", []
    rounds = []
    for tokens in looked.rounds:
        pieces = []
        for token in tokens:
            ids.append(token)
            text = tokenizer.decode(ids)
            # A character may need several tokens; it stands with the last of them.
            whole = text if not text.endswith("\ufffd") else text.rstrip("\ufffd")
            pieces.append(whole[len(shown) :] if whole.startswith(shown) else "")
            shown = whole if whole.startswith(shown) else shown
        rounds.append(pieces)
    return ViewRecord(unit.record.setting, unit.record.unit, arm, prompt, rounds)


class PeakMemory:
    """Highest memory above that before; None where it cannot be known.

    On a GPU what torch allocates. On a CPU the resident size of the process, whose peak Linux
    resets. What the heap keeps of earlier answers is given back to the system first: the answer
    would fill that again, and the resident size would not grow. That needs glibc.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before: int | None = None

    def start(self) -> None:
        """Begins."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before = torch.cuda.memory_allocated(self._device)
            return
        self._before = None
        if self._device.type != "cpu" or not _give_heap_back():
            return
        try:
            _CLEAR.write_text(_RESET_PEAK)
        except OSError:
            return
        self._before = _status_bytes("VmRSS")

    def stop(self) -> int | None:
        """Bytes."""
        if self._before is None:
            return None
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_allocated(self._device)) - self._before
        peak = _status_bytes("VmHWM")
        return None if peak is None else max(peak - self._before, 0)


def _give_heap_back() -> bool:
    """Returns free heap to the system; False where the C library has no call for it."""
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return False
    trim(0)  # 0 when there was nothing to give
    return True


def _status_bytes(name: str) -> int | None:
    """A line of the process's status, which Linux gives in kB."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    found = next((line.split() for line in lines if line.startswith(f"{name}:")), None)
    return None if found is None or len(found) < 2 else int(found[1]) * 1024


class EnergyMeter:
    """Joules between start and stop: of the GPU by NVML, else of the processors by RAPL.

    Both count everything that ran meanwhile. `source` says which; None where neither can be read.
    """

    def __init__(self, device: torch.device) -> None:
        self._read: Callable[[], Sequence[tuple[float, float]]] | None = None
        self.source: str | None = None
        if device.type == "cuda":
            self._read = _nvml_counter(device)
            self.source = "nvml" if self._read is not None else None
        elif _rapl_values():
            self._read, self.source = _rapl_values, "rapl"
        self._before: Sequence[tuple[float, float]] = ()

    def start(self) -> None:
        """Begins."""
        self._before = self._read() if self._read is not None else ()

    def stop(self) -> float | None:
        """Joules."""
        after = self._read() if self._read is not None else ()
        if not after or len(after) != len(self._before):
            return None
        total = 0.0
        for (now, span), (then, _) in zip(after, self._before, strict=True):
            total += now - then + (span if now < then else 0.0)  # the counter began anew
        return total


def _rapl_values() -> list[tuple[float, float]]:
    """(joules, joules at which it begins anew) of every processor package; empty if unreadable."""
    found = []
    try:
        for zone in sorted(_RAPL.glob("intel-rapl:*")):
            if zone.name.count(":") == 1:  # subzones are part of their package
                energy = int((zone / "energy_uj").read_text())
                span = int((zone / "max_energy_range_uj").read_text())
                found.append((energy / 1e6, span / 1e6))
    except (OSError, ValueError):
        return []
    return found


def _nvml_counter(device: torch.device) -> Callable[[], Sequence[tuple[float, float]]] | None:
    """Reads the energy counter of a GPU; None without NVML's Python package or the counter."""
    try:
        import pynvml  # type: ignore[import-not-found,import-untyped,unused-ignore]

        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except Exception:  # noqa: BLE001 - a missing or old driver raises types of its own
        return None
    return lambda: [(pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, 0.0)]
