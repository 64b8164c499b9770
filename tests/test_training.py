"""train and test: what they compute, other people's networks and hooks, and what would be silently wrong."""

import copy
import functools
import itertools
import math
import pickle
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn
from torch.overrides import TorchFunctionMode

import epoch
import utils
from models import Model

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = [7, 5, 3]  # uneven batches: a mean over batches is not the mean over samples
CPU = torch.device("cpu")


def linear(*end):
    """Four classes of images (N, 3, 8, 8), by default as log-probabilities."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4), *(end or [nn.LogSoftmax(dim=1)]))


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(n, 3, 8, 8, generator=generator), torch.randint(0, 4, (n,), generator=generator)) for n in SIZES
    ]


@pytest.fixture
def cifar_batches():
    return [(torch.randn(4, 3, 32, 32), torch.tensor([3, 1, 4, 1]))] * 2


@pytest.fixture
def in_float32(monkeypatch):
    monkeypatch.setattr(utils, "autocast_dtype", lambda device: torch.float32)


def train(model, batches, criterion=None, **options):
    optimizer = options.pop("optimizer", None) or utils.get_optimizer(model, lr=0.1)
    utils.train(model, "cpu", batches, optimizer, criterion or utils.get_loss(), verbose=False, **options)


def evaluate(model, batches, criterion=None, **options):
    return utils.test(model, "cpu", batches, criterion or utils.get_loss(), verbose=False, **options)


BOTH = pytest.mark.parametrize("run", [train, evaluate], ids=["train", "test"])


# ---- what they compute -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds_per_batch", [0, 1])
def test_test_reports_means_per_sample_and_what_was_wrong(batches, in_float32, monkeypatch, seconds_per_batch):
    """Also when what was got wrong is read from the device twice a second, and not only at the end."""
    clock = types.SimpleNamespace(monotonic=itertools.count(step=seconds_per_batch).__next__)
    monkeypatch.setattr(epoch, "time", clock)
    torch.manual_seed(0)
    model, losses, accuracies = linear(), [], []
    wrong = evaluate(model, batches, test_losses=losses, test_acc=accuracies)
    images, labels = (torch.cat(parts) for parts in zip(*batches))
    scores = model(images).detach()
    predictions = scores.argmax(dim=1)
    assert losses == [pytest.approx(float(F.nll_loss(scores, labels)), rel=1e-6)]
    assert accuracies == [pytest.approx(100 * float((predictions == labels).float().mean()))]
    index = (predictions != labels).nonzero().flatten()
    for got, expected in zip(zip(*wrong), (images, labels, predictions)):
        assert torch.equal(torch.stack(got), expected[index])
    assert np.array_equal(wrong.tested, np.bincount(labels))


def test_train_takes_the_steps_of_plain_sgd(batches, in_float32):
    torch.manual_seed(0)
    model, by_hand, losses, accuracies = linear(), linear(), [], []
    by_hand.load_state_dict(model.state_dict())
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
    optimizer = utils.get_optimizer(model, "SGD", lr=0.5, momentum=0.9)
    train(model, batches * 2, optimizer=optimizer, train_losses=losses, train_acc=accuracies)
    torch.testing.assert_close(list(model.parameters()), list(by_hand.parameters()))
    assert losses == [pytest.approx(total / 30, rel=1e-5)] and accuracies == [pytest.approx(100 * correct / 30)]


def test_modes_and_gradients(batches):
    model = linear()
    train(model.eval(), batches)
    assert model.training
    model.zero_grad()
    evaluate(model, batches)
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())


class Named(list):
    dataset = types.SimpleNamespace(name="a few images")


def test_a_line_each_and_lists_that_are_never_shared(batches, capsys):
    """Lists may be left out, as the original had it; its default lists were shared by all calls."""
    model, losses, accuracies = linear(), [0.7], [60.0]
    optimizer = utils.get_optimizer(model)
    for lists in ([losses, accuracies], [], []):
        utils.train(model, "cpu", Named(batches), optimizer, utils.get_loss(), *lists)
    utils.test(model, "cpu", Named(batches), utils.get_loss(), losses, accuracies)
    first, second, third, tested = capsys.readouterr().out.splitlines()
    assert "epoch 2  train" in first and "epoch" not in second + third + tested and "test" in tested
    for line, loss, accuracy in zip((first, tested), losses[1:], accuracies[1:], strict=True):
        assert f"loss {loss:.4f}" in line and f"{accuracy:.2f} %" in line and "[a few images]" in line
    evaluate(model, batches, test_losses=losses)
    assert len(losses) == 4 and len(accuracies) == 3 and capsys.readouterr().out == ""


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 32), nn.ReLU(), nn.Linear(32, 10), nn.LogSoftmax(dim=1))


@pytest.mark.parametrize(
    "network, lr, epochs, shuffled, low, high",
    [(lambda: Model(0.02), 0.1, 3, False, 75, 100), (mlp, 0.02, 6, False, 50, 100), (mlp, 0.02, 6, True, 0, 25)],
    ids=["Model", "a small network", "shuffled labels teach nothing"],
)
def test_learning(network, lr, epochs, shuffled, low, high):
    utils.seed_everything(0)
    kwargs = {"batch_size": 32, "sampler": torch.utils.data.SubsetRandomSampler(range(512))}
    _, train_loader = utils.get_CIFARdataset_with_loader("train", kwargs, dataset="digits")
    _, test_loader = utils.get_CIFARdataset_with_loader("test", {"batch_size": 64}, dataset="digits")
    if shuffled:
        np.random.default_rng(0).shuffle(train_loader.dataset.labels)
    model, accuracies = network(), []
    optimizer = utils.get_optimizer(model, lr=lr)
    scheduler = utils.get_scheduler(optimizer, "OneCycleLR", epochs=epochs, steps_per_epoch=len(train_loader))
    for _ in range(epochs):
        train(model, train_loader, optimizer=optimizer, scheduler=scheduler)
    evaluate(model, test_loader, test_acc=accuracies)
    assert low < accuracies[0] < high


@BOTH
def test_what_an_epoch_counts_is_read_from_the_device_at_its_end(batches, monkeypatch, run):
    """And a few times a second in between, to be shown, but not while the clock stands still."""
    monkeypatch.setattr(epoch, "time", types.SimpleNamespace(monotonic=lambda: 0.0))
    reads, sums = [], epoch.Tally.sums
    monkeypatch.setattr(epoch.Tally, "sums", lambda tally: reads.append(tally) or sums(tally))
    run(linear(), batches)
    assert len(reads) == 1


def test_misclassified_samples_keep_no_batch_alive(cifar_batches):
    """One in sixteen is wrong: what is pickled must be theirs alone."""
    images = torch.randn(256, 3, 32, 32)
    model = nn.Sequential(nn.Flatten(), nn.LazyLinear(10))
    labels = model(images).argmax(dim=1)
    labels[::16] = (labels[::16] + 1) % 10
    wrong = evaluate(model, [(images, labels)], utils.get_loss("cross_entropy"))
    assert len(wrong) == 16 and len(pickle.dumps(wrong)) < 16 * (3 * 32 * 32 * 4 + 2000)
    assert pickle.loads(pickle.dumps(wrong)).tested.sum() == 256


@given(hnp.arrays(np.int64, st.integers(1, 40), elements=st.integers(0, 9)), st.integers(0, 2**31))
@settings(deadline=None, max_examples=30)
def test_correct_count_is_numpys(labels, seed):
    scores = np.random.default_rng(seed).normal(size=(len(labels), 10)).astype(np.float32)
    expected = int((scores.argmax(axis=1) == labels).sum())
    for predictions in (scores, scores.argmax(axis=1), scores.argmax(axis=1, keepdims=True)):
        counted = utils.GetCorrectPredCount(torch.from_numpy(predictions), torch.from_numpy(labels))
        assert counted == expected and isinstance(counted, int)


@pytest.mark.parametrize(
    "predictions, labels", [((3,), (4,)), ((3, 10), (4,)), ((4,), (4, 10)), ((10,), ()), ((4,), (4, 1))]
)
def test_a_count_of_what_torch_would_stretch_is_refused(predictions, labels):
    with pytest.raises(ValueError) as refused:
        utils.GetCorrectPredCount(torch.zeros(predictions), torch.zeros(labels))
    assert str(predictions) in str(refused.value) and str(labels) in str(refused.value)


# ---- other people's networks and tools -------------------------------------------------------------------------------


class View(nn.Module):
    """What every second student writes."""

    def __init__(self):
        super().__init__()
        self.conv, self.classifier = nn.Conv2d(3, 4, 3), nn.Linear(4 * 6 * 6, 4)

    def forward(self, x):
        return F.log_softmax(self.classifier(self.conv(x).view(x.size(0), -1)), dim=1)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.classifier = nn.Linear(3 * 8 * 8, 4)

    def forward(self, images):
        return F.log_softmax(self.classifier(images.view(len(images), -1)), dim=1)


NETWORKS = {
    "view behind a convolution": View,
    "images.view": Mlp,
    "torch's layers": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), linear()[0], nn.Linear(144, 4), nn.LogSoftmax(dim=1)),
    "lazy layers": lambda: nn.Sequential(
        nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(4), nn.LogSoftmax(dim=1)
    ),
    "ours": lambda: Model(num_classes=4),
}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_networks_of_all_kinds_keep_the_layout_of_their_weights(batches, cifar_batches, make):
    """A `test` in inference_mode before training included, which is where lazy layers would be made."""
    model = make()
    if isinstance(model, Model):
        batches = [(images, labels % 4) for images, labels in cifar_batches]
    with torch.inference_mode():
        wrong = evaluate(model, batches)
    before = [parameter.stride() for parameter in model.parameters()]
    train(model, batches)
    evaluate(model, batches)
    assert [parameter.stride() for parameter in model.parameters()] == before
    for values in (model.parameters(), (parameter.grad for parameter in model.parameters())):
        nn.utils.parameters_to_vector(values)  # by a view of each
    assert all(image.is_contiguous() and image.clone().requires_grad_() is not None for image, _, _ in wrong)


@pytest.mark.parametrize(
    "shape, layers",
    [((4, 20), [nn.Linear(20, 4)]), ((4, 3, 5, 8, 8), [nn.Conv3d(3, 4, 3), nn.AdaptiveAvgPool3d(1), nn.Flatten()])],
    ids=["vectors", "volumes"],
)
def test_batches_of_other_shapes(shape, layers):
    model, batch = nn.Sequential(*layers), (torch.randn(shape), torch.arange(4))
    train(model, [batch], F.cross_entropy)
    evaluate(model, [batch], F.cross_entropy)


class Convolutions(TorchFunctionMode):
    """Records for each image that a convolution gets whether its channels are innermost in memory."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.conv2d and args[0].shape[1] > 1 and args[0].shape[2] > 1:
            self.innermost.append(args[0].stride(1) == 1)
        return function(*args, **(kwargs or {}))


