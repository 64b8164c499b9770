"""train and test: what they compute, other people's networks and hooks, and what would be silently wrong."""

import copy
import functools
import itertools
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import default_collate
from torchvision.transforms import v2

import utils
from models import Model


def linear(*end):
    """Four classes of images (N, 3, 8, 8), by default as log-probabilities."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4), *(end or [nn.LogSoftmax(dim=1)]))


@pytest.fixture
def batches():
    """Of uneven sizes, so that a mean over batches is not the mean over samples."""
    torch.manual_seed(0)
    return [(torch.randn(n, 3, 8, 8), torch.tensor([3, 1, 0, 2, 2, 1, 3])[:n]) for n in (7, 5, 3)]


@pytest.fixture
def cifar_batches():
    return [(torch.randn(4, 3, 32, 32), torch.tensor([3, 1, 4, 1]))] * 2


def in_its_type(model, images):
    """Float32 scores, computed in the type that `train` computes in here."""
    dtype = utils.autocast_dtype("cpu")
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return model(images).float()


def train(model, batches, criterion=None, **options):
    optimizer = options.pop("optimizer", None) or utils.get_optimizer(model, lr=0.1)
    utils.train(model, "cpu", batches, optimizer, criterion or utils.get_loss(), verbose=False, **options)


def evaluate(model, batches, criterion=None, **options):
    return utils.test(model, "cpu", batches, criterion or utils.get_loss(), verbose=False, **options)


BOTH = pytest.mark.parametrize("run", [train, evaluate], ids=["train", "test"])


def test_test_reports_means_per_sample_and_what_was_wrong(batches):
    model, losses, accuracies = linear(), [], []
    wrong = evaluate(model, batches, test_losses=losses, test_acc=accuracies)
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())
    images, labels = (torch.cat(parts) for parts in zip(*batches))
    scores = in_its_type(model, images).detach()
    predictions = scores.argmax(dim=1)
    assert losses == [pytest.approx(float(F.nll_loss(scores, labels)), rel=1e-4)]
    assert accuracies == [pytest.approx(100 * float((predictions == labels).float().mean()))]
    index = (predictions != labels).nonzero().flatten()
    for got, expected in zip(zip(*wrong), (images, labels, predictions)):
        assert torch.equal(torch.stack(got), expected[index])
    assert np.array_equal(pickle.loads(pickle.dumps(wrong)).tested, np.bincount(labels))
    assert len(pickle.dumps(wrong)) < len(wrong) * (3 * 8 * 8 * 4 + 2000)  # none keeps its batch alive


def test_a_loader_may_fill_the_memory_of_its_batches_again(batches):
    """As loaders of memory-mapped files do."""
    buffers = torch.empty(3, 3, 8, 8), torch.empty(3, dtype=torch.int64)

    def refilled():
        for batch in batches:
            for buffer, part in zip(buffers, batch):
                buffer.copy_(part[:3])
            yield buffers

    model = linear()
    expected = evaluate(model, [(images[:3], labels[:3]) for images, labels in batches])
    wrong = evaluate(model, refilled())
    assert np.array_equal(wrong.tested, expected.tested) and len(wrong) == len(expected)
    assert all(map(torch.equal, itertools.chain(*wrong), itertools.chain(*expected)))


def test_train_takes_the_steps_of_a_plain_loop(batches):
    model, plain, losses, accuracies = linear(), linear(), [], []
    plain.load_state_dict(model.state_dict())
    sgd = torch.optim.SGD(plain.parameters(), lr=0.5, momentum=0.9)
    total = correct = 0
    for images, labels in batches * 2:
        scores = in_its_type(plain, images)
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
    assert "epoch 2 train" in first and "epoch" not in second + third + tested and "test" in tested
    for line, loss, accuracy in zip((first, tested), losses[1:], accuracies[1:], strict=True):
        assert f"loss {loss:.4f}" in line and f"{accuracy:.2f} %" in line and "[list]" in line
    evaluate(model, batches, test_losses=losses)
    assert len(losses) == 4 and len(accuracies) == 3 and capsys.readouterr().out == ""


def test_correct_predictions_are_counted():
    labels = torch.tensor([2, 0, 1])
    for predicted in (torch.tensor([2, 1, 1]), torch.tensor([[2], [1], [1]]), torch.eye(3)[[2, 1, 1]]):
        assert utils.GetCorrectPredCount(predicted, labels) == 2
    for predicted in (torch.zeros(4, 10), torch.zeros(1)):
        with pytest.raises(RuntimeError):  # not stretched to fit
            utils.GetCorrectPredCount(predicted, labels)


# ---- other people's networks and tools -------------------------------------------------------------------------------


def test_batches_of_cutmix_and_mixup(batches):
    """Labels are probabilities then; the accuracy counts the larger part."""
    mix = v2.RandomChoice([v2.CutMix(num_classes=10), v2.MixUp(num_classes=10)])
    options = {"batch_size": 64, "collate_fn": lambda samples: mix(*default_collate(samples))}
    loader = utils.get_CIFARdataset_with_loader("test", options, "digits")[1]
    images, labels = next(iter(loader))
    assert images.shape == (64, 3, 32, 32) and labels.shape == (64, 10)
    accuracies = []
    model = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 10))
    for _ in range(12):
        train(model, loader, utils.get_loss("cross_entropy"), train_acc=accuracies)
    evaluate(model, loader, utils.get_loss("cross_entropy"))
    assert accuracies[-1] > 30 and max(accuracies) <= 100


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
    "ours": lambda: Model(num_classes=5),
}


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
def test_networks_of_all_kinds_keep_the_layout_of_their_weights(batches, cifar_batches, make):
    """A `test` in inference_mode before training included, which is where lazy layers would be made."""
    model = make()
    batches = cifar_batches if isinstance(model, Model) else batches
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


@pytest.mark.skipif(utils.autocast_dtype("cpu") != torch.bfloat16, reason="needs a CPU with bfloat16")
def test_a_quantised_copy_of_a_network_can_be_tested(batches):
    quantised = torch.ao.quantization.quantize_dynamic(linear(), {nn.Linear}, dtype=torch.qint8)
    evaluate(quantised, batches)


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
def test_hooks_of_every_kind_on_every_layer(cifar_batches):
    """They may view what a convolution takes and gives, as innermost channels forbid, and keep an output as it was."""
    model, calls, losses, kept = Model(dropout_value=0.0), set(), [], []
    expected = F.nll_loss(in_its_type(copy.deepcopy(model), cifar_batches[0][0]), cifar_batches[0][1]).item()

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
    assert losses == [pytest.approx(expected, rel=1e-2)]
    # Tools such as thop know layers by their exact type.
    assert calls == {(kind, name, type(m)) for kind, (name, m) in itertools.product(kinds, model.named_modules())}
    assert all(torch.equal(output, copied) for output, copied in kept)


# ---- what would be silently wrong ------------------------------------------------------------------------------------

CRITERIA = {
    "NLL: get_loss": utils.get_loss(),
    "NLL: partial": functools.partial(F.nll_loss, weight=torch.tensor([1.0, 2, 3, 4])),
    "NLL: torch's": nn.NLLLoss(),
    "cross-entropy: get_loss": utils.get_loss("cross_entropy", label_smoothing=0.1),
    "cross-entropy: function": F.cross_entropy,
    "cross-entropy: torch's": nn.CrossEntropyLoss(),
}
ENDS = {  # of a network, and which criteria take it
    "log-probabilities": ([nn.LogSoftmax(dim=1)], "NLL, cross-entropy"),
    "logits": ([nn.Identity()], "cross-entropy"),
    "probabilities": ([nn.Softmax(dim=1)], ""),
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
    with pytest.raises(ValueError, match="cross_entropy"):
        run(model, batches, CRITERIA[criterion])
    assert torch.equal(model[1].weight, before)


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


def test_a_loss_may_take_its_mean_itself_or_leave_labels_out(batches):
    class Hardest(nn.CrossEntropyLoss):
        def forward(self, scores, labels):
            return super().forward(scores, labels).topk(2).values.mean()

    train(linear(), batches, Hardest(reduction="none"))
    for ignored in (-100, 255):
        criterion = nn.CrossEntropyLoss(ignore_index=ignored)
        some = [(images, labels.where(labels > 0, ignored)) for images, labels in batches]
        train(linear(), some, criterion)
        evaluate(linear(), some, criterion)


@BOTH
@pytest.mark.parametrize(
    "criterion",
    [utils.get_loss("cross_entropy", reduction="sum"), nn.NLLLoss(reduction="sum")],
)
def test_a_sum_is_not_taken_for_a_mean(batches, run, criterion):
    with pytest.raises(ValueError, match="mean"):
        run(linear(), batches, criterion)


@BOTH
def test_labels_beyond_the_classes_are_refused(batches, run):
    images, labels = batches[0]
    with pytest.raises(ValueError, match=r"label 4 .* 4 classes"):
        run(linear(), [(images, labels + 1), *batches])


def test_many_classes_and_large_losses_are_no_reason_to_refuse():
    """A small network of 100 classes may well have a loss of 20 after its first epoch."""
    model, losses = nn.Sequential(nn.Flatten(), nn.Linear(192, 100)), []
    model[1].weight.data *= 100
    evaluate(model, [(torch.randn(50, 3, 8, 8), torch.arange(50))], F.cross_entropy, test_losses=losses)
    assert losses[0] > 20


@BOTH
def test_a_loss_that_is_not_finite_is_named_and_the_lists_left_alone(batches, run):
    names = ("train_losses", "train_acc") if run is train else ("test_losses", "test_acc")
    lists, (images, labels) = [[0.5, 0.4], [80.0, 82.0]], batches[1]
    with pytest.raises(FloatingPointError, match=r"batch 2: .*nan") as error:
        run(linear(), [batches[0], (images * math.nan, labels)], **dict(zip(names, lists)))
    assert lists == [[0.5, 0.4], [80.0, 82.0]] and ("epoch 3" in str(error.value)) == (run is train)


@BOTH
def test_an_empty_loader_is_refused(run):
    with pytest.raises(ValueError, match="empty"):
        run(linear(), [])


@pytest.mark.parametrize("bad", [lambda x, y: (x, y, y), lambda x, y: (x.byte(), y), lambda x, y: (x, y[:3])])
def test_other_batches_are_refused_by_torch_or_python(batches, bad):
    with pytest.raises((ValueError, RuntimeError, TypeError)):
        train(linear(), [bad(*batches[0])])
