"""What notebooks of the original author, and other people's tools, call: each name and each way that it is called."""

import copy
import pickle
import types

import albumentations
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from torch import nn

from models import Model, SeparableResNet

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def names():
    """What `from utils import *` gives."""
    given = {}
    exec("from utils import *", given)
    return types.SimpleNamespace(**given)


@pytest.fixture(scope="module")
def notebook(names):
    """The other notebook, run once, with a few images: positions and keywords as it writes them."""
    n = types.SimpleNamespace()
    kwargs = {"batch_size": 32, "shuffle": True, "pin_memory": True}
    n.class_to_idx, n.train_loader = names.get_CIFARdataset_with_loader("train", kwargs, dataset="digits")
    _, n.test_loader = names.get_CIFARdataset_with_loader("test", kwargs | {"shuffle": False}, dataset="digits")
    for loader, size in ((n.train_loader, 64), (n.test_loader, 64)):
        loader.dataset.data, loader.dataset.targets = loader.dataset.data[:size], loader.dataset.targets[:size]
    torch.manual_seed(0)
    n.model, device = Model(dropout_value=0.05), torch.device("cpu")
    n.optimizer = names.get_optimizer(n.model, optname="SGD", learningrate=0.2, momentumval=0.9)
    n.scheduler = names.get_scheduler(n.optimizer, 5, 0.75, True)
    criterion = names.get_loss(loss_name="nll_loss")
    n.train_losses, n.train_acc, n.test_losses, n.test_acc = [], [], [], []
    for _ in range(2):
        names.train(n.model, device, n.train_loader, n.optimizer, criterion, n.train_losses, n.train_acc)
        n.misclassified = names.test(n.model, device, n.test_loader, criterion, n.test_losses, n.test_acc)
        n.scheduler.step()
    return n


def test_loaders_and_their_data_sets(names, notebook):
    assert notebook.class_to_idx == {str(digit): digit for digit in range(10)}
    images, labels = next(iter(notebook.train_loader))
    assert (images.shape, images.dtype, labels.dtype) == ((32, 3, 32, 32), torch.float32, torch.int64)
    data = notebook.test_loader.dataset
    assert data.data.shape == (64, 32, 32, 3) and data.data.dtype == np.uint8 and len(data.targets) == 64
    assert data.class_to_idx == notebook.class_to_idx and list(data.classes) == list(notebook.class_to_idx)
    torch.testing.assert_close(data[0][0], names.get_test_transforms()(image=data.data[0])["image"])


@pytest.mark.parametrize("name", ["get_train_transforms", "get_test_transforms"])
def test_transforms(names, name):
    compose = getattr(names, name)()
    assert type(compose) is albumentations.Compose
    image = compose(image=np.zeros((32, 32, 3), np.uint8))["image"]
    assert image.shape == (3, 32, 32) and image.dtype == torch.float32


def test_an_epoch_appends_a_mean_loss_and_an_accuracy_in_percent(notebook):
    for losses, accuracies in ((notebook.train_losses, notebook.train_acc), (notebook.test_losses, notebook.test_acc)):
        assert [len(losses), len(accuracies)] == [2, 2] and 0.5 < losses[0] < 5 and 0 <= accuracies[1] <= 100
    wrong = len(notebook.misclassified)
    assert 0 < wrong < 64 and notebook.test_acc[-1] == pytest.approx(100 * (64 - wrong) / 64)


def test_optimizer_scheduler_and_loss(names, notebook):
    assert names.optim is torch.optim
    assert type(notebook.optimizer) is names.optim.SGD and notebook.optimizer.defaults["momentum"] == 0.9
    assert (notebook.scheduler.step_size, notebook.scheduler.gamma, notebook.scheduler.last_epoch) == (5, 0.75, 2)
    assert notebook.scheduler.base_lrs == [0.2]
    by_name = names.get_scheduler(names.get_optimizer(notebook.model), stepsize=5, gamma_val=0.75)
    assert (by_name.step_size, by_name.gamma) == (5, 0.75)
    scores, labels = torch.randn(8, 10).log_softmax(dim=1), torch.arange(8)
    assert names.get_loss()(scores, labels) == F.nll_loss(scores, labels)
    assert names.get_loss()(scores, labels, reduction="sum") == F.nll_loss(scores, labels, reduction="sum")


def test_correct_predictions(names):
    scores, labels = torch.eye(4)[[0, 1, 1, 2]], torch.tensor([0, 1, 2, 2])
    assert names.GetCorrectPredCount(scores, labels) == names.GetCorrectPredCount(scores.argmax(dim=1), labels) == 3


