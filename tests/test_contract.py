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
    for data in (n.train_loader.dataset, n.test_loader.dataset):
        data.data, data.targets = data.data[:64], data.targets[:64]
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


def test_data_sets_and_transforms(names, notebook):
    data, compose = notebook.test_loader.dataset, names.get_test_transforms()
    assert data.data.shape == (64, 32, 32, 3) and data.data.dtype == np.uint8 and len(data.targets) == 64
    assert type(compose) is type(names.get_train_transforms()) is albumentations.Compose
    torch.testing.assert_close(data[0][0], compose(image=data.data[0])["image"])


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
    by_keyword = names.get_scheduler(names.get_optimizer(Model()), stepsize=5, gamma_val=0.75)
    assert (by_keyword.step_size, by_keyword.gamma) == (5, 0.75)
    scores, labels = torch.randn(8, 10).log_softmax(dim=1), torch.arange(8)
    assert names.get_loss()(scores, labels, reduction="sum") == F.nll_loss(scores, labels, reduction="sum")


def test_misclassified_samples_are_walked_through_as_tensors(notebook):
    misclassified = notebook.misclassified
    for image, true, predicted in misclassified[:10]:
        assert image.shape == (3, 32, 32) and true.ndim == predicted.ndim == 0 and true != predicted
        assert isinstance(true.item(), int) and predicted.cpu() in range(10)
    assert torch.stack([sample[1] for sample in misclassified]).tolist() == [sample.true for sample in misclassified]


def test_plots(names, notebook):
    assert len(names.post_display(notebook.train_loader, notebook.class_to_idx).axes) == 16
    lists = [notebook.train_losses, notebook.test_losses, notebook.train_acc, notebook.test_acc]
    assert [list(axis.lines[0].get_ydata()) for axis in names.post_accuracyplots(*lists).axes] == lists
    figure = names.showmisclassifiedsamples(notebook.misclassified, notebook.class_to_idx, "Mistakes")
    assert len(figure.axes) == 10 and figure.get_suptitle() == "Mistakes"
    plt.close("all")


# ---- tools that look at a network, or run it -------------------------------------------------------------------------

IMAGES = torch.randn(2, 3, 32, 32)


def test_operations_are_counted_by_exact_type_while_train_runs(names):
    """As thop does: multiply-adds of each convolution, by hooks."""
    model, counted = Model(), []

    def count(module, inputs, output):
        if type(module) is nn.Conv2d:
            side = output.shape[-1]
            counted.append(module.weight.numel() * side * side + (module.bias is not None) * output[0].numel())

    for module in model.modules():
        module.register_forward_hook(count)
    names.train(model, "cpu", [(IMAGES, torch.tensor([1, 2]))], names.get_optimizer(model), names.get_loss())
    assert 31.5e6 < sum(counted) < 32.5e6


@pytest.mark.parametrize("make", [Model, SeparableResNet])
def test_layers_are_of_the_very_classes_of_torch(make):
    layers = [module for module in make().modules() if not any(True for _ in module.children())]
    assert all(type(layer) is getattr(nn, type(layer).__name__, None) for layer in layers)


@pytest.mark.parametrize("make", [Model, SeparableResNet])
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


def test_five_classes_in_a_network_that_was_made_for_ten(names):
    model = Model()
    model.classifier = nn.Sequential(nn.Flatten(), nn.Linear(52, 20), nn.ReLU(), nn.Linear(20, 5))
    names.train(model, "cpu", [(IMAGES, torch.tensor([1, 4]))], names.get_optimizer(model), names.get_loss())
    assert model(IMAGES).shape == (2, 5)
