"""Small image classifiers of several families, as factories with JSON options.

Every factory returns a module with random weights of PyTorch's default initialisation; run it
under ``torch.device("meta")`` for one without weights. Inputs are ``(batch, channels, n, n)``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "leaky_relu": nn.LeakyReLU,
}


def mlp(
    inputs: int, hidden: Sequence[int], classes: int = 10, activation: str = "relu"
) -> nn.Module:
    """A multilayer perceptron on flattened images.

    Args:
        inputs: Numbers in an image.
        hidden: Widths of the hidden layers.
        classes: Length of the answer.
        activation: One of `ACTIVATIONS`.

    Returns:
        The module.
    """
    sizes, layers = [inputs, *hidden], list[nn.Module]([nn.Flatten()])
    for a, b in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(a, b), ACTIVATIONS[activation]()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], classes))


def cnn(
    channels: int,
    widths: Sequence[int] = (16, 16, 16),
    *,
    classes: int = 10,
    kernel: int = 3,
    stride: int = 2,
    activation: str = "relu",
    norm: bool = False,
) -> nn.Module:
    """Convolutions with one stride, global average pooling and a linear layer.

    The default is the network of the Small CNN Zoo: 4,970 parameters on grey images. Unterthiner et
    al. (2020), "Predicting Neural Network Accuracy from Weights", section 3 (arXiv 2002.11448).

    Args:
        channels: Channels of the images.
        widths: Channels of the convolutions.
        classes: Length of the answer.
        kernel: Size of the kernels.
        stride: Stride of every convolution.
        activation: One of `ACTIVATIONS`.
        norm: Whether BatchNorm follows every convolution.

    Returns:
        The module.
    """
    layers: list[nn.Module] = []
    for a, b in zip([channels, *widths[:-1]], widths, strict=True):
        layers.append(nn.Conv2d(a, b, kernel, stride, kernel // 2, bias=not norm))
        layers += [nn.BatchNorm2d(b)] if norm else []
        layers.append(ACTIVATIONS[activation]())
    return nn.Sequential(*layers, *_head(widths[-1], classes))


class _Average(nn.Module):
    """Global average pooling; `torch.func.vmap` has no fast rule for PyTorch's own."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def _head(width: int, classes: int) -> list[nn.Module]:
    return [_Average(), nn.Linear(width, classes)]


