"""What `train` and `test` refuse: one clear error for each thing that would otherwise fail far from its cause."""

import torch
from torch import nn, optim


def check_arguments(model, device, criterion, losses, accuracies):
    """Model, device and criterion fit each other, and the lists can be appended to."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is {model!r}; it must be a network, an instance of nn.Module")
    if not callable(criterion) or isinstance(criterion, type):
        raise TypeError(f"criterion is {criterion!r}; it must be a loss function, such as get_loss() returns")
    if (reduction := getattr(criterion, "reduction", "mean")) != "mean":
        raise ValueError(f"the criterion's reduction is {reduction!r}; it must be the 'mean' over a batch")
    if not (hasattr(losses, "append") and hasattr(accuracies, "append")):
        kinds = f"{type(losses).__name__} and {type(accuracies).__name__}"
        raise TypeError(f"losses and accuracies are appended to lists, and those given are {kinds}")
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.device.type != device.type:
        raise ValueError(
            f"the model is on {parameter.device} and the device given is {device}; move one: model.to({str(device)!r})"
        )
    if parameter is not None and parameter.dtype != torch.float32:
        raise ValueError(
            f"the model's weights are {parameter.dtype}; keep them in float32, with model.float(), and what is faster "
            "in half precision is computed in it"
        )


def check_optimization(model, optimizer, scheduler):
    """The optimizer trains this model, and the scheduler can be stepped after a batch."""
    if isinstance(scheduler, optim.lr_scheduler.ReduceLROnPlateau):
        raise TypeError(
            "train got a ReduceLROnPlateau, which needs a loss of the whole epoch; call train without it, and "
            "scheduler.step(test_losses[-1]) after test"
        )
    trainable = {parameter for parameter in model.parameters() if parameter.requires_grad}
    if not trainable:
        raise ValueError("the model has no parameter that requires a gradient; unfreeze what is to be trained")
    if trainable.isdisjoint(parameter for group in optimizer.param_groups for parameter in group["params"]):
        raise ValueError(
            "the optimizer holds no parameter of this model, so nothing would be learned; make it again, with "
            "get_optimizer(model, ...)"
        )


def checked_batch(batch):
    """(images, labels), once they are what a loader should give."""
    if not isinstance(batch, (tuple, list)) or [isinstance(part, torch.Tensor) for part in batch] != [True, True]:
        kinds = [type(part).__name__ for part in batch] if isinstance(batch, (tuple, list)) else type(batch).__name__
        raise TypeError(f"the loader gave {kinds}; a batch is a pair of tensors (images, labels)")
    images, labels = batch
    if images.ndim != 4 or labels.dtype != torch.int64 or labels.shape != images.shape[:1] or not len(labels):
        raise ValueError(
            f"the loader gave images of shape {tuple(images.shape)} and {labels.dtype} labels of shape "
            f"{tuple(labels.shape)}; a batch is images (N, channels, H, W) and int64 labels (N,), N at least 1"
        )
    return images, labels


def check_scores(scores, labels):
    """The model returned scores (N, classes), of as many classes as the labels need; labels as the loader gave them."""
    if not isinstance(scores, torch.Tensor) or scores.ndim != 2:
        shape = f" of shape {tuple(scores.shape)}" if isinstance(scores, torch.Tensor) else ""
        raise TypeError(
            f"the model returned a {type(scores).__name__}{shape}; train and test take one that returns scores "
            "(N, classes)"
        )
    # Labels that are on a GPU already would have to be waited for.
    if labels.device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) < scores.shape[1]:
        raise ValueError(
            f"the loader gave labels from {int(labels.min())} to {int(labels.max())}; the model has {scores.shape[1]} "
            f"classes, so labels go from 0 to {scores.shape[1] - 1}"
        )


def check_loss(loss):
    """The criterion gave one number."""
    if loss.ndim:
        raise ValueError(
            f"the criterion gave a loss of shape {tuple(loss.shape)}; it must be one number, the batch's mean"
        )
