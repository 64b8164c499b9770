"""Optimizers, schedulers and losses: what their names give, and which of them `train` refuses."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import utils
from models import Model
from optimization import MuonSGD, orthogonalized


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.LogSoftmax(dim=1))


def sgd(**options):
    return utils.get_optimizer(network(), **options)


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(5, 3, 8, 8, generator=generator), torch.arange(5) % 4) for _ in range(6)]


def train(model, batches, optimizer, **options):
    utils.train(model, "cpu", batches, optimizer, utils.get_loss(), verbose=False, **options)


def rates(scheduler, steps):
    """Learning rates of the groups, before each of the steps."""
    got = []
    for _ in range(steps):
        got.append([group["lr"] for group in scheduler.optimizer.param_groups])
        scheduler.optimizer.step()
        scheduler.step()
    return np.array(got)


def test_optimizers_by_name():
    sgd = utils.get_optimizer(network())
    assert type(sgd) is torch.optim.SGD and (sgd.defaults["lr"], sgd.defaults["momentum"]) == (0.01, 0.9)
    adam = utils.get_optimizer(network(), "ADAMW", weight_decay=0.1, eps=0.5)
    assert type(adam) is torch.optim.AdamW
    assert [adam.defaults[key] for key in ("lr", "weight_decay", "eps")] == [0.01, 0.1, 0.5]


def test_muon_makes_steps_of_kernels_orthogonal_and_is_sgd_for_the_rest():
    torch.manual_seed(0)
    layers = nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3, groups=6, bias=False)
    model = nn.Sequential(*layers, nn.Conv2d(6, 4, 4), nn.Flatten(), nn.LogSoftmax(dim=1))
    twin = copy.deepcopy(model)
    muon = utils.get_optimizer(model, "MuonSGD", lr=0.1, weight_decay=0.01, decay="weights", kernel_lr=0.5)
    sgd = utils.get_optimizer(twin, "SGD", lr=0.1, weight_decay=0.01, decay="weights", nesterov=True)
    kernel, momentum = model[0].weight.detach().clone(), 0
    norm = kernel.norm()
    for _ in range(3):
        utils.get_loss()(model(torch.randn(8, 4, 8, 8)), torch.arange(8) % 4).backward()
        for ours, theirs in zip(model.parameters(), twin.parameters()):
            theirs.grad = ours.grad.clone()
        momentum = 0.9 * momentum + model[0].weight.grad
        nesterov = (model[0].weight.grad + 0.9 * momentum).reshape(6, 36)
        muon.load_state_dict(copy.deepcopy(muon.state_dict()))  # as a run that goes on does
        muon.step()
        sgd.step()
        muon.zero_grad()
        kernel -= 0.5 * orthogonalized([nesterov])[0].reshape(kernel.shape) * norm / 6**0.5
        kernel *= norm / kernel.norm()
        torch.testing.assert_close(model[0].weight.detach(), kernel)
    for ours, theirs in list(zip(model.parameters(), twin.parameters()))[1:]:
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("frozen", ["0.weight", "1.weight"])  # all of a group, one of several
def test_muon_leaves_alone_what_has_no_gradient(frozen):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 4))
    model.get_parameter(frozen).requires_grad = False
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer = utils.get_optimizer(model, "MuonSGD")
    utils.get_loss("cross_entropy")(model(torch.randn(8, 3, 8, 8)), torch.arange(8) % 4).backward()
    optimizer.step()
    unchanged = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert unchanged == {frozen}


def test_a_kernel_that_becomes_zero_stays_zero():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 4))
    optimizer = utils.get_optimizer(model, "MuonSGD")
    nn.init.zeros_(model[0].weight)
    utils.get_loss("cross_entropy")(model(torch.randn(8, 3, 8, 8)), torch.arange(8) % 4).backward()
    optimizer.step()
    assert not model[0].weight.any()  # and so no NaN either


def test_muon_takes_kernels_without_bias_that_are_neither_depthwise_nor_zero_nor_computed():
    first, (shared, tied, zero) = nn.Conv2d(1, 4, 3, bias=False), (nn.Conv2d(4, 4, 1, bias=False) for _ in range(3))
    tied.weight = shared.weight
    nn.init.zeros_(zero.weight)
    grouped, depthwise = (nn.Conv2d(4, 4, 3, groups=groups, bias=False) for groups in (2, 4))
    computed = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1, bias=False))
    others = depthwise, zero, computed, nn.Conv2d(4, 4, 1), nn.Linear(4, 4)
    model = nn.Sequential(first, shared, grouped, tied, *others)
    *rest, kernels = utils.get_optimizer(model, "MuonSGD", lr=0.3).param_groups
    taken = [first.weight, shared.weight, grouped.weight]
    assert [*map(id, kernels["params"])] == [*map(id, taken)]
    assert kernels["lr"] == pytest.approx(0.02) and kernels["muon"]
    assert sum(len(group["params"]) for group in rest) + len(taken) == len(list(model.parameters()))
    for none in (model[-2:], nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1, bias=False))):  # the classifier
        with pytest.raises(ValueError, match="this network has none"):
            utils.get_optimizer(none, "MuonSGD")


def test_muon_at_a_learning_rate_of_zero_changes_nothing():
    model = Model()
    optimizer = utils.get_optimizer(model, "MuonSGD", lr=0.0)
    weights = copy.deepcopy(model.state_dict())
    model.eval()(torch.randn(4, 3, 32, 32)).sum().backward()
    optimizer.step()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_muon_steps_are_of_the_learning_rate_times_the_norm_and_keep_it():
    wide, tall = nn.Conv2d(4, 8, 3, bias=False), nn.Conv2d(8, 64, 1, bias=False)
    model = nn.Sequential(wide, nn.BatchNorm2d(8), tall, nn.BatchNorm2d(64))
    before = [kernel.weight.detach().clone() for kernel in (wide, tall)]
    optimizer = utils.get_optimizer(model, "MuonSGD", lr=0.5, kernel_lr=0.1, momentum=0.0)
    (model(torch.randn(16, 4, 8, 8)) * torch.randn(16, 64, 6, 6)).sum().backward()
    assert optimizer.step(torch.is_grad_enabled) is True  # a closure may go backward, and what it returns is returned
    for kernel, old in zip((wide, tall), before):
        torch.testing.assert_close(kernel.weight.norm(), old.norm())
        assert 0.07 < (kernel.weight - old).norm() / old.norm() < 0.13  # singular values are moved to 0.7 to 1.2


def test_muon_has_the_momentum_of_its_paper_and_refuses_negative_numbers():
    assert MuonSGD([nn.Parameter(torch.ones(2))]).defaults["momentum"] == 0.9
    for negative in ("lr", "momentum", "weight_decay"):
        with pytest.raises(ValueError, match=f"{negative}=-0.1"):
            utils.get_optimizer(Model(), "MuonSGD", **{negative: -0.1})


def test_weights_decay_and_scales_do_not():
    """By the kind of module: a scale may have any shape."""
    scale = nn.Module()
    scale.gamma = nn.Parameter(torch.ones(4, 1, 1))  # a layer scale
    layers = nn.Conv2d(3, 4, 3), nn.LayerNorm([4, 6, 6]), nn.PReLU(4), nn.Linear(4, 2), nn.MultiheadAttention(4, 2)
    model = nn.Sequential(*layers, scale)
    decayed, rest = utils.get_optimizer(model, "SGD", weight_decay=0.1, decay="weights").param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0)
    weights = [layers[0].weight, layers[3].weight, layers[4].in_proj_weight, layers[4].out_proj.weight]
    assert set(decayed["params"]) == set(weights)
    assert {*decayed["params"], *rest["params"]} == {*model.parameters()}


@pytest.mark.parametrize("shape", [(8, 40), (40, 8)])
def test_orthogonalized_changes_singular_values_and_not_their_directions(shape):
    """By Jordan's polynomial, five times."""
    u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(-1.5, 0, 8, dtype=torch.float64)
    (done,) = orthogonalized([7 * u @ values.diag() @ v])
    expected = values / values.norm()
    for _ in range(5):
        expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
    torch.testing.assert_close(u.T @ done @ v.T, expected.diag(), atol=1e-5, rtol=0)
    assert 0.6 < expected.min() < expected.max() < 1.3


