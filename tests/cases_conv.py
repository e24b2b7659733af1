"""Small convolutional networks, true to the structure of the published ones; table in `cases`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv_bn(c_in: int, c_out: int, k: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, then batch norm."""
    conv = nn.Conv2d(c_in, c_out, k, stride, k // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out))


def head(c: int, classes: int = 7) -> nn.Sequential:
    """Global average pool and a linear classifier."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, classes))


def vgg() -> nn.Module:
    """Stacked conv-BN-ReLU, max pool, then flatten (C, H, W) into a linear classifier."""
    features = nn.Sequential(
        conv_bn(3, 12), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        conv_bn(12, 20), nn.ReLU(inplace=True), conv_bn(20, 28), nn.ReLU(inplace=True),
        nn.MaxPool2d(2), nn.AdaptiveAvgPool2d((3, 2)),
    )  # fmt: skip
    classifier = nn.Sequential(
        nn.Linear(28 * 6, 22), nn.ReLU(True), nn.Dropout(), nn.Linear(22, 18), nn.Linear(18, 7)
    )
    return nn.Sequential(features, nn.Flatten(), classifier)


class ResidualBlock(nn.Module):
    """torchvision's BasicBlock."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        same = c_in == c_out and stride == 1
        self.downsample = None if same else conv_bn(c_in, c_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        identity = x if self.downsample is None else self.downsample(x)
        out += identity
        return self.relu(out)


class ResNet18(nn.Module):
    """torchvision's resnet18: stem, four stages of two blocks, pool, fc."""

    def __init__(self, widths: tuple[int, ...] = (12, 16, 20, 28)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        c, stages = widths[0], []
        for i, w in enumerate(widths):
            blocks = ResidualBlock(c, w, 1 if i == 0 else 2), ResidualBlock(w, w, 1)
            stages.append(nn.Sequential(*blocks))
            c = w
        self.layers = nn.Sequential(*stages)
        self.fc = nn.Linear(c, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.bn1(self.conv1(x)).relu_())
        x = F.adaptive_avg_pool2d(self.layers(x), (1, 1))
        return self.fc(torch.flatten(x, 1))


class DenseLayer(nn.Module):
    """DenseNet's BN-ReLU-conv1x1-BN-ReLU-conv3x3 over the concatenation of all earlier maps."""

    def __init__(self, c_in: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(c_in), nn.Conv2d(c_in, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, maps: list[Tensor]) -> Tensor:
        h = self.conv1(self.norm1(torch.cat(maps, 1)).relu())
        return self.conv2(self.norm2(h).relu())


class DenseNet(nn.Module):
    """Two dense blocks with a transition between them."""

    def __init__(self, growth: int = 5, c: int = 12) -> None:
        super().__init__()
        self.stem = conv_bn(3, c)
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for layers in (2, 3):
            block = [DenseLayer(c + i * growth, growth) for i in range(layers)]
            self.blocks.append(nn.ModuleList(block))
            c += layers * growth
            self.transitions.append(
                nn.Sequential(
                    nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, c // 2, 1), nn.AvgPool2d(2)
                )
            )
            c //= 2
        self.classifier = nn.Linear(c, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block, transition in zip(self.blocks, self.transitions, strict=True):
            maps = [x]
            for layer in block:
                maps.append(layer(maps))
            x = transition(torch.cat(maps, 1))
        return self.classifier(x.mean((2, 3)))


class SqueezeExcite(nn.Module):
    """Scale channels by a gate computed from their spatial means."""

    def __init__(self, c: int, squeezed: int, gate: type[nn.Module] = nn.Hardsigmoid) -> None:
        super().__init__()
        self.fc1, self.fc2, self.gate = nn.Conv2d(c, squeezed, 1), nn.Conv2d(squeezed, c, 1), gate()

    def forward(self, x: Tensor) -> Tensor:
        s = F.adaptive_avg_pool2d(x, 1)
        return x * self.gate(self.fc2(F.relu(self.fc1(s))))


class InvertedResidual(nn.Module):
    """MobileNetV3: expand, depthwise, squeeze-excite, project, residual where shapes allow."""

    def __init__(self, c_in: int, c_mid: int, c_out: int, k: int, stride: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            conv_bn(c_in, c_mid, 1), nn.Hardswish(True),
            conv_bn(c_mid, c_mid, k, stride, groups=c_mid), nn.Hardswish(True),
            SqueezeExcite(c_mid, c_mid // 4), conv_bn(c_mid, c_out, 1),
        )  # fmt: skip
        self.residual = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.residual else self.block(x)


def mobilenet_v3() -> nn.Module:
    """Stem, three inverted residuals, 1x1 convolution, two-layer classifier."""
    return nn.Sequential(
        conv_bn(3, 12, 3, 2), nn.Hardswish(),
        InvertedResidual(12, 20, 12, 3, 1), InvertedResidual(12, 28, 16, 5, 2),
        InvertedResidual(16, 36, 16, 5, 1), conv_bn(16, 40, 1), nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 24), nn.Hardswish(),
        nn.Dropout(0.2, inplace=True), nn.Linear(24, 7),
    )  # fmt: skip


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of `groups` equal pieces."""
    b, c, h, w = x.shape
    return x.view(b, groups, c // groups, h, w).transpose(1, 2).contiguous().view(b, c, h, w)


class ShuffleUnit(nn.Module):
    """ShuffleNetV2's unit: split (stride 1) or copy (stride 2), convolve a branch, cat, shuffle."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        half, self.stride = c_out // 2, stride
        c = c_in if stride == 2 else c_in // 2
        self.branch1 = nn.Sequential(
            conv_bn(c, c, 3, stride, groups=c), conv_bn(c, half, 1), nn.ReLU()
        )
        self.branch2 = nn.Sequential(
            conv_bn(c, half, 1), nn.ReLU(), conv_bn(half, half, 3, stride, groups=half),
            conv_bn(half, half, 1), nn.ReLU(),
        )  # fmt: skip
        if stride == 1:
            self.branch1 = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x1, x2 = x.chunk(2, dim=1) if self.stride == 1 else (x, x)
        return channel_shuffle(torch.cat((self.branch1(x1), self.branch2(x2)), dim=1), 2)


def shufflenet_v2() -> nn.Module:
    """Stem, two stages of units, 1x1 convolution, classifier."""
    return nn.Sequential(
        conv_bn(3, 12, 3, 2), nn.ReLU(), ShuffleUnit(12, 20, 2), ShuffleUnit(20, 20, 1),
        ShuffleUnit(20, 20, 1), ShuffleUnit(20, 28, 2), ShuffleUnit(28, 28, 1),
        conv_bn(28, 36, 1), nn.ReLU(), head(36),
    )  # fmt: skip


class GroupedShuffle(nn.Module):
    """ShuffleNet v1: grouped 1x1, shuffle, depthwise, grouped 1x1, residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv_bn(3, 12), head(12)
        self.reduce, self.depthwise = conv_bn(12, 24, 1, groups=3), conv_bn(24, 24, groups=24)
        self.expand = conv_bn(24, 12, 1, groups=3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        h = channel_shuffle(self.reduce(x).relu(), 3)
        return self.head((x + self.expand(self.depthwise(h))).relu())


class Fire(nn.Module):
    """SqueezeNet: squeeze by 1x1, expand by 1x1 and 3x3, concatenate."""

    def __init__(self, c: int, squeeze: int, expand1: int, expand3: int) -> None:
        super().__init__()
        self.squeeze, self.expand1 = nn.Conv2d(c, squeeze, 1), nn.Conv2d(squeeze, expand1, 1)
        self.expand3 = nn.Conv2d(squeeze, expand3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1(x).relu(), self.expand3(x).relu()], 1)


def squeezenet() -> nn.Module:
    """Fire modules and a convolutional classifier."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, 2), nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(16, 5, 12, 10), Fire(22, 6, 13, 15), nn.MaxPool2d(3, 2, ceil_mode=True),
        Fire(28, 7, 18, 18), nn.Conv2d(36, 7, 1), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 1)),
        nn.Flatten(),
    )  # fmt: skip


class Inception(nn.Module):
    """GoogLeNet's four parallel branches, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = conv_bn(3, 12), head(10 + 14 + 9 + 5)
        self.b1 = conv_bn(12, 10, 1)
        self.b2 = nn.Sequential(conv_bn(12, 8, 1), nn.ReLU(), conv_bn(8, 14))
        self.b3 = nn.Sequential(conv_bn(12, 6, 1), nn.ReLU(), conv_bn(6, 9, 5))
        self.b4 = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv_bn(12, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(torch.cat([b(x).relu() for b in (self.b1, self.b2, self.b3, self.b4)], 1))


class UNet(nn.Module):
    """Two levels down and up with skip concatenations and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.mid = conv_bn(3, 10), conv_bn(10, 16), conv_bn(16, 28)
        self.up2, self.dec2 = nn.ConvTranspose2d(28, 14, 2, 2), conv_bn(14 + 16, 18)
        self.up1, self.dec1 = nn.ConvTranspose2d(18, 9, 2, 2), conv_bn(9 + 10, 12)
        self.out = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x1 = self.down1(x).relu()
        x2 = self.down2(F.max_pool2d(x1, 2)).relu()
        h = self.mid(F.max_pool2d(x2, 2)).relu()
        h = self.dec2(torch.cat([x2, self.up2(h)], dim=1)).relu()
        h = self.dec1(torch.cat([x1, self.up1(h)], dim=1)).relu()
        return self.out(h)


class UNetUpsample(nn.Module):
    """One level of bilinear upsampling with a skip, reflect padding and a residual output."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Conv2d(3, 10, 3, padding=1, padding_mode="reflect")
        self.mid, self.dec = nn.Conv2d(10, 16, 3, 2, 1), nn.Conv2d(26, 3, 3, padding=1)
        self.up = nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.enc(x), 0.1)
        up = self.up(F.silu(self.mid(h)))
        up = F.interpolate(up, size=h.shape[-2:], mode="nearest")
        return torch.sigmoid(x + self.dec(torch.cat((h, F.pad(up, (0, 0, 0, 0))), 1)))


def grouped_se() -> nn.Module:
    """RegNet-like: grouped and depthwise convolutions with squeeze-excite."""
    return nn.Sequential(
        conv_bn(3, 12, 3, 2), nn.ReLU(), conv_bn(12, 20, 1), nn.ReLU(),
        conv_bn(20, 20, 3, groups=4), nn.ReLU(), SqueezeExcite(20, 6, nn.Sigmoid),
        conv_bn(20, 20, 3, groups=20), nn.SiLU(), conv_bn(20, 18, 3, groups=2), nn.ReLU(), head(18),
    )  # fmt: skip


def depth_multiplier() -> nn.Module:
    """Depthwise convolution with three filters per channel."""
    return nn.Sequential(
        nn.Conv2d(3, 10, 3), nn.ReLU(), nn.Conv2d(10, 30, 3, groups=10), nn.GELU(), head(30)
    )


def pixel_shuffle() -> nn.Module:
    """ESPCN super-resolution: the last channels become 2 x 2 pixels; an inner shuffle as well."""
    return nn.Sequential(
        nn.Conv2d(1, 12, 5, padding=2), nn.Tanh(), nn.PixelUnshuffle(2), nn.Conv2d(48, 20, 1),
        nn.Tanh(), nn.PixelShuffle(2), nn.Conv2d(5, 28, 3, padding=1), nn.ReLU(),
        nn.Conv2d(28, 4, 3, padding=1), nn.PixelShuffle(2),
    )  # fmt: skip


def group_norm() -> nn.Module:
    """Convolutions with group norm, and one with a single group."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(3, 12), nn.ReLU(),
        nn.Conv2d(12, 20, 3, 2, 1), nn.GroupNorm(4, 20), nn.SiLU(),
        nn.Conv2d(20, 28, 3), nn.GroupNorm(1, 28), nn.ReLU(), head(28),
    )  # fmt: skip


def instance_norm() -> nn.Module:
    """Affine instance norm, once with running statistics; reflection padding."""
    return nn.Sequential(
        nn.ReflectionPad2d(1), nn.Conv2d(3, 12, 3), nn.InstanceNorm2d(12, affine=True), nn.ReLU(),
        nn.Conv2d(12, 20, 3, 2, 1), nn.InstanceNorm2d(20, affine=True, track_running_stats=True),
        nn.ELU(), nn.LPPool2d(2, 2), head(20),
    )  # fmt: skip


class FiLM(nn.Module):
    """Feature-wise affine modulation of two convolutions by a conditioning vector."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 20, 3, padding=1)
        self.film = nn.Sequential(nn.Linear(5, 28), nn.SiLU(), nn.Linear(28, 2 * (12 + 20)))
        self.head = head(20)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        gamma1, beta1, gamma2, beta2 = self.film(cond)[:, :, None, None].split([12, 12, 20, 20], 1)
        h = F.relu((1 + gamma1) * self.conv1(x) + beta1)
        return self.head(F.relu(torch.addcmul(beta2, gamma2, self.conv2(h))))


class WaveNet(nn.Module):
    """Gated dilated causal conv1d with residual and skip paths; output per time step."""

    def __init__(self, c: int = 12, skip: int = 20, classes: int = 7) -> None:
        super().__init__()
        self.inp = nn.Conv1d(1, c, 1)
        self.filters = nn.ModuleList(nn.Conv1d(c, 18, 2, dilation=2**i) for i in range(3))
        self.mixes = nn.ModuleList(nn.Conv1d(9, c, 1) for _ in range(3))
        self.skips = nn.ModuleList(nn.Conv1d(9, skip, 1) for _ in range(3))
        self.out = nn.Sequential(
            nn.ReLU(), nn.Conv1d(skip, 28, 1), nn.ReLU(), nn.Conv1d(28, classes, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.inp(x), 0
        for conv, mix, skip in zip(self.filters, self.mixes, self.skips, strict=True):
            a, b = conv(F.pad(x, (conv.dilation[0], 0))).chunk(2, dim=1)
            h = a.tanh() * b.sigmoid()
            x, total = x + mix(h), total + skip(h)
        return self.out(total)


def conv3d() -> nn.Module:
    """3D convolutions over a small volume, flattened."""
    return nn.Sequential(
        nn.Conv3d(2, 12, 3, padding=1), nn.BatchNorm3d(12), nn.ReLU(), nn.MaxPool3d(2),
        nn.Conv3d(12, 20, 3, padding=1), nn.ReLU(), nn.AvgPool3d((1, 2, 2)),
        nn.Conv3d(20, 14, 1), nn.ReLU6(), nn.Flatten(), nn.Linear(14 * 3, 7),
    )  # fmt: skip


def prelu() -> nn.Module:
    """Learned slopes: one per channel, and one for all."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.PReLU(12), nn.Conv2d(12, 20, 3, 2), nn.PReLU(), nn.Flatten(),
        nn.Linear(20 * 4, 28), nn.PReLU(28), nn.Linear(28, 7),
    )  # fmt: skip


