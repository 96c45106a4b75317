"""Text from a trained model, byte by byte, with a cache of what it has seen.

Which bytes a prediction sees: all of the text while it fits the context. A longer prompt is seen by its last `context`
bytes. Once the context is full, its older half is forgotten: the last context // 2 bytes (at least one), the newest
included, are read anew at the first positions, and the text grows from there. So a prediction sees between half a
context and a whole one, and a byte costs about two positions at most instead of a context of them.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.models.cache import Cache
from rarefy.models.gpt import GPT


@dataclass(frozen=True, kw_only=True)
class Generation:
    """New bytes, and what they took."""

    text: bytes
    """Without the prompt."""

    prompt_bytes: int
    """Bytes of the prompt that the model read, at most its context."""

    prompt_s: float
    """Seconds to read them and choose the first new byte."""

    decode_s: float
    """Seconds for all further bytes, reading half a context again where it was full."""

    @property
    def prompt_bytes_per_s(self) -> float | None:
        """None where nothing was read."""
        return self.prompt_bytes / self.prompt_s if self.prompt_s > 0 else None

    @property
    def decode_bytes_per_s(self) -> float | None:
        """None with fewer than two new bytes."""
        return (len(self.text) - 1) / self.decode_s if len(self.text) > 1 else None


def generate(
    model: GPT, prompt: bytes, num_bytes: int, *, temperature: float = 0.8, top_k: int | None = None, seed: int = 0
) -> bytes:
    """Continue a prompt, byte by byte, each drawn from what the model expects. `timed_generate` without the times."""
    return timed_generate(model, prompt, num_bytes, temperature=temperature, top_k=top_k, seed=seed).text


@torch.inference_mode()
def timed_generate(
    model: GPT, prompt: bytes, num_bytes: int, *, temperature: float = 0.8, top_k: int | None = None, seed: int = 0
) -> Generation:
    """Continue a prompt, byte by byte, each drawn from what the model expects.

    Args:
        prompt: what to continue; empty: a line feed is put before the text and left out of the answer.
        num_bytes: how many bytes to add.
        temperature: below 1 sharpens the distribution, above flattens it; 0 takes the likeliest byte.
        top_k: draw from the k likeliest bytes only; None: from all.
        seed: the same seed, prompt and model give the same bytes. Torch's global generator is not touched.
    Raises:
        ValueError: a negative temperature or number of bytes, or top_k below 1.
    """
    if temperature < 0:
        raise ValueError(f"temperature must not be negative, got {temperature}")
    if num_bytes < 0:
        raise ValueError(f"the number of bytes must not be negative, got {num_bytes}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}")
    context, device = model.config.context, model.embedding.weight.device
    generator = torch.Generator().manual_seed(seed)
    text = list(prompt or b"\n")
    begin = len(text)
    cache = Cache(model.config.layers, context)
    unread = text[-context:]
    times = [time.perf_counter()]
    was_training = model.training
    model.eval()
    try:
        for _ in range(num_bytes):
            if cache.length + len(unread) > context:
                cache.clear()
                unread = text[-max(1, context // 2) :]
            logits = model.step(torch.tensor([unread], device=device), cache)[0].float().cpu()
            unread = [_draw(logits, temperature, top_k, generator)]
            text += unread
            times.append(time.perf_counter())
    finally:
        model.train(was_training)
    return Generation(
        text=bytes(text[begin:]),
        prompt_bytes=min(begin, context) if num_bytes else 0,
        prompt_s=times[min(1, num_bytes)] - times[0],
        decode_s=times[-1] - times[min(1, num_bytes)],
    )


def _draw(logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator) -> int:
    """A byte by its (256,) logits, which are changed."""
    if top_k is not None and top_k < logits.numel():
        logits[logits < torch.topk(logits, top_k).values[-1]] = -math.inf
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / temperature, dim=0), 1, generator=generator))
