"""Whole training runs against a simulation that shares nothing with the library: dense weights, a mask, plain torch.

In float64 the patterns must be equal after every step, and the weights equal within rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from rarefy import GMP, SET, Cosine, GraNet, Method, Plan, RigL, sparsify
from rarefy.distributions import exact_counts
from rarefy.nn import SparseLayer
from rarefy.sampling import keyed_generator, sample_without_replacement

STEPS, INTERVAL, END, START = 60, 6, 48, 0.4
WIDTHS = (10, 24, 16, 6)
DENSITY = 0.3


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(20, WIDTHS[0], dtype=torch.float64, generator=generator)
    return x, torch.tanh(x @ torch.randn(WIDTHS[0], WIDTHS[-1], dtype=torch.float64, generator=generator))


class Simulation:
    """A masked dense MLP, trained and rewired by the rules of docs/rewiring.md as one would write them down."""

    def __init__(self, layers: list[SparseLayer], names: list[str], adam: bool, method: Method, seed: int) -> None:
        self.names, self.adam, self.method, self.seed = names, adam, method, seed
        self.masks = [layer.pattern.to_mask() for layer in layers]
        self.weights = [layer.dense_weight().clone() for layer in layers]
        self.biases = [layer.bias.detach().clone() for layer in layers if layer.bias is not None]
        # Two moments of weights and biases; SGD's momentum is the first.
        self.moments = [[torch.zeros_like(t) for t in (*self.weights, *self.biases)] for _ in range(2)]

    def gradients(self, x: Tensor, wanted: Tensor) -> list[Tensor]:
        """Of the loss, to the dense weights that are zero outside the mask, and to the biases."""
        leaves = [t.clone().requires_grad_() for t in (*self.weights, *self.biases)]
        weights, biases = leaves[: len(self.weights)], leaves[len(self.weights) :]
        for at, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
            x = x @ weight.T + bias
            x = x if at == len(weights) - 1 else torch.tanh(x)
        return list(torch.autograd.grad((x - wanted).pow(2).mean(), leaves))

    def step(self, t: int) -> None:
        dense = self.gradients(*batch(t))
        tensors = [*self.weights, *self.biases]
        for at, (tensor, gradient) in enumerate(zip(tensors, dense, strict=True)):
            mask = self.masks[at] if at < len(self.masks) else torch.ones_like(tensor, dtype=torch.bool)
            g = gradient * mask
            first, second = self.moments[0][at], self.moments[1][at]
            if self.adam:
                first.mul_(0.9).add_(g, alpha=0.1)
                second.mul_(0.999).add_(g * g, alpha=0.001)
                mean, square = first / (1 - 0.9**t), second / (1 - 0.999**t)
                tensor.sub_(0.01 * mean / (square.sqrt() + 1e-8))
            else:
                first.mul_(0.9).add_(g)
                tensor.sub_(0.1 * first)
            tensor.mul_(mask)
        for at in range(len(self.masks)):
            offset = at * INTERVAL // len(self.masks) if self.method.stagger else 0
            if t <= END and (t - offset) % INTERVAL == 0:
                self.rewire(at, t, dense[at])

    def rewire(self, at: int, t: int, dense: Tensor) -> None:
        mask, weight = self.masks[at].flatten(), self.weights[at].flatten()
        active = mask.nonzero().flatten().tolist()
        fraction = START * (1 + math.cos(math.pi * t / END)) / 2
        k = min(math.floor(fraction * len(active) + 0.5), mask.numel() - len(active))
        dropped = sorted(active, key=lambda unit: (abs(float(weight[unit])), unit))[:k]
        stay = set(active) - set(dropped)
        taken = stay if self.method.may_return else set(active)
        candidates = [unit for unit in range(mask.numel()) if unit not in taken]
        if isinstance(self.method, RigL):
            score = dense.flatten().abs().tolist()
            grown = sorted(candidates, key=lambda unit: (-score[unit], unit))[:k]
        else:
            generator = keyed_generator(self.seed, t, self.names[at])
            grown = [candidates[i] for i in sample_without_replacement(len(candidates), k, generator).tolist()]
        for unit in set(dropped) - set(grown):
            for tensor in (self.weights[at], *(moment[at] for moment in self.moments)):
                tensor.view(-1)[unit] = 0.0
            self.masks[at].view(-1)[unit] = False
        for unit in set(grown) - set(dropped):
            assert not self.masks[at].view(-1)[unit] and float(self.weights[at].view(-1)[unit]) == 0.0
            self.masks[at].view(-1)[unit] = True


@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adam"])
@pytest.mark.parametrize("stagger", [False, True], ids=["together", "staggered"])
@pytest.mark.parametrize("may_return", [False, True], ids=["gone", "may-return"])
@pytest.mark.parametrize("make", [RigL, SET])
def test_a_whole_run_equals_the_dense_masked_simulation(make: Callable[..., Method], may_return, stagger, adam):
    method = make(interval=INTERVAL, end=END, fraction=Cosine(START), stagger=stagger, may_return=may_return)
    model = mlp64()
    rewirer = sparsify(model, Plan(density=DENSITY, distribution="erk", method=method, seed=11))
    if adam:
        optimizer: torch.optim.Optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    rewirer.attach(optimizer)
    layers = list(rewirer.layers.values())
    simulation = Simulation(layers, list(rewirer.layers), adam, method, seed=11)
    rewired = 0
    for t in range(1, STEPS + 1):
        x, wanted = batch(t)
        (model(x) - wanted).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        before = [mask.clone() for mask in simulation.masks]
        simulation.step(t)
        rewired += sum(not torch.equal(old, new) for old, new in zip(before, simulation.masks, strict=True))
        for at, layer in enumerate(layers):
            assert torch.equal(layer.pattern.to_mask(), simulation.masks[at]), f"layer {at} at step {t}"
            torch.testing.assert_close(layer.dense_weight(), simulation.weights[at], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(layer.bias.detach(), simulation.biases[at], rtol=1e-9, atol=1e-12)  # type: ignore[union-attr]
    assert rewired >= 15, "the run was one of many rewires"


class Falling(Simulation):
    """The same, of a density that falls: all layers pruned together, then each regenerates where the method does."""

    def step(self, t: int) -> None:
        self.pruned_at = -1
        super().step(t)

    def rewire(self, at: int, t: int, dense: Tensor) -> None:
        if self.pruned_at != t:  # the first layer's turn: every layer is pruned before any regenerates
            self.pruned_at = t
            self.gone: list[set[int]] = [set() for _ in self.masks]
            self.prune(t)
        if isinstance(self.method, GraNet):
            self.regenerate(at, t, dense)

    def prune(self, t: int) -> None:
        assert isinstance(self.method, GMP | GraNet)
        sizes = [mask.numel() for mask in self.masks]
        density = DENSITY + (self.method.start - DENSITY) * (1 - t / END) ** 3
        active = [mask.flatten().nonzero().flatten().tolist() for mask in self.masks]
        everything = [
            (abs(float(self.weights[at].view(-1)[unit])), at, unit) for at, units in enumerate(active) for unit in units
        ]
        if isinstance(self.method, GraNet) or self.method.scope == "global":
            leaving = sorted(everything)[: len(everything) - round(density * sum(sizes))]
        else:
            keep = exact_counts(dict.fromkeys(range(len(sizes)), density), dict(enumerate(sizes)), density)  # type: ignore[arg-type]
            leaving = []
            for at in range(len(sizes)):
                mine = sorted(entry for entry in everything if entry[1] == at)
                leaving += mine[: len(mine) - keep[at]]  # type: ignore[index]
        for _, at, unit in leaving:
            self.remove(at, unit)
            self.gone[at].add(unit)

    def remove(self, at: int, unit: int) -> None:
        for tensor in (self.weights[at], *(moment[at] for moment in self.moments)):
            tensor.view(-1)[unit] = 0.0
        self.masks[at].view(-1)[unit] = False

    def regenerate(self, at: int, t: int, dense: Tensor) -> None:
        mask, weight = self.masks[at].flatten(), self.weights[at].flatten()
        active = mask.nonzero().flatten().tolist()
        may_return = self.method.may_return
        barred = set(active) if may_return else set(active) | self.gone[at]
        k = math.floor(0.5 * (1 + math.cos(math.pi * t / END)) / 2 * len(active) + 0.5)
        k = min(k, mask.numel() - len(barred))
        dropped = sorted(active, key=lambda unit: (abs(float(weight[unit])), unit))[:k]
        taken = barred - set(dropped) if may_return else barred
        score = dense.flatten().abs().tolist()
        candidates = [unit for unit in range(mask.numel()) if unit not in taken]
        grown = sorted(candidates, key=lambda unit: (-score[unit], unit))[:k]
        for unit in set(dropped) - set(grown):
            self.remove(at, unit)
        for unit in set(grown) - set(dropped):
            self.masks[at].view(-1)[unit] = True


@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adam"])
@pytest.mark.parametrize(
    "method",
    [
        GMP(interval=INTERVAL, end=END, stagger=False),
        GMP(interval=INTERVAL, end=END, scope="global", stagger=False),
        GraNet(interval=INTERVAL, end=END, stagger=False),
        GraNet(interval=INTERVAL, end=END, stagger=False, start=1.0),
        GraNet.paper(interval=INTERVAL, end=END),
        GraNet.paper(interval=INTERVAL, end=END, start=1.0),
    ],
    ids=["gmp", "gmp-global", "granet", "granet-from-dense", "granet-paper", "granet-paper-from-dense"],
)
def test_a_run_with_falling_density_equals_the_dense_masked_simulation(method: Method, adam):
    model = mlp64()
    rewirer = sparsify(model, Plan(density=DENSITY, method=method, seed=11))
    optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if adam:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    rewirer.attach(optimizer)
    layers = list(rewirer.layers.values())
    simulation = Falling(layers, list(rewirer.layers), adam, method, seed=11)
    sizes = set()
    for t in range(1, STEPS + 1):
        x, wanted = batch(t)
        (model(x) - wanted).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        simulation.step(t)
        sizes.add(sum(layer.num_units for layer in layers))
        for at, layer in enumerate(layers):
            assert torch.equal(layer.pattern.to_mask(), simulation.masks[at]), f"layer {at} at step {t}"
            torch.testing.assert_close(layer.dense_weight(), simulation.weights[at], rtol=1e-9, atol=1e-12)
    assert len(sizes) >= END // INTERVAL and min(sizes) == round(DENSITY * sum(w * v for w, v in pairwise(WIDTHS)))


def mlp64() -> nn.Sequential:
    """The network of these runs, dense and fresh."""
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(WIDTHS):
        modules += [nn.Linear(inputs, outputs, dtype=torch.float64), nn.Tanh()]
    return nn.Sequential(*modules[:-1])
