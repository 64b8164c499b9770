"""Optimizers, schedulers and losses by name."""

import inspect

import numpy as np
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


# On a GPU these can update all parameters in one kernel, which also decides by itself whether float16 gradients have
# overflowed; otherwise GradScaler waits for the GPU in every step to find out.
FUSED = ("SGD", "Adam", "AdamW")


def get_optimizer(model, name="SGD", lr=0.01, momentum=0.9, weight_decay=None, decay="all", **options):
    """Any optimizer of `torch.optim` by name; momentum goes to those that take one, options to all.

    Args:
        lr, momentum: the same defaults for every optimizer, whatever its own are.
        weight_decay: by default the optimizer's own.
        decay: which parameters the weight decay applies to, "all", or "weights": those of convolutions and linear
            layers, but neither biases nor the scales and shifts of normalisation.

    Raises:
        ValueError: unknown name, or another value of decay.
        TypeError: a model that is no network, or a learning rate that is no number.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"get_optimizer got {model!r}; it takes a network, an instance of nn.Module")
    if not isinstance(lr, (int, float, torch.Tensor)):
        raise TypeError(f"lr is {lr!r}; the learning rate must be a number")
    if decay not in ("all", "weights"):
        raise ValueError(f"decay is {decay!r}; weight decay applies to 'all' parameters or to 'weights'")
    choices = _classes(optim, optim.Optimizer)
    del choices["LBFGS"]  # it evaluates the loss several times a step, which `train` does not
    optimizer = _named(name, "optimizer", choices)
    if "momentum" in inspect.signature(optimizer).parameters:
        options["momentum"] = momentum
    if weight_decay is not None:
        options["weight_decay"] = weight_decay
    parameters = list(model.parameters())
    if name in FUSED and all(p.is_cuda for p in parameters) and {"foreach", "differentiable"}.isdisjoint(options):
        options.setdefault("fused", True)
    if decay == "all":
        return optimizer(parameters, lr=lr, **options)
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1]},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return optimizer(groups, lr=lr, **options)


def fit_fused_state(optimizer):
    """Bring the state of a fused optimizer into the form that its kernels need, before it takes steps.

    SGD gets zeros for momentum, from which a first step is the same as from none. Without them, torch fails where some
    parameters have momentum and others, unfrozen later, have none; and where GradScaler skips the first step, it goes
    on from momentum that it has allocated and not set. Then, state that was kept in another memory layout than the
    parameter, as by an Apple GPU, is refused by the kernels.
    """
    for group in optimizer.param_groups:
        if not group.get("fused"):
            continue
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if isinstance(optimizer, optim.SGD) and group["momentum"] and not group["dampening"]:
                state.setdefault("momentum_buffer", torch.zeros_like(parameter))
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    if value.stride() != parameter.stride():
                        state[name] = torch.empty_like(parameter).copy_(value)


IN_EPOCHS = {"T_max", "T_0", "total_iters", "milestones"}  # options of schedulers that torch counts in steps


def get_scheduler(optimizer, step_size=10, gamma=0.1, name="StepLR", epochs=None, steps_per_epoch=1, **options):
    """A scheduler of `torch.optim.lr_scheduler` by name.

    Args:
        step_size, gamma: go to the schedulers that take them; step_size counts epochs, as do T_max, T_0, total_iters
            and milestones among the options.
        epochs: length of the run, for OneCycleLR, whose max_lr is by default the learning rate of the optimizer; T_max
            and total_iters by default.
        steps_per_epoch: 1 for a scheduler to be stepped after every epoch; the number of batches, `len(train_loader)`,
            for one to be stepped after every batch, as `train` does with the scheduler that it is given.

    Raises:
        ValueError: unknown name; a step_size, epochs or steps_per_epoch below 1, or a negative gamma; a run too short
            for OneCycleLR; a scheduler that has no length in epochs and so cannot be stepped after every batch.
    """
    base = optim.lr_scheduler.LRScheduler
    scheduler = _named(name, "scheduler", _classes(optim.lr_scheduler, base))
    taken = inspect.signature(scheduler).parameters
    if "step_size" in taken and (step_size < 1 or gamma < 0):
        raise ValueError(f"step_size is {step_size} and gamma {gamma}; they must be at least 1 epoch and not negative")
    if epochs is not None and epochs < 1:
        raise ValueError(f"epochs is {epochs}; a run has at least 1")
    if steps_per_epoch < 1:
        raise ValueError(f"steps_per_epoch is {steps_per_epoch}; it must be 1, or the number of batches of an epoch")
    if steps_per_epoch > 1 and not {"step_size", "steps_per_epoch", *IN_EPOCHS} & taken.keys():
        raise ValueError(
            f"{name} counts its steps by itself; give what it counts in batches, and leave steps_per_epoch at 1"
        )
    if epochs:
        options = {key: epochs for key in ("T_max", "total_iters") if key in taken} | options
    if "total_iters" in taken and taken["total_iters"].default is not inspect.Parameter.empty:
        options.setdefault("total_iters", taken["total_iters"].default)
    for key in IN_EPOCHS & options.keys():
        options[key] = (np.array(options[key]) * steps_per_epoch).tolist()
    if "pct_start" in taken and epochs and epochs * steps_per_epoch * options.get("pct_start", 0.3) <= 1:
        raise ValueError(
            f"{epochs} epochs of {steps_per_epoch} batches are too few for {name} to rise and fall; train longer, or "
            "with a smaller batch size"
        )
    given = {"step_size": step_size * steps_per_epoch, "gamma": gamma, "max_lr": optimizer.param_groups[0]["lr"]}
    given |= {"epochs": epochs, "steps_per_epoch": steps_per_epoch}
    return scheduler(optimizer, **{key: value for key, value in given.items() if key in taken} | options)


def get_loss(name="nll_loss", **options):
    """A loss, the mean over a batch: "nll_loss" for the log-probabilities that Model returns, or "cross_entropy".

    Raises:
        ValueError: unknown name, or a reduction other than the mean.
    """
    if options.get("reduction", "mean") != "mean":
        raise ValueError(f"reduction is {options['reduction']!r}; train and test take the 'mean' over a batch")
    return _named(name, "loss", {"nll_loss": nn.NLLLoss, "cross_entropy": nn.CrossEntropyLoss})(**options)