class _Residual(nn.Module):
    """x + conv(act(norm(conv(x)))), all of one width."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.act = ACTIVATIONS[activation]()
        self.second = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.act(self.norm(self.first(x))))


def residual(
    channels: int, width: int = 12, blocks: int = 2, classes: int = 10, activation: str = "relu"
) -> nn.Module:
    """A strided convolution, residual blocks with BatchNorm, pooling and a linear layer.

    Args:
        channels: Channels of the images.
        width: Channels of the stream.
        blocks: Number of blocks.
        classes: Length of the answer.
        activation: One of `ACTIVATIONS`.

    Returns:
        The module.
    """
    stem = nn.Conv2d(channels, width, 3, 2, 1)
    body = [_Residual(width, activation) for _ in range(blocks)]
    return nn.Sequential(stem, *body, ACTIVATIONS[activation](), *_head(width, classes))


def depthwise(
    channels: int, width: int = 16, blocks: int = 2, classes: int = 10, activation: str = "relu"
) -> nn.Module:
    """A strided convolution, depthwise and pointwise convolutions, pooling and a linear layer.

    Args:
        channels: Channels of the images.
        width: Channels.
        blocks: Pairs of a depthwise and a pointwise convolution.
        classes: Length of the answer.
        activation: One of `ACTIVATIONS`.

    Returns:
        The module.
    """
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, 2, 1), ACTIVATIONS[activation]()]
    for _ in range(blocks):
        layers += [nn.Conv2d(width, width, 3, padding=1, groups=width), nn.Conv2d(width, width, 1)]
        layers.append(ACTIVATIONS[activation]())
    return nn.Sequential(*layers, *_head(width, classes))


def plain(
    channels: int,
    widths: Sequence[int] = (16, 16, 32, 32),
    strides: Sequence[int] = (2, 1, 2, 1),
    *,
    classes: int = 10,
    activation: str = "relu",
    norm: bool = True,
) -> nn.Module:
    """Convolutions of different strides, global average pooling and a linear layer.

    Args:
        channels: Channels of the images.
        widths: Channels of the convolutions.
        strides: Their strides.
        classes: Length of the answer.
        activation: One of `ACTIVATIONS`.
        norm: Whether BatchNorm follows every convolution.

    Returns:
        The module.
    """
    layers: list[nn.Module] = []
    for a, b, stride in zip([channels, *widths[:-1]], widths, strides, strict=True):
        layers.append(nn.Conv2d(a, b, 3, stride, 1, bias=not norm))
        layers += [nn.BatchNorm2d(b)] if norm else []
        layers.append(ACTIVATIONS[activation]())
    return nn.Sequential(*layers, *_head(widths[-1], classes))


class _BasicBlock(nn.Module):
    """Two convolutions with BatchNorm beside a shortcut, which is a convolution between widths."""

    def __init__(self, before: int, width: int, stride: int, activation: str) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, width, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.act = ACTIVATIONS[activation]()
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or before != width:
            conv = nn.Conv2d(before, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.second(self.act(self.norm1(self.first(x)))))
        return self.act(y + self.shortcut(x))


def resnet(
    channels: int,
    widths: Sequence[int] = (8, 16, 32),
    *,
    blocks: int = 1,
    stem: int = 1,
    classes: int = 10,
    activation: str = "relu",
) -> nn.Module:
    """A residual network in stages: He et al. (2016), section 4.2 (arXiv 1512.03385).

    Args:
        channels: Channels of the images.
        widths: Channels of the stages; all but the first start with stride 2.
        blocks: Blocks in a stage.
        stem: Stride of the first convolution.
        classes: Length of the answer.
        activation: One of `ACTIVATIONS`.

    Returns:
        The module.
    """
    first = nn.Conv2d(channels, widths[0], 3, stem, 1, bias=False)
    body: list[nn.Module] = []
    for i, (a, b) in enumerate(zip([widths[0], *widths[:-1]], widths, strict=True)):
        body.append(_BasicBlock(a, b, 2 if i else 1, activation))
        body += [_BasicBlock(b, b, 1, activation) for _ in range(blocks - 1)]
    norm, act = nn.BatchNorm2d(widths[0]), ACTIVATIONS[activation]()
    return nn.Sequential(first, norm, act, *body, *_head(widths[-1], classes))


class Attention(nn.Module):
    """Self-attention with plain operators, which `torch.func.vmap` runs side by side.

    Args:
        width: Width of the tokens; `heads` divides it.
        heads: Number of heads.
        causal: Whether tokens see no later ones.
    """

    def __init__(self, width: int, heads: int, *, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(batch, tokens, width)`` that have looked at each other."""
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind()
        scores = q @ k.mT * (width // self.heads) ** -0.5
        if self.causal:
            later = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    """A transformer block: attention and a perceptron, each on a normalised copy of the stream.

    Args:
        width: Width of the tokens; `heads` divides it.
        heads: Attention heads.
        activation: Between the layers of the perceptron.
        expand: How many times wider those are.
        causal: Whether tokens see no later ones.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        activation: nn.Module,
        *,
        expand: int = 2,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, causal=causal)
        self.norm2, wide = nn.LayerNorm(width), expand * width
        self.mlp = nn.Sequential(nn.Linear(width, wide), activation, nn.Linear(wide, width))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(batch, tokens, width)`` after the block."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _ViT(nn.Module):
    def __init__(self, patches: nn.Conv2d, tokens: int, blocks: nn.Module, head: nn.Linear) -> None:
        super().__init__()
        width = patches.out_channels
        self.patches = patches
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.blocks, self.norm, self.head = blocks, nn.LayerNorm(width), head

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


def vit(
    channels: int,
    image: int,
    *,
    patch: int = 4,
    width: int = 16,
    blocks: int = 2,
    heads: int = 2,
    classes: int = 10,
    activation: str = "gelu",
) -> nn.Module:
    """A small vision transformer with averaged tokens.

    Args:
        channels: Channels of the images.
        image: Pixels along a side; `patch` divides it.
        patch: Pixels along a side of a patch.
        width: Width of the tokens; `heads` divides it.
        blocks: Number of blocks.
        heads: Attention heads.
        classes: Length of the answer.
        activation: One of `ACTIVATIONS`.

    Returns:
        The module.
    """
    return _ViT(
        nn.Conv2d(channels, width, patch, patch),
        (image // patch) ** 2,
        nn.Sequential(*[Block(width, heads, ACTIVATIONS[activation]()) for _ in range(blocks)]),
        nn.Linear(width, classes),
    )
