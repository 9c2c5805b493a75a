"""Encoders shaped like MiniLM-L6 (Wang et al., 2020) and BERT-base (Devlin et al., 2018), with random weights."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

SEQUENCE = 128
VOCABULARY = 30522


def minilm() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Six layers of width 384 with 12 heads (10.6 M parameters without embeddings), and example token ids [1, 128]."""
    return _ready(Encoder(6, 384, 12, 1536))


def bert_base() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """Twelve layers of width 768 with 12 heads (85 M parameters without embeddings), and example token ids [1, 128]."""
    return _ready(Encoder(12, 768, 12, 3072))


def _ready(model: nn.Module) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                # The initialization of BERT.
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model.eval(), (torch.randint(0, VOCABULARY, (1, SEQUENCE), generator=generator),)


class Encoder(nn.Module):
    """Embeddings, and `layers` post-norm transformer layers."""

    def __init__(self, layers: int, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(torch.zeros(1, SEQUENCE, width))
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList([Layer(width, heads, inner) for _ in range(layers)])

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids int64 [N, 128] -> hidden states [N, 128, width]."""
        x = self.norm(self.tokens(ids) + self.positions)
        for layer in self.layers:
            x = layer(x)
        result: torch.Tensor = x
        return result


class Layer(nn.Module):
    """Self-attention and a GELU feed-forward layer, each followed by a residual add and a layer norm."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, S, width] -> [N, S, width]."""
        n, s, width = x.shape

        def split(t: torch.Tensor) -> torch.Tensor:
            return t.view(n, s, self.heads, width // self.heads).transpose(1, 2)

        mixed = functional.scaled_dot_product_attention(split(self.query(x)), split(self.key(x)), split(self.value(x)))
        x = self.norm1(x + self.out(mixed.transpose(1, 2).reshape(n, s, width)))
        result: torch.Tensor = self.norm2(x + self.down(functional.gelu(self.up(x))))
        return result
