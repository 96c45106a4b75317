"""Growth by topology. Zhang et al. 2024, "Epitopological learning and Cannistraci-Hebb network shape intelligence
brain-inspired theory for ultra-sparse advantage in deep learning" (ICLR), and Zhang et al. 2025, "Brain network science
modelling of sparse neural networks enables Transformers and LLMs to perform as fully connected", arXiv:2501.19107.

Links go by weight, by magnitude or relative importance; then, where the method is told which layers follow each other,
those whose neuron was left without a way in or out (chain removal); as many come where the graph of the links that are
left predicts them (`rarefy.methods.topology`). No gradient is needed. CHT takes the lowest and highest scores, CHTs
samples by them. A just-removed link may be predicted at once, and then keeps its value, as in both papers.

Departs from the papers and the authors' code in these: CHT predicts by nodes as CHTs does, where the first paper sums
over paths, which cannot be done by products of matrices; counts are exact where a threshold takes all ties; relative
importance adds nothing to the sums; where too few links have a score above 0 the rest are the lower units (CHT) or
uniform (CHTs); layers take turns, so chain removal sees the neighbours' present patterns; the fraction follows a
cosine, which the second paper has as an option. `CHT.paper()` and `CHTs.paper()` restore the last two. First patterns
are the plan's: the papers' correlated and receptive-field ones are not here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, Self

import numpy as np
import torch
from torch import Tensor

from rarefy.methods.base import LayerView, Method, Needs, unit_mean
from rarefy.methods.candidates import Candidates, Choice
from rarefy.methods.topology import Rule, grid_of, link_scores
from rarefy.sampling import exponentials, keyed_generator
from rarefy.schedules import Constant, Linear, Schedule
from rarefy.selection import all_finite, contains, kth_lowest, lowest, num_true, positions


@dataclass(frozen=True, kw_only=True)
class CHT(Method):
    """Remove the least links by weight, regrow the best predicted by topology."""

    may_return: bool = True
    """Whether links removed in a rewire may be regrown in it, as in the papers; `stop_overlap` needs it."""

    removal: Literal["magnitude", "importance"] = "magnitude"
    """Score of a link that exists: |w|, or |w| / (sum of its row) + |w| / (sum of its column)."""

    rule: Rule = "ch3"
    """How links are predicted: "ch3" counts paths against links that leave them, "ch2" also for those that stay."""

    stop_overlap: float | None = None
    """A layer that regrows more than this part of what it removed is settled, and rewires no more; the authors' is 0.9.
    None: never."""

    chains: tuple[tuple[str, ...], ...] = ()
    """Layers that follow each other, by name: (("up", "down"),). A single * stands for the same text in all names of a
    chain. Without, no link is removed for its neuron's sake."""

    needs = Needs.TOPOLOGY

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "chains", tuple(tuple(chain) for chain in self.chains))
        if self.removal not in ("magnitude", "importance"):
            raise ValueError(f'removal must be "magnitude" or "importance", got {self.removal!r}')
        if self.rule not in ("ch2", "ch3"):
            raise ValueError(f'rule must be "ch2" or "ch3", got {self.rule!r}')
        if self.stop_overlap is not None and not (0 < self.stop_overlap <= 1 and self.may_return):
            raise ValueError(
                f"stop_overlap must lie in (0, 1] and needs may_return=True, got {self.stop_overlap}; "
                "the authors' is 0.9"
            )
        for chain in self.chains:
            if len(chain) < 2 or any(name.count("*") > 1 for name in chain):
                raise ValueError(f"a chain must be two or more names with at most one * each, got {chain}")

    @classmethod
    def paper(cls, *, interval: int = 100, end: int | None = None) -> Self:
        """The first paper's constant fraction of 0.3, all layers at once."""
        return cls(interval=interval, end=end, fraction=Constant(0.3), stagger=False)

    def drop_score(self, view: LayerView) -> Tensor:
        """(K,) by `removal`."""
        weight = unit_mean(view.values.abs()).double()
        if self.removal == "magnitude":
            return weight
        rows, cols = view.pattern.row_indices(), view.pattern.col_indices.long()
        of_row = torch.bincount(rows, weight, view.pattern.num_unit_rows)[rows]
        of_col = torch.bincount(cols, weight, view.pattern.num_unit_cols)[cols]
        nothing = torch.finfo(weight.dtype).tiny
        return weight / of_row.clamp(min=nothing) + weight / of_col.clamp(min=nothing)

    def to_remove(self, score: Tensor, k: int, view: LayerView) -> Tensor:
        """(k,) ascending positions: the lowest scores."""
        return lowest(score, k)

    def preference(self, scores: Tensor, draws: np.random.Generator) -> Tensor:
        """Topological scores to what is maximised; may be done in place."""
        return scores

    def choose(self, view: LayerView, k: int, candidates: Candidates) -> Choice | None:
        """See `Method.choose`. Time and memory as `link_scores`."""
        score = self.drop_score(view)
        if not all_finite(score):
            return None
        active, pattern = view.pattern.unit_indices(), view.pattern
        goes = torch.zeros_like(active, dtype=torch.bool)
        goes[self.to_remove(score, k, view)] = True
        useless = positions(self._useless(view) & ~goes)
        room = pattern.num_unit_rows * pattern.num_unit_cols - active.numel() - k
        goes[useless if self.may_return else useless[:room]] = True  # as many must be able to come
        drop = positions(goes)
        left, removed = active[positions(~goes)], active[drop]
        grown = self._predicted(view, left, removed.numel())
        overlap = float(contains(removed, grown).double().mean()) if removed.numel() else 0.0
        settled = self.stop_overlap is not None and overlap > self.stop_overlap
        return Choice(drop, grown, settled)

    def _predicted(self, view: LayerView, links: Tensor, k: int) -> Tensor:
        """(k,) ascending units that the graph of `links` predicts best."""
        grid = grid_of(links, view.pattern.num_unit_rows, view.pattern.num_unit_cols)
        taken = grid.links() if self.may_return else grid.by_lines(view.pattern.unit_indices())
        draws = keyed_generator(view.seed, view.step, view.name, "regrowth")
        units, best = taken.new_empty(0), torch.empty(0, device=links.device)
        floor = -torch.inf
        for first, scores in link_scores(grid, self.rule):
            wanted = self.preference(scores, draws).flatten()
            begins, ends = first * grid.num_short, first * grid.num_short + wanted.numel()
            inside = slice(*torch.searchsorted(taken, taken.new_tensor([begins, ends])).tolist())
            wanted[taken[inside] - begins] = -1
            floor = max(floor, _bound(wanted, k))
            found = positions(wanted >= max(floor, 0))  # equals stay: a lower unit may be among them
            units, best = torch.cat([units, grid.to_units(found + begins)]), torch.cat([best, wanted[found]])
            if units.numel() > max(2 * k, 1 << 16):
                units, best = _best(units, best, k)
                floor = float(best.min()) if k else torch.inf
        return _best(units, best, k)[0]

    def _useless(self, view: LayerView) -> Tensor:
        """(K,) boolean: links from inputs that nothing reaches, or to neurons that lead nowhere, by the chains."""
        rows, cols = view.pattern.row_indices(), view.pattern.col_indices.long()
        useless = torch.zeros_like(rows, dtype=torch.bool)
        (b_r, b_c), (num_out, num_in) = view.pattern.block, view.pattern.shape
        for before, after in _neighbours(view.name, self.chains):
            if (pattern := view.pattern_of(before)) is not None:
                _check_follows(before, pattern.shape[0], view.name, num_in)
                reached = torch.diff(pattern.crow_indices).bool().repeat_interleave(pattern.block[0])
                useless |= ~reached.view(-1, b_c).any(dim=1)[cols]
            if (pattern := view.pattern_of(after)) is not None:
                _check_follows(view.name, num_out, after, pattern.shape[1])
                read = torch.bincount(pattern.col_indices.long(), minlength=pattern.num_unit_cols).bool()
                useless |= ~read.repeat_interleave(pattern.block[1]).view(-1, b_r).any(dim=1)[rows]
        return useless


