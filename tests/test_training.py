"""train, test and the helpers: means against sums by hand, learning, and what they print."""

import itertools
import math
import types

import numpy as np
import progress
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import utils
from models import Model

SIZES = [7, 5, 3]  # uneven batches: a mean over batches is not the mean over samples


class Linear(nn.Module):
    """Scores that float32 arithmetic can be followed by hand."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3 * 8 * 8, 4)

    def forward(self, x):
        return F.log_softmax(self.layer(x.flatten(1)).float(), dim=1)


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, 3, 8, 8, generator=generator), torch.randint(0, 4, (n,), generator=generator)) for n in SIZES
    ]


@pytest.fixture
def in_float32(monkeypatch):
    monkeypatch.setattr(utils, "autocast_dtype", lambda device: torch.float32)


def whole(batches):
    images, labels = zip(*batches)
    return torch.cat(images), torch.cat(labels)


class Loader(list):
    """The least that a loader is: batches, and a data set."""

    dataset = ()


@pytest.mark.parametrize("seconds_per_batch", [0, 1])
def test_test_reports_means_per_sample(batches, in_float32, monkeypatch, seconds_per_batch):
    """Also when what was got wrong is read from the device twice a second, and not only at the end."""
    clock = types.SimpleNamespace(monotonic=itertools.count(step=seconds_per_batch).__next__)
    monkeypatch.setattr(progress, "time", clock)
    torch.manual_seed(0)
    model, losses, accuracies = Linear(), [], []
    wrong = utils.test(model, "cpu", Loader(batches), utils.get_loss(), losses, accuracies)
    images, labels = whole(batches)
    with torch.no_grad():
        scores = model(images)
    predictions = scores.argmax(dim=1)
    assert losses == [pytest.approx(float(F.nll_loss(scores, labels)), rel=1e-6)]
    assert accuracies == [pytest.approx(100 * float((predictions == labels).float().mean()))]
    expected = [i for i in range(len(labels)) if predictions[i] != labels[i]]
    assert [(true, predicted) for _, true, predicted in wrong] == [
        (int(labels[i]), int(predictions[i])) for i in expected
    ]
    assert all(torch.equal(sample[0], images[i]) for sample, i in zip(wrong, expected))
    assert [(true.item(), predicted.item()) for _, true, predicted in wrong] == [sample[1:] for sample in wrong]


def test_lists_may_be_left_out_and_are_never_shared(batches):
    """As the original had it; its default lists were shared by all calls, so every epoch counted as a later one."""
    model = Linear()
    optimizer = utils.get_optimizer(model)
    for _ in range(2):
        utils.train(model, "cpu", Loader(batches), optimizer, utils.get_loss())
        utils.test(model, "cpu", Loader(batches), utils.get_loss())
    losses = []
    utils.test(model, "cpu", Loader(batches), utils.get_loss(), losses)
    assert len(losses) == 1


def test_train_takes_the_steps_of_plain_sgd(batches, in_float32):
    torch.manual_seed(0)
    model, by_hand = Linear(), Linear()
    by_hand.load_state_dict(model.state_dict())
    losses, accuracies = [], []
    optimizer = utils.get_optimizer(model, "SGD", lr=0.5, momentum=0.9)
    velocity = [torch.zeros_like(p) for p in by_hand.parameters()]
    total = correct = 0
    for images, labels in batches * 2:
        scores = by_hand(images)
        loss = F.nll_loss(scores, labels)
        gradients = torch.autograd.grad(loss, list(by_hand.parameters()))
        with torch.no_grad():
            for parameter, v, gradient in zip(by_hand.parameters(), velocity, gradients):
                v.mul_(0.9).add_(gradient)
                parameter -= 0.5 * v
        total, correct = total + loss.item() * len(labels), correct + int((scores.argmax(1) == labels).sum())
    utils.train(model, "cpu", Loader(batches * 2), optimizer, utils.get_loss(), losses, accuracies)
    for ours, theirs in zip(model.parameters(), by_hand.parameters()):
        torch.testing.assert_close(ours, theirs)
    assert losses == [pytest.approx(total / 30, rel=1e-5)] and accuracies == [pytest.approx(100 * correct / 30)]


def test_modes_gradients_and_lists(batches):
    model, criterion = Linear(), utils.get_loss()
    train_losses, train_acc, test_losses, test_acc = [9.0], [1.0], [], []
    utils.train(model, "cpu", Loader(batches), utils.get_optimizer(model), criterion, train_losses, train_acc)
    assert model.training and len(train_losses) == len(train_acc) == 2
    model.zero_grad()
    utils.test(model, torch.device("cpu"), Loader(batches), criterion, test_losses, test_acc)
    assert not model.training and len(test_losses) == len(test_acc) == 1
    assert all(parameter.grad is None for parameter in model.parameters())


def test_prints_a_line_each_with_loss_accuracy_and_data_set(digits, capsys):
    model = Model()
    _, loader = utils.get_CIFARdataset_with_loader("test", {"batch_size": 180}, dataset="digits")
    capsys.readouterr()
    losses, accuracies = [], []
    utils.train(model, "cpu", loader, utils.get_optimizer(model), utils.get_loss(), losses, accuracies)
    utils.test(model, "cpu", loader, utils.get_loss(), losses, accuracies)
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert len(lines) == 2 and captured.err == ""  # no bar in a log file
    assert "epoch 1  train" in lines[0] and "test" in lines[1]
    for line, loss, accuracy in zip(lines, losses, accuracies):
        assert f"loss {loss:.4f}" in line and f"{accuracy:.2f} %" in line and "digits (offline sample)" in line


@pytest.mark.parametrize("position", [1, 3])
def test_a_loss_that_is_not_finite_stops_the_run(batches, position):
    batches[position - 1][0][0, 0, 0, 0] = math.nan
    model, losses, accuracies = Linear(), [0.5, 0.4], [80.0, 82.0]
    with pytest.raises(FloatingPointError, match=f"epoch 3, batch {position}: the loss is nan"):
        utils.train(model, "cpu", Loader(batches), utils.get_optimizer(model), utils.get_loss(), losses, accuracies)
    assert losses == [0.5, 0.4] and accuracies == [80.0, 82.0]


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_out_of_range_are_refused(batches, label):
    batches[1][1][2] = label
    model = Linear()
    with pytest.raises(ValueError, match=rf"labels from .*{label}.*0 to 3"):
        utils.train(model, "cpu", Loader(batches), utils.get_optimizer(model), utils.get_loss(), [], [])
    with pytest.raises(ValueError, match=rf"labels from .*{label}.*0 to 3"):
        utils.test(model, "cpu", Loader(batches), utils.get_loss(), [], [])


def test_empty_loader_and_wrong_device_are_refused():
    model, losses = Linear(), []
    with pytest.raises(ValueError, match="empty"):
        utils.test(model, "cpu", Loader(), utils.get_loss(), losses, losses)
    with pytest.raises(ValueError, match=r"model is on meta.*cpu.*model\.to"):
        utils.test(model.to("meta"), "cpu", Loader(), utils.get_loss(), losses, losses)
    assert losses == []


@pytest.mark.parametrize("name", ["LinearLR", "ConstantLR", "PolynomialLR"])
def test_a_default_length_counts_epochs_too(name):
    """torch's own is 5 steps, so 5 epochs of 7 batches are 35."""
    scheduler = utils.get_scheduler(utils.get_optimizer(Linear(), lr=0.2), name=name, steps_per_epoch=7)
    assert scheduler.total_iters == 35


