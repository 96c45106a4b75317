"""The pool that outputs come from: reused, never shared, bounded by what was once in use."""

from __future__ import annotations

import copy
import gc
import pickle
import platform
import subprocess
import sys
import threading

import pytest
import torch

from rarefy import SparseLinear
from rarefy.ops import library, memory

pytestmark = pytest.mark.skipif(not library.isas(), reason="the native kernels are not built")

ROWS, COLS = 1024, 512
BYTES = ROWS * COLS * 4


@pytest.fixture(autouse=True)
def _empty_pool():
    gc.collect()
    memory.release()
    yield
    memory.release()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_output_is_an_ordinary_tensor(dtype):
    tensor = memory.empty(ROWS, 2 * COLS, dtype)
    assert (tensor.shape, tensor.dtype, tensor.device.type) == ((ROWS, 2 * COLS), dtype, "cpu")
    assert tensor.is_contiguous() and tensor.data_ptr() % 64 == 0
    tensor.fill_(3)
    for twin in (copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor)), tensor.clone()):
        assert torch.equal(twin, tensor) and twin.data_ptr() != tensor.data_ptr()


def test_memory_in_use_is_never_given_out_again():
    alive = [memory.empty(ROWS, COLS).fill_(number) for number in range(5)]
    assert len({tensor.data_ptr() for tensor in alive}) == 5
    assert all(bool((tensor == number).all()) for number, tensor in enumerate(alive))


def test_a_view_keeps_its_memory():
    view = memory.empty(ROWS, COLS).fill_(7)[3:5]
    other = memory.empty(ROWS, COLS).fill_(8)
    assert bool((view == 7).all()) and bool((other == 8).all())


def test_freed_memory_serves_the_next_request_of_about_its_size():
    tensor = memory.empty(ROWS, COLS)
    place = tensor.data_ptr()
    del tensor
    assert memory.kept_bytes() >= BYTES
    assert memory.empty(ROWS, COLS - 8).data_ptr() == place
    kept = memory.empty(ROWS, COLS)
    del kept
    assert memory.empty(ROWS * 16, COLS).data_ptr() != place  # too small for that one


def test_no_more_is_kept_than_was_once_in_use():
    for size in range(1, 40):
        memory.empty(ROWS, size * COLS)  # one at a time, each larger: no block fits the next
    assert memory.kept_bytes() <= 39 * BYTES + (16 << 20) + (2 << 20)


def test_release_leaves_what_is_in_use():
    tensor = memory.empty(ROWS, COLS).fill_(5)
    memory.empty(ROWS, 4 * COLS)
    memory.release()
    assert memory.kept_bytes() == 0
    assert bool((tensor == 5).all())


def test_small_tensors_come_from_torch():
    memory.empty(8, 8)
    assert memory.kept_bytes() == 0


def test_threads_share_the_pool():
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(50):
            if not bool((memory.empty(ROWS, COLS).fill_(number) == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_layers_output_is_reused_from_step_to_step():
    layer = SparseLinear(64, 512, density=0.1)
    x = torch.randn(2048, 64)
    places = {layer(x).data_ptr() for _ in range(4)}
    assert len(places) == 1


FAULTS_AGAIN = """
import resource
import torch
from rarefy.ops import memory
{wish}
def use():
    return [torch.empty(1 << 19).fill_(1) for _ in range(16)]
for _ in range(3):
    use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told what to keep")
def test_what_a_step_frees_serves_the_next_one():
    def faults(wish: str) -> int:
        code = FAULTS_AGAIN.format(wish=wish)
        return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)

    pages = 5 * 16 * 2 * 512  # of what is used, 4 KiB each
    if faults("") < pages // 100:
        pytest.skip("here glibc keeps it by itself, or the system's pages are large")
    assert faults("memory.keep_freed()") < pages // 100