class AvgMaxPool(nn.Module):
    """Average and max pools of one map, concatenated into the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 12, 3), nn.Conv2d(12, 20, 3, 2)
        self.fc = nn.Linear(2 * 20 * 2, 7)

    def forward(self, x: Tensor) -> Tensor:
        h = F.mish(self.conv2(F.softplus(self.conv1(x))))
        pools = [F.adaptive_avg_pool2d(h, (2, 1)), F.adaptive_max_pool2d(h, (1, 2)).mT]
        return self.fc(torch.cat(pools, dim=1).flatten(1))


def lenet() -> nn.Module:
    """Lenet-like: tanh, average pool, flatten, softmax output."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16 * 4 * 4, 28), nn.Tanh(), nn.Linear(28, 20),
        nn.Tanh(), nn.Linear(20, 10), nn.Softmax(dim=-1),
    )  # fmt: skip


class DynamicConv(nn.Module):
    """Convolution kernels mixed per sample from three candidates, as one grouped convolution."""

    def __init__(self, c_in: int = 12, c_out: int = 20, kernels: int = 3) -> None:
        super().__init__()
        self.stem, self.route, self.head = (
            nn.Conv2d(3, c_in, 3),
            nn.Linear(c_in, kernels),
            head(c_out),
        )
        self.weight = nn.Parameter(torch.randn(kernels, c_out, c_in, 3, 3) / (9 * c_in) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        b, c, h, w = x.shape
        mix = self.route(x.mean((2, 3))).softmax(-1)
        weight = torch.einsum("bk,koihw->boihw", mix, self.weight).flatten(0, 1)
        out = F.conv2d(x.reshape(1, b * c, h, w), weight, groups=b)
        return self.head(out.view(b, -1, h - 2, w - 2).relu())


class FNO(nn.Module):
    """Fourier neural operator in one dimension: spectral and pointwise paths."""

    def __init__(self, c: int = 12, modes: int = 5) -> None:
        super().__init__()
        self.modes, self.lift = modes, nn.Linear(2, c)
        shape = c, c, modes, 2
        self.spectral = nn.ParameterList(nn.Parameter(torch.randn(shape) / c) for _ in range(2))
        self.local = nn.ModuleList(nn.Conv1d(c, c, 1) for _ in range(2))
        self.out = nn.Sequential(nn.Linear(c, 28), nn.GELU(), nn.Linear(28, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.lift(x).permute(0, 2, 1)
        for weight, local in zip(self.spectral, self.local, strict=True):
            modes = torch.fft.rfft(x)[..., : self.modes]
            mixed = torch.einsum("bim,iom->bom", modes, torch.view_as_complex(weight))
            x = F.gelu(torch.fft.irfft(mixed, n=x.shape[-1]) + local(x))
        return self.out(x.permute(0, 2, 1))


class ConvMixer(nn.Module):
    """Patch embedding, residual depthwise convolution, pointwise convolution."""

    def __init__(self, c: int = 20, depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, c, 4, 4), nn.GELU(), nn.BatchNorm2d(c))
        self.spatial = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(c, c, 5, padding="same", groups=c), nn.GELU(), nn.BatchNorm2d(c)
            )
            for _ in range(depth)
        )
        self.mix = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, c, 1), nn.GELU(), nn.BatchNorm2d(c)) for _ in range(depth)
        )
        self.head = head(c)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for spatial, mix in zip(self.spatial, self.mix, strict=True):
            x = mix(spatial(x) + x)
        return self.head(x)


class AutoEncoder(nn.Module):
    """Convolutional variational autoencoder at its mean: returns a dict of three tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.enc = nn.Sequential(nn.Conv2d(1, 12, 3, 2, 1), nn.ReLU(), nn.Conv2d(12, 20, 3, 2, 1))
        self.mean, self.log_var = nn.Linear(20 * 4, 5), nn.Linear(20 * 4, 5)
        self.fc = nn.Linear(5, 28 * 4)
        self.dec = nn.Sequential(
            nn.ReLU(), nn.ConvTranspose2d(28, 14, 4, 2, 1), nn.BatchNorm2d(14), nn.ReLU(),
            nn.ConvTranspose2d(14, 14, 3, 1, 1, groups=7), nn.ReLU(),
            nn.ConvTranspose2d(14, 1, 4, 2, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = F.relu(self.enc(x)).flatten(1)
        mean, log_var = self.mean(h), self.log_var(h).clamp(-5, 5)
        out = self.dec(self.fc(mean).unflatten(1, (28, 2, 2)))
        return {"mean": mean, "scale": (0.5 * log_var).exp(), "recon": out}
