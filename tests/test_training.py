"""The loop and its parts: twins, schedules, clocks, logs, checkpoints, and what happens when something goes wrong."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

import rarefy
from rarefy.files import DiskFull
from rarefy.nn import SparseLinear
from rarefy.recipes import settle
from rarefy.recipes.text import TextTask
from rarefy.recipes.text.networks import make_dense, make_sparse, text_loss
from rarefy.recipes.text.task import batches
from rarefy.training.batches import Batches, Windows
from rarefy.training.calibrate import Trial, steps_within, try_out
from rarefy.training.checkpoint import latest, load_checkpoint, save_checkpoint
from rarefy.training.data import load_corpus
from rarefy.training.folder import choose_folder
from rarefy.training.interrupt import Interrupted, StopRequest
from rarefy.training.log import MetricsLog, cut_log
from rarefy.training.loop import Loop, LoopSettings
from rarefy.training.twin import Diverged, StepResult, Twin
from tiny import make_twins, one_thread, records, settings, write_text

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return write_text(tmp_path / "text.txt")


class Watched:
    """Looks on and remembers; `then` is called after every step."""

    def __init__(self, then=None) -> None:
        self.steps: list[tuple[str, int]] = []
        self.then = then

    def stepped(self, twin: Twin, result: StepResult) -> None:
        self.steps.append((twin.name, twin.step))
        if self.then is not None:
            self.then(twin)

    def evaluated(self, twin: Twin, loss: float) -> None: ...


class Spy:
    """Batches that remember who asked for which bytes."""

    def __init__(self, data: Batches) -> None:
        self.data = data
        self.seen: dict[tuple[int, int], list[torch.Tensor]] = {}

    def at(self, step: int, micro: int = 0):
        inputs, targets = self.data.at(step, micro)
        self.seen.setdefault((step, micro), []).append(inputs)
        return inputs, targets


def make_loop(
    tmp_path: Path, text: Path, log: MetricsLog, watcher=None, *, spy=None, checkpoint_s=1e9, **changes
) -> Loop:
    given = settings(text, **changes).settled(12)
    data, windows = batches(given, load_corpus(str(text)))
    twins = make_twins(given, given.plan)
    loop_settings = LoopSettings(
        steps=12, warmup=2, eval_interval=5, tokens_per_step=given.tokens_per_step, accumulate=given.accumulate,
        slice_steps=3, checkpoint_s=checkpoint_s,
    )  # fmt: skip
    return Loop(
        twins=twins,
        train_data=data if spy is None else spy(data),
        valid_data=windows,
        settings=loop_settings,
        flops_per_token=lambda twin: {"sparse": 10, "dense": 100}[twin.name],
        folder=tmp_path,
        log=log,
        watcher=watcher or Watched(),
    )


# -- schedules and calibration -----------------------------------------------------------------------------------------


def test_the_rate_rises_then_falls_to_a_tenth():
    loop = LoopSettings(steps=100, warmup=10, eval_interval=1, tokens_per_step=1)
    rates = [loop.rate(step) for step in range(1, 101)]
    assert rates[:10] == pytest.approx([n / 10 for n in range(1, 11)])
    assert all(a > b for a, b in itertools.pairwise(rates[9:]))
    assert rates[54] == pytest.approx(0.55)  # half way between 10 and 100: the middle of 1 and 0.1
    assert rates[-1] == pytest.approx(0.1)


def test_as_many_steps_as_fit_into_the_time():
    sparse = Trial(step_s=0.1, rewire_s=0.5, eval_s=1.0, training_bytes={})
    dense = Trial(step_s=0.3, rewire_s=0.0, eval_s=2.0, training_bytes={})
    steps = steps_within(100, [sparse, dense], evaluations=lambda steps: 4, rewires=lambda steps: steps // 10)

    def spent(steps: int) -> float:
        return steps * 0.4 + 0.5 * (steps // 10) + 4 * 3.0

    assert spent(steps) <= 99 < spent(steps + 1)
    assert steps_within(1, [dense], evaluations=lambda steps: 4, rewires=lambda steps: 0) == 1


def test_a_density_that_moves_is_averaged_over_its_schedule(text):
    first = Trial(step_s=0.5, rewire_s=0.2, eval_s=2.0, training_bytes={"values": 9})
    last = Trial(step_s=0.1, rewire_s=0.0, eval_s=1.0, training_bytes={"values": 1})
    mean = first.mixed(last, 0.75)
    assert (mean.step_s, mean.rewire_s, mean.eval_s) == pytest.approx((0.2, 0.05, 1.25))
    assert mean.training_bytes == {"values": 9}
    # Until 75% of the run a straight line is on average half way down, a cubic three quarters; then both are there.
    straight = rarefy.Plan(density=rarefy.Linear(0.5, 0.1))
    assert settle._share_of_end(straight, 1000) == pytest.approx(0.75 / 2 + 0.25, abs=0.01)
    assert settle._share_of_end(rarefy.Plan(density=0.1, method=rarefy.GMP()), 1000) == pytest.approx(
        0.75 * 0.75 + 0.25, abs=0.01
    )
    assert settle._share_of_end(rarefy.Plan(density=0.1, method=rarefy.GMP(end=500)), 1000) == pytest.approx(
        0.5 * 0.75 + 0.5, abs=0.01
    )
    assert settle._share_of_end(rarefy.Plan(density=0.1), 1000) == 0
    given = settings(text, method="granet")
    assert set(settle._trial_makers(TextTask(given), [])) == {"sparse", "dense"}
    makers = settle._trial_makers(TextTask(dataclasses.replace(given, steps=None)), [])
    assert set(makers) == {"sparse", settle.AT_END, "dense"}
    assert makers["sparse"]().density == pytest.approx(0.5, abs=1e-3)
    at_end = makers[settle.AT_END]()
    assert at_end.density == pytest.approx(0.1, abs=1e-3)
    data, _ = batches(given, load_corpus(str(text)))
    for _ in range(4):
        at_end.train_step(data, accumulate=1, rate=0.1)
    assert at_end.density == pytest.approx(0.1, abs=1e-3)


def test_a_method_by_name_keeps_only_what_the_old_one_was_given(text):
    plan = rarefy.Plan(density=0.1, method=rarefy.RigL(end=30))
    chosen = dataclasses.replace(settings(text), plan=plan, method="granet").folded_plan().method
    assert chosen == rarefy.GraNet(end=30)


def test_a_trial_times_steps_and_rewires_and_knows_the_bytes(text):
    given = settings(text, method="set", interval=8).settled(10_000)  # four layers: every other step
    data, _ = batches(given, load_corpus(str(text)))
    trial = try_out(lambda: make_sparse(given, given.plan), data, seconds=0.1, accumulate=1, eval_batches=3)
    assert trial.step_s > 0 and trial.eval_s > 0 and trial.rewire_s >= 0
    assert min(trial.training_bytes.values()) > 0
    once = try_out(lambda: make_dense(given), data, seconds=None, accumulate=1, eval_batches=3)
    assert once.step_s == once.eval_s == 0
    assert once.training_bytes["optimizer"] >= 2 * once.training_bytes["parameters"]


# -- a twin ------------------------------------------------------------------------------------------------------------


def test_accumulated_micro_batches_are_one_batch(text):
    given = settings(text, optimizer="torch").settled(12)
    data, _ = batches(given, load_corpus(str(text)))
    halves, whole = make_dense(given), make_dense(given)

    class Joined:
        def at(self, step: int, micro: int = 0):
            parts = [data.at(step, number) for number in (0, 1)]
            return torch.cat([inputs for inputs, _ in parts]), torch.cat([targets for _, targets in parts])

    first = halves.train_step(data, accumulate=2)
    second = whole.train_step(Joined())

    assert first.loss == pytest.approx(second.loss, rel=1e-5)
    assert first.grad_norm == pytest.approx(second.grad_norm, rel=1e-4)
    assert halves.step == whole.step == 1


def test_the_clock_counts_training_and_not_evaluation(text):
    given = settings(text, method="set", interval=1).settled(12)
    data, windows = batches(given, load_corpus(str(text)))
    twin = make_sparse(given, given.plan)
    result = [twin.train_step(data) for _ in range(3)][-1]
    parts = dict(twin.clock.parts())
    assert all(seconds > 0 for seconds in parts.values())
    assert twin.clock.train_s == pytest.approx(sum(parts.values()))
    assert result.churn > 0 and result.rewires[0]["step"] == 3
    twin.evaluate(windows)
    assert twin.clock.parts() == parts


def test_evaluation_is_the_mean_over_all_bytes(text):
    given = settings(text).settled(12)
    twin = make_dense(given)
    windows = Windows(text=load_corpus(str(text)).valid, context=16, batch=3, wanted_bytes=16 * 7)  # 3 + 3 + 1 windows
    inputs, targets = (torch.cat(parts) for parts in zip(*windows, strict=True))
    assert twin.evaluate(windows) == pytest.approx(text_loss(twin.model, inputs, targets).item(), rel=1e-5)


@pytest.mark.parametrize("make", [make_sparse, make_dense], ids=["sparse", "dense"])
def test_bf16_is_autocast_around_the_loss_alone(text, make):
    """Weights, their gradients and the optimizer's state stay fp32; the loss is that of fp32 within bf16's rounding."""
    losses = []
    for precision in ("fp32", "bf16"):
        given = settings(text, precision=precision).settled(12)
        data, _ = batches(given, load_corpus(str(text)))
        twin = make(given, given.plan) if make is make_sparse else make(given)
        seen: list[torch.dtype] = []
        linear = next(m for m in twin.model.modules() if isinstance(m, SparseLinear | nn.Linear))

        def look(module: nn.Module, inputs: object, output: torch.Tensor, seen: list[torch.dtype] = seen) -> None:
            seen.append(output.dtype)

        linear.register_forward_hook(look)
        losses.append(twin.train_step(data).loss)
        assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float32}
        held = [p.dtype for p in twin.model.parameters()]
        held += [p.grad.dtype for p in twin.model.parameters() if p.grad is not None]
        assert set(held) == {torch.float32}
    assert losses[0] != losses[1] and losses[1] == pytest.approx(losses[0], rel=0.01)


def test_clipping_bounds_the_norm_that_the_optimizer_sees(text):
    given = settings(text).settled(12)
    data, _ = batches(given, load_corpus(str(text)))
    twin = make_dense(given)
    seen = []
    twin.optimizer.register_step_pre_hook(
        lambda *_: seen.append(
            math.sqrt(sum(float(p.grad.square().sum()) for p in twin.model.parameters() if p.grad is not None))
        )
    )
    before = twin.train_step(data, clip=0.01).grad_norm
    assert before > 0.01
    assert seen == [pytest.approx(0.01, rel=1e-3)]


@pytest.mark.parametrize("most", [0.0, 0.5, 2.0, 100.0])
def test_gradients_are_clipped_as_torch_does(text, most):
    """To the bit, though what is within bounds is left alone."""
    given = settings(text).settled(12)
    data, _ = batches(given, load_corpus(str(text)))
    twins = [make_dense(given) for _ in range(2)]
    results = [twin.train_step(data, clip=0.0) for twin in twins]
    grads = [[p.grad.clone() for p in twin.model.parameters() if p.grad is not None] for twin in twins]
    norm = nn.utils.clip_grad_norm_(twins[0].model.parameters(), most or float("inf"))
    assert twins[1]._clip(most) == float(norm) == results[0].grad_norm
    for ours, theirs in zip(*(list(twin.model.parameters()) for twin in twins), strict=True):
        assert ours.grad is not None and theirs.grad is not None and torch.equal(ours.grad, theirs.grad)
    left = [p.grad for p in twins[1].model.parameters() if p.grad is not None]
    changed = any(not torch.equal(here, was) for here, was in zip(left, grads[1], strict=True))
    assert changed == (0 < most < float(norm))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_diverges_changes_nothing(text, where):
    class Root(torch.autograd.Function):
        """Finite forward, infinite backward."""

        @staticmethod
        def forward(ctx, x):
            return x

        @staticmethod
        def backward(ctx, grad):
            return grad * float("inf")

    def broken(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = text_loss(model, inputs, targets)
        return loss * float("nan") if where == "loss" else Root.apply(loss)

    given = settings(text).settled(12)
    data, _ = batches(given, load_corpus(str(text)))
    twin = make_sparse(given, given.plan)
    twin.train_step(data)
    before = {name: tensor.clone() for name, tensor in twin.model.state_dict().items()}
    twin.loss = broken
    with pytest.raises(Diverged, match=f"the {where} of the sparse network is (nan|inf) at step 2"):
        twin.train_step(data)
    assert twin.step == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in twin.model.state_dict().items())


# -- both twins --------------------------------------------------------------------------------------------------------


def test_twins_start_from_the_same_draw(text):
    given = settings(text).settled(12)
    sparse, dense = make_twins(given, given.plan)
    theirs = dense.model.state_dict()
    same = [
        name
        for name, tensor in sparse.model.state_dict().items()
        if name in theirs and torch.equal(tensor, theirs[name])
    ]
    assert {"embedding.weight", "head.weight", "blocks.0.mlp_norm.weight"} <= set(same)
    up = sparse.model.get_submodule("blocks.0.mlp.up")
    assert isinstance(up, SparseLinear)
    kept = up.dense_weight() != 0
    ratio = up.dense_weight()[kept] / theirs["blocks.0.mlp.up.weight"][kept]
    assert (ratio > 0).all()  # the dense weights, scaled by 1 / sqrt(row density)


def test_sparse_values_have_a_rate_of_their_own(text):
    given = settings(text, lr=0.01, density=0.1).settled(12)
    assert given.sparse_lr == pytest.approx(0.01 * 10**0.3)
    twin = make_sparse(given, given.plan)
    rates = {id(p): group["lr"] for group in twin.optimizer.param_groups for p in group["params"]}
    for name, p in twin.model.named_parameters():
        assert rates[id(p)] == (given.sparse_lr if name.endswith(".values") else 0.01), name
    assert len(rates) == len(list(twin.model.parameters()))


def test_the_dense_twin_has_a_rate_of_its_own(text):
    for asked, rate in ((None, 0.005), (0.02, 0.02)):
        given = settings(text, lr=0.01, density=0.1, dense_lr=asked).settled(12)
        assert {group["lr"] for group in make_twins(given, given.plan)[1].optimizer.param_groups} == {rate}


def test_twins_take_turns_on_the_same_bytes(tmp_path, text):
    watched = Watched()
    with MetricsLog(tmp_path) as log, StopRequest() as stop:
        loop = make_loop(tmp_path, text, log, watched, spy=Spy, accumulate=2)
        loop.run(stop)

    slices = [
        [(name, step) for step in range(begin + 1, begin + 4)] for begin in (0, 3, 6, 9) for name in ("sparse", "dense")
    ]
    assert watched.steps == [taken for part in slices for taken in part]
    assert isinstance(loop.train_data, Spy)
    seen = loop.train_data.seen
    assert set(seen) == {(step, micro) for step in range(1, 13) for micro in (0, 1)}
    assert all(len(inputs) == 2 and torch.equal(*inputs) for inputs in seen.values())


def test_the_log_has_what_the_contract_says(tmp_path, text):
    with MetricsLog(tmp_path) as log, StopRequest() as stop:
        make_loop(tmp_path, text, log, interval=4).run(stop)

    fields = {
        "train": {
            "twin", "step", "loss", "bits_per_byte", "lr", "grad_norm", "tokens", "train_s", "tokens_per_s", "flops",
            "churn", "density",
        },
        "eval": {"twin", "step", "train_s", "flops", "loss", "bits_per_byte"},
        "time": {"twin", "step", "forward_s", "backward_s", "optimizer_s", "rewire_s", "data_s"},
        "rewire": {
            "twin", "step", "layer", "num_units", "changed", "churn", "exploration", "newborn_survival", "empty_rows",
            "empty_cols", "seconds", "grown_by",
        },
        "guard": {"twin", "step", "layer", "guard", "message"},
        "end": {"twin", "step", "reason"},
    }  # fmt: skip
    found = records(tmp_path)
    assert {record["kind"] for record in found} == set(fields)
    for record in found:
        assert set(record) == fields[record["kind"]] | {"kind"}
    for twin in ("sparse", "dense"):
        mine = [record for record in found if record["twin"] == twin]
        assert [record["step"] for record in mine if record["kind"] == "train"] == list(range(1, 13))
        assert [record["step"] for record in mine if record["kind"] == "eval"] == [5, 10, 12]
        assert mine[-1] == {"kind": "end", "twin": twin, "step": 12, "reason": "steps"}
        last = [record for record in mine if record["kind"] == "train"][-1]
        assert last["tokens"] == 12 * 2 * 16
        assert last["flops"] == last["tokens"] * {"sparse": 10, "dense": 100}[twin]
        assert last["bits_per_byte"] == pytest.approx(last["loss"] / math.log(2))
    rewires = [record for record in found if record["kind"] == "rewire"]
    assert {record["twin"] for record in rewires} == {"sparse"} and all(record["step"] <= 9 for record in rewires)
    churned = {record["step"] for record in found if record["kind"] == "train" and record["churn"] > 0}
    assert churned == {record["step"] for record in rewires if record["changed"]}


def test_training_learns(tmp_path, text):
    with MetricsLog(tmp_path) as log, StopRequest() as stop:
        make_loop(tmp_path, text, log, batch=16, lr=0.01).run(stop)
    for twin in ("sparse", "dense"):
        losses = [record["loss"] for record in records(tmp_path, "eval") if record["twin"] == twin]
        assert losses[-1] < losses[0] < 5.5


# -- logs and checkpoints ----------------------------------------------------------------------------------------------


def test_a_log_is_cut_at_the_checkpoint_of_each_twin(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write("run", id="x")
        for step in (1, 2, 3):
            for twin in ("sparse", "dense"):
                log.write("train", twin=twin, step=step, loss=float("nan"))
        log.write("end", twin="sparse", step=2, reason="interrupted")
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "train", "twin": "spa')  # killed while writing

    cut_log(tmp_path, {"sparse": 2, "dense": 1})

    kept = [(record["kind"], record.get("twin"), record.get("step")) for record in records(tmp_path)]
    assert kept == [("run", None, None), ("train", "sparse", 1), ("train", "dense", 1), ("train", "sparse", 2)]
    assert records(tmp_path)[1]["loss"] is None  # JSON has no name for it


def test_a_checkpoint_replaces_the_one_before(tmp_path, text):
    given = settings(text).settled(12)
    data, _ = batches(given, load_corpus(str(text)))
    twins = make_twins(given, given.plan)
    for _ in range(2):
        for twin in twins:
            twin.train_step(data)
        save_checkpoint(tmp_path, twins)
    names = {path.name for path in tmp_path.glob("*.safetensors")}
    assert names == {"checkpoint-sparse-2.safetensors", "checkpoint-dense-2.safetensors"}
    assert {entry["file"] for entry in latest(tmp_path).values()} == names

    fresh = make_twins(given, given.plan)
    load_checkpoint(tmp_path, fresh)
    for old, new in zip(twins, fresh, strict=True):
        assert new.step == 2 and new.clock == old.clock
        assert all(
            torch.equal(a, b)
            for a, b in zip(old.model.state_dict().values(), new.model.state_dict().values(), strict=True)
        )


def test_a_checkpoint_of_another_step_is_refused(tmp_path, text):
    given = settings(text).settled(12)
    twins = make_twins(given, given.plan)
    save_checkpoint(tmp_path, twins)
    path = tmp_path / "latest.json"
    found = json.loads(path.read_text())
    found["twins"]["sparse"]["step"] = 7
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="is not of step 7"):
        load_checkpoint(tmp_path, twins)
    path.write_text(path.read_text()[:40])
    with pytest.raises(ValueError, match=r"latest\.json is damaged"):
        load_checkpoint(tmp_path, twins)


def test_parameters_that_are_no_numbers_are_not_saved(tmp_path, text):
    def poison(twin: Twin) -> None:
        if twin.name == "dense" and twin.step == 8:
            next(twin.model.parameters()).data[0, 0] = float("nan")

    with MetricsLog(tmp_path) as log, StopRequest() as stop:
        loop = make_loop(tmp_path, text, log, Watched(poison), checkpoint_s=0)
        with pytest.raises(Diverged, match="dense network"):
            loop.run(stop)
    assert {entry["step"] for entry in latest(tmp_path).values()} == {6}
    assert {record["reason"] for record in records(tmp_path, "end")} == {"diverged"}


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_checkpoint(tmp_path, text):
    with MetricsLog(tmp_path) as log, StopRequest() as stop:
        loop = make_loop(tmp_path, text, log, checkpoint_s=0)
        good = loop.twins[0].loss
        loop.twins[0].loss = lambda model, x, y: good(model, x, y) * (float("nan") if loop.twins[0].step >= 7 else 1.0)
        with pytest.raises(Diverged, match="the loss of the sparse network is nan at step 8"):
            loop.run(stop)
    assert {entry["step"] for entry in latest(tmp_path).values()} == {6}
    fresh = make_loop(tmp_path, text, log).twins
    load_checkpoint(tmp_path, fresh)
    assert all(twin.is_finite() for twin in fresh)


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path, text):
    """A real one: from step 7 on no file may grow past 20 kB, as a disk quota would have it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill(twin: Twin) -> None:
        if twin.step == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))

    try:
        with MetricsLog(tmp_path) as log, StopRequest() as stop:
            loop = make_loop(tmp_path, text, log, Watched(fill), checkpoint_s=0)
            with pytest.raises(DiskFull, match="checkpoint-sparse-9"):
                loop.run(stop)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert {entry["step"] for entry in latest(tmp_path).values()} == {6}
    fresh = make_loop(tmp_path, text, log).twins
    load_checkpoint(tmp_path, fresh)
    assert [twin.step for twin in fresh] == [6, 6]
    assert not list(tmp_path.glob(".*.tmp"))


