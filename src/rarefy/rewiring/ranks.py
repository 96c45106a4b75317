"""What ranks of torch.distributed must agree on (rewiring rules 6.4, 8.2, 8.3). Without it, every question is free."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from rarefy.nn import SparseLayer


def world_size() -> int:
    """Ranks that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This one's number."""
    return dist.get_rank() if world_size() > 1 else 0


def rows_of_ranks(rows: Tensor) -> Tensor:
    """All ranks' (m, F) rows, in the order of ranks, the same on each; m may differ, and then zeros fill up."""
    if world_size() == 1:
        return rows
    most = torch.tensor([rows.shape[0]], device=rows.device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    mine = F.pad(rows, (0, 0, 0, int(most) - rows.shape[0])).contiguous()
    everyone = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(everyone, mine)
    return torch.cat(everyone)


def mean_over_ranks(gradient: Tensor) -> Tensor:
    """The average of a dense gradient over ranks, in place; the absolute value is taken afterwards, by the score
    (6.2).
    """
    if world_size() > 1:
        dist.all_reduce(gradient)
        gradient /= world_size()
    return gradient


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set anywhere."""
    if world_size() == 1:
        return flag
    anywhere = torch.tensor([int(flag)], device=device)
    dist.all_reduce(anywhere, op=dist.ReduceOp.MAX)
    return bool(anywhere.item())


def refuse_ddp(layers: Mapping[str, SparseLayer]) -> None:
    """Whether sizes may change: not of parameters in DistributedDataParallel's buckets, which have the first sizes.

    Raises:
        ValueError: a DDP module holds values of one of the layers.
    """
    if world_size() == 1:
        return
    mine = {id(layer.values): name for name, layer in layers.items()}
    for thing in gc.get_objects():
        if isinstance(thing, DistributedDataParallel):
            held = next((mine[id(p)] for p in thing.module.parameters() if id(p) in mine), None)
            if held is not None:
                raise ValueError(
                    f"DistributedDataParallel holds the values of {held}, whose number changes while training: its "
                    "buckets have the first sizes for good. Train the module itself and average its gradients after "
                    "backward (for p in model.parameters(): torch.distributed.all_reduce(p.grad), then divide by the "
                    "number of ranks), or use a method and a density that stay"
                )


def check_agreement(name: str, values: Tensor, pattern_digest: str) -> None:
    """Compare a digest of pattern and values over all ranks (8.2).

    Raises:
        RuntimeError: ranks differ.
    """
    if world_size() == 1:
        return
    content = values.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()  # every bit, in any dtype
    digest = hashlib.sha256(content + pattern_digest.encode()).digest()[:8]
    mine = torch.tensor([int.from_bytes(digest, "little", signed=True)], device=values.device)
    everyone = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(everyone, mine)
    if any(not torch.equal(mine, other) for other in everyone):
        raise RuntimeError(
            f"ranks disagree on the pattern or values of {name} after a rewire: start them from the same seed, "
            "let DDP average gradients, and give every rank the same optimizer settings"
        )