@BOTH
def test_our_network_computes_channels_last(cifar_batches, run):
    """Which is faster; seen without hooks, which turn it off."""
    with Convolutions() as seen:
        seen.innermost = []
        run(Model(), cifar_batches)
    assert seen.innermost == [True] * 2 * 16  # all but the classifier


@BOTH
def test_a_hook_that_keeps_an_output_keeps_it_as_it_was(cifar_batches, run):
    model, kept, copies = Model(dropout_value=0.1), {}, {}
    for name, module in model.named_modules():
        module.register_forward_hook(
            lambda module, _, out, name=name: (
                kept.update({name: out}),
                copies.update({name: out.detach().clone()}),
                None,
            )[-1]
        )
    run(model, cifar_batches)
    assert len(kept) == len(list(model.modules()))
    assert all(torch.equal(kept[name], copies[name]) for name in kept)
    convolutions = [name for name in kept if name.endswith("conv")]
    assert len(convolutions) == 13 and all(kept[name].min() < 0 for name in convolutions)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # as images have no gradient
def test_hooks_of_every_kind_on_every_layer(cifar_batches, in_float32):
    """With a `view` of what a convolution takes and gives, which images with innermost channels do not have."""
    torch.manual_seed(0)
    model, calls, losses = Model(dropout_value=0.0), set(), []
    images, labels = cifar_batches[0]
    expected = F.nll_loss(copy.deepcopy(model)(images), labels).item()

    def look(kind, name):
        def hook(module, *tensors):
            calls.add((kind, name))
            for tensor in tensors:
                tensor = tensor[0] if isinstance(tensor, tuple) else tensor
                if isinstance(module, nn.Conv2d) and tensor is not None:  # as the gradient of images is
                    tensor.view(-1)

        return hook

    kinds = ["forward", "forward_pre", "full_backward", "full_backward_pre"]
    for name, module in model.named_modules():
        for kind in kinds:
            getattr(module, f"register_{kind}_hook")(look(kind, name))
    train(model, cifar_batches[:1], train_losses=losses)
    assert losses == [pytest.approx(expected, rel=1e-4)]
    assert len(calls) == len(kinds) * len(list(model.modules()))
    calls.clear()
    evaluate(model, cifar_batches)
    assert calls == {(kind, name) for kind in kinds[:2] for name, _ in model.named_modules()}


