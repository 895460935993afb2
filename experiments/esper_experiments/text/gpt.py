"""The host `char_gpt`: a small GPT whose maps have names that sites can be globbed by.

`blocks.*.attn.qkv`, `blocks.*.attn.out`, `blocks.*.fc1`, `blocks.*.fc2`, and `head`; to widen an
MLP, the span `blocks.*.fc1->blocks.*.fc2`. No map has a bias, so that a seed on one has none, and a
rank-one seed over a single map has the parameters of LoRA's rank one.

Shapes: B = sequences, L = positions, D = width, V = characters.
"""

from pathlib import Path

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from esper.surgery.checkpoint_folder import read_checkpoint
from esper.training.hosts import HOSTS, Host
from esper.training.tasks import TaskData
from esper_experiments.text.adapters import Adapter, add_adapter

# sequences of one pass without gradient, so that a whole split never lies on the device at once
PIECE = 256
# of the embeddings and of the head; maps are drawn with 1 / sqrt(inputs). Smaller ones keep small
# networks longer at the loss of character pairs.
EMBEDDING_STD, HEAD_STD = 0.5, 0.02


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Same shape."""
        B, L, D = x_BLD.shape
        q, k, v = self.qkv(x_BLD).view(B, L, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        y: Tensor = self.out(mixed.transpose(1, 2).reshape(B, L, D))
        return y


class Block(nn.Module):
    """Attention and an MLP, each after a norm and beside a skip connection."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.fc1 = nn.Linear(width, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Same shape."""
        x_BLD = x_BLD + self.attn(self.norm1(x_BLD))
        y: Tensor = x_BLD + self.fc2(F.gelu(self.fc1(self.norm2(x_BLD))))
        return y


class Gpt(nn.Module):
    """Maps characters `[B, L]` int64 to logits of the next ones, `[B, L, V]`."""

    def __init__(self, options: "CharGpt", positions: int, characters: int) -> None:
        super().__init__()
        width = options.width
        self.token = nn.Embedding(characters, width)
        self.position = nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(
            Block(width, options.heads, options.hidden or 4 * width) for _ in range(options.layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=EMBEDDING_STD)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
        nn.init.normal_(self.head.weight, std=HEAD_STD)
        with torch.no_grad():
            for name, weight in self.named_parameters():
                # what writes to the skip connections, smaller by their number; as in GPT-2
                if name.endswith(("attn.out.weight", "fc2.weight")):
                    weight.mul_((2 * options.layers) ** -0.5)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """The logits; without gradient, `PIECE` sequences at a time."""
        if not torch.is_grad_enabled() and len(tokens_BL) > PIECE:
            return torch.cat([self(piece) for piece in tokens_BL.split(PIECE)])
        x_BLD = self.token(tokens_BL) + self.position.weight[: tokens_BL.shape[1]]
        for block in self.blocks:
            x_BLD = block(x_BLD)
        logits: Tensor = self.head(self.norm(x_BLD))
        return logits


@HOSTS.register("char_gpt")
class CharGpt(Host):
    """Sizes; and for adapting, where the weights come from and what stays as it is."""

    layers: PositiveInt = Field(4, description="Transformer blocks.")
    width: PositiveInt = Field(128, description="Features of a position; a multiple of heads.")
    heads: PositiveInt = Field(4, description="Attention heads of a block.")
    hidden: PositiveInt | None = Field(None, description="Of each MLP; None: 4 times the width.")
    pretrained: Path | None = Field(
        None, description="Checkpoint of this host alone, as `esper run --save` writes it."
    )
    frozen: bool = Field(False, description="Whether the host's own weights stay as they are.")
    adapter: Adapter | None = Field(None, description="LoRA or AdaLoRA, on a frozen host.")
    tf32: bool = Field(False, description="Matrix products in TF32 on a GPU, in the whole process.")

    @model_validator(mode="after")
    def _heads_fit(self) -> "CharGpt":
        if self.width % self.heads:
            raise ValueError(
                f"width must be a multiple of heads ({self.heads}), but got {self.width}."
            )
        return self

    @model_validator(mode="after")
    def _adapter_needs_frozen(self) -> "CharGpt":
        if self.adapter is not None and not self.frozen:
            raise ValueError("frozen must be true for a host with an adapter, but is false.")
        return self

    def build(self, data: TaskData) -> nn.Module:
        """A `Gpt`, with its adapter if any.

        Raises:
            ValueError: If the checkpoint does not fit, or `peft` is missing for an adapter.
        """
        if self.tf32:
            torch.set_float32_matmul_precision("high")
        model = Gpt(self, data.inputs, data.outputs)
        if self.pretrained is not None:
            load_weights(model, self.pretrained)
        model.requires_grad_(not self.frozen)
        if self.adapter is not None:
            add_adapter(model, self.adapter)
        return model


def load_weights(model: nn.Module, folder: Path) -> None:
    """Give a host without a lattice the weights of a checkpoint.

    Raises:
        ValueError: If the checkpoint is of another host.
    """
    _, tensors = read_checkpoint(folder)
    prefix = "model."
    weights = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f"pretrained must be a checkpoint of a host of these sizes, but {folder} is not: "
            f"{error}"
        ) from None
