"""Neural fields: forward maps, likelihood, steps at test time, initial weights."""

from math import cos, floor, pi, sin, sqrt

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.func import functional_call

import wspace
from datasets_zoo.inr import Siren
from wspace.errors import HyperError
from wspace.hyper import FiLMHead, HyperNetwork, PerTensorHead
from wspace.hyper.fields import (
    InitialField,
    PixelSensors,
    SensorEncoder,
    SineField,
    gaussian_nll,
    psnr,
    radon,
    read,
    refine,
    sine_field,
)
from wspace.testing import assert_close, assert_same
from wspace.zoo.images import grid

SIZES = (2, 7, 5, 3)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def field(seed: int = 0) -> SineField:
    made = SineField(SIZES, omega=4.0)
    made.draw(generator(seed))
    return made.double()


def stacked(count: int) -> dict[str, Tensor]:
    every = [dict(field(i).named_parameters()) for i in range(count)]
    return {n: torch.stack([s[n].detach() for s in every]) for n in every[0]}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


# --- the field ----------------------------------------------------------------------


def test_it_is_the_siren_of_the_zoo() -> None:
    mine, theirs = field(), Siren(SIZES, omega=4.0).double()
    theirs.load_state_dict(mine.state_dict())
    x = random(11, 2)
    assert_same(theirs(x), mine(x))


def test_draw_stays_in_its_bounds() -> None:
    made = SineField((50, 400, 300), omega=30.0)
    made.draw(generator(1))
    first, second = (layer.get_parameter("weight") for layer in made.layers)
    assert 0.9 / 50 < float(first.detach().abs().max()) <= 1 / 50
    bound = sqrt(6 / 400) / 30
    assert 0.9 * bound < float(second.detach().abs().max()) <= bound
    again = SineField((50, 400, 300), omega=30.0)
    again.draw(generator(1))
    assert_same(dict(made.state_dict()), dict(again.state_dict()))


# --- forward maps ---------------------------------------------------------------------


def naive(image: Tensor, angle: float, s: float, samples: int) -> float:
    """A line integral by a loop over points and over the four pixels around each."""
    size, total = len(image), 0.0
    step = 2 * sqrt(2) / samples
    for k in range(samples):
        t = (k + 0.5) * step - sqrt(2)
        u = (s * cos(angle) - t * sin(angle) + 1) * (size - 1) / 2
        v = (s * sin(angle) + t * cos(angle) + 1) * (size - 1) / 2
        for i in (floor(u), floor(u) + 1):
            for j in (floor(v), floor(v) + 1):
                if 0 <= i < size and 0 <= j < size:
                    total += step * (1 - abs(u - i)) * (1 - abs(v - j)) * float(image[i, j])
    return total


def test_radon_is_the_naive_integral() -> None:
    size, bins, samples = 6, 5, 17
    angles = torch.tensor([0.0, 0.3, pi / 2, 2.0])
    lines = radon(size, angles, bins, samples=samples, dtype=torch.float64)
    image = random(size, size)
    found = lines(image.reshape(1, -1, 1))[0, :, 0].view(4, bins)
    offsets = torch.linspace(-sqrt(2), sqrt(2), bins, dtype=torch.float64)
    expected = [[naive(image, float(a), float(s), samples) for s in offsets] for a in angles]
    assert_close(torch.tensor(expected, dtype=torch.float64), found)
    with pytest.raises(AssertionError):  # negative control: rows and columns are not alike
        assert_close(torch.tensor(expected, dtype=torch.float64), found.flip(0))
    assert_close(image.reshape(-1, 1), read_pixels(lines.coordinates, image))
    assert_close(lines.places.view(4, bins, 3)[1, :, 2], offsets)


def read_pixels(coordinates: Tensor, image: Tensor) -> Tensor:
    """Pixels in the order of coordinates."""
    index = ((coordinates + 1) * (len(image) - 1) / 2).round().long()
    return image[index[:, 0], index[:, 1]][:, None]


def test_projections_converge_to_the_continuous_integral() -> None:
    """Of a Gaussian, whose integrals are known: the error falls with the square of the step."""
    width = 0.25

    def error(size: int) -> float:
        angles = torch.tensor([0.4, 1.9])
        lines = radon(size, angles, 21, dtype=torch.float64)
        image = torch.exp(-lines.coordinates.square().sum(-1) / (2 * width**2))
        s = lines.places[:, 2]
        expected = sqrt(2 * pi) * width * torch.exp(-s.square() / (2 * width**2))
        return float((lines(image[None, :, None])[0, :, 0] - expected).abs().max())

    coarse, fine = error(13), error(25)
    assert fine < coarse / 3


def test_readings_of_several_fields_in_one_pass() -> None:
    states, x = stacked(3), random(3, 9, 2)
    shared, own = read(field(), states, PixelSensors(x[0])), read(field(), states, PixelSensors(x))
    lines = radon(4, torch.tensor([0.1, 1.0]), dtype=torch.float64)
    seen = read(field(), states, lines)
    for i in range(3):
        one = {n: v[i] for n, v in states.items()}
        assert_close(functional_call(field(), one, (x[0],)), shared[i])
        assert_close(functional_call(field(), one, (x[i],)), own[i])
        assert_close(lines.matrix @ functional_call(field(), one, (lines.coordinates,)), seen[i])
    with pytest.raises(AssertionError):
        assert_close(shared, own)


