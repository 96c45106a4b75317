"""What the coming backward passes keep for the layers that will grow by it (rewiring rules 6.2 to 6.4, 6.7)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rarefy.growth import Collector, Request, Signal
from rarefy.nn import SparseLayer
from rarefy.ops import sink as sinks


class Collectors(Mapping[str, Collector]):
    """Layer -> the collector that waits at its sink. It is there from the step that arms it to the rewire it is for.

    Args:
        layers: name -> layer.
    """

    def __init__(self, layers: Mapping[str, SparseLayer]) -> None:
        self._layers = layers
        self._held: dict[str, Collector] = {}
        self.calls_per_step: dict[str, int] = {}
        """Backward calls that a layer's last step had, of those that had one."""

    def __getitem__(self, name: str) -> Collector:
        return self._held[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def arm(self, request: Request, signal: Signal) -> None:
        """Have the layer's next backward calls collected as the signal does it."""
        collector = signal.collector(request)
        self._held[request.name] = collector
        sinks.arm(self._layers[request.name].sink, collector)

    def forget(self, name: str) -> None:
        """No one waits at the layer any more, and what was kept is freed."""
        sinks.disarm(self._layers[name].sink)
        del self._held[name]

    def keep(self, steps: Mapping[str, int]) -> None:
        """Forget all but those for a rewire of the layer after the step that `steps` says."""
        for name in [name for name, held in self._held.items() if steps.get(name) != held.request.step]:
            self.forget(name)

    def count_calls(self) -> None:
        """Note how many backward calls the step just applied had, layer by layer."""
        for name, layer in self._layers.items():
            calls = sinks.take_calls(layer.sink)
            if calls:
                self.calls_per_step[name] = calls

    def step_applied(self, t: int) -> None:
        """Tell those whose rewire comes after step t that an optimizer step was applied."""
        for name, collector in self._held.items():
            if collector.request.step > t:
                collector.step_applied(self._layers[name].index)

    def state_dict(self) -> dict[str, Any]:
        """See `Rewirer.state_dict`."""
        held = {name: state for name, collector in self._held.items() if (state := collector.state_dict())}
        return {"calls_per_step": dict(self.calls_per_step), "held": held}

    def load_calls(self, state: Mapping[str, Any]) -> None:
        """Take up the saved numbers of calls; to be armed by them next."""
        self.calls_per_step = {name: int(calls) for name, calls in state["calls_per_step"].items()}

    def load_held(self, state: Mapping[str, Any]) -> None:
        """Take up what those that are armed again had kept."""
        for name, kept in state["held"].items():
            if name in self._held:
                self._held[name].load_state_dict(kept)
