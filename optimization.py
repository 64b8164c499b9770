"""Optimizers, schedulers and losses by name."""

import inspect

import torch
from torch import nn, optim


def _named(name, what, choices):
    """choices[name], or an error that lists them."""
    if name not in choices:
        raise ValueError(f"unknown {what} {name!r}; there is {', '.join(sorted(choices))}")
    return choices[name]


def _classes(module, base):
    """The public classes of a torch module, by name: every optimizer, every scheduler."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, base) and value is not base and not name.startswith("_")
    }


def get_optimizer(model, name="SGD", lr=0.01, momentum=0.9, **options):
    """Any optimizer of `torch.optim` by name; momentum goes to those that take one, options to all.

    Raises:
        ValueError: unknown name.
        TypeError: a model that is no network, or a learning rate that is no number.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"get_optimizer got {model!r}; it takes a network, an instance of nn.Module")
    if not isinstance(lr, (int, float, torch.Tensor)):
        raise TypeError(f"lr is {lr!r}; the learning rate must be a number")
    choices = _classes(optim, optim.Optimizer)
    del choices["LBFGS"]  # it evaluates the loss several times a step, which `train` does not
    optimizer = _named(name, "optimizer", choices)
    if "momentum" in inspect.signature(optimizer).parameters:
        options["momentum"] = momentum
    return optimizer(model.parameters(), lr=lr, **options)


def get_scheduler(optimizer, step_size=10, gamma=0.1, name="StepLR", **options):
    """A scheduler of `torch.optim.lr_scheduler` by name; step_size and gamma go to those that take them.

    Raises:
        ValueError: unknown name, a step_size below 1 or a negative gamma.
    """
    if name == "StepLR" and (step_size < 1 or gamma < 0):
        raise ValueError(f"step_size is {step_size} and gamma {gamma}; they must be at least 1 epoch and not negative")
    base = optim.lr_scheduler.LRScheduler
    scheduler = _named(name, "scheduler", _classes(optim.lr_scheduler, base))
    taken = inspect.signature(scheduler).parameters
    options |= {key: value for key, value in {"step_size": step_size, "gamma": gamma}.items() if key in taken}
    return scheduler(optimizer, **options)


def get_loss(name="nll_loss", **options):
    """A loss, the mean over a batch: "nll_loss" for the log-probabilities that Model returns, or "cross_entropy".

    Raises:
        ValueError: unknown name, or a reduction other than the mean.
    """
    if options.get("reduction", "mean") != "mean":
        raise ValueError(f"reduction is {options['reduction']!r}; train and test take the 'mean' over a batch")
    return _named(name, "loss", {"nll_loss": nn.NLLLoss, "cross_entropy": nn.CrossEntropyLoss})(**options)
