"""Static hypernetworks: the paper's counts of parameters, and kernels put together by hand."""

import pytest
import torch
from torch import Tensor, nn

from datasets_zoo.experiments.networks import two_convolutions, wide_resnet
from wspace.errors import HyperError
from wspace.hyper import HyperNetwork, TiledHead
from wspace.testing import assert_close

KERNELS = "blocks.*.conv?.weight"


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def tiles(hyper: HyperNetwork) -> int:
    return sum(w.numel for w in hyper.weights) // (16 * 16 * 9)


def test_mnist_counts_of_the_paper() -> None:
    """12,544 weights from 4,240 parameters, and a vector of 4."""
    net = two_convolutions()
    hyper = HyperNetwork(net, None, TiledHead(4), select="3.weight")
    assert hyper.generated == 7 * 7 * 16 * 16 == 12_544
    assert count(hyper.head) == 4_240 + 4
    assert count(hyper) == count(net) - 12_544 + 4_244


@pytest.mark.parametrize(
    ("widen", "number", "kernels", "parameters"),
    [(1, 242, 557_568, 91_408), (2, 966, 2_225_664, 137_744)],
)
def test_wide_resnet_counts_of_the_paper(
    widen: int, number: int, kernels: int, parameters: int
) -> None:
    with torch.device("meta"):
        net = wide_resnet(40, widen)
    hyper = HyperNetwork(
        net.to_empty(device="cpu"), None, TiledHead(64), select=KERNELS, init="default"
    )
    assert (tiles(hyper), hyper.generated, count(hyper.head)) == (number, kernels, parameters)
    assert len(hyper.weights) == 36


@pytest.mark.parametrize(("depth", "widen"), [(10, 1), (16, 1), (10, 2)])
def test_count_formula(depth: int, widen: int) -> None:
    """Nz tiles + d (Nz + 1) N_in + f² N_out (d + 1)."""
    hyper = HyperNetwork(
        wide_resnet(depth, widen), None, TiledHead(5, hidden=7), select=KERNELS, init="default"
    )
    expected = 5 * tiles(hyper) + 7 * (5 + 1) * 16 + 9 * 16 * (7 + 1)
    assert count(hyper.head) == expected


def test_wide_resnet_has_the_published_size() -> None:
    """WRN-40-1 of Zagoruyko and Komodakis (2016), table 4: 0.6 M parameters; WRN-40-2: 2.2 M."""
    with torch.device("meta"):
        sizes = [count(wide_resnet(40, k)) for k in (1, 2)]
    assert [round(n / 1e6, 1) for n in sizes] == [0.6, 2.2]


def kernel(z: Tensor, first: nn.Linear, last: nn.Linear, f: int) -> Tensor:
    """The paper's equations for one basic kernel, input channel by input channel."""
    d = last.in_features
    columns = []
    for i in range(first.out_features // d):
        a = first.weight[i * d : (i + 1) * d] @ z + first.bias[i * d : (i + 1) * d]
        columns.append((last.weight @ a + last.bias).reshape(-1, f, f))
    return torch.stack(columns, 1)  # (out, in, f, f)


def test_kernels_follow_the_equations(float64: None) -> None:
    """Tiles are laid out by output, then by input channels, each with a vector of its own."""
    net = nn.Sequential(nn.Conv2d(3, 6, 5, bias=False), nn.Conv2d(6, 4, 5, bias=False))
    head = TiledHead(4, basic=(3, 2), hidden=5)
    hyper = HyperNetwork(net, None, head, init="default")
    made = hyper.generate()
    (part,) = head.kernels
    z = iter(part.get_parameter("z"))
    for name, rows, columns in (("0.weight", 3, 1), ("1.weight", 2, 2)):
        expected = torch.cat([
            torch.cat([kernel(next(z), part.first, part.last, 5) for _ in range(columns)], 1)
            for _ in range(rows)
        ])  # fmt: skip
        assert_close(made[name], expected)


def test_wrong_layouts_are_seen(float64: None) -> None:
    """The test above tells input from output channels, and one tile's vector from another's."""
    net = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False))
    head = TiledHead(4, basic=(2, 2))
    made = HyperNetwork(net, None, head, init="default").generate()["0.weight"]
    with pytest.raises(AssertionError):
        assert_close(made, made.transpose(0, 1))
    with pytest.raises(AssertionError):
        assert_close(made[:2], made[2:])


def test_convolution_with_made_kernels(float64: None) -> None:
    net = wide_resnet(10, channels=1).eval()
    hyper = HyperNetwork(net, None, TiledHead(6), select=KERNELS).eval()
    x = torch.randn(3, 1, 8, 8)
    hyper.write_to(net)
    assert_close(hyper.run(None, x), net(x))
    made = hyper.generate()
    made[next(iter(made))] *= 1.1
    with pytest.raises(AssertionError):  # the kernels matter
        assert_close(hyper.run_with(made, x), net(x))


def test_made_kernels_have_the_variance_of_the_rule() -> None:
    """Tiles of one generator, yet fan-in of the whole kernel."""
    torch.manual_seed(0)
    hyper = HyperNetwork(wide_resnet(16), None, TiledHead(64), select=KERNELS)
    ratios = [x.detach().square().mean() * x[0].numel() / 2 for x in hyper.generate().values()]
    assert min(ratios) > 0.8 and max(ratios) < 1.25


def test_channels_that_do_not_fit() -> None:
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3))
    with pytest.raises(HyperError, match=r"0\.weight \(16, 3, 3, 3\)"):
        HyperNetwork(net, None, TiledHead(4), select="*.weight")


def test_depth_that_is_none() -> None:
    with pytest.raises(ValueError, match="6 n"):
        wide_resnet(12)