@BOTH
def test_layers_are_faster_only_meanwhile(cifar_batches, monkeypatch, run):
    """Also when the loader breaks down in mid-epoch."""
    model, faster, forward = Model(dropout_value=0.1), [], Model.forward

    def looking(self, x):
        faster.append([name for name, module in model.named_modules() if "forward" in vars(module)])
        return forward(self, x)

    def loader():
        yield from cifar_batches
        raise OSError("the disk")

    monkeypatch.setattr(Model, "forward", looking)
    with pytest.raises(OSError, match="the disk"):
        run(model, loader())
    assert [len(names) for names in faster] == [4 + 13] * 2  # depthwise with two outputs per channel, and dropout
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    "before, deterministic, inside", [(False, False, True), (False, True, False), (True, False, True)]
)
def test_cudnn_searches_for_kernels_only_meanwhile(monkeypatch, before, deterministic, inside):
    cudnn = types.SimpleNamespace(benchmark=before, deterministic=deterministic)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    with pytest.raises(OSError), utils._made_fast(nn.Identity(), torch.device("cuda")):
        assert cudnn.benchmark == inside
        raise OSError
    assert cudnn.benchmark == before


def test_weight_averaging(cifar_batches):
    """torch.optim.swa_utils, with our batches and our train and test."""
    model = Model()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    weights = []
    for _ in range(2):
        train(model, cifar_batches)
        averaged.update_parameters(model)
        weights.append(model.classifier.weight.detach().clone())
    torch.optim.swa_utils.update_bn(cifar_batches, averaged)
    torch.testing.assert_close(averaged.module.classifier.weight.detach(), sum(weights) / 2)
    assert len(evaluate(averaged, cifar_batches)) <= 8
    assert (averaged.module.C1[0].norm.num_batches_tracked, model.training) == (2, True)