# -- stopping ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_saves(tmp_path, text, number):
    def interrupt(twin: Twin) -> None:
        if (twin.name, twin.step) == ("sparse", 5):
            os.kill(os.getpid(), number)

    watched = Watched(interrupt)
    handler = signal.getsignal(number)
    with MetricsLog(tmp_path) as log, StopRequest() as stop:
        loop = make_loop(tmp_path, text, log, watched)
        with pytest.raises(Interrupted):
            loop.run(stop)
    assert watched.steps[-1] == ("sparse", 5)
    assert {name: entry["step"] for name, entry in latest(tmp_path).items()} == {"sparse": 5, "dense": 3}
    assert [(record["twin"], record["reason"]) for record in records(tmp_path, "end")] == [
        ("sparse", "interrupted"),
        ("dense", "interrupted"),
    ]
    assert signal.getsignal(number) is handler


def test_a_second_control_c_stops_at_once():
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


# -- folders and settings ----------------------------------------------------------------------------------------------


def test_a_new_run_never_takes_a_folder_that_is_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = choose_folder(None, 3)
    assert first.parent == Path("runs") and first.name.endswith("-s3")
    (tmp_path / "empty").mkdir()
    assert choose_folder(tmp_path / "empty", 0) == tmp_path / "empty"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").write_text("steps: 1")
    with pytest.raises(ValueError, match="holds a run already: go on with it by --resume"):
        choose_folder(tmp_path / "run", 0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is no empty folder"):
        choose_folder(tmp_path / "other", 0)


@pytest.mark.parametrize("steps, interval", [(100, 10), (600, 30), (10_000, 100)])
def test_the_default_interval_suits_the_run(text, steps, interval):
    assert settings(text).settled(steps).plan.method.interval == interval
    assert settings(text, method="set").settled(steps).plan.method.interval == interval
    assert settings(text, interval=77).settled(steps).plan.method.interval == 77


def test_settled_settings_say_everything_with_the_plan(text):
    given = settings(text, density=0.2, method="set", block=(4, 1), distribution="erk", seed=5)
    done = dataclasses.replace(given, eval_interval=None).settled(100)
    assert (done.plan.density, done.plan.block, done.plan.distribution, done.plan.seed) == (0.2, (4, 1), "erk", 5)
    assert type(done.plan.method).__name__ == "SET"
    assert (done.density, done.method, done.block, done.distribution, done.interval) == (None,) * 5
    assert done.steps == 100 and done.warmup == 10 and done.eval_interval == 10 and done.minutes is None
    assert done.settled(100) == done


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"density": 0.0}, r"density must lie in \(0, 1\], got 0.0"),
        ({"method": "rigll"}, "did you mean 'rigl'"),
        ({"minutes": 1.0}, "give one of them"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"lr": -1.0}, "lr must be positive, got -1.0"),
        ({"block": 0}, "block must be a positive int"),
    ],
)
def test_impossible_settings_are_refused(text, wrong, message):
    with pytest.raises(ValueError, match=message):
        settings(text, **wrong)


def test_decided_layers_stay_dense(text):
    given = settings(text).settled(12)
    rows = [{"name": "blocks.0.mlp.up", "kind": "dense"}, {"name": "blocks.0.mlp.down", "kind": "sparse"}]
    rewirer = make_sparse(given, given.plan.settled(rows)).rewirer
    assert rewirer is not None
    assert "blocks.0.mlp.up" in rewirer.left_dense and "blocks.0.mlp.down" in rewirer.layers
