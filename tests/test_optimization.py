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
from optimization import orthogonalized


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


def test_a_fused_optimizer_has_momentum_that_is_set_even_if_its_first_step_is_skipped():
    optimizer = sgd(momentum=0.9, fused=True)
    buffers = [state["momentum_buffer"] for state in optimizer.state.values()]
    assert len(buffers) == 2 and not any(buffer.any() for buffer in buffers)


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
    assert kernels["kernel_scale"] == pytest.approx(0.02 / kernels["lr"])
    assert sum(len(group["params"]) for group in rest) + len(taken) == len(list(model.parameters()))
    for none in (model[-2:], nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1, bias=False))):  # the classifier
        with pytest.raises(ValueError, match="convolutions without bias, and this network has none; take SGD"):
            utils.get_optimizer(none, "MuonSGD")


def test_muon_at_a_learning_rate_of_zero_changes_nothing():
    model = Model()
    optimizer = utils.get_optimizer(model, "MuonSGD", lr=0.0)
    trained = Model.from_pretrained("s9").state_dict()
    for weights in (copy.deepcopy(model.state_dict()), trained):  # also where other weights are loaded meanwhile
        model.load_state_dict(weights)
        model.eval()(torch.randn(4, 3, 32, 32)).sum().backward()
        optimizer.step()
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_muon_steps_are_of_the_learning_rate_times_the_norm_and_keep_it():
    wide, tall = nn.Conv2d(4, 8, 3, bias=False), nn.Conv2d(8, 64, 1, bias=False)
    model = nn.Sequential(wide, nn.BatchNorm2d(8), tall, nn.BatchNorm2d(64))
    before = [kernel.weight.detach().clone() for kernel in (wide, tall)]
    optimizer = utils.get_optimizer(model, "MuonSGD", lr=0.5, kernel_lr=0.05, momentum=0.0)
    (model(torch.randn(16, 4, 8, 8)) * torch.randn(16, 64, 6, 6)).sum().backward()
    for group in optimizer.param_groups:
        group["lr"] = 1.0  # one for all groups, as SWALR and learning-rate finders set it
    assert optimizer.step(torch.is_grad_enabled) is True  # a closure may go backward, and what it returns is returned
    for kernel, old in zip((wide, tall), before):
        torch.testing.assert_close(kernel.weight.norm(), old.norm())
        assert 0.07 < (kernel.weight - old).norm() / old.norm() < 0.13  # singular values are moved to 0.7 to 1.2


@pytest.mark.parametrize("negative", ["lr", "momentum", "weight_decay"])
def test_muon_refuses_negative_numbers(negative):
    with pytest.raises(ValueError, match=f"{negative}=-0.1 given; MuonSGD takes no negative numbers"):
        utils.get_optimizer(Model(), "MuonSGD", **{negative: -0.1})


@pytest.mark.parametrize(("lr", "kernel_lr"), [(0.0, 0.02), (0.3, 0.0)])
def test_a_rate_for_kernels_that_is_no_multiple_of_lr_is_refused(lr, kernel_lr):
    with pytest.raises(
        ValueError, match=f"kernel_lr={kernel_lr} is kept as a multiple of lr={lr}; give both above zero"
    ):
        utils.get_optimizer(Model(), "MuonSGD", lr=lr, kernel_lr=kernel_lr)


@pytest.mark.parametrize("shape", [(8, 40), (40, 8)])
def test_orthogonalized_changes_singular_values_and_not_their_directions(shape):
    u, _, v = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    (done,) = orthogonalized([7 * u @ torch.logspace(-1.5, 0, 8, dtype=torch.float64).diag() @ v])
    turned = u.T @ done @ v.T
    assert 0.6 < turned.diag().min() < turned.diag().max() < 1.3
    assert (turned - turned.diag().diag()).abs().max() < 1e-9


