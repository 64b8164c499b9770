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
from torch import nn

import epoch
import utils
from models import Model


def linear(*end):
    """Four classes of images (N, 3, 8, 8), by default as log-probabilities."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4), *(end or [nn.LogSoftmax(dim=1)]))


@pytest.fixture
def batches():
    """Of uneven sizes, so that a mean over batches is not the mean over samples."""
    torch.manual_seed(0)
    return [(torch.randn(n, 3, 8, 8), torch.randint(4, (n,))) for n in (7, 5, 3)]


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


@pytest.mark.parametrize("seconds_per_batch, expected_reads", [(0, 1), (1, 4)])
def test_test_reports_means_per_sample_and_what_was_wrong(
    batches, in_float32, monkeypatch, seconds_per_batch, expected_reads
):
    """The device is waited for at the end and, to show how far it is, twice a second."""
    clock = types.SimpleNamespace(monotonic=itertools.count(step=seconds_per_batch).__next__)
    monkeypatch.setattr(epoch, "time", clock)
    reads, sums = [], epoch.Tally.sums
    monkeypatch.setattr(epoch.Tally, "sums", lambda tally: reads.append(tally) or sums(tally))
    model, losses, accuracies = linear(), [], []
    wrong = evaluate(model, batches, test_losses=losses, test_acc=accuracies)
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())
    images, labels = (torch.cat(parts) for parts in zip(*batches))
    scores = model(images).detach()
    predictions = scores.argmax(dim=1)
    assert losses == [pytest.approx(float(F.nll_loss(scores, labels)), rel=1e-6)]
    assert accuracies == [pytest.approx(100 * float((predictions == labels).float().mean()))]
    index = (predictions != labels).nonzero().flatten()
    for got, expected in zip(zip(*wrong), (images, labels, predictions)):
        assert torch.equal(torch.stack(got), expected[index])
    assert np.array_equal(pickle.loads(pickle.dumps(wrong)).tested, np.bincount(labels))
    assert len(pickle.dumps(wrong)) < len(wrong) * (3 * 8 * 8 * 4 + 2000)  # none keeps its batch alive
    assert len(reads) == expected_reads


def test_a_loader_may_fill_the_memory_of_its_batches_again(batches):
    def refilled():
        images, labels = torch.empty(3, 3, 8, 8), torch.empty(3, dtype=torch.int64)
        for parts in batches:
            for buffer, part in zip((images, labels), parts):
                buffer.copy_(part[:3])
            yield images, labels

    model = linear()
    expected = evaluate(model, [(images[:3], labels[:3]) for images, labels in batches])
    wrong = evaluate(model, refilled())
    assert np.array_equal(wrong.tested, expected.tested) and len(wrong) == len(expected)
    assert all(map(torch.equal, itertools.chain(*wrong), itertools.chain(*expected)))


def test_test_keeps_no_graph(batches):
    kept = []
    evaluate(linear(), batches, lambda scores, labels: kept.append(scores.requires_grad) or F.nll_loss(scores, labels))
    assert kept == [False] * 3


def test_train_takes_the_steps_of_a_plain_loop(batches, in_float32):
    model, plain, losses, accuracies = linear(), linear(), [], []
    plain.load_state_dict(model.state_dict())
    sgd = torch.optim.SGD(plain.parameters(), lr=0.5, momentum=0.9)
    total = correct = 0
    for images, labels in batches * 2:
        scores = plain(images)
        loss = F.nll_loss(scores, labels)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        total, correct = total + loss.item() * len(labels), correct + int((scores.argmax(1) == labels).sum())
    optimizer = utils.get_optimizer(model, "SGD", lr=0.5, momentum=0.9)
    train(model.eval(), batches * 2, optimizer=optimizer, train_losses=losses, train_acc=accuracies)
    assert model.training
    torch.testing.assert_close(list(model.parameters()), list(plain.parameters()))
    assert losses == [pytest.approx(total / 30, rel=1e-5)] and accuracies == [pytest.approx(100 * correct / 30)]


def test_a_line_each_and_lists_that_are_never_shared(batches, capsys):
    """Lists may be left out, as the original had it; its default lists were shared by all calls."""
    model, losses, accuracies = linear(), [0.7], [60.0]
    optimizer = utils.get_optimizer(model)
    for lists in ([losses, accuracies], [], []):
        utils.train(model, "cpu", batches, optimizer, utils.get_loss(), *lists)
    utils.test(model, "cpu", batches, utils.get_loss(), losses, accuracies)
    first, second, third, tested = capsys.readouterr().out.splitlines()
    assert "epoch 2  train" in first and "epoch" not in second + third + tested and "test" in tested
    for line, loss, accuracy in zip((first, tested), losses[1:], accuracies[1:], strict=True):
        assert f"loss {loss:.4f}" in line and f"{accuracy:.2f} %" in line and "[list]" in line
    evaluate(model, batches, test_losses=losses)
    assert len(losses) == 4 and len(accuracies) == 3 and capsys.readouterr().out == ""


def test_correct_predictions_are_counted():
    for predicted in (torch.tensor([2, 1, 1]), torch.tensor([[2], [1], [1]]), torch.eye(3)[[2, 1, 1]]):
        assert utils.GetCorrectPredCount(predicted, torch.tensor([2, 0, 1])) == 2
    assert utils.GetCorrectPredCount(torch.tensor([[0.9], [0.2]]).round(), torch.tensor([1, 0])) == 2


@pytest.mark.parametrize("predictions, labels", [((3, 10), (4,)), ((10,), ()), ((4,), (4, 1))])
def test_a_count_of_what_torch_would_stretch_is_refused(predictions, labels):
    with pytest.raises(ValueError) as refused:
        utils.GetCorrectPredCount(torch.zeros(predictions), torch.zeros(labels))
    assert str(predictions) in str(refused.value) and str(labels) in str(refused.value)


# ---- other people's networks and tools -------------------------------------------------------------------------------


def test_our_network_learns_digits():
    utils.seed_everything(0)
    options = {"batch_size": 32, "sampler": torch.utils.data.SubsetRandomSampler(range(512))}
    _, train_loader = utils.get_CIFARdataset_with_loader("train", options, dataset="digits")
    _, test_loader = utils.get_CIFARdataset_with_loader("test", {"batch_size": 64}, dataset="digits")
    model, accuracies = Model(0.02), []
    optimizer = utils.get_optimizer(model, lr=0.1)
    scheduler = utils.get_scheduler(optimizer, "OneCycleLR", epochs=3, steps_per_epoch=len(train_loader))
    for _ in range(3):
        train(model, train_loader, optimizer=optimizer, scheduler=scheduler)
    evaluate(model, test_loader, test_acc=accuracies)
    assert accuracies[0] > 75


class View(nn.Module):
    """What every second student writes: a view of images, and one of what a convolution made of them."""

    def __init__(self):
        super().__init__()
        self.conv, self.classifier, self.skip = nn.Conv2d(3, 4, 3), nn.Linear(4 * 6 * 6, 4), nn.Linear(3 * 8 * 8, 4)

    def forward(self, x):
        scores = self.classifier(self.conv(x).view(x.size(0), -1)) + self.skip(x.view(x.size(0), -1))
        return F.log_softmax(scores, dim=1)


NETWORKS = {
    "views": View,
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


def test_batches_of_vectors_and_of_volumes(batches):
    train(nn.Linear(192, 4), [(x.flatten(1), y) for x, y in batches], F.cross_entropy)
    volumes = nn.Sequential(nn.Conv3d(1, 2, 3), nn.Flatten(), nn.Linear(72, 4))
    train(volumes, [(x[:, None], y) for x, y in batches], F.cross_entropy)


@BOTH
def test_our_network_computes_in_its_fastest_way_meanwhile(cifar_batches, monkeypatch, run):
    model, faster, innermost = Model(dropout_value=0.1), [], []
    convolve = nn.Conv2d._conv_forward

    def looking(layer, images, *arguments):
        innermost.append(images.stride(1) == 1)
        faster.append(sum("forward" in vars(module) for module in model.modules()))
        return convolve(layer, images, *arguments)

    monkeypatch.setattr(nn.Conv2d, "_conv_forward", looking)  # without hooks, which would turn channels_last off
    run(model, cifar_batches)
    assert all(innermost) and set(faster) == {4 + 13}  # depthwise with two outputs per channel, and dropout
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # as images have no gradient
def test_hooks_of_every_kind_on_every_layer(cifar_batches, in_float32):
    """They may view what a convolution takes and gives, as innermost channels forbid, and keep an output as it was."""
    model, calls, losses, kept = Model(dropout_value=0.0), set(), [], []
    expected = F.nll_loss(copy.deepcopy(model)(cifar_batches[0][0]), cifar_batches[0][1]).item()

    def look(kind, name):
        def hook(module, *tensors):
            calls.add((kind, name, type(module)))
            for tensor in tensors:
                tensor = tensor[0] if isinstance(tensor, tuple) else tensor
                if isinstance(module, nn.Conv2d) and tensor is not None:  # as the gradient of images is
                    tensor.view(-1)
            if kind == "forward":
                kept.append((tensors[-1], tensors[-1].detach().clone()))

        return hook

    kinds = ["forward", "forward_pre", "full_backward", "full_backward_pre"]
    for kind, (name, module) in itertools.product(kinds, model.named_modules()):
        getattr(module, f"register_{kind}_hook")(look(kind, name))
    train(model, cifar_batches[:1], train_losses=losses)
    evaluate(model, cifar_batches)
    assert losses == [pytest.approx(expected, rel=1e-4)]
    # Tools such as thop know layers by their exact type.
    assert calls == {(kind, name, type(m)) for kind, (name, m) in itertools.product(kinds, model.named_modules())}
    assert all(torch.equal(output, copied) for output, copied in kept)


# ---- what would be silently wrong ------------------------------------------------------------------------------------

CRITERIA = {  # known by their kind, or a lambda by its value
    "NLL: get_loss": utils.get_loss(),
    "NLL: partial": functools.partial(F.nll_loss, weight=torch.tensor([1.0, 2, 3, 4])),
    "NLL: lambda": lambda scores, labels: F.nll_loss(scores, labels),
    "cross-entropy: get_loss": utils.get_loss("cross_entropy", label_smoothing=0.1),
    "cross-entropy: function": F.cross_entropy,
    "cross-entropy: lambda": lambda scores, labels: F.cross_entropy(scores, labels),
}
ENDS = {  # of a network, and which criteria take it
    "log-probabilities": ([nn.LogSoftmax(dim=1)], "NLL, cross-entropy"),
    "logits": ([nn.Identity()], "cross-entropy"),
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes, spread", [(4, 1), (1000, 0), (1000, 30)])
def test_rounding_to_half_precision_is_no_disagreement(batches, dtype, classes, spread):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, classes))
    model.register_forward_hook(lambda _model, _images, scores: F.log_softmax((spread * scores).to(dtype), dim=1))
    for criterion in (utils.get_loss(), utils.get_loss("cross_entropy")):
        evaluate(model, batches, criterion)


def test_losses_of_another_kind_take_any_scores(batches):
    for criterion in (nn.MultiMarginLoss(), lambda scores, labels: F.mse_loss(scores, F.one_hot(labels, 4).float())):
        for layers, _ in ENDS.values():
            train(linear(*layers), batches, criterion)


def test_a_loss_may_take_its_mean_itself(batches):
    class Hardest(nn.CrossEntropyLoss):
        def forward(self, scores, labels):
            return super().forward(scores, labels).topk(2).values.mean()

    train(linear(), batches, Hardest(reduction="none"))


NOT_THE_MEAN = r"criterion.*must be .*mean"


@BOTH
@pytest.mark.parametrize(
    "end, criterion, words",
    [
        (nn.LogSoftmax(1), utils.get_loss("cross_entropy", reduction="sum"), NOT_THE_MEAN),
        (nn.LogSoftmax(1), functools.partial(F.nll_loss, reduction="sum"), NOT_THE_MEAN),
        (nn.LogSoftmax(1), lambda scores, labels: F.cross_entropy(scores, labels, reduction="sum"), NOT_THE_MEAN),
        (nn.LogSoftmax(1), lambda scores, labels: F.nll_loss(scores, labels, reduction="none"), NOT_THE_MEAN),
        (nn.Unflatten(1, (2, 2)), utils.get_loss(), r"the model returned \(7, 2, 2\).*\(N, classes\)"),
        (nn.LSTM(4, 4), utils.get_loss(), r"the model returned a tuple.*\(N, classes\)"),
    ],
)
def test_other_scores_than_of_classes_and_other_losses_than_the_mean_are_refused(batches, run, end, criterion, words):
    with pytest.raises(ValueError, match=words):
        run(linear(end), batches, criterion)


@pytest.mark.parametrize(
    "change, error, words",
    [
        (lambda x, y: (x[:0], y[:0]), ValueError, r"\(0, 3, 8, 8\).*N > 0"),
        (lambda x, y: (x.byte(), y), ValueError, "torch.uint8 images.*floating-point"),
        (lambda x, y: (x, y.tolist()), TypeError, "a Tensor and a list"),
        (lambda x, y: (x, y, y), TypeError, "a Tensor and a Tensor and a Tensor; a batch is a pair"),
        (lambda x, y: x[:2], TypeError, "gave a Tensor; a batch is a pair"),
        (lambda x, y: (x, y.float()), ValueError, "torch.float32 labels.*int64"),
        (lambda x, y: (x, F.one_hot(y, 4)), ValueError, r"labels \(5, 4\).*\(N,\)"),
        (lambda x, y: (x, y[:3]), ValueError, r"labels \(3,\)"),
        (lambda x, y: (x, y.clamp(min=4)), ValueError, "to 4;.*from 0 to 3"),
        (lambda x, y: (x, y.clamp(max=-1)), ValueError, "from -1.*0 to 3"),
        (lambda x, y: (x * math.nan, y), FloatingPointError, "batch 2: .*nan"),
    ],
)
def test_a_bad_batch_is_refused_and_the_lists_left_alone(batches, change, error, words):
    bad = [batches[0], change(*batches[1]), batches[2]]
    losses, accuracies = [0.5, 0.4], [80.0, 82.0]
    with pytest.raises(error, match=words) as in_training:
        train(linear(), bad, train_losses=losses, train_acc=accuracies)
    with pytest.raises(error, match=words) as in_test:
        evaluate(linear(), bad, test_losses=losses, test_acc=accuracies)
    assert (losses, accuracies) == ([0.5, 0.4], [80.0, 82.0])
    if error is FloatingPointError:  # a test changes no weights, so nobody needs to go back to a checkpoint
        assert "epoch 3" in str(in_training.value) and "checkpoint" in str(in_training.value)
        assert "test" in str(in_test.value) and "checkpoint" not in str(in_test.value)


@BOTH
def test_an_empty_loader_is_refused(run):
    with pytest.raises(ValueError, match="the loader is empty"):
        run(linear(), [])


@BOTH
def test_lists_in_each_others_place_are_refused(batches, run):
    names = ("train_losses", "train_acc") if run is train else ("test_losses", "test_acc")
    with pytest.raises(ValueError, match=r"85\.3.*0\.42.*order is train_losses, train_acc"):
        run(linear(), batches, **dict(zip(names, ([11.0, 85.3], [2.3, 0.42]))))
    for lists in (([2.3], [10.0]), ([11.5], [9.8]), ([0.01], [99.0]), ([4.6], [1.0]), ([], [])):  # bad ones, too
        run(linear(), batches, **dict(zip(names, lists)))
    with pytest.raises(ValueError, match="one list"):
        run(linear(), batches, **dict(zip(names, [[]] * 2)))