SAMPLED = 64
"""One score in so many is looked at for a bound."""


def _bound(scores: Tensor, k: int) -> float:
    """What at least k of the scores reach, not far below the k-th highest: little is then left to collect and sort.
    -inf where a sample of them finds none.
    """
    sample = scores[::SAMPLED]
    rank = 2 * k // SAMPLED + SAMPLED  # of the sample: about 2k of all are above it
    if not 0 < rank < sample.numel() // 2:
        return -torch.inf
    bound = sample.kthvalue(sample.numel() - rank + 1).values
    return float(bound) if num_true(scores >= bound) >= k else -torch.inf


def _best(units: Tensor, scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k of highest score, ascending, with their scores; of equal scores the lower units (6.2)."""
    if units.numel() > k > 0:  # most fall at once: what is left to sort is little more than k
        likely = positions(scores >= -kth_lowest(-scores, k))
        units, scores = units[likely], scores[likely]
    units, order = torch.sort(units)
    chosen = lowest(-scores[order], min(k, units.numel()))
    return units[chosen], scores[order][chosen]


def _neighbours(name: str, chains: tuple[tuple[str, ...], ...]) -> Iterator[tuple[str, str]]:
    """Names before and after `name` in each chain that has it; empty at an end."""
    for chain in chains:
        for at, given in enumerate(chain):
            head, star, tail = given.partition("*")
            matches = len(name) >= len(head) + len(tail) and name.startswith(head) and name.endswith(tail)
            if name != given and not (star and matches):
                continue
            text = name[len(head) : len(name) - len(tail)]
            around = ("", *chain, "")
            yield around[at].replace("*", text), around[at + 2].replace("*", text)


def _check_follows(first: str, num_out: int, second: str, num_in: int) -> None:
    if num_out != num_in:
        raise ValueError(
            f"chains: {second} does not follow {first}, which has {num_out} outputs for its {num_in} inputs"
        )


@dataclass(frozen=True, kw_only=True)
class CHTs(CHT):
    """CHT that samples: links stay by weight and come by prediction only with a probability."""

    temperature: Schedule = field(default_factory=lambda: Linear(1.0, 3.0))
    """Power of the weights by which links are drawn to stay; the higher, the harder. The authors' is 1 to 3; 1 to 9 for
    LLaMA."""

    rule: Rule = "ch2"
    """As `CHT.rule`; the second paper's is "ch2"."""

    def to_remove(self, score: Tensor, k: int, view: LayerView) -> Tensor:
        """(k,) ascending positions: those not drawn to stay."""
        draws = keyed_generator(view.seed, view.step, view.name, "removal")
        power = self.temperature(view.progress)
        return lowest(score**power / exponentials(tuple(score.shape), draws).to(score), k)

    def preference(self, scores: Tensor, draws: np.random.Generator) -> Tensor:
        """A race that a link wins in proportion to its score; those without one come last, each equally likely."""
        return scores.clamp_(min=1e-30).div_(exponentials(tuple(scores.shape), draws).to(scores.device))