def test_optimizers_schedulers_and_losses_by_name():
    model = Model()
    sgd = utils.get_optimizer(model)
    assert isinstance(sgd, utils.optim.SGD) and sgd.defaults["lr"] == 0.01 and sgd.defaults["momentum"] == 0.9
    assert isinstance(utils.get_optimizer(model, "AdamW", lr=1e-3, weight_decay=0.1), torch.optim.AdamW)
    scheduler = utils.get_scheduler(utils.get_optimizer(model, lr=0.2), step_size=5, gamma=0.75)
    rates = []
    for _ in range(11):
        rates.append(scheduler.get_last_lr()[0])
        scheduler.optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([0.2 * 0.75 ** (epoch // 5) for epoch in range(11)])
    cosine = utils.get_scheduler(sgd, name="CosineAnnealingLR", T_max=10)
    assert isinstance(cosine, torch.optim.lr_scheduler.CosineAnnealingLR)
    scores, labels = torch.randn(6, 10).log_softmax(dim=1), torch.arange(6)
    assert utils.get_loss()(scores, labels) == F.nll_loss(scores, labels)
    torch.testing.assert_close(utils.get_loss("cross_entropy")(scores, labels), F.nll_loss(scores, labels))


def test_weight_decay_spares_biases_and_normalisation():
    model = Model()
    optimizer = utils.get_optimizer(model, lr=0.5, momentum=0, weight_decay=0.1, decay="weights")
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # without a gradient only the decay is left: w - lr * decay * w
    for name, value in model.named_parameters():
        factor = 0.95 if name.endswith("conv.weight") or value.ndim == 4 else 1.0
        torch.testing.assert_close(value.detach(), factor * before[name])


def test_a_scheduler_given_to_train_is_stepped_after_every_batch():
    batches = [(torch.randn(2, 3, 32, 32), torch.tensor([0, 1]))] * 10
    rates = []

    class Recorded(torch.optim.SGD):
        def step(self, *args):
            rates.append(self.param_groups[0]["lr"])
            return super().step(*args)

    model = Model()
    optimizer = Recorded(model.parameters(), lr=0.1)
    options = dict(max_lr=0.1, pct_start=0.2, anneal_strategy="linear", cycle_momentum=False)
    scheduler = utils.get_scheduler(optimizer, name="OneCycleLR", epochs=2, steps_per_epoch=10, **options)
    for _ in range(2):
        utils.train(model, "cpu", Loader(batches), optimizer, utils.get_loss(), [], [], scheduler)
    peak = 0.2 * 20 - 1  # up in a straight line to the last batch of the first fifth, then down to nothing
    expected = np.interp(range(20), [0, peak, 19], [0.1 / 25, 0.1, 0.1 / 25 / 1e4])
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_steps_of_the_scheduler_count_batches_or_epochs():
    def rates(steps, **options):
        optimizer = utils.get_optimizer(Model(), lr=0.2)
        scheduler = utils.get_scheduler(optimizer, step_size=5, gamma=0.75, **options)
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
            yield optimizer.param_groups[0]["lr"]

    assert list(rates(60, steps_per_epoch=3))[2::3] == list(rates(20))
    with pytest.raises(ValueError, match="ExponentialLR counts its steps"):
        utils.get_scheduler(utils.get_optimizer(Model()), name="ExponentialLR", steps_per_epoch=3)


@pytest.mark.parametrize(
    "name, ours, in_batches",
    [
        ("CosineAnnealingLR", {"epochs": 4}, {"T_max": 12}),
        ("CosineAnnealingLR", {"epochs": 4, "T_max": 2}, {"T_max": 6}),
        ("CosineAnnealingWarmRestarts", {"epochs": 4, "T_0": 2}, {"T_0": 6}),
        ("LinearLR", {"epochs": 4}, {"total_iters": 12}),
        ("MultiStepLR", {"epochs": 4, "milestones": [1, 3]}, {"milestones": [3, 9]}),
    ],
)
def test_lengths_are_epochs_though_the_steps_are_batches(name, ours, in_batches):
    optimizers = [utils.get_optimizer(Model(), lr=0.2) for _ in range(2)]
    mine = utils.get_scheduler(optimizers[0], name=name, steps_per_epoch=3, **ours)
    torchs = getattr(torch.optim.lr_scheduler, name)(optimizers[1], **in_batches)
    for _ in range(12):
        for optimizer, scheduler in zip(optimizers, (mine, torchs)):
            optimizer.step()
            scheduler.step()
        assert mine.get_last_lr() == torchs.get_last_lr()


@pytest.mark.parametrize(
    "call, listed",
    [
        (lambda: utils.get_optimizer(Model(), "SDG"), "SGD"),
        (lambda: utils.get_scheduler(utils.get_optimizer(Model()), name="Step"), "StepLR"),
        (lambda: utils.get_loss("nll"), "nll_loss"),
        (lambda: utils.get_CIFARdataset_with_loader("train", {}, dataset="mnist"), "digits"),
        (lambda: utils.get_CIFARdataset_with_loader("valid", {}, dataset="digits"), "test"),
    ],
)
def test_unknown_names_list_what_there_is(call, listed):
    with pytest.raises(ValueError, match=f"unknown .*{listed}"):
        call()


def learn(train_set_labels, epochs):
    utils.seed_everything(0)
    kwargs = {"batch_size": 64}
    _, train_loader = utils.get_CIFARdataset_with_loader("train", kwargs, dataset="digits")
    _, test_loader = utils.get_CIFARdataset_with_loader("test", kwargs, dataset="digits")
    train_loader.dataset.labels = train_set_labels
    model, accuracies = Model(dropout_value=0.05), []
    optimizer = utils.get_optimizer(model, "SGD", lr=0.1, momentum=0.9)
    scheduler = utils.get_scheduler(optimizer, step_size=1, gamma=0.75)
    for _ in range(epochs):
        utils.train(model, "cpu", train_loader, optimizer, utils.get_loss(), [], [])
        scheduler.step()
    utils.test(model, "cpu", test_loader, utils.get_loss(), [], accuracies)
    return accuracies[0]


def test_a_few_epochs_on_the_digits_reach_90_percent(digits):
    assert learn(digits["train"].labels, epochs=6) > 90


def test_shuffled_labels_teach_nothing(digits):
    shuffled = np.random.default_rng(0).permutation(digits["train"].labels)
    assert learn(shuffled, epochs=6) < 30


def test_star_import_gives_the_names_of_the_contract():
    names = {}
    exec("from utils import *", names)
    contract = """get_CIFARdataset_with_loader get_train_transforms get_test_transforms GetCorrectPredCount train test
        get_optimizer get_scheduler get_loss post_display post_accuracyplots optim get_image_from_tensor"""
    assert all(name in names for name in contract.split()) and names["optim"] is torch.optim


def float16_epoch(batches, fused, monkeypatch):
    """(weights after an epoch in float16, how often GradScaler asked the device whether gradients had overflowed)."""
    monkeypatch.setattr(utils, "autocast_dtype", lambda device: torch.float16)
    read, item = [], torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: read.append(tensor) or item(tensor))
    torch.manual_seed(0)
    model = Linear()
    optimizer = utils.get_optimizer(model, lr=0.1, nesterov=True, weight_decay=5e-4, decay="weights", fused=fused)
    utils.train(model, "cpu", Loader(batches), optimizer, utils.get_loss(), [], [])
    monkeypatch.undo()
    return model.layer.weight.detach(), len(read)


def test_a_fused_optimizer_learns_the_same_and_does_not_wait_in_every_step(batches, monkeypatch):
    plain, waits = float16_epoch(batches, False, monkeypatch)
    fused, fused_waits = float16_epoch(batches, True, monkeypatch)
    assert waits >= len(batches) and fused_waits == 0
    torch.testing.assert_close(fused, plain)


def test_a_fused_optimizer_goes_on_as_a_plain_one_does(batches, in_float32):
    """After parameters were unfrozen, and with momentum in the memory layout that another device left it in."""
    trained = []
    for fused in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 6), nn.Flatten(), nn.LogSoftmax(dim=1))
        first, second = model[0].weight, model[1].weight
        first.requires_grad_(False)
        optimizer = utils.get_optimizer(model, lr=0.1, fused=fused)
        utils.train(model, "cpu", Loader(batches), optimizer, utils.get_loss())
        momentum = optimizer.state[second]["momentum_buffer"]
        optimizer.state[second]["momentum_buffer"] = momentum.clone(memory_format=torch.contiguous_format)
        assert momentum.stride() != optimizer.state[second]["momentum_buffer"].stride()
        first.requires_grad_(True)
        utils.train(model, "cpu", Loader(batches), optimizer, utils.get_loss())
        trained.append([first.detach(), second.detach()])
    torch.testing.assert_close(*trained)


