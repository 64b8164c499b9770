"""What notebooks of the original author, and other people's tools, call: each name and each way that it is called."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import utils
from models import Model, SeparableResNet


def test_the_other_notebook():
    """Positions and keywords as it writes them, with a few images; the names are those of `from utils import *`."""
    exec("from utils import *", names := {})
    get = names["get_CIFARdataset_with_loader"]
    kwargs = {"batch_size": 32, "shuffle": True, "pin_memory": True}
    class_to_idx, train_loader = get("train", kwargs, dataset="digits")
    _, test_loader = get("test", kwargs | {"shuffle": False}, dataset="digits")
    for data in (train_loader.dataset, test_loader.dataset):
        data.data, data.targets = data.data[:64], data.targets[:64]
    torch.manual_seed(0)
    model, device = Model(dropout_value=0.05), torch.device("cpu")
    optimizer = names["get_optimizer"](model, optname="SGD", learningrate=0.2, momentumval=0.8)
    scheduler = names["get_scheduler"](optimizer, 5, 0.75, True)
    criterion = names["get_loss"](loss_name="nll_loss")
    assert type(optimizer) is names["optim"].SGD
    assert optimizer.defaults["momentum"] == 0.8 and scheduler.base_lrs == [0.2]
    train_losses, train_acc, test_losses, test_acc = [], [], [], []
    for _ in range(2):
        names["train"](model, device, train_loader, optimizer, criterion, train_losses, train_acc)
        misclassified = names["test"](model, device, test_loader, criterion, test_losses, test_acc)
        scheduler.step()
    assert 0 < len(misclassified) < 64 and test_acc[1] == pytest.approx(100 * (64 - len(misclassified)) / 64)
    for image, true, predicted in misclassified[:10]:
        assert image.shape == (3, 32, 32) and true != predicted and isinstance(true.item(), int)
        assert predicted.cpu() in range(10)
    assert torch.stack([sample[1] for sample in misclassified]).ndim == 1
    assert len(names["post_display"](train_loader, class_to_idx).axes) == 16
    lists = [train_losses, test_losses, train_acc, test_acc]
    assert [list(axis.lines[0].get_ydata()) for axis in names["post_accuracyplots"](*lists).axes] == lists
    figure = names["showmisclassifiedsamples"](misclassified, class_to_idx, "Mistakes")
    assert len(figure.axes) == 10 and figure.get_suptitle() == "Mistakes"


@pytest.mark.parametrize("make", [Model, SeparableResNet])
def test_copies_and_graphs_compute_the_same(make):
    model, images = make().eval(), torch.randn(2, 3, 32, 32)
    tools = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "fx": fx.symbolic_trace(model),
        "export": torch.export.export(model, (images,)).module(),
        "SWA": torch.optim.swa_utils.AveragedModel(model),
    }
    computed = {tool: network(images) for tool, network in tools.items()}
    torch.testing.assert_close(computed, dict.fromkeys(tools, model(images)))  # which names the tool


@pytest.mark.parametrize("wrap", [fx.symbolic_trace, lambda m: torch.compile(m, backend="eager"), nn.DataParallel])
def test_train_and_test_take_what_such_tools_make(wrap):
    torch.manual_seed(0)
    device, losses, images, labels = utils.best_device(), [], torch.randn(8, 3, 32, 32), torch.arange(8)
    model = Model(dropout_value=0.0).to(device)
    before = F.nll_loss(model(images.to(device)).cpu(), labels).item()
    network = wrap(model)
    for _ in range(5):
        utils.train(network, device, [(images, labels)], utils.get_optimizer(network, lr=0.1), utils.get_loss(), losses)
    assert losses[0] == pytest.approx(before, rel=0.05) and losses[-1] < losses[0] / 1.5
    utils.test(network, device, [(images, labels)], utils.get_loss())
    assert not network.training