def test_orthogonalized_of_many_is_that_of_each():
    matrices = [torch.randn(shape) for shape in ((8, 40), (9, 8), (8, 8), (20, 6), (8, 40))]
    matrices[-1] = matrices[-1].double()
    for together, matrix in zip(orthogonalized(matrices), matrices):
        torch.testing.assert_close(together, orthogonalized([matrix])[0])


WEIGHTED = {"weight": torch.tensor([1.0, 2, 3, 4]), "ignore_index": 1}


@pytest.mark.parametrize(
    "name, kind, options",
    [("NLL", nn.NLLLoss, WEIGHTED), ("Cross-Entropy", nn.CrossEntropyLoss, WEIGHTED | {"label_smoothing": 0.2})],
)
def test_losses_by_name(name, kind, options):
    ours, scores, labels = utils.get_loss(name, **options), torch.randn(6, 4).log_softmax(dim=1), torch.arange(6) % 4
    assert isinstance(ours, kind) and torch.equal(ours(scores, labels), kind(**options)(scores, labels))
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
        (lambda: utils.get_optimizer(network(), "SDG"), "unknown optimizer 'SDG'.*Adam.*SGD"),
        (lambda: utils.get_scheduler(sgd(), name="Step"), "unknown scheduler 'Step'.*StepLR"),
        (lambda: utils.get_loss("mse"), "unknown loss 'mse'.*cross_entropy, nll_loss"),
        (lambda: utils.get_optimizer(network(), decay="bias"), "'bias'.*'all'.*'weights'"),
        (
            lambda: utils.get_scheduler(sgd(), "ExponentialLR", steps_per_epoch=3),
            r"ExponentialLR has no length in epochs; make torch\.optim",
        ),
        (
            lambda: utils.get_scheduler(sgd(), "ReduceLROnPlateau", "max"),
            r"ReduceLROnPlateau takes no step_size \(given: 'max'\); give its own arguments by name",
        ),
        (
            lambda: [utils.get_scheduler(optimizer, "OneCycleLR", epochs=9) for optimizer in 2 * [sgd(lr=0.5)]],
            "the optimizer has had a OneCycleLR, which left a learning rate of 0.02; make the optimizer anew",
        ),
        (
            lambda: utils.get_scheduler(sgd(), "CosineAnnealingLR", gamma=0.5, epochs=9),
            "CosineAnnealingLR takes no gamma",
        ),
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
        ("LinearLR", {"epochs": 20}, {"total_iters": 15}),  # a warm-up: torch's default of 5, taken for epochs
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
    return lr_scheduler.SequentialLR(
        optimizer, [lr_scheduler.LinearLR(optimizer, 0.1, total_iters=steps), decline], [steps]
    )


COUNTS_EPOCHS = "after every batch, and this .* counts epochs"
WRONG = {
    "StepLR": (lambda o: utils.get_scheduler(o, step_size=5, gamma=0.75), COUNTS_EPOCHS),
    "torch's ReduceLROnPlateau": (lr_scheduler.ReduceLROnPlateau, COUNTS_EPOCHS),
    "torch's StepLR": (lambda o: lr_scheduler.StepLR(o, 2, 0.1), COUNTS_EPOCHS),
    "torch's ExponentialLR": (lambda o: lr_scheduler.ExponentialLR(o, 0.1), COUNTS_EPOCHS),
    "torch's CosineAnnealingLR": (lambda o: lr_scheduler.CosineAnnealingLR(o, 5), COUNTS_EPOCHS),
    "torch's MultiStepLR": (lambda o: lr_scheduler.MultiStepLR(o, [2, 4]), COUNTS_EPOCHS),
    "torch's PolynomialLR": (lambda o: lr_scheduler.PolynomialLR(o, 5), COUNTS_EPOCHS),
    "torch's warm restarts": (lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5), COUNTS_EPOCHS),
    "torch's LambdaLR": (lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.1**step), COUNTS_EPOCHS),
    "torch's SequentialLR": (lambda o: in_turn(o, 2, lr_scheduler.CosineAnnealingLR(o, 3)), COUNTS_EPOCHS),
    "torch's OneCycleLR": (lambda o: lr_scheduler.OneCycleLR(o, 0.1, 5), "5 steps left and the epoch takes 6"),
    "another loader's": (lambda o: utils.get_scheduler(o, steps_per_epoch=7), "7 batches per epoch.* loader has 6"),
    "another optimizer's": (lambda o: lr_scheduler.StepLR(utils.get_optimizer(network()), 6), "of another optimizer"),
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


