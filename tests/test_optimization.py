"""Optimizers, schedulers and losses: what their names give, and which of them `train` refuses."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import utils
from optimization import MuonSGD


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.LogSoftmax(dim=1))


BATCHES = [(torch.randn(5, 3, 8, 8), torch.arange(5) % 4) for _ in range(6)]


def train(model, optimizer, criterion=None, scheduler=None, batches=BATCHES):
    utils.train(model, "cpu", batches, optimizer, criterion or utils.get_loss(), scheduler=scheduler, verbose=False)


def rates(scheduler, steps):
    """Learning rates of the groups, before each of the steps."""
    got = []
    for _ in range(steps):
        got.append([group["lr"] for group in scheduler.optimizer.param_groups])
        scheduler.optimizer.step()
        scheduler.step()
    return np.array(got)


def test_optimizers_and_losses_by_name():
    sgd, adam = utils.get_optimizer(network()), utils.get_optimizer(network(), "ADAMW", weight_decay=0.1)
    assert type(sgd) is torch.optim.SGD and (sgd.defaults["lr"], sgd.defaults["momentum"]) == (0.01, 0.9)
    assert type(adam) is torch.optim.AdamW and (adam.defaults["lr"], adam.defaults["weight_decay"]) == (0.01, 0.1)
    scores, labels = torch.randn(6, 4).log_softmax(dim=1), torch.arange(6) % 4
    assert torch.equal(utils.get_loss("NLL_loss")(scores, labels), nn.NLLLoss()(scores, labels))
    ours = utils.get_loss("Cross-Entropy", label_smoothing=0.2)(scores, labels, reduction="sum")
    assert torch.equal(ours, nn.CrossEntropyLoss(label_smoothing=0.2, reduction="sum")(scores, labels))


def orthogonal(matrix):
    """Jordan's polynomial, five times, of the singular values over their norm."""
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return (u * values @ v).float()


def test_muon_turns_kernels_by_orthogonal_steps_and_is_sgd_for_the_rest():
    torch.manual_seed(0)
    dense = [nn.Conv2d(4, 6, 3, bias=False), nn.Conv2d(6, 40, 2, bias=False), nn.Conv2d(40, 6, 1, bias=False)]
    end = nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.Flatten(), nn.Linear(54, 4), nn.LogSoftmax(dim=1)
    model = nn.Sequential(*dense, nn.BatchNorm2d(6), *end)
    assert MuonSGD(model.parameters()).defaults["momentum"] == 0.9
    twin, kernels, momenta = copy.deepcopy(model), [layer.weight.detach().clone() for layer in dense], [0, 0, 0]
    muon = utils.get_optimizer(model, "MuonSGD", 0.1, weight_decay=0.01, decay="weights", kernel_lr=0.3)
    sgd = utils.get_optimizer(twin, "SGD", 0.1, weight_decay=0.01, decay="weights", nesterov=True)
    for _ in range(3):
        utils.get_loss()(model(torch.randn(8, 4, 8, 8)), torch.arange(8) % 4).backward()
        for ours, theirs in zip(model.parameters(), twin.parameters()):
            theirs.grad = ours.grad.clone()
        muon.load_state_dict(copy.deepcopy(muon.state_dict()))  # as a run that goes on does
        assert muon.step(torch.is_grad_enabled) is True  # a closure may go backward, and what it returns is returned
        sgd.step()
        for i, gradient in enumerate([layer.weight.grad for layer in dense]):
            momenta[i] = 0.9 * momenta[i] + gradient
            step, norm = orthogonal((gradient + 0.9 * momenta[i]).flatten(1)), kernels[i].norm()
            kernels[i] -= 0.3 * norm * step.view_as(gradient) / min(step.shape) ** 0.5
            kernels[i] *= norm / kernels[i].norm()
            torch.testing.assert_close(dense[i].weight.detach(), kernels[i], rtol=1e-4, atol=1e-5)
        muon.zero_grad()
    for ours, theirs in list(zip(model.parameters(), twin.parameters()))[3:]:
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("case", ["frozen", "zero", "rate of zero"])
def test_muon_leaves_a_kernel_alone_that_is_frozen_or_zero_or_at_a_rate_of_zero(case):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 4))
    optimizer = utils.get_optimizer(model, "MuonSGD", kernel_lr=0.0 if case == "rate of zero" else None)
    kernel = model[0].weight.requires_grad_(case != "frozen")
    if case == "zero":
        nn.init.zeros_(kernel)
    before, bias = kernel.detach().clone(), model[3].bias.detach().clone()
    utils.get_loss("cross_entropy")(model(torch.randn(8, 3, 8, 8)), torch.arange(8) % 4).backward()
    optimizer.step()
    assert torch.equal(kernel, before) and not torch.equal(model[3].bias, bias)