# ---- what would be silently wrong ------------------------------------------------------------------------------------


class OwnLoss(nn.Module):
    def __init__(self, function, **options):
        super().__init__()
        self.loss = functools.partial(function, **options)

    def forward(self, scores, labels):
        return self.loss(scores, labels)


NLL = {
    "get_loss": utils.get_loss(),
    "weighted": nn.NLLLoss(weight=torch.tensor([1.0, 2, 3, 4])),
    "function": F.nll_loss,
    "partial": functools.partial(F.nll_loss, weight=torch.tensor([1.0, 2, 3, 4])),
    "lambda": lambda scores, labels: F.nll_loss(scores, labels),
    "own": OwnLoss(F.nll_loss),
}
CROSS_ENTROPY = {
    "get_loss": utils.get_loss("cross_entropy", label_smoothing=0.1),
    "function": F.cross_entropy,
    "partial": functools.partial(F.cross_entropy, label_smoothing=0.1),
    "lambda": lambda scores, labels: F.cross_entropy(scores, labels),
    "own": OwnLoss(F.cross_entropy),
}
CRITERIA = {f"NLL: {name}": value for name, value in NLL.items()}
CRITERIA |= {f"cross-entropy: {name}": value for name, value in CROSS_ENTROPY.items()}
ENDS = {  # of a network, and which criteria take it
    "log-probabilities": ([nn.LogSoftmax(dim=1)], "NLL, cross-entropy"),
    "logits": ([nn.Identity()], "cross-entropy"),
    "confident logits": ([nn.Hardtanh(-30, 30)], "cross-entropy"),
    "probabilities": ([nn.Softmax(dim=1)], ""),
    "log_softmax over the batch": ([nn.LogSoftmax(dim=0)], "cross-entropy"),
}