def test_orthogonalized_of_many_is_that_of_each():
    matrices = [torch.randn(shape) for shape in ((8, 40), (9, 8), (8, 8), (20, 6), (8, 40))]
    matrices[-1] = matrices[-1].double()
    for together, matrix in zip(orthogonalized(matrices), matrices):
        torch.testing.assert_close(together, orthogonalized([matrix])[0])


@pytest.mark.parametrize(
    "name, kind, options",
    [("NLL_loss", nn.NLLLoss, {}), ("Cross-Entropy", nn.CrossEntropyLoss, {"label_smoothing": 0.2, "ignore_index": 1})],
)
def test_losses_by_name(name, kind, options):
    ours, scores, labels = utils.get_loss(name, **options), torch.randn(6, 4).log_softmax(dim=1), torch.arange(6) % 4
    assert torch.equal(ours(scores, labels), kind(**options)(scores, labels))
    for reduction in ("sum", "none"):  # as the functions that the original get_loss returned
        expected = kind(**options, reduction=reduction)(scores, labels)
        assert torch.equal(ours(scores, labels, reduction=reduction), expected)


CALLS = {  # ways to ask for what lr_scheduler.StepLR(optimizer, 5, 0.75) is
    "the original's verbose": lambda o: utils.get_scheduler(o, 5, 0.75, True),
    "verbose by keyword": lambda o: utils.get_scheduler(o, 5, 0.75, verbose=False),
    "the original's keywords": lambda o: utils.get_scheduler(o, stepsize=5, gamma_val=0.75),
    "name first, then keywords": lambda o: utils.get_scheduler(o, "steplr", step_size=5, gamma=0.75),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_ways_to_call_get_scheduler(call):
    got = rates(call(utils.get_optimizer(network(), lr=0.2)), 11)
    assert got[:, 0] == pytest.approx([0.2 * 0.75 ** (epoch // 5) for epoch in range(11)])


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: utils.get_optimizer(network(), "SDG"), "'SDG'.*Adam.*SGD"),
        (lambda: utils.get_optimizer(network(), "Muon"), "'Muon'.*MuonSGD"),
        (lambda: utils.get_optimizer(network(), "LBFGS"), "'LBFGS'.*MuonSGD.*SGD"),
        (lambda: utils.get_scheduler(sgd(), name="Step"), "'Step'.*StepLR"),
        (lambda: utils.get_loss("mse"), "'mse'.*cross_entropy, nll_loss"),
        (lambda: utils.get_scheduler(sgd(), "ExponentialLR", steps_per_epoch=3), r"make torch\.optim"),
    ],
)
def test_a_refusal_says_what_there_is_instead(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# ---- schedulers in epochs and in batches -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, ours, in_batches",
    [
        ("StepLR", {"step_size": 2, "gamma": 0.5}, {"step_size": 6, "gamma": 0.5}),
        ("StepLR", {"step_size": 1.4}, {"step_size": 4}),  # at the nearest batch
        ("CosineAnnealingLR", {"epochs": 4}, {"T_max": 12}),
        ("CosineAnnealingWarmRestarts", {"T_0": 2}, {"T_0": 6}),
        ("LinearLR", {}, {"total_iters": 15}),  # torch's default of 5, taken for epochs
        ("PolynomialLR", {"epochs": 4, "power": 2}, {"total_iters": 12, "power": 2}),
        ("MultiStepLR", {"epochs": 4, "milestones": [1, 3]}, {"milestones": [3, 9]}),
        (
            "CyclicLR",
            {"base_lr": 0.01, "step_size_up": 2, "mode": "exp_range"},
            {"base_lr": 0.01, "max_lr": 0.2, "step_size_up": 6, "mode": "exp_range"},
        ),
        ("OneCycleLR", {"epochs": 4, "pct_start": 0.5}, {"max_lr": 0.2, "total_steps": 12, "pct_start": 0.5}),
    ],
)
def test_lengths_are_epochs_though_the_steps_are_batches(name, ours, in_batches):
    optimizers = [utils.get_optimizer(network(), lr=0.2) for _ in range(2)]
    mine = utils.get_scheduler(optimizers[0], name=name, steps_per_epoch=3, **ours)
    torchs = getattr(lr_scheduler, name)(optimizers[1], **in_batches)
    assert np.array_equal(rates(mine, 11), rates(torchs, 11))


def test_each_group_peaks_at_its_own_learning_rate():
    weight, bias = network()[1].parameters()
    optimizer = torch.optim.SGD([{"params": [weight], "lr": 0.001}, {"params": [bias], "lr": 0.1}], momentum=0.9)
    scheduler = utils.get_scheduler(optimizer, "OneCycleLR", epochs=4, steps_per_epoch=10)
    assert rates(scheduler, 40).max(axis=0) == pytest.approx([0.001, 0.1])


def test_a_scheduler_given_to_train_is_stepped_after_every_batch(batches):
    seen, model = [], network()
    optimizer = utils.get_optimizer(model, lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: seen.append(optimizer.param_groups[0]["lr"]))
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for _ in range(2):
        train(model, batches, optimizer, scheduler=scheduler)
    np.testing.assert_allclose(seen, 0.1 * 0.5 ** np.arange(12))


def in_turn(optimizer, steps, decline):
    """So many steps of warm-up, then the decline."""
    warm_up = lr_scheduler.LinearLR(optimizer, 1e-4, total_iters=steps)
    return lr_scheduler.SequentialLR(optimizer, [warm_up, decline()], [steps])


WRONG = {
    "StepLR": (lambda o: utils.get_scheduler(o, step_size=5, gamma=0.75), "made for 1 an epoch"),
    "another loader's": (lambda o: utils.get_scheduler(o, steps_per_epoch=7), "loader has 6.* made for 7"),
    "another optimizer's": (lambda o: lr_scheduler.StepLR(utils.get_optimizer(network()), 6), "of another optimizer"),
    "a part": (lambda o: in_turn(o, 6, lambda: utils.get_scheduler(o, "CosineAnnealingLR", epochs=3)), "made for 1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_train_refuses_a_scheduler_that_is_not_of_its_batches(batches, case):
    make, words = WRONG[case]
    model = network()
    before = model[1].weight.detach().clone()
    optimizer = utils.get_optimizer(model, lr=0.2)
    with pytest.raises(ValueError, match=words):
        train(model, batches, optimizer, scheduler=make(optimizer))
    assert torch.equal(model[1].weight, before)


RIGHT = {  # those that torch made itself are stepped as documented, whatever they count
    "a sequence": lambda o: in_turn(
        o, 6, lambda: utils.get_scheduler(o, "CosineAnnealingLR", epochs=3, steps_per_epoch=6)
    ),
    "torch's SequentialLR": lambda o: in_turn(o, 2, lambda: lr_scheduler.CosineAnnealingLR(o, 16)),
    "OneCycleLR of total_steps": lambda o: utils.get_scheduler(o, "OneCycleLR", total_steps=24),
    "torch's ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "torch's StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.9),
    "torch's ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o, 0.5, 3)]),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.05),
}


@pytest.mark.parametrize("make", RIGHT.values(), ids=RIGHT)
def test_train_steps_a_scheduler_once_a_batch(batches, make):
    model, twin = network(), network()
    optimizer, other = utils.get_optimizer(model, lr=0.2), utils.get_optimizer(twin, lr=0.2)
    scheduler = make(optimizer)
    for loader in (batches, (batch for batch in batches)):  # the last does not know its length
        train(model, loader, optimizer, scheduler=scheduler)
    expected = make(other)
    for _ in range(12):
        other.step()
        expected.step()
    assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"]


@pytest.mark.parametrize("again", ["OneCycleLR", "CosineAnnealingLR", "StepLR"])
@pytest.mark.parametrize("earlier", ["OneCycleLR", "CosineAnnealingLR"])
def test_a_learning_rate_that_has_been_brought_to_nothing_is_refused(batches, earlier, again):
    """A whole run at a learning rate of zero would look like one that does not learn."""
    model, steps = network(), {"epochs": 1, "steps_per_epoch": 90}
    optimizer = utils.get_optimizer(model, lr=0.2)
    train(model, batches * 15, optimizer, scheduler=utils.get_scheduler(optimizer, earlier, **steps))
    with pytest.raises(ValueError, match=r"0\.2 down to .*optimizer again"):
        utils.get_scheduler(optimizer, again, **steps)
    utils.get_scheduler(utils.get_optimizer(model, lr=0.2), again, **steps)


def test_a_scheduler_may_be_put_back_to_its_start(batches):
    model = network()
    optimizer = utils.get_optimizer(model)
    scheduler = utils.get_scheduler(optimizer, "OneCycleLR", epochs=1, steps_per_epoch=6)
    before = copy.deepcopy([part.state_dict() for part in (optimizer, scheduler)])
    for _ in range(2):
        train(model, batches, optimizer, scheduler=scheduler)
        for part, state in zip((optimizer, scheduler), copy.deepcopy(before)):
            part.load_state_dict(state)


def test_optimizer_and_scheduler_are_freed_with_their_names(batches):
    """Without the garbage collector, as memory of a GPU may not wait for it."""
    model = network()
    weight = weakref.ref(next(model.parameters()))
    optimizer = utils.get_optimizer(model)
    scheduler = utils.get_scheduler(optimizer, "OneCycleLR", epochs=1, steps_per_epoch=6)
    gc.collect()
    gc.disable()
    try:
        del model, optimizer, scheduler
        assert weight() is None
    finally:
        gc.enable()


# ---- optimizers of a model -------------------------------------------------------------------------------------------


CHANGES = {
    "another head": lambda model: setattr(model, "1", nn.Linear(192, 4)),
    "parameters remade": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
    "weight norm": lambda model: nn.utils.parametrizations.weight_norm(model[1]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_optimizer_that_misses_part_of_the_model_is_refused(batches, change):
    for make in (utils.get_optimizer, lambda model: torch.optim.SGD(model.parameters())):
        model = network()
        optimizer = make(model)
        CHANGES[change](model)
        with pytest.raises(ValueError, match=r"lacks 1\..*get_optimizer\(model"):
            train(model, batches, optimizer)
        train(model, batches, make(model))


def test_the_optimizer_of_another_model_is_refused(batches):
    model = network()
    for other in (network(), copy.deepcopy(model)):
        with pytest.raises(ValueError, match="another model"):
            train(model, batches, utils.get_optimizer(other))


def test_part_of_a_model_may_be_trained(batches):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Linear(4, 4), nn.LogSoftmax(dim=1))
    body, head = (layer.weight.detach().clone() for layer in model[1:3])
    train(model, batches, torch.optim.SGD(model[2].parameters(), lr=0.1))
    model[1].requires_grad_(False)
    for optimizer in (utils.get_optimizer(model), utils.get_optimizer(model[2])):
        train(model, batches, optimizer)
    assert torch.equal(model[1].weight, body) and not torch.equal(model[2].weight, head)


def test_a_criterion_may_have_parameters_of_its_own(batches):
    model, criterion = network(), nn.CrossEntropyLoss()
    criterion.scale = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([model[1].bias, criterion.scale])
    utils.train(model, "cpu", batches, optimizer, criterion, verbose=False)
