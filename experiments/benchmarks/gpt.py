"""A GPT-2-small-sized host, and how it is usually trained on one GPU.

The recipe is that of nanoGPT: fp32 weights under bf16 autocast, flash attention, tied embeddings,
fused AdamW with betas 0.9 and 0.95, gradients clipped at 1, `torch.compile`. Source: Radford et
al., "Language models are unsupervised multitask learners", 2019, for the sizes.

Shapes: B = batch, T = positions, D = width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Size:
    """Sizes of the host and of its batch; the defaults are GPT-2 small's."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 50304
    positions: int = 1024
    batch: int = 16


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.out = nn.Linear(size.width, size.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Same shape."""
        B, T, D = x_BTD.shape
        q, k, v = self.qkv(x_BTD).view(B, T, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y: Tensor = self.out(mixed.transpose(1, 2).reshape(B, T, D))
        return y


class MLP(nn.Module):
    """Two linear layers with a GELU; its output is the site of the seeds."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.fc1 = nn.Linear(size.width, 4 * size.width)
        self.fc2 = nn.Linear(4 * size.width, size.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Same shape."""
        y: Tensor = self.fc2(F.gelu(self.fc1(x_BTD)))
        return y


class Block(nn.Module):
    """One layer of the host."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        self.attention, self.mlp = Attention(size), MLP(size)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Same shape."""
        x_BTD = x_BTD + self.attention(self.norm1(x_BTD))
        y: Tensor = x_BTD + self.mlp(self.norm2(x_BTD))
        return y


class GPT(nn.Module):
    """Maps tokens and their successors, `[B, T]` int64, to the mean loss."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.token = nn.Embedding(size.vocabulary, size.width)
        self.position = nn.Embedding(size.positions, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        self.apply(_initialise)
        self.head.weight = self.token.weight

    def logits(self, tokens_BT: Tensor) -> Tensor:
        """Of the next token, `[B, T, V]`."""
        positions = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.token(tokens_BT) + self.position(positions)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        y: Tensor = self.head(self.norm(x_BTD))
        return y

    def forward(self, tokens_BT: Tensor, next_BT: Tensor) -> Tensor:
        """Cross-entropy in nats."""
        logits = self.logits(tokens_BT)
        return F.cross_entropy(logits.flatten(0, 1).float(), next_BT.flatten())


def make_optimizer(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices only."""
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": 0.1},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = params[0].is_cuda
    return torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=fused)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