@pytest.mark.parametrize("epoch", ["train", "test"])
def test_what_an_epoch_counts_is_read_from_the_device_at_its_end(batches, monkeypatch, epoch):
    """And a few times a second in between, to be shown, but not while the clock stands still."""
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: 0.0))
    reads, read = [], progress.Tally.read
    monkeypatch.setattr(progress.Tally, "read", lambda tally: reads.append(tally) or read(tally))
    model = Linear()
    if epoch == "train":
        utils.train(model, "cpu", Loader(batches), utils.get_optimizer(model), utils.get_loss())
    else:
        utils.test(model, "cpu", Loader(batches), utils.get_loss())
    assert len(reads) == 1


def test_a_fused_optimizer_survives_an_overflow_in_its_first_step(batches, monkeypatch):
    """GradScaler skips the step; torch alone would then take its next step with momentum that was never set."""
    uninitialised = torch.empty_like

    def junk(*arguments, **options):
        return uninitialised(*arguments, **options).fill_(1e30)

    monkeypatch.setattr(torch, "empty_like", junk)
    (images, labels), *others = batches
    weights, _ = float16_epoch([(images * 1000, labels), *others], True, monkeypatch)
    assert weights.abs().max() < 100


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_optimizers_are_fused_on_a_gpu():
    model = Linear().cuda()
    assert utils.get_optimizer(model).defaults["fused"] and utils.get_optimizer(model, "AdamW").defaults["fused"]
    assert not utils.get_optimizer(model, foreach=True).defaults["fused"]
