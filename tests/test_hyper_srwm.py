"""Self-referential cells: laws from their equations in float64; episodes are what they say."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from datasets_zoo.experiments.episodes import Episode, Episodes, Plan, Pool, distinct
from wspace.errors import HyperError, ZooError
from wspace.hyper import FullHead, HyperNetwork, TaskEmbedding
from wspace.hyper.cells.fast_weights import CELLS, FastWeightLayer, FastWeightModel
from wspace.hyper.cells.self_reference import SRWM, DeltaNet, FakeSR, FastWeightCell
from wspace.testing import assert_close, assert_same

pytestmark = pytest.mark.usefixtures("float64")

B, T, WIDTH, HEADS, D = 3, 7, 10, 2, 5
MAKERS: dict[str, Callable[..., FastWeightCell]] = {
    "srwm": lambda: SRWM(WIDTH, HEADS),
    "srwm, autograd": lambda: SRWM(WIDTH, HEADS, fused=False),
    "srwm, softmax": lambda: SRWM(WIDTH, HEADS, softmax_input=True, beta_init=-1.0),
    "fake": lambda: FakeSR(WIDTH, HEADS),
    "delta": lambda: DeltaNet(WIDTH, HEADS),
    "delta, chunks": lambda: DeltaNet(WIDTH, HEADS, chunk=3),
}
each = pytest.mark.parametrize("name", MAKERS)


# --- the equations, one number after another ----------------------------------------------------


def softmax(x: Tensor) -> Tensor:
    e = (x - x.max()).exp()
    return e / e.sum()


def sigmoid(x: Tensor) -> Tensor:
    return 1 / (1 + (-x).exp())


def naive_srwm(cell: SRWM, x: Tensor, *, wrong: str = "") -> tuple[Tensor, Tensor]:
    """Every batch element, head and step by itself. `wrong` makes one deliberate mistake."""
    outputs, shifts = torch.zeros_like(x), torch.zeros(len(x), HEADS, 3 * D + 4, D)
    for i in range(len(x)):
        for h in range(HEADS):
            w = cell.weight[h].detach().clone()
            for t in range(x.shape[1]):
                z = x[i, t, h * D : (h + 1) * D]
                z = softmax(z) if cell.softmax_input else z
                made = w @ z
                y, q, k, b = made[:D], made[D : 2 * D], made[2 * D : 3 * D], made[3 * D :]
                new, old = w @ softmax(q), w @ softmax(k)
                change = torch.zeros_like(w)
                for m, (first, last) in enumerate(
                    ((0, D), (D, 2 * D), (2 * D, 3 * D), (3 * D, 3 * D + 4))
                ):
                    rate = sigmoid(b[0 if wrong == "one rate" else m])
                    if wrong == "b stays" and m == 3:
                        continue
                    key = softmax(q if wrong == "wrong key" else k)
                    change[first:last] = rate * torch.outer(new[first:last] - old[first:last], key)
                w = w + change
                outputs[i, t, h * D : (h + 1) * D] = (w @ z)[:D] if wrong == "late output" else y
            shifts[i, h] = w - cell.weight[h].detach()
    return outputs, shifts


def naive_delta(cell: DeltaNet, x: Tensor, *, wrong: str = "") -> tuple[Tensor, Tensor]:
    outputs, states = torch.zeros_like(x), torch.zeros(len(x), HEADS, D, D)
    rows = 3 * D + 1
    for i in range(len(x)):
        for h in range(HEADS):
            w = torch.zeros(D, D)
            slow = cell.weight[h * rows : (h + 1) * rows].detach()
            for t in range(x.shape[1]):
                made = slow @ x[i, t]
                q, k, v = softmax(made[:D]), softmax(made[D : 2 * D]), made[2 * D : 3 * D]
                early = w @ q
                known = 0 * v if wrong == "no delta" else w @ k
                w = w + sigmoid(made[-1]) * torch.outer(v - known, k)
                outputs[i, t, h * D : (h + 1) * D] = early if wrong == "early output" else w @ q
            states[i, h] = w
    return outputs, states


@pytest.mark.parametrize("name", ["srwm", "srwm, autograd", "srwm, softmax"])
def test_srwm_is_its_equations(name: str) -> None:
    cell, x = MAKERS[name](), torch.randn(B, T, WIDTH)
    with torch.no_grad():
        assert_close(naive_srwm(cell, x), cell(x))


@pytest.mark.parametrize("wrong", ["late output", "one rate", "b stays", "wrong key"])
def test_a_wrong_srwm_is_seen(wrong: str) -> None:
    cell, x = SRWM(WIDTH, HEADS), torch.randn(B, T, WIDTH)
    with pytest.raises(AssertionError), torch.no_grad():
        assert_close(naive_srwm(cell, x, wrong=wrong), cell(x))


@pytest.mark.parametrize("name", ["delta", "delta, chunks"])
def test_delta_net_is_its_equations(name: str) -> None:
    cell, x = MAKERS[name](), torch.randn(B, T, WIDTH)
    with torch.no_grad():
        assert_close(naive_delta(cell, x), cell(x))


@pytest.mark.parametrize("wrong", ["no delta", "early output"])
def test_a_wrong_delta_net_is_seen(wrong: str) -> None:
    cell, x = DeltaNet(WIDTH, HEADS), torch.randn(B, T, WIDTH)
    with pytest.raises(AssertionError), torch.no_grad():
        assert_close(naive_delta(cell, x, wrong=wrong), cell(x))


def test_fake_is_one_matrix_product() -> None:
    cell, x = FakeSR(WIDTH, HEADS), torch.randn(B, T, WIDTH)
    expected = torch.cat(
        [x[..., h * D : (h + 1) * D] @ cell.weight[h, :D].T for h in range(HEADS)], -1
    )
    assert_close(expected, cell(x)[0])


# --- laws -----------------------------------------------------------------------------------------


@each
def test_halves_make_a_whole(name: str) -> None:
    cell, x = MAKERS[name](), torch.randn(B, T, WIDTH)
    with torch.no_grad():
        y, state = cell(x)
        first, between = cell(x[:, :4])
        second, after = cell(x[:, 4:], between)
        assert_close((y, state), (torch.cat((first, second), 1), after))
        if name != "fake":  # the control: without the state the second half is another
            assert not torch.allclose(cell(x[:, 4:])[0], second, rtol=1e-3)


@each
def test_the_last_input_changes_only_the_last_output(name: str) -> None:
    cell, x = MAKERS[name](), torch.randn(B, T, WIDTH)
    other = x.clone()
    other[:, -1] = torch.randn(B, WIDTH)
    with torch.no_grad():
        a, b = cell(x)[0], cell(other)[0]
    assert_close(a[:, :-1], b[:, :-1])
    assert not torch.allclose(a[:, -1], b[:, -1], rtol=1e-3)


@each
def test_batch_elements_and_axes_are_independent(name: str) -> None:
    cell, x = MAKERS[name](), torch.randn(4, B, T, WIDTH)
    with torch.no_grad():
        y, state = cell(x)
        assert y.shape == x.shape and state.shape[:2] == (4, B)
        for i in range(4):
            assert_close((y[i], state[i]), cell(x[i]))
        assert_close((y[2, 1], state[2, 1]), cell(x[2, 1]))  # no batch axis at all
        x[0] = torch.randn(B, T, WIDTH)
        assert_close(y[1:], cell(x)[0][1:])


@pytest.mark.parametrize("fused", [True, False])
def test_without_rates_the_map_is_fixed(fused: bool) -> None:
    cell = SRWM(WIDTH, HEADS, softmax_input=True, beta_init=-1e4, fused=fused)
    fake = FakeSR(WIDTH, HEADS, softmax_input=True)
    fake.load_state_dict(cell.state_dict())
    x = torch.randn(B, T, WIDTH)
    with torch.no_grad():
        y, state = cell(x)
        assert_close(fake(x)[0], y)
        assert_same(state, torch.zeros_like(state))
        cell.weight[:, -4:] += 1e4  # the control
        assert not torch.allclose(fake(x)[0], cell(x)[0], rtol=1e-3)


@pytest.mark.parametrize("fused", [True, False])
def test_equal_query_and_key_change_nothing(fused: bool) -> None:
    cell, x = SRWM(WIDTH, HEADS, fused=fused), torch.randn(B, T, WIDTH)
    with torch.no_grad():
        cell.weight[:, D : 2 * D] = cell.weight[:, 2 * D : 3 * D]
        _, state = cell(x)
        assert_same(state, torch.zeros_like(state))
        cell.weight[:, D] += 1
        assert float(cell(x)[1].abs().max()) > 1e-2


def test_delta_rule_finds_what_was_written() -> None:
    """With rate 1 and a key that is nearly one unit vector, W k becomes v."""
    cell = DeltaNet(WIDTH, 1)
    d = WIDTH
    with torch.no_grad():
        cell.weight.zero_()
        cell.weight[:d] = cell.weight[d : 2 * d] = 100 * torch.eye(d)
        cell.weight[2 * d : 3 * d] = torch.randn(d, d)
        cell.weight[-1] = 100
        x = torch.eye(d)[torch.tensor([1, 4, 2, 4, 1])][None]
        assert_close(x @ cell.weight[2 * d : 3 * d].T, cell(x)[0])


@each
def test_gradients(name: str) -> None:
    cell = MAKERS[name]()
    x = torch.randn(2, 3, WIDTH, requires_grad=True)
    state = (0.3 * torch.randn_like(cell.start(x, None))).requires_grad_()
    weight = cell.weight.detach().clone().requires_grad_()

    def run(x: Tensor, state: Tensor, weight: Tensor) -> Any:
        return torch.func.functional_call(cell, {"weight": weight}, (x, state))

    assert torch.autograd.gradcheck(run, (x, state, weight), fast_mode=name != "srwm")


@pytest.mark.parametrize("softmax_input", [True, False])
def test_written_gradients_are_those_of_autograd(softmax_input: bool) -> None:
    cell = SRWM(WIDTH, HEADS, softmax_input=softmax_input)
    x, state = torch.randn(B, 2 * T, WIDTH), 0.3 * torch.randn(B, HEADS, cell.rows, D)
    found: list[tuple[Tensor, ...]] = []
    for fused in (True, False):
        cell.fused = fused
        inputs = x.clone().requires_grad_(), state.clone().requires_grad_(), cell.weight
        y, after = cell(inputs[0], inputs[1])
        loss = y.sin().sum() + (after * after.cos()).sum()
        found.append((y, after, *torch.autograd.grad(loss, inputs)))
    assert_close(found[0], found[1])


def test_second_derivatives_are_refused_by_the_written_gradient() -> None:
    x = torch.randn(1, 3, WIDTH, requires_grad=True)
    for fused in (True, False):
        cell = SRWM(WIDTH, HEADS, fused=fused)
        for loss in (
            cell(x)[0].square().sum(),
            cell(x)[0].sum(),
        ):  # the second has a constant slope
            if fused:
                with pytest.raises(HyperError, match="second derivatives(.|\n)*fused=False"):
                    torch.autograd.grad(loss, x, create_graph=True)
                continue
            (grad,) = torch.autograd.grad(loss, x, create_graph=True)
            assert torch.isfinite(torch.autograd.grad(grad.square().sum(), x)[0]).all()


def test_autograd_takes_a_matrix_for_each_sample() -> None:
    cell, x, w = (
        SRWM(WIDTH, HEADS, fused=False),
        torch.randn(4, B, T, WIDTH),
        torch.randn(4, HEADS, 19, D),
    )

    def run(w: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(cell, {"weight": w}, (x,))[0]

    y = torch.func.vmap(run)(w, x)
    assert_close(torch.stack([run(w[i], x[i]) for i in range(4)]), y)


def test_initial_weights() -> None:
    cell = SRWM(128, 2, beta_init=-1.0, generator=torch.Generator().manual_seed(1))
    again = SRWM(128, 2, beta_init=-1.0, generator=torch.Generator().manual_seed(1))
    assert_same(cell.weight.detach(), again.weight.detach())
    most, b = cell.weight.detach().split((3 * 64, 4), 1)
    assert abs(float(most.std()) * 8 - 1) < 0.02 and abs(float(most.mean())) < 0.003
    assert abs(float(b.std()) * 8 - 1) < 0.15 and abs(float(b.mean()) + 1) < 0.03


@each
def test_float32_and_its_device_stay(name: str) -> None:
    cell = MAKERS[name]().float()
    y, state = cell(torch.randn(B, T, WIDTH, dtype=torch.float32))
    assert y.dtype == state.dtype == torch.float32


@each
def test_what_does_not_fit_is_refused(name: str) -> None:
    cell = MAKERS[name]()
    with pytest.raises(HyperError, match=r"expected \(\*batch, T, 10\)"):
        cell(torch.randn(B, T, WIDTH + 1))
    with pytest.raises(HyperError, match="inputs do not fit"):
        cell(torch.randn(B, 0, WIDTH))
    with pytest.raises(HyperError, match="the state does not fit"):
        cell(torch.randn(B, T, WIDTH), torch.zeros(B + 1, HEADS, cell.rows, D))


def test_heads_must_divide() -> None:
    for make in (SRWM, FakeSR, DeltaNet):
        for heads in (0, 3):
            with pytest.raises(HyperError, match="heads do not divide"):
                make(WIDTH, heads)
    with pytest.raises(HyperError, match="chunk is at least 1"):
        DeltaNet(WIDTH, chunk=0)


@pytest.mark.parametrize("name", ["srwm", "srwm, autograd", "delta"])
def test_initial_weights_can_be_generated(name: str) -> None:
    """A hypernetwork makes the matrices that the cell begins with, for several tasks at once."""
    cell = MAKERS[name]()
    hyper = HyperNetwork(cell, TaskEmbedding(4, 3), FullHead())
    tasks, x = torch.tensor([3, 1]), torch.randn(2, B, T, WIDTH)
    y, state = hyper.run(tasks, x)
    (grad,) = torch.autograd.grad(y.square().sum(), hyper.condition.parameters())
    assert bool(grad[[1, 3]].any()) and not bool(grad[[0, 2]].any())
    for i, task in enumerate(tasks):
        with torch.no_grad():
            cell.weight.copy_(hyper.generate(task)["weight"])
            assert_close((y[i].detach(), state[i].detach()), cell(x[i]))


# --- the stack ------------------------------------------------------------------------------------


def test_layer_is_its_equation() -> None:
    layer, h = FastWeightLayer(SRWM(WIDTH, HEADS), 11).eval(), torch.randn(B, T, WIDTH)
    y, state = layer(h)
    inner, after = layer.cell(h)  # as it is, not normalised
    middle = torch.layer_norm(h, (WIDTH,)) + inner @ layer.mix[0].weight.T
    a, b = layer.feed[1], layer.feed[4]
    hidden = torch.relu(torch.layer_norm(middle, (WIDTH,)) @ a.weight.T + a.bias)
    assert_close((middle + hidden @ b.weight.T + b.bias, after), (y, state))
    wrong = h + inner @ layer.mix[0].weight.T
    assert not torch.allclose(middle, wrong, rtol=1e-3)


@pytest.mark.parametrize("cell", CELLS)
def test_model_goes_on(cell: str) -> None:
    model, x = FastWeightModel(4, 3, cell, width=WIDTH, heads=HEADS, layers=3), torch.randn(B, T, 4)
    with torch.no_grad():
        y, states = model(x)
        first, between = model(x[:, :3])
        second, after = model(x[:, 3:], between)
    assert y.shape == (B, T, 3)
    assert_close((y, *states), (torch.cat((first, second), 1), *after))


def test_model_takes_options_and_refuses_others() -> None:
    options = {"softmax_input": True, "beta_init": -1.0}
    model = FastWeightModel(4, 3, width=WIDTH, heads=HEADS, feedforward=0, options=options)
    assert model.layers[1].cell.softmax_input and model.layers[0].feed is None
    with pytest.raises(HyperError, match="no such cell"):
        FastWeightModel(4, 3, "gru")
    with pytest.raises(HyperError, match="options of delta_net"):
        FastWeightModel(4, 3, "delta_net", options=options)
    with pytest.raises(HyperError, match="one state for each layer"):
        model(torch.randn(B, T, 4), [torch.zeros(1)])


# --- episodes -------------------------------------------------------------------------------------


def pool(classes: int = 5, each: int = 9) -> Pool:
    """Images whose pixels say which image they are."""
    labels = torch.randperm(classes * each) % classes
    pixels = torch.arange(4.0).view(1, 1, 2, 2) / 8
    return Pool(torch.arange(len(labels))[:, None, None, None] + pixels, labels, range(classes))


def read(p: Pool, e: Episode) -> tuple[Tensor, Tensor]:
    """Number and class of every image."""
    numbers = e.images.amin((2, 3, 4)).floor().long()
    of = torch.empty(len(p.rows), dtype=torch.long)
    of[p.rows] = torch.arange(len(p.counts)).repeat_interleave(p.counts)
    return numbers, of[numbers]


def check(p: Pool, e: Episode, plan: Plan) -> None:
    """What an episode must be."""
    numbers, kinds = read(p, e)
    first, n = plan.ways * plan.before, plan.ways * (plan.before + plan.after)
    assert e.images.shape[1] == n + 1 and bool((e.labels[:, -1] == 0).all())
    for i in range(len(e.target)):
        assert len(set(numbers[i].tolist())) == n + 1
        maps = [
            dict(zip(kinds[i, a:b].tolist(), e.labels[i, a:b].tolist(), strict=True))
            for a, b in ((0, first), (first, n))
        ]
        for m, (a, b), shots in zip(maps, ((0, first), (first, n)), plan[1:3], strict=True):
            seen = list(zip(kinds[i, a:b].tolist(), e.labels[i, a:b].tolist(), strict=True))
            assert sorted(seen) == sorted([pair for pair in m.items() for _ in range(shots)])
            assert sorted(m.values()) == list(range(plan.ways if shots else 0))
        last = maps[1] if plan.after else maps[0]
        assert last[int(kinds[i, -1])] == int(e.target[i])
        assert [last[c] for c in e.classes[i].tolist()] == list(range(plan.ways))
        assert not plan.after or all(maps[0][c] != maps[1][c] for c in maps[0])


@pytest.mark.parametrize(("before", "after"), [(1, 0), (3, 0), (3, 2), (2, 4)])
def test_episodes_are_what_they_say(before: int, after: int, generator: torch.Generator) -> None:
    p, plan = pool(), Plan(3, before, after)
    e = p.draw(plan, 20, generator)
    check(p, e, plan)
    with pytest.raises(AssertionError):  # the control
        check(p, e._replace(target=(e.target + 1) % 3), plan)


def test_classes_labels_and_queries_are_even(generator: torch.Generator) -> None:
    p = pool()
    e = p.draw(Plan(3, 1), 6000, generator)
    share = (e.classes[..., None] == torch.arange(5)).double().mean(0)  # (ways, classes)
    assert float((share - 1 / 5).abs().max()) < 0.02
    assert float((e.target.bincount() / 6000 - 1 / 3).abs().max()) < 0.02
    first = (e.labels[:, 0, None] == torch.arange(3)).double().mean(0)
    assert float((first - 1 / 3).abs().max()) < 0.02  # nor does the place tell a label
    fixed = p.draw(Plan(3, 1, permute=False), 100, generator).classes
    assert bool((fixed.diff(dim=1) > 0).all())


def test_distinct_numbers(generator: torch.Generator) -> None:
    counts = torch.tensor([4, 6]).expand(4000, 2)
    drawn = distinct(counts, 4, generator)
    assert bool((drawn >= 0).all()) and bool((drawn < counts[..., None]).all())
    assert bool((drawn.sort(-1).values.diff(dim=-1) > 0).all())
    for place in range(4):  # every number is equally likely in every place
        share = drawn[:, 1, place].bincount(minlength=6) / 4000
        assert float((share - 1 / 6).abs().max()) < 0.03


def test_too_few_to_choose_from(generator: torch.Generator) -> None:
    with pytest.raises(ZooError, match="6 ways of 5 classes"):
        pool().draw(Plan(6, 1), 2, generator)
    with pytest.raises(ZooError, match=r"10 different images of classes \[0, 1, 2, 3, 4\]"):
        pool().draw(Plan(3, 9), 2, generator)
    with pytest.raises(ZooError, match="classes without images"):
        Pool(torch.zeros(2, 1, 1, 1), torch.tensor([0, 2]), [0, 1])


def test_data_is_deterministic_and_held_out() -> None:
    data, same = (Episodes(ways=3, shots=2, batch_size=50, eval_batches=2) for _ in range(2))
    other = Episodes(ways=3, shots=2, batch_size=50, seed=1)
    for d in (data, same, other):
        d.setup("fit")
    assert_same(data.batch("train", 1, 4), same.batch("train", 1, 4))
    for place in (
        (other, "train", 1, 4),
        (data, "train", 1, 5),
        (data, "train", 2, 4),
        (data, "val", 1, 4),
    ):
        d, *rest = place
        assert not torch.equal(d.batch(*rest).target, data.batch("train", 1, 4).target)
    assert set(data.batch("train", 0, 0).classes.flatten().tolist()) == set(range(7))
    (first, second, third, fourth) = data.test_dataloader()
    for e in (first, second):
        assert set(e.classes.flatten().tolist()) == {7, 8, 9} and bool(e.held_out.all())
    for e in (third, fourth):
        assert set(e.classes.flatten().tolist()) == set(range(7)) and not bool(e.held_out.any())
    assert len(data.train_dataloader()) == 500 and len(data.val_dataloader()) == 2


def test_images_of_parts_are_different() -> None:
    data = Episodes()
    data.setup()
    images = {n: {x.numpy().tobytes() for x in p.images} for n, p in data.pools.items()}
    assert not images["train"] & images["val"] and not images["train"] & images["test"]
    assert len(data.pools["val"].images) == 129 and len(data.pools["test"].images) == 500


def test_lengths_before_and_after_a_switch_vary_in_training() -> None:
    data = Episodes(ways=3, shots=4, switch=2, batch_size=2, batches=60)
    data.setup()
    lengths = {e.labels.shape[1] for e in data.train_dataloader()}
    assert lengths == {3 * n + 1 for n in range(1, 7)}
    assert data.batch("test", 0, 0).labels.shape[1] == 3 * 6 + 1


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"shots": 0, "batch_size": 0}, "shots 0"),
        ({"switch": -1}, "switch 0"),
        ({"ways": 1, "switch": 1}, "switch of one"),
        ({"held_out": (7, 11)}, "held-out classes"),
        ({"held_out": (7, 8)}, "3 ways of 2 classes"),
        ({"shots": 50}, "different images"),
    ],
)
def test_wrong_data_is_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ZooError, match=match):
        Episodes(**options).setup()