@BOTH
@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("end", ENDS)
def test_criterion_and_scores_must_agree(batches, run, end, criterion):
    layers, taken = ENDS[end]
    model = linear(*layers)
    if criterion.split(":")[0] in taken:
        run(model, batches, CRITERIA[criterion])
        return
    before = model[1].weight.detach().clone()
    with pytest.raises(ValueError, match=r'the model returns .*get_loss\("cross_entropy"\)'):
        run(model, batches, CRITERIA[criterion])
    assert torch.equal(model[1].weight, before)


@pytest.mark.parametrize("criterion", [utils.get_loss(), F.cross_entropy])
def test_two_softmaxes_are_refused(cifar_batches, criterion):
    """As of a head that ends in one, in a network that applies log_softmax to it."""
    model = Model()
    model.classifier = nn.Sequential(model.classifier, nn.Softmax(dim=1))
    with pytest.raises(ValueError, match="softmax twice"):
        train(model, cifar_batches, criterion)
    train(nn.Sequential(Model(), nn.LogSoftmax(dim=1)), cifar_batches, criterion)  # which changes nothing


class Rounded(nn.Module):
    """Log-probabilities as half precision leaves them."""

    def __init__(self, dtype, classes, spread):
        super().__init__()
        self.dtype, self.spread, self.layer = dtype, spread, nn.Linear(192, classes)

    def forward(self, x):
        return F.log_softmax((self.spread * self.layer(x.flatten(1))).to(self.dtype), dim=1)


