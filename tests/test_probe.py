"""The probe of the machine's ceilings: that the work is done, counted, and timed as it says. No figure is asserted."""

from __future__ import annotations

import ctypes

import pytest
import torch

from rarefy import ops, probe
from rarefy.ops import library

ISAS = library.isas()
NO_ISA, BAD_ARGUMENT = -4, -1

needs_kernels = pytest.mark.skipif(not ISAS, reason="no compiled kernels")


def call(work: int, data: torch.Tensor | None = None, repeats: int = 1, threads: int = 1) -> int:
    loaded = library.load()
    assert isinstance(loaded, ctypes.CDLL)
    where = (None, 0) if data is None else (data.data_ptr(), data.numel() * 4)
    return loaded.rarefy_probe(work, *where, repeats, threads)


@needs_kernels
@pytest.mark.parametrize("isa", ISAS)
def test_work_counts_repeats_and_threads(isa):
    with ops.using(isa):
        for work in (probe.FMA_F32, probe.DOT_BF16, probe.TILES_BF16):
            one = call(work)
            if one == NO_ISA:
                assert work != probe.FMA_F32
                assert call(work, repeats=2, threads=2) == NO_ISA
            else:
                assert one > 0 and call(work, repeats=3, threads=2) == 6 * one


@needs_kernels
@pytest.mark.parametrize("isa", [isa for isa in ISAS if probe.vectors(isa) != "avx512"])
def test_bf16_products_belong_to_avx512(isa):
    with ops.using(isa):
        assert call(probe.DOT_BF16) == call(probe.TILES_BF16) == NO_ISA


@needs_kernels
def test_tiles_leave_onednn_its_own():
    # oneDNN remembers the tile configuration that it loaded; a probe in between must not take it away.
    x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    before = x.bfloat16() @ x.bfloat16()
    call(probe.TILES_BF16, threads=torch.get_num_threads())
    assert torch.equal(x.bfloat16() @ x.bfloat16(), before)


@needs_kernels
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_copy_copies_each_thread_its_part_and_nothing_beside(isa, threads):
    count = 12345
    data = torch.arange(count + 64, dtype=torch.float32)
    with ops.using(isa):
        moved = call(probe.COPY, data[:count], threads=threads)
    part = moved // 4 // threads
    assert 0 < part * threads <= count
    for thread in range(threads):
        near, far = data[thread * part : (thread + 1) * part].view(2, -1)
        assert torch.equal(near, far) and near[0] == thread * part
    assert torch.equal(data[threads * part :], torch.arange(threads * part, count + 64, dtype=torch.float32))


@needs_kernels
def test_reading_changes_nothing_and_counts_bytes():
    data = torch.arange(1 << 14, dtype=torch.float32)
    assert call(probe.READ, data, repeats=5, threads=2) == 5 * data.numel() * 4
    assert torch.equal(data, torch.arange(1 << 14, dtype=torch.float32))
    assert call(probe.READ, data[:3]) == 0  # too little to read at all


@needs_kernels
def test_nonsense_is_refused():
    assert call(99) == BAD_ARGUMENT
    assert call(probe.FMA_F32, repeats=-1) == BAD_ARGUMENT
    loaded = library.load()
    assert isinstance(loaded, ctypes.CDLL)
    assert loaded.rarefy_probe(probe.READ, None, 64, 1, 1) == BAD_ARGUMENT


class Machine:
    """Does `work` at a rate per second and thread, and keeps the time itself.

    Args:
        hiccups: seconds lost, by number of the call.
        meeting_s: what every call of several threads loses.
    """

    def __init__(self, per_s: float, hiccups: dict[int, float] | None = None, meeting_s: float = 0.0) -> None:
        self.now, self.per_s, self.hiccups, self.meeting_s = 0.0, per_s, hiccups or {}, meeting_s
        self.calls: list[tuple[int, int, int]] = []

    def clock(self) -> float:
        return self.now

    def call(self, work: int, data: int | None, size: int, repeats: int, threads: int) -> int:
        self.now += repeats * 1000 / self.per_s + self.hiccups.get(len(self.calls), 0.0)
        self.now += self.meeting_s if threads > 1 else 0.0
        self.calls.append((size, repeats, threads))
        return repeats * 1000 * threads


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


