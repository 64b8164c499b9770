"""train and test: what they compute, other people's networks and hooks, and what would be silently wrong."""

import contextlib
import copy
import functools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import utils
from models import Model

CIFAR_BATCHES = [(torch.randn(4, 3, 32, 32), torch.tensor([3, 1, 4, 1]))] * 2


def linear(end=None):
    """Four classes of images (N, 3, 8, 8), by default as log-probabilities."""
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 4), end or nn.LogSoftmax(dim=1))


@pytest.fixture
def batches():
    """Of uneven sizes, so that a mean over batches is not the mean over samples."""
    torch.manual_seed(0)
    return [(torch.randn(n, 3, 8, 8), torch.tensor([3, 1, 0, 2, 2, 1, 3])[:n]) for n in (7, 5, 3)]


def train(model, batches, criterion=None, lists=(), optimizer=None):
    optimizer = optimizer or utils.get_optimizer(model, lr=0.1)
    utils.train(model, "cpu", batches, optimizer, criterion or utils.get_loss(), *lists, verbose=False)


def evaluate(model, batches, criterion=None, lists=()):
    return utils.test(model, "cpu", batches, criterion or utils.get_loss(), *lists, verbose=False)


BOTH = pytest.mark.parametrize("run", [train, evaluate], ids=["train", "test"])


@pytest.mark.parametrize("form", [torch.clone, lambda labels: 0.6 * F.one_hot(labels, 4) + 0.1])  # CutMix
def test_a_plain_loop_finds_the_same_means_per_sample_and_mistakes_and_takes_the_same_steps(batches, form):
    buffers = [part.clone() for part in (batches[0][0], form(batches[0][1]))]

    def refilled():  # as by loaders of memory-mapped files
        for images, labels in batches:
            yield [buffer[: len(labels)].copy_(part) for buffer, part in zip(buffers, (images, form(labels)))]

    def by_hand(model, optimizer=None):
        total, predictions, dtype = 0, [], utils.autocast_dtype("cpu")
        for images, labels in batches:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                scores = model(images).float()
            loss = F.cross_entropy(scores, form(labels))
            total += loss.item() * len(labels)
            predictions.append(scores.argmax(1))
            if optimizer:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        return total / 15, torch.cat(predictions)

    model, losses, accuracies = linear(), [], []
    plain = copy.deepcopy(model)
    wrong = evaluate(model, refilled(), F.cross_entropy, [losses, accuracies])
    assert not model.training and all(parameter.grad is None for parameter in model.parameters())
    optimizer = utils.get_optimizer(model, "SGD", lr=0.5, momentum=0.9)
    train(model, refilled(), F.cross_entropy, [losses, accuracies], optimizer)
    tested, trained = by_hand(plain), by_hand(plain, torch.optim.SGD(plain.parameters(), lr=0.5, momentum=0.9))
    assert model.training and losses == pytest.approx([tested[0], trained[0]], rel=1e-5)
    torch.testing.assert_close(list(model.parameters()), list(plain.parameters()))
    images, labels = (torch.cat(parts) for parts in zip(*batches))
    assert accuracies == pytest.approx([100 * (found == labels).sum().item() / 15 for _, found in (tested, trained)])
    for got, truth in zip(zip(*wrong), (images, labels, tested[1])):
        assert torch.equal(torch.stack(got), truth[tested[1] != labels])
    assert len(pickle.dumps(wrong)) < len(wrong) * (3 * 8 * 8 * 4 + 2000)  # none keeps its batch alive


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
    evaluate(model, batches, None, [losses])
    assert len(losses) == 4 and len(accuracies) == 3 and capsys.readouterr().out == ""


def test_correct_predictions_are_counted():
    labels = torch.tensor([2, 0, 1])
    for predicted in (torch.tensor([2, 1, 1]), torch.tensor([[2], [1], [1]]), torch.eye(3)[[2, 1, 1]]):
        assert utils.GetCorrectPredCount(predicted, labels) == 2
    for predicted, wrong in [(torch.zeros(1), labels), (torch.eye(4), torch.eye(4))]:  # not stretched to fit
        with pytest.raises(RuntimeError):
            utils.GetCorrectPredCount(predicted, wrong)


class View(nn.Sequential):
    """What every second student writes: a view of images, and one of what a convolution made of them."""

    def forward(self, x):
        return self[1](self[0](x).view(len(x), -1)) + self[2](x.view(len(x), -1))


def keep(module, taken, given):
    """A hook that views an activation, as innermost channels forbid; a layer that works in place would change it."""
    module.kept = given.view(-1), given.detach().clone().view(-1)


