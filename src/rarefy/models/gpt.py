"""A GPT over bytes: pre-norm transformer, causal attention with rotary positions, token shift, and
an MLP of squared ReLUs.

Layer names, for the globs of a plan: embedding, position (if positions are learned), blocks.N.attention.qkv,
blocks.N.attention.out, blocks.N.mlp.up, blocks.N.mlp.down, head. Shape letters: B sequences, T bytes of context, C
width, A features of attention, H heads, c features a head, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rarefy.models.cache import Cache, LayerCache
from rarefy.nn import SquaredReLU, add_norm
from rarefy.ops import causal_attention, rotary_table, rotate
from rarefy.supar import SuPar

VOCABULARY = 256
"""Every byte is a token."""

ACTIVATIONS = {"squared_relu": SquaredReLU, "gelu": nn.GELU}


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """The shape of a GPT."""

    width: int = 256
    """Features of a position, C."""

    layers: int = 4
    """Blocks of attention and MLP."""

    heads: int = 4
    """Attention heads, which share its features."""

    attention: int | None = None
    """Features of all heads together, A: of a position's query, of its key and of its value; None: the width."""

    context: int = 256
    """Bytes that a prediction can see, T."""

    mlp: int | None = None
    """Hidden features of the MLP; None: four times the width."""

    positions: Literal["rotary", "learned"] = "rotary"
    """How attention knows where a byte stands: by queries and keys that turn with their positions (Su et al. 2021), or
    by a learned vector a position, added to the embedding as in GPT-2."""

    activation: Literal["squared_relu", "gelu"] = "squared_relu"
    """Of the MLP's hidden features."""

    token_shift: bool = True
    """Whether half of the features that attention and MLP read are those of the byte before
    (`rarefy.ops.token_shift`)."""

    base_width: int | None = None
    """Width of the network whose learning rate this one takes over (`rarefy.SuPar`); None: the usual first weights."""

    base_head: int | None = None
    """Features of a head there, to scale scores by 1/d instead of 1/sqrt(d); None: as here, and nothing changes."""

    def __post_init__(self) -> None:
        for name in ("base_width", "base_head"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("width", "layers", "heads", "context"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("mlp", "attention"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.attended % self.heads:
            shared = "width" if self.attention is None else "features of attention"
            raise ValueError(
                f"the {self.heads} heads must share the {shared} evenly, and {self.attended} is no multiple of "
                f"{self.heads}"
            )
        if self.positions not in ("rotary", "learned"):
            raise ValueError(f"positions must be 'rotary' or 'learned', got {self.positions!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be {' or '.join(map(repr, ACTIVATIONS))}, got {self.activation!r}")
        if self.positions == "rotary" and self.head_dim % 2:
            raise ValueError(
                f"rotary positions turn pairs of features, and a head of {self.attended} / {self.heads} = "
                f"{self.head_dim} has an odd one out: take another width or number of heads, or learned positions"
            )

    @property
    def attended(self) -> int:
        """Features of all heads together, A."""
        return self.attention if self.attention is not None else self.width

    @property
    def head_dim(self) -> int:
        """Features of a head, c."""
        return self.attended // self.heads

    @property
    def hidden(self) -> int:
        """Hidden features of the MLP."""
        return self.mlp if self.mlp is not None else 4 * self.width

    @property
    def query_scale(self) -> float:
        """What queries are multiplied by, so that scores are q k sqrt(base head) / head."""
        return 1.0 if self.base_head is None else math.sqrt(self.base_head / self.head_dim)

    def supar(self) -> SuPar | None:
        """For `rarefy.param_groups`: how the layers relate to the base network's, whose MLP is four times as wide."""
        if self.base_width is None:
            return None
        return SuPar(base_width=self.base_width, base_fan_in={"*mlp.down": 4 * self.base_width})

    def attention_flops(self) -> int:
        """FLOPs a token of training spends on scores and their weighted sums, of which the causal half is computed.

        Forward: T / 2 keys on average, A features, a multiply and an add, twice; the backward pass costs two forwards.
        """
        return 6 * self.layers * self.context * self.attended


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query_scale = config.query_scale
        self.qkv = nn.Linear(config.width, 3 * config.attended)
        self.out = nn.Linear(config.attended, config.width)
        self.rotary_Tc: Tensor | None
        table = rotary_table(config.context, config.head_dim) if config.positions == "rotary" else None
        self.register_buffer("rotary_Tc", table, persistent=False)

    def forward(self, x_BTC: Tensor) -> Tensor:
        mixed_BTHc = causal_attention(self._projected(x_BTC), self._rotary(0, x_BTC.shape[1]))
        return self.out(mixed_BTHc.flatten(2))

    def _rotary(self, begin: int, end: int) -> Tensor | None:
        return None if self.rotary_Tc is None else self.rotary_Tc[begin:end]

    def _apply(self, fn, recurse=True):  # pyright: ignore[reportIncompatibleMethodOverride]
        """As any module's, but a cast of the model rounds no angles, and memory that is empty is filled."""
        super()._apply(fn, recurse)
        if self.rotary_Tc is not None:
            self.rotary_Tc = rotary_table(*self.rotary_Tc.shape, device=self.rotary_Tc.device)
        return self

    def _projected(self, x_BTC: Tensor) -> Tensor:
        """(B, T, 3, H, c) queries, keys and values."""
        qkv = self.qkv(x_BTC).unflatten(2, (3, self.heads, -1))
        if self.query_scale == 1.0:
            return qkv
        return torch.cat([qkv[:, :, :1] * self.query_scale, qkv[:, :, 1:]], dim=2)  # a copy, where heads were widened

    def step(self, x_BTC: Tensor, past: LayerCache) -> Tensor:
        """`forward` for T further positions, which see those in `past` too and are added to it."""
        T = x_BTC.shape[1]
        q_BTHc, k_BTHc, v_BTHc = self._projected(x_BTC).unbind(dim=2)
        seen = past.length
        rotary = self._rotary(seen, seen + T)
        if rotary is not None:
            q_BTHc, k_BTHc = rotate(q_BTHc, rotary), rotate(k_BTHc, rotary)
        q, k, v = (part.transpose(1, 2) for part in (q_BTHc, k_BTHc, v_BTHc))
        keys, values = past.append(k, v)
        later = None if seen == 0 or T == 1 else x_BTC.new_ones(T, seen + T, dtype=torch.bool).tril(seen)
        mixed_BHTc = F.scaled_dot_product_attention(q, keys, values, later, is_causal=seen == 0)
        return self.out(mixed_BHTc.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Up, activation, down. `sparsify` makes it one call (`rarefy.fuse`)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.hidden)
        self.act = ACTIVATIONS[config.activation]()
        self.down = nn.Linear(config.hidden, config.width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        return self.down(self.act(self.up(x_BTC)))


class Block(nn.Module):
    """Attention and MLP, each beside a residual path that no norm touches.

    What the MLP adds to that path is handed on beside it: whoever reads the sum normalises it too, in the same pass.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = MLP(config)
        self.shift = config.token_shift

    def forward(self, x_BTC: Tensor, added_BTC: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x_BTC, normed_BTC = add_norm(self.attention_norm, x_BTC, added_BTC, shift=self.shift)
        x_BTC, normed_BTC = add_norm(self.mlp_norm, x_BTC, self.attention(normed_BTC), shift=self.shift)
        return x_BTC, self.mlp(normed_BTC)

    def step(self, x_BTC: Tensor, past: LayerCache) -> Tensor:
        """`forward` and the last addition, for positions that follow those in `past`."""
        x_BTC = x_BTC + self.attention.step(self._shifted("attention", self.attention_norm(x_BTC), past), past)
        return x_BTC + self.mlp(self._shifted("mlp", self.mlp_norm(x_BTC), past))

    def _shifted(self, reader: str, normed_BTC: Tensor, past: LayerCache) -> Tensor:
        return past.shifted(reader, normed_BTC) if self.shift else normed_BTC


class GPT(nn.Module):
    """Bytes to the logits of each next byte.

    Args:
        config: the shape.
        generator: draws the first weights; None: torch's global one.
    """

    def __init__(self, config: GPTConfig, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.recompute = False
        """Whether training keeps only what enters each block and runs the blocks again in the backward pass: less
        memory for activations, a forward pass more of time."""
        self.embedding = nn.Embedding(VOCABULARY, config.width)
        self.position = nn.Embedding(config.context, config.width) if config.positions == "learned" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)
        self.reset_parameters(generator)

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights as in GPT-2 (Radford et al. 2019, section 2.3): normal, those that write to the residual path
        smaller.

        The deviation of weights is 0.02 there, at width 768; here 0.02 * sqrt(768 / C), so that a neuron starts alike
        at every width, an MLP of another hidden size writes as much as one of 4 C, and attention of A features as much
        as one of C. Made for the dense model: `sparsify` rescales. With a base width the head's weights are those of
        the base over C / base, as its rate is (`rarefy.SuPar`); the others are as they were: that is rule 3.3 already.
        """
        C = self.config.width
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02, generator=generator)
            elif isinstance(module, nn.Linear):
                usual_fan_in = 4 * C if name.endswith("mlp.down") else C
                std = 0.02 * math.sqrt(768 / C * usual_fan_in / module.in_features)
                if name.endswith(("attention.out", "mlp.down")):
                    std /= math.sqrt(2 * self.config.layers)
                if name == "head" and self.config.base_width is not None:
                    std *= math.sqrt(self.config.base_width / C)
                nn.init.normal_(module.weight, std=std, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """(B, T) int64 in [0, 256) -> (B, T, 256) logits of the byte after each.

        Raises:
            ValueError: more bytes than the context.
        """
        T = tokens_BT.shape[1]
        if self.config.context < T:
            raise ValueError(f"{T} bytes are more than the context of {self.config.context}")
        x_BTC, added_BTC = self._embedded(tokens_BT, 0), None
        for block in self.blocks:
            if self.recompute and torch.is_grad_enabled():
                x_BTC, added_BTC = checkpoint(block, x_BTC, added_BTC, use_reentrant=False)
            else:
                x_BTC, added_BTC = block(x_BTC, added_BTC)
        return self.head(add_norm(self.norm, x_BTC, added_BTC)[1])

    def _embedded(self, tokens_BT: Tensor, begin: int) -> Tensor:
        x_BTC = self.embedding(tokens_BT)
        return x_BTC if self.position is None else x_BTC + self.position.weight[begin : begin + tokens_BT.shape[1]]

    def step(self, tokens_BT: Tensor, past: Cache) -> Tensor:
        """(B, T) further bytes of a text -> (B, 256) logits of the byte after the last. `past` then holds them too.

        The same as `forward` over the whole text, up to rounding, at the cost of the T new bytes.

        Raises:
            ValueError: more bytes than the context, those in `past` included.
        """
        seen, T = past.length, tokens_BT.shape[1]
        if self.config.context < seen + T:
            raise ValueError(f"{seen} + {T} bytes are more than the context of {self.config.context}")
        x_BTC = self._embedded(tokens_BT, seen)
        for block, layer in zip(self.blocks, past.layers, strict=True):
            assert isinstance(block, Block)
            x_BTC = block.step(x_BTC, layer)
        return self.head(self.norm(x_BTC[:, -1]))