RIGHT = {
    "a sequence": lambda o: in_turn(o, 6, utils.get_scheduler(o, "CosineAnnealingLR", epochs=1, steps_per_epoch=6)),
    "torch's SequentialLR": lambda o: in_turn(o, 2, lr_scheduler.CosineAnnealingLR(o, 16)),
    "torch's LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: max(0, 1 - step / 18)),
    "OneCycleLR of total_steps": lambda o: utils.get_scheduler(o, "OneCycleLR", total_steps=24),
    "torch's StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.9),
    "torch's CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 18),
    "torch's MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 8]),
    "torch's ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o, 0.5, 3)]),
}


@pytest.mark.parametrize("make", RIGHT.values(), ids=RIGHT)
def test_train_refuses_a_scheduler_that_somebody_else_steps_as_well(batches, make):
    model = network()
    optimizer = utils.get_optimizer(model, lr=0.2)
    scheduler = make(optimizer)
    for loader in (batches, (batch for batch in batches)):  # the last does not know its length
        train(model, loader, optimizer, scheduler=scheduler)
        scheduler.load_state_dict(copy.deepcopy(scheduler.state_dict()))  # as a run that goes on does
    optimizer.step()
    scheduler.step()
    with pytest.raises(ValueError, match=r"stepped once more since the last epoch; take scheduler\.step\(\) out"):
        train(model, batches, optimizer, scheduler=scheduler)


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


def test_train_asks_for_a_scheduler_that_counts_its_batches(batches):
    """Stepped once per epoch instead, OneCycleLR would stay at a 25th of the learning rate."""
    model = network()
    optimizer = utils.get_optimizer(model)
    scheduler = utils.get_scheduler(optimizer, "OneCycleLR", epochs=2, steps_per_epoch=6)
    with pytest.raises(ValueError, match=r"OneCycleLR counts batches.*scheduler=scheduler"):
        train(model, batches, optimizer)
    train(model, batches, optimizer, scheduler=scheduler)
    train(model, batches, optimizer)  # at a constant rate from now on, as for averaging weights
    utils.get_scheduler(optimizer, "StepLR")
    train(model, batches, optimizer)


# ---- optimizers of a model -------------------------------------------------------------------------------------------


CHANGES = {
    "another head": lambda model: setattr(model, "1", nn.Linear(192, 4)),
    "parameters remade": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
    "weight norm": lambda model: nn.utils.parametrizations.weight_norm(model[1]),
    "a layer added": lambda model: model.insert(2, nn.Linear(4, 4)),
}
MAKERS = {"ours": utils.get_optimizer, "torch's": lambda model: torch.optim.SGD(model.parameters())}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_an_optimizer_that_misses_part_of_the_model_is_refused(batches, make, change):
    model = network()
    optimizer = make(model)
    CHANGES[change](model)
    if change == "a layer added" and make is not utils.get_optimizer:  # which may be meant
        with pytest.warns(UserWarning, match=r"does not have 2\.weight, 2\.bias, which will not be trained"):
            train(model, batches, optimizer)
    else:
        with pytest.raises(ValueError, match=r"does not have the parameters .*\b[12]\..*get_optimizer\(model"):
            train(model, batches, optimizer)
    train(model, batches, make(model))