def test_muon_takes_kernels_without_bias_that_are_neither_depthwise_nor_zero_nor_computed():
    first, grouped, depthwise = (nn.Conv2d(n, 4, 3, groups=g, bias=False) for n, g in ((1, 1), (4, 2), (4, 4)))
    shared, tied, zero, computed, last = (nn.Conv2d(4, 4, 1, bias=False) for _ in range(5))
    tied.weight = shared.weight
    nn.init.zeros_(zero.weight)
    nn.utils.parametrizations.weight_norm(computed)
    model = nn.Sequential(first, grouped, shared, tied, depthwise, zero, computed, nn.Conv2d(4, 4, 1), last)
    kernels = utils.get_optimizer(model, "MuonSGD", lr=0.3).param_groups[-1]
    assert [*map(id, kernels["params"])] == [id(layer.weight) for layer in (first, grouped, shared)]
    assert kernels["lr"] == pytest.approx(0.02) and kernels["muon"]


def test_weights_decay_and_scales_do_not():
    """By the kind of module: a scale may have any shape."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 2), nn.MultiheadAttention(4, 2), nn.LayerNorm([4, 6]))
    decayed, rest = utils.get_optimizer(model, weight_decay=0.1, decay="weights").param_groups
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0)
    names = {parameter: name for name, parameter in model.named_parameters()}
    weights = {"0.weight", "1.weight", "2.in_proj_weight", "2.out_proj.weight"}
    assert {names[p] for p in decayed["params"]} == weights == {*names.values()} - {names[p] for p in rest["params"]}


REFUSED = [
    (lambda: utils.get_optimizer(network(), "Muon"), "MuonSGD"),  # torch's takes nothing but matrices
    (lambda: utils.get_optimizer(network(), "LBFGS"), "MuonSGD"),  # which steps by a closure
    (lambda: utils.get_scheduler(utils.get_optimizer(network()), "ExponentialLR", steps_per_epoch=3), "batches"),
]


@pytest.mark.parametrize("call, word", REFUSED)
def test_a_refusal_says_what_there_is_instead(call, word):
    with pytest.raises(ValueError, match=word):
        call()


PEAKS = [0.2, 0.01]  # of two groups
SCHEDULERS = [  # what get_scheduler is given, and the same of torch where an epoch has three batches
    ([5, 0.75, True], {}, lambda o: lr_scheduler.StepLR(o, 15, 0.75)),  # the original's verbose
    ([], {"stepsize": 5, "gamma_val": 0.75, "verbose": False}, lambda o: lr_scheduler.StepLR(o, 15, 0.75)),
    ([], {}, lambda o: lr_scheduler.StepLR(o, 30, 0.1)),
    (["steplr"], {"step_size": 1.6}, lambda o: lr_scheduler.StepLR(o, 5)),  # at the nearest batch
    (["CosineAnnealingLR"], {"epochs": 11}, lambda o: lr_scheduler.CosineAnnealingLR(o, 33)),
    (["CosineAnnealingWarmRestarts"], {"T_0": 2}, lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 6)),
    (["LinearLR"], {"epochs": 11}, lambda o: lr_scheduler.LinearLR(o, total_iters=15)),  # torch's default, in epochs
    (["PolynomialLR"], {"epochs": 11, "power": 2}, lambda o: lr_scheduler.PolynomialLR(o, 33, 2)),
    (["MultiStepLR"], {"epochs": 11, "milestones": [1, 3]}, lambda o: lr_scheduler.MultiStepLR(o, [3, 9])),
    (["CyclicLR"], {"base_lr": 0.01, "step_size_up": 2}, lambda o: lr_scheduler.CyclicLR(o, 0.01, PEAKS, 6)),
    (["OneCycleLR"], {"epochs": 11}, lambda o: lr_scheduler.OneCycleLR(o, PEAKS, 33)),
]


@pytest.mark.parametrize("given, options, of_torch", SCHEDULERS)
def test_lengths_are_epochs_though_the_steps_are_batches(given, options, of_torch):
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in PEAKS]
    ours, theirs = torch.optim.SGD(groups, momentum=0.9), torch.optim.SGD(copy.deepcopy(groups), momentum=0.9)
    mine = utils.get_scheduler(ours, *given, steps_per_epoch=3, **options)
    assert np.array_equal(rates(mine, 32), rates(of_torch(theirs), 32))


def in_turn(optimizer, steps_per_epoch):
    """Six steps of warm-up, then a decline over three epochs."""
    warm_up = lr_scheduler.LinearLR(optimizer, 1e-4, total_iters=6)
    decline = utils.get_scheduler(optimizer, "CosineAnnealingLR", epochs=3, steps_per_epoch=steps_per_epoch)
    return lr_scheduler.SequentialLR(optimizer, [warm_up, decline], [6])


RIGHT = {  # those that torch made itself are stepped as documented, whatever they count
    "in turn": lambda o: in_turn(o, 6),
    "OneCycleLR of total_steps": lambda o: utils.get_scheduler(o, "OneCycleLR", total_steps=24),
    "torch's StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.9),
}


@pytest.mark.parametrize("make", RIGHT.values(), ids=RIGHT)
def test_train_steps_a_scheduler_after_every_batch(make):
    model, seen = network(), []
    optimizer = utils.get_optimizer(model, lr=0.2)
    optimizer.register_step_pre_hook(lambda *_: seen.append([optimizer.param_groups[0]["lr"]]))
    scheduler = make(optimizer)
    for loader in (BATCHES, (batch for batch in BATCHES)):  # the last does not know its length
        train(model, optimizer, scheduler=scheduler, batches=loader)
    assert np.array_equal(seen, rates(make(utils.get_optimizer(network(), lr=0.2)), 12))


WRONG = {  # (model, scheduler) of a model and its optimizer
    "scheduler of epochs": lambda m, o: (m, utils.get_scheduler(o, step_size=5, gamma=0.75)),
    "scheduler of epochs in part": lambda m, o: (m, in_turn(o, 1)),
    "scheduler of another loader": lambda m, o: (m, utils.get_scheduler(o, steps_per_epoch=7)),
    "scheduler of another optimizer": lambda m, o: (m, lr_scheduler.StepLR(utils.get_optimizer(network()), 6)),
    "optimizer of another model": lambda m, o: (copy.deepcopy(m), None),
    "optimizer of another head": lambda m, o: (nn.Sequential(m[0], nn.Linear(192, 4), m[2]), None),
}


@pytest.mark.parametrize("case", WRONG)
def test_train_refuses_an_optimizer_or_scheduler_of_something_else(case):
    model = network()
    optimizer = utils.get_optimizer(model)
    changed, scheduler = WRONG[case](model, optimizer)
    with pytest.raises(ValueError, match=case.split()[0]):
        train(changed, optimizer, scheduler=scheduler)


def test_a_learning_rate_that_has_been_brought_to_nothing_is_refused():
    """A whole run at a learning rate of zero would look like one that does not learn."""
    optimizer = utils.get_optimizer(network(), lr=0.2)
    rates(utils.get_scheduler(optimizer, "OneCycleLR", epochs=1, steps_per_epoch=90), 90)
    with pytest.raises(ValueError, match="again"):
        utils.get_scheduler(optimizer)


def test_part_of_a_model_may_be_trained_and_a_criterion_with_parameters_of_its_own():
    model, criterion = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Linear(4, 4)), nn.CrossEntropyLoss()
    body, head = (layer.weight.detach().clone() for layer in model[1:])
    criterion.scale = nn.Parameter(torch.ones(()))
    for trained in ([*model[2].parameters()], [model[2].bias, criterion.scale]):
        train(model, torch.optim.SGD(trained, lr=0.1), criterion)
    model[1].requires_grad_(False)
    train(model, utils.get_optimizer(model), criterion)
    assert torch.equal(model[1].weight, body) and not torch.equal(model[2].weight, head)