NETWORKS = {  # and what they take in place of images of 8x8 pixels
    "views": (lambda: View(nn.Conv2d(3, 4, 3), nn.Linear(144, 4), nn.Linear(192, 4)), torch.clone),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(4)), torch.clone),
    "ours": (Model, lambda x: x.repeat(1, 1, 4, 4)),
    "hooks": (lambda: Model().apply(lambda module: module.register_forward_hook(keep)), lambda x: x.repeat(1, 1, 4, 4)),
    "vectors": (linear, lambda x: x.flatten(1)),
    "volumes": (lambda: nn.Sequential(nn.Conv3d(1, 2, 3), nn.Flatten(), nn.Linear(72, 4)), lambda x: x[:, None]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_all_kinds_keep_the_layout_of_their_weights(batches, name):
    """A `test` in inference_mode before training included, which is where lazy layers would be made."""
    model, form = NETWORKS[name][0](), NETWORKS[name][1]
    batches = [(form(images), labels) for images, labels in batches]
    with torch.inference_mode():
        wrong = evaluate(model, batches, F.cross_entropy)
    before = [parameter.stride() for parameter in model.parameters()]
    train(model, batches, F.cross_entropy)
    evaluate(model, batches, F.cross_entropy)
    assert [parameter.stride() for parameter in model.parameters()] == before
    nn.utils.parameters_to_vector(parameter.grad for parameter in model.parameters())  # by a view of each
    kept = [module.kept for module in model.modules() if hasattr(module, "kept")]
    assert all(torch.equal(*both) for both in kept) and bool(kept) == (name == "hooks")
    assert all(image.is_contiguous() and image.clone().requires_grad_() is not None for image, _, _ in wrong)


@BOTH
def test_our_network_computes_in_its_fastest_way_meanwhile(run):
    """Which is seen from a layer without hooks, as they would turn channels_last off."""

    class Looking(nn.Identity):
        channels_last = True

        def forward(self, images):
            seen.append((images.stride(1), sum("forward" in vars(module) for module in model.modules())))
            return images

    model, seen = nn.Sequential(Looking(), Model(dropout_value=0.1)), []
    run(model, CIFAR_BATCHES)
    assert seen == [(1, 4 + 13)] * 2  # depthwise with two outputs per channel, and dropout
    assert not any("forward" in vars(module) for module in model.modules())


class Hardest(nn.CrossEntropyLoss):
    def forward(self, scores, labels):  # takes its mean itself, a large one
        return super().forward(100 * scores, labels).topk(2).values.mean()


WEIGHT = torch.tensor([1.0, 2, 3, 4])
CRITERIA = {
    "NLL": [utils.get_loss(), functools.partial(F.nll_loss, weight=WEIGHT), nn.NLLLoss(WEIGHT)],
    "cross-entropy": [F.cross_entropy, utils.get_loss("cross_entropy"), Hardest(reduction="none")],
    "other": [nn.MultiMarginLoss(), lambda scores, labels: F.mse_loss(scores, F.one_hot(labels, 4).float())],
}
ENDS = [(nn.LogSoftmax(1), [*CRITERIA]), (nn.Identity(), ["cross-entropy", "other"]), (nn.Softmax(1), ["other"])]


@BOTH
@pytest.mark.parametrize("kind", CRITERIA)
@pytest.mark.parametrize("end, taken", ENDS)
def test_criterion_and_scores_must_agree(batches, run, end, taken, kind):
    for criterion in CRITERIA[kind]:
        model = linear(end)
        before = model[1].weight.detach().clone()
        with contextlib.nullcontext() if kind in taken else pytest.raises(ValueError, match="cross_entropy"):
            run(model, batches, criterion)
        assert torch.equal(model[1].weight, before) == (run is evaluate or kind not in taken)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes, spread", [(4, 1), (983, 0), (983, 30)])  # log 983 is halfway between bfloat16s
def test_rounding_to_half_precision_is_no_disagreement(batches, dtype, classes, spread):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, classes))
    model.register_forward_hook(lambda _model, _images, scores: F.log_softmax((spread * scores).to(dtype), dim=1))
    for criterion in (utils.get_loss(), utils.get_loss("cross_entropy")):
        evaluate(model, batches, criterion)


@BOTH
def test_sums_empty_loaders_and_labels_beyond_the_classes_are_refused_unless_the_loss_ignores_these(batches, run):
    with pytest.raises(ValueError, match="mean"):
        run(linear(), batches, utils.get_loss("cross_entropy", reduction="sum"))
    with pytest.raises(ValueError, match="empty"):
        run(linear(), [])
    with pytest.raises(ValueError, match="label 4"):
        run(linear(), [(images, labels + 1) for images, labels in batches])
    for ignored in (-100, 255):
        some = [(images, labels.where(labels > 0, ignored)) for images, labels in batches]
        run(linear(), some, nn.CrossEntropyLoss(ignore_index=ignored))


@BOTH
def test_a_loss_that_is_not_finite_is_named_and_the_lists_left_alone(batches, run):
    lists, (images, labels) = [[0.5, 0.4], [80.0, 82.0]], batches[1]
    with pytest.raises(FloatingPointError, match="batch 2") as error:
        run(linear(), [batches[0], (images * math.nan, labels)], None, lists)
    assert lists == [[0.5, 0.4], [80.0, 82.0]] and ("epoch 3" in str(error.value)) == (run is train)