@pytest.mark.parametrize("hiccups", [{}, {0: 1.0, 2: 1.0}])  # waits that make short work look long
def test_a_rate_is_the_median_of_readings_long_enough(two_threads, hiccups):
    machine = Machine(5e9, hiccups)
    assert probe.rate(probe.FMA_F32, seconds=0.1, clock=machine.clock, call=machine.call) == pytest.approx(10.0)
    readings = [call for call in machine.calls if call[2] == 2]
    assert len(readings) > 10 and all(
        probe.LAP_S <= repeats * 1000 / 5e9 < 2 * probe.LAP_S for _, repeats, _ in readings
    )
    slow = Machine(1000 / probe.LAP_S / 10)  # one repeat fills ten readings: three of them are enough
    probe.rate(probe.FMA_F32, seconds=0.01, clock=slow.clock, call=slow.call)
    assert len(slow.calls) == 3 + 3


def test_threads_that_wait_for_each_other_do_not_pass_for_work(two_threads):
    # Cores are taken: whenever threads meet they lose as long as a reading should take.
    machine = Machine(5e9, meeting_s=probe.LAP_S)
    found = probe.rate(probe.FMA_F32, seconds=0.1, clock=machine.clock, call=machine.call)
    assert found is not None and 5.0 <= found < 10.0


def test_one_thread_alone_gets_its_part_of_the_working_set(two_threads):
    machine, data = Machine(5e9), torch.zeros(256)
    probe.rate(probe.READ, data, seconds=0.0, clock=machine.clock, call=machine.call)
    assert {(size, threads) for size, _, threads in machine.calls} == {(512, 1), (1024, 2)}


def test_what_a_cpu_lacks_has_no_rate():
    assert probe.rate(probe.TILES_BF16, seconds=1.0, call=lambda *_: NO_ISA) is None


@needs_kernels
def test_measure_names_each_instruction_set_and_leaves_the_choice(monkeypatch):
    monkeypatch.setattr(probe, "MEMORY_BYTES", 1 << 20)
    monkeypatch.setattr(probe, "LAP_S", 0.0)
    before = library.isa()
    found = probe.measure(ISAS, seconds=0.0)
    assert list(found.fp32) == [isa for isa in ISAS if isa == probe.vectors(isa)] and library.isa() == before
    readings = found.readings()
    assert {"l2 read", "l2 copy", "memory read", "memory copy"} <= readings.keys()
    assert all(rate > 0 for rate in readings.values())
    assert (found.bf16_dot is not None) == ("avx512_bf16" in probe.cpu_flags() and "avx512" in ISAS)


def test_without_the_library_nothing_is_measured(monkeypatch):
    monkeypatch.setattr(library, "load", lambda: "no compiler")
    assert probe.measure(["avx2"], seconds=0.0).readings() == {}
    assert probe.rate(probe.FMA_F32, seconds=0.0) is None


@pytest.mark.parametrize(
    "held, wanted",
    [(None, "avx512"), ("AVX512", "avx512"), ("AVX2", "avx2"), ("avx2", "avx2"), ("SSE4_2", "portable")],
)
def test_dense_is_taken_to_be_as_fast_as_mkl_may_be(monkeypatch, held, wanted):
    monkeypatch.setattr(library, "isas", lambda: ["avx512", "avx2", "portable"])
    monkeypatch.delenv("MKL_ENABLE_INSTRUCTIONS", raising=False)
    if held is not None:
        monkeypatch.setenv("MKL_ENABLE_INSTRUCTIONS", held)
    assert probe.dense_isa() == wanted


def test_the_second_cache_has_a_size():
    assert 1 << 16 <= probe.l2_bytes() <= 1 << 28