@pytest.mark.parametrize("spread", [0, 1, 30])
@pytest.mark.parametrize("classes", [4, 100, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_no_disagreement(batches, dtype, classes, spread):
    for criterion in (utils.get_loss(), utils.get_loss("cross_entropy")):
        evaluate(Rounded(dtype, classes, spread), batches, criterion)


def test_losses_of_another_kind_take_any_scores(batches):
    for criterion in (nn.MultiMarginLoss(), lambda scores, labels: F.mse_loss(scores, F.one_hot(labels, 4).float())):
        for layers, _ in ENDS.values():
            train(linear(*layers), batches, criterion)
    zero = linear(nn.Identity())
    nn.init.zeros_(zero[1].weight), nn.init.zeros_(zero[1].bias)
    train(zero, batches, F.cross_entropy)


@BOTH
@pytest.mark.parametrize(
    "criterion",
    [
        nn.NLLLoss(reduction="sum"),
        utils.get_loss("cross_entropy", reduction="sum"),
        functools.partial(F.nll_loss, reduction="sum"),
        nn.NLLLoss(reduction="none"),
        OwnLoss(F.nll_loss, reduction="sum"),
        OwnLoss(F.cross_entropy, reduction="sum"),
        OwnLoss(F.nll_loss, reduction="none"),
    ],
)
def test_a_loss_that_is_not_the_mean_is_refused(batches, run, criterion):
    with pytest.raises(ValueError, match=r"criterion.*must be .*mean"):
        run(linear(), batches, criterion)


def spoiled(batches, change):
    """The batches with another second one."""
    images, labels = batches[1]
    return [batches[0], change(images.clone(), labels.clone()), batches[2]]


def first_set_to(tensor, value):
    tensor.view(-1)[0] = value
    return tensor


BAD_BATCHES = {
    "no batch": (lambda b: [], ValueError, "the loader is empty"),
    "an empty batch": (lambda b: [(b[0][0][:0], b[0][1][:0])], ValueError, r"\(0, 3, 8, 8\).*N > 0"),
    "bytes": (lambda b: spoiled(b, lambda x, y: (x.byte(), y)), ValueError, "torch.uint8 images.*floating-point"),
    "arrays": (lambda b: spoiled(b, lambda x, y: (x.numpy(), y)), TypeError, "a ndarray and a Tensor"),
    "labels in a list": (lambda b: spoiled(b, lambda x, y: (x, y.tolist())), TypeError, "a Tensor and a list"),
    "labels as floats": (lambda b: spoiled(b, lambda x, y: (x, y.float())), ValueError, "torch.float32 labels.*int64"),
    "labels of 32 bits": (lambda b: spoiled(b, lambda x, y: (x, y.int())), ValueError, "torch.int32 labels.*int64"),
    "one-hot labels": (lambda b: spoiled(b, lambda x, y: (x, F.one_hot(y, 4))), ValueError, r"labels \(5, 4\).*\(N,\)"),
    "fewer labels": (lambda b: spoiled(b, lambda x, y: (x, y[:3])), ValueError, r"labels \(3,\)"),
    "a label too large": (lambda b: spoiled(b, lambda x, y: (x, first_set_to(y, 4))), ValueError, "to 4;.*from 0 to 3"),
    "a negative label": (lambda b: spoiled(b, lambda x, y: (x, first_set_to(y, -1))), ValueError, "from -1.*0 to 3"),
    "a NaN": (lambda b: spoiled(b, lambda x, y: (first_set_to(x, math.nan), y)), FloatingPointError, "batch 2: .*nan"),
    "an infinity": (lambda b: spoiled(b, lambda x, y: (first_set_to(x, math.inf), y)), FloatingPointError, "batch 2"),
}


@pytest.mark.parametrize("case", BAD_BATCHES)
def test_bad_batches_are_refused_and_the_lists_left_alone(batches, case):
    bad, error, words = BAD_BATCHES[case]
    losses, accuracies = [0.5, 0.4], [80.0, 82.0]
    with pytest.raises(error, match=words) as in_training:
        train(linear(), bad(batches), train_losses=losses, train_acc=accuracies)
    with pytest.raises(error, match=words) as in_test:
        evaluate(linear(), bad(batches), test_losses=losses, test_acc=accuracies)
    assert (losses, accuracies) == ([0.5, 0.4], [80.0, 82.0])
    if error is FloatingPointError:  # a test changes no weights, so nobody needs to go back to a checkpoint
        assert "epoch 3" in str(in_training.value) and "checkpoint" in str(in_training.value)
        assert "test" in str(in_test.value) and "checkpoint" not in str(in_test.value)


@BOTH
@pytest.mark.parametrize(
    "end, found", [(nn.Flatten(0), r"\(28,\)"), (nn.Unflatten(1, (2, 2)), r"\(7, 2, 2\)"), (nn.LSTM(4, 4), "a tuple")]
)
def test_what_is_not_scores_is_refused(batches, run, end, found):
    with pytest.raises(ValueError, match=rf"the model returned {found}.*\(N, classes\)"):
        run(linear(end), batches)


@BOTH
def test_lists_in_each_others_place_are_refused(batches, run):
    names = ("train_losses", "train_acc") if run is train else ("test_losses", "test_acc")
    for lists in (([85.3], [0.42]), ([11.0, 85.3], [2.3, 0.42])):
        with pytest.raises(ValueError, match=r"85\.3.*0\.42.*order is train_losses, train_acc"):
            run(linear(), batches, **dict(zip(names, lists)))
    for lists in (([2.3], [10.0]), ([11.5], [9.8]), ([0.01], [99.0]), ([4.6], [1.0]), ([], [])):  # bad ones, too
        run(linear(), batches, **dict(zip(names, lists)))
    one = []
    with pytest.raises(ValueError, match="one list"):
        run(linear(), batches, **dict.fromkeys(names, one))