def test_misclassified_samples_are_walked_through_as_tensors(notebook):
    misclassified = notebook.misclassified
    for image, true, predicted in misclassified[:10]:
        assert image.shape == (3, 32, 32) and true.ndim == predicted.ndim == 0 and true != predicted
    trues = torch.stack([s[1] for s in misclassified])
    assert trues.dtype == torch.int64 and trues.tolist() == [s[1].item() for s in misclassified]
    assert all(s[1].cpu() == s.true and s[2].cpu() == s.predicted for s in misclassified)


def test_plots(names, notebook):
    label_map = notebook.class_to_idx
    assert len(names.post_display(notebook.train_loader, label_map).axes) == 16
    lists = notebook.train_losses, notebook.test_losses, notebook.train_acc, notebook.test_acc
    figure = names.post_accuracyplots(*lists)
    drawn = [list(axis.lines[0].get_ydata()) for axis in figure.axes]
    assert drawn == list(lists)
    figure = names.showmisclassifiedsamples(notebook.misclassified, label_map, "Mistakes")
    first = notebook.misclassified[0]
    assert len(figure.axes) == 10 and figure.get_suptitle() == "Mistakes"
    assert figure.axes[0].get_title() == f"{first.predicted}\ntrue: {first.true}"
    plt.close("all")


# ---- tools that look at a network, or run it -------------------------------------------------------------------------

NETWORKS = pytest.mark.parametrize("make", [Model, SeparableResNet])
IMAGES = torch.randn(2, 3, 32, 32)


@NETWORKS
def test_the_layers_are_of_torchs_own_classes(make):
    """As tools find them that look up type(module)."""
    layers = [module for module in make().modules() if not list(module.children())]
    assert all(getattr(nn, type(layer).__name__, None) is type(layer) for layer in layers)


@pytest.mark.parametrize("while_training", [False, True])
def test_operations_are_counted_by_exact_type(names, while_training):
    """As thop does: multiply-adds of each layer on the way, by the table of its type; and while train runs, too."""
    model, counted = Model(), {"operations": 0, "parameters": 0}

    def count(module, inputs, output):
        if type(module) is nn.Conv2d:
            side = output.shape[-1]
            counted["operations"] += module.weight.numel() * side * side + (module.bias is not None) * output[0].numel()
        if type(module) in (nn.Conv2d, nn.BatchNorm2d):
            counted["parameters"] += sum(parameter.numel() for parameter in module.parameters())

    for module in model.modules():
        module.register_forward_hook(count)
    if while_training:
        names.train(model, "cpu", [(IMAGES, torch.tensor([1, 2]))], names.get_optimizer(model), names.get_loss())
    else:
        model.eval()(IMAGES)
    assert counted["parameters"] == 199_810 and 31.5e6 < counted["operations"] < 32.5e6


@NETWORKS
def test_copies_and_graphs_compute_the_same(make):
    model = make().eval()
    expected = model(IMAGES)
    tools = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "fx": torch.fx.symbolic_trace(model),
        "export": torch.export.export(model, (IMAGES,)).module(),
        "SWA": torch.optim.swa_utils.AveragedModel(model),
    }
    for tool, network in tools.items():
        torch.testing.assert_close(network(IMAGES), expected, msg=lambda message, tool=tool: f"{tool}: {message}")


@pytest.mark.parametrize(
    "wrap",
    [torch.fx.symbolic_trace, lambda model: torch.compile(model, backend="eager"), nn.DataParallel],
    ids=["fx", "compile", "DataParallel"],
)
def test_train_and_test_take_what_such_tools_make(names, wrap):
    torch.manual_seed(0)
    model = Model(dropout_value=0.0)
    network, batch = wrap(model), [(torch.randn(8, 3, 32, 32), torch.arange(8))]
    before, losses = F.nll_loss(model(batch[0][0]), batch[0][1]).item(), []
    for _ in range(5):
        names.train(network, "cpu", batch, names.get_optimizer(network, lr=0.1), names.get_loss(), losses)
    assert losses[0] == pytest.approx(before, rel=0.05) and losses[-1] < losses[0] / 1.5
    names.test(network, "cpu", batch, names.get_loss())
    assert not network.training


def test_another_head(names):
    """Five classes instead of ten, in a network that was made for ten; and none, for its features."""
    model = Model()
    model.classifier = nn.Sequential(nn.Flatten(), nn.Linear(52, 20), nn.ReLU(), nn.Linear(20, 5))
    names.train(model, "cpu", [(IMAGES, torch.tensor([1, 4]))], names.get_optimizer(model), names.get_loss())
    model.classifier = nn.Identity()
    assert model(IMAGES).shape == (2, 52)