def test_likelihood_and_psnr() -> None:
    mean, readings, log_sigma = random(4, 5), random(4, 5, seed=1), torch.tensor(0.3).double()
    expected = -Normal(mean, log_sigma.exp()).log_prob(readings)
    assert_close(expected, gaussian_nll(mean, readings, log_sigma))
    images = torch.full((2, 4, 1), 0.25)
    shown = images.clone()
    shown[1] += 0.1
    found = psnr(shown, images)
    assert found[0] == 100
    assert_close(torch.tensor(20.0), found[1])
    assert_close(psnr(images * 0, images), psnr(images * 0 - 3, images))  # clipped


# --- steps at test time ---------------------------------------------------------------


def test_refine_is_adam_for_each_image() -> None:
    states, x = stacked(3), random(7, 2)
    y = torch.rand(3, 7, 3, generator=generator(2), dtype=torch.float64)

    def objective(now: dict[str, Tensor]) -> Tensor:
        return (read(field(), now, PixelSensors(x)) - y).square().flatten(1).mean(1)

    kept = refine(objective, states, 4, 0.01, keep=(0, 2))
    assert sorted(kept) == [0, 2, 4]
    assert_same(kept[0], states)
    module = field(1)
    adam = torch.optim.Adam(module.parameters(), 0.01)
    for _ in range(4):
        adam.zero_grad()
        (module(x) - y[1]).square().mean().backward()
        adam.step()
    assert_close(dict(module.state_dict()), {n: v[1] for n, v in kept[4].items()})
    with pytest.raises(AssertionError):
        assert_close(dict(module.state_dict()), {n: v[1] for n, v in kept[2].items()})


def losses(y: Tensor, x: Tensor):  # noqa: ANN202
    return lambda now: (read(field(), now, PixelSensors(x)) - y).square().flatten(1).mean(1)


@pytest.mark.parametrize("rule", ["reptile", "maml"])
def test_rules_of_initial_weights(rule: str) -> None:
    """Gradients, against loops over images."""
    x, inner_y, outer_y = random(5, 2), random(4, 5, 3, seed=3), random(4, 5, 3, seed=4)
    made = InitialField(field(), steps=3, lr=0.02, rule=rule).double()  # pyright: ignore
    made.loss(losses(inner_y, x), losses(outer_y, x), 4).backward()
    start = dict(field().state_dict())
    expected = {n: torch.zeros_like(v) for n, v in start.items()}
    for i in range(4):
        one = {n: v[None] for n, v in start.items()}
        after = refine(losses(inner_y[i : i + 1], x), one, 3, 0.02)[3]
        if rule == "reptile":
            slopes = {n: one[n] - v for n, v in after.items()}
        else:
            leaves = {n: v.requires_grad_() for n, v in after.items()}
            loss = losses(outer_y[i : i + 1], x)(leaves).sum()
            slopes = dict(
                zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True)
            )
        expected = {n: expected[n] + slopes[n][0] / 4 for n in expected}
    found = dict(zip(made.names, [p.grad for p in made.values], strict=True))
    assert_close(expected, found)


def test_maml_without_steps_is_the_gradient_of_the_loss() -> None:
    x, y = random(5, 2), random(2, 5, 3, seed=3)
    made = InitialField(field(), steps=0).double()
    made.loss(losses(y, x), losses(y, x), 2).backward()
    module = field()
    torch.stack([(module(x) - y[i]).square().mean() for i in range(2)]).mean().backward()
    found = dict(zip(made.names, [p.grad for p in made.values], strict=True))
    assert_close({n: p.grad for n, p in module.named_parameters()}, found)


# --- hypernetworks --------------------------------------------------------------------


@pytest.mark.parametrize("head", [PerTensorHead, FiLMHead])
def test_one_pass_is_a_loop_over_images_and_order_does_not_matter(head: type) -> None:
    condition = SensorEncoder(2, 3, 6, (8,), generator=generator())
    made = HyperNetwork(field(), condition, head([9]), "trained", generator=generator()).double()
    places, readings, x = random(4, 8, 2), random(4, 8, 3, seed=1), random(11, 2)
    made.generate((places, readings))  # sets the scale of vectors
    shown = made.run((places, readings), x, inputs="shared")
    paired = made.run((places, readings), x.expand(4, -1, -1), inputs="paired")
    assert_close(shown, paired)
    for i in range(4):
        one = {n: v[0] for n, v in made((places[i : i + 1], readings[i : i + 1])).items()}
        assert_close(functional_call(field(), one, (x,)), shown[i])
    order = torch.randperm(8, generator=generator(2))
    assert_close(shown, made.run((places[:, order], readings[:, order]), x, inputs="shared"))
    with pytest.raises(AssertionError):
        assert_close(shown, made.run((places, readings[:, order]), x, inputs="shared"))


def test_states_are_states_of_the_traced_field() -> None:
    condition = SensorEncoder(2, 3, 6, (8,), generator=generator())
    made = HyperNetwork(field(), condition, PerTensorHead([9]), "trained", generator=generator())
    made = made.double()
    states = made((random(4, 8, 2), random(4, 8, 3)))
    space = wspace.trace(field(), random(5, 2))
    graph = wspace.encode(space, states)
    assert tuple(graph.batch) == (4,)
    assert_same({n: v.detach() for n, v in states.items()},
                {n: v.detach() for n, v in wspace.decode(graph).items()})  # fmt: skip


def test_wrong_inputs() -> None:
    with pytest.raises(HyperError, match="no such rule"):
        InitialField(nn.Linear(2, 1), rule="anil")  # pyright: ignore[reportArgumentType]
    with pytest.raises(HyperError, match="size of at least 2"):
        radon(1, torch.zeros(1))
    assert isinstance(sine_field(), SineField)
    assert_close(grid(5, 5, torch.float64), radon(5, torch.zeros(1), dtype=torch.float64)[0])