def test_the_optimizer_of_another_model_is_refused(batches):
    model = network()
    for other in (network(), copy.deepcopy(model)):
        with pytest.raises(ValueError, match="made for another model"):
            train(model, batches, utils.get_optimizer(other))


def test_part_of_a_model_may_be_trained(batches):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Linear(4, 4), nn.LogSoftmax(dim=1))
    body, head = (layer.weight.detach().clone() for layer in model[1:3])
    optimizer = torch.optim.SGD(model[2].parameters(), lr=0.1)
    with pytest.warns(UserWarning, match=r"optimizer does not have 1\.weight, 1\.bias, which will not be trained"):
        train(model, batches, optimizer)
    model[1].requires_grad_(False)
    for silent in (optimizer, utils.get_optimizer(model), utils.get_optimizer(model[2])):
        train(model, batches, silent)  # without a word: it was said that the body is not to be trained
    assert torch.equal(model[1].weight, body) and not torch.equal(model[2].weight, head)


def test_a_criterion_may_have_parameters_of_its_own(batches):
    model, criterion = network(), nn.CrossEntropyLoss()
    criterion.scale = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([model[1].bias, criterion.scale])
    with pytest.warns(UserWarning, match=r"does not have 1\.weight, which"):
        utils.train(model, "cpu", batches, optimizer, criterion, verbose=False)


def test_a_fused_optimizer_survives_an_overflow_in_its_first_step(batches, monkeypatch):
    """GradScaler skips the step; torch alone would then take its next step with momentum that was never set."""
    allocate, model = torch.empty_like, network()
    monkeypatch.setattr(utils, "autocast_dtype", lambda device: torch.float16)
    monkeypatch.setattr(torch, "empty_like", lambda *args, **options: allocate(*args, **options).fill_(1e30))
    (images, labels), *others = batches
    train(model, [(images * 1000, labels), *others], utils.get_optimizer(model, lr=0.1, fused=True))
    assert model[1].weight.abs().max() < 100


@pytest.mark.parametrize("fused", [False, True])
def test_a_hook_before_the_step_sees_the_true_gradients(batches, fused, monkeypatch):
    """Not those of float16, scaled up: it may clip them."""
    monkeypatch.setattr(utils, "autocast_dtype", lambda device: torch.float16)
    model, norms = network(), []
    optimizer = utils.get_optimizer(model, fused=fused)
    optimizer.register_step_pre_hook(lambda *_: norms.append(nn.utils.get_total_norm([model[1].weight.grad]).item()))
    expected = torch.autograd.grad(utils.get_loss()(model(batches[0][0]), batches[0][1]), model[1].weight)[0].norm()
    train(model, batches[:1], optimizer)
    assert norms == [pytest.approx(expected.item(), rel=0.01)]


def test_a_fused_optimizer_goes_on_as_a_plain_one_does(batches, monkeypatch):
    """After parameters were unfrozen, and with momentum in the memory layout that another device left it in."""
    monkeypatch.setattr(utils, "autocast_dtype", lambda device: torch.float32)
    trained = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 6), nn.Flatten(), nn.LogSoftmax(dim=1))
        first, second = model[0].weight, model[1].weight
        first.requires_grad_(False)
        optimizer = utils.get_optimizer(model, lr=0.1, fused=fused)
        train(model, batches, optimizer)
        momentum = optimizer.state[second]["momentum_buffer"]
        optimizer.state[second]["momentum_buffer"] = momentum.contiguous(memory_format=torch.channels_last)
        first.requires_grad_(True)
        train(model, batches, optimizer)
        trained.append([first.detach(), second.detach()])
    torch.testing.assert_close(*trained)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_optimizers_are_fused_on_a_gpu():
    model = network().cuda()
    assert utils.get_optimizer(model).defaults["fused"] and utils.get_optimizer(model, "AdamW").defaults["fused"]
    assert not utils.get_optimizer(model, foreach=True).defaults["fused"]
