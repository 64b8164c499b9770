"""Optimizers, schedulers and losses by name."""

import functools
import inspect
import re

import numpy as np
import torch
from torch import nn, optim

from devices import unwrap


class MuonSGD(optim.Optimizer):
    """SGD with Nesterov momentum; for groups with `muon=True`, Muon (Jordan et al., "Muon", 2024).

    Muon reads a kernel, float32 (out, in, k, k), as a matrix (out, in * k * k) and makes its step orthogonal: all
    directions change alike, not mostly those of large gradients. The step is lr times as long as the kernel, whose norm
    neither it nor weight decay changes: behind a normalisation only the direction of a kernel matters.
    """

    def __init__(self, params, lr=0.01, momentum=0.9, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "muon": False})

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            for parameter in [p for p in parameters if "momentum_buffer" not in self.state[p]]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            momenta = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            # torch._foreach, as torch's own optimizers: on a GPU few kernels for all parameters, not some for each.
            decay = 0 if group["muon"] else group["weight_decay"]
            steps = torch._foreach_add([p.grad for p in parameters], parameters, alpha=decay)
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, steps)
            torch._foreach_add_(steps, momenta, alpha=group["momentum"])
            if group["muon"]:
                norms = torch._foreach_norm(parameters)
                steps = orthogonalized([step.flatten(1) for step in steps])
                torch._foreach_mul_(steps, [norm / min(step.shape) ** 0.5 for norm, step in zip(norms, steps)])
                steps = [step.view_as(parameter) for step, parameter in zip(steps, parameters)]
            torch._foreach_add_(parameters, steps, alpha=-group["lr"])
            if group["muon"]:
                after = torch._foreach_norm(parameters)
                torch._foreach_clamp_min_(after, 1e-30)  # a kernel that has become zero stays so
                torch._foreach_mul_(parameters, torch._foreach_div(norms, after))
        return loss


def orthogonalized(matrices):
    """The matrices with their singular values, but for tiny ones, moved to 0.7 to 1.2: five Newton-Schulz steps.

    Those whose shorter sides are equally long are computed together, padded with zeros, which stay zeros.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan's: steep at zero, which matters more than to end at exactly 1
    tall = [matrix.T if matrix.shape[0] < matrix.shape[1] else matrix for matrix in matrices]
    batches = {}
    for index, matrix in enumerate(tall):
        batches.setdefault((matrix.shape[1], matrix.dtype, matrix.device), []).append(index)
    for indices in batches.values():
        x = nn.utils.rnn.pad_sequence([tall[index] for index in indices], batch_first=True)
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            gram = x.mT @ x
            x = torch.baddbmm(x, x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), beta=a)
        for index, done in zip(indices, x):
            tall[index] = done[: len(tall[index])]
    return [done if done.shape == matrix.shape else done.T for done, matrix in zip(tall, matrices)]


def _muon_kernels(model):
    """Kernels of convolutions without bias, as before a normalisation; not depthwise ones, nor the classifier's."""
    layers = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    convolutions = [layer for layer in layers[:-1] if isinstance(layer, nn.Conv2d) and layer.bias is None]
    dense = [layer.weight for layer in convolutions if layer.groups == 1 or layer.weight.shape[1] > 1]
    # A weight that layers share comes more than once, and that of a parametrized layer is computed.
    return [weight for weight in dict.fromkeys(dense) if isinstance(weight, nn.Parameter) and weight.any()]


# Of which everything but a bias is a weight; not a normalisation, nor a module's own scale.
WITH_WEIGHTS = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.Embedding, nn.RNNBase, nn.MultiheadAttention)


def _named(name, what, choices):
    """The choice of that name, whatever its case and punctuation."""
    plain = {re.sub(r"[^a-z0-9]", "", choice.__name__.lower()): choice for choice in choices}
    if (key := re.sub(r"[^a-z0-9]", "", str(name).lower())) not in plain:
        raise ValueError(f"unknown {what} {name!r}; there is {', '.join(sorted(c.__name__ for c in choices))}")
    return plain[key]


def _classes(module, base, but=()):
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, base)]
    return [kind for kind in kinds if kind is not base and kind.__name__ not in but and kind.__name__[0] != "_"]


# Not Muon, which takes nothing but matrices, nor LBFGS, which steps by a closure, which `train` does not have.
OPTIMIZERS = [*_classes(optim, optim.Optimizer, but=("Muon", "LBFGS")), MuonSGD]
SCHEDULERS = _classes(optim.lr_scheduler, optim.lr_scheduler.LRScheduler)


def get_optimizer(model, name="SGD", lr=0.01, momentum=0.9, weight_decay=None, decay="all", kernel_lr=None, **options):
    """Any optimizer of `torch.optim` that steps by gradients alone, or `MuonSGD`, by name, for all parameters.

    Args (others go to the optimizer):
        lr, momentum: the same defaults for every optimizer, whatever its own are; momentum goes to those that take one.
        weight_decay: by default the optimizer's own.
        decay: what it applies to: "all" parameters, or "weights", which leaves out biases, scales and shifts.
        kernel_lr: of MuonSGD, the learning rate of Muon, by default lr / 15. Muon trains the kernels of convolutions
            without bias, but neither depthwise nor all-zero ones, nor those of the layer that the network registers
            last, its classifier; SGD trains the rest.
    """
    name, lr = options.pop("optname", name), options.pop("learningrate", lr)  # the names of the original code
    momentum = options.pop("momentumval", momentum)
    kind, model = _named(name, "optimizer", OPTIMIZERS), unwrap(model)
    options |= {"momentum": momentum} if "momentum" in inspect.signature(kind).parameters else {}
    options |= {} if weight_decay is None else {"weight_decay": weight_decay}
    kernels = _muon_kernels(model) if kind is MuonSGD else []
    layers = [module for module in model.modules() if isinstance(module, WITH_WEIGHTS)]
    weights = {p for layer in layers for name, p in layer.named_parameters() if "bias" not in name}
    decayed = {"all": set(model.parameters()), "weights": weights}[decay]
    rest = [parameter for parameter in model.parameters() if parameter not in set(kernels)]
    groups = [
        {"params": [parameter for parameter in rest if parameter in decayed]},
        {"params": [parameter for parameter in rest if parameter not in decayed], "weight_decay": 0.0},
        {"params": kernels, "lr": lr / 15 if kernel_lr is None else kernel_lr, "muon": True},
    ]
    return kind([group for number, group in enumerate(groups) if group["params"] or not number], lr=lr, **options)


# What torch counts in steps.
IN_EPOCHS = {"step_size", "T_max", "T_0", "total_iters", "milestones", "step_size_up", "step_size_down"}


def get_scheduler(optimizer, size_or_name=None, gamma=None, name="StepLR", epochs=None, steps_per_epoch=1, **options):
    """A scheduler of `torch.optim.lr_scheduler` by name; what it counts is given in epochs.

    Args:
        size_or_name: step_size, epochs between two falls of the learning rate (for StepLR by default 10), or the name.
        gamma: factor of a fall; for StepLR by default 0.1.
        name: a bool in its place, the original's `verbose`, is passed over.
        epochs: length of the run, for the schedulers that need one.
        steps_per_epoch: 1 for a scheduler to be stepped after every epoch; the number of batches, `len(train_loader)`,
            for one to be stepped after every batch, as `train` does with the scheduler that it is given.
        options: go to the scheduler; T_max, T_0, total_iters, milestones, step_size_up and step_size_down in epochs,
            OneCycleLR's total_steps in steps. max_lr is by default the learning rate of each of the optimizer's groups.
    """
    options.pop("verbose", None)  # which torch has given up
    size_or_name, gamma = options.pop("stepsize", size_or_name), options.pop("gamma_val", gamma)
    if isinstance(size_or_name, str):
        name, size_or_name = size_or_name, None
    positional = {"step_size": size_or_name, "gamma": gamma}
    options |= {key: value for key, value in positional.items() if value is not None}
    kind = _named("StepLR" if isinstance(name, bool) else name, "scheduler", SCHEDULERS)
    for group in optimizer.param_groups:
        peak = group.get("max_lr", group.get("initial_lr", 0))  # which schedulers leave there
        # Before the first step a warm-up may have set it as low.
        if group["lr"] < 1e-3 * peak and getattr(optimizer, "_opt_called", False):
            raise ValueError(f"an earlier scheduler cut lr {peak:.2g} → {group['lr']:.2g}; make the optimizer again")
    takes = inspect.signature(kind).parameters
    if steps_per_epoch > 1 and not (IN_EPOCHS | {"steps_per_epoch"}) & takes.keys():
        raise ValueError(f"{kind.__name__} has no length in epochs; make it yourself, with what it counts in batches")
    given = {"T_max": epochs, "epochs": epochs, "steps_per_epoch": steps_per_epoch, "step_size": 10}
    given["max_lr"] = [group["lr"] for group in optimizer.param_groups]
    if "total_iters" in takes:  # others than PolynomialLR have it for a part of the run, such as its warm-up
        given["total_iters"] = (kind is optim.lr_scheduler.PolynomialLR and epochs) or takes["total_iters"].default
    given = {key: value for key, value in given.items() if key in takes and value is not None} | options
    for key in IN_EPOCHS & given.keys():
        if given[key] is not None:  # whole ones, as torch waits for a step that is equal
            given[key] = np.rint(np.array(given[key]) * steps_per_epoch).astype(int).tolist()
    scheduler = kind(optimizer, **given)
    # What nobody else can know: `train` refuses a scheduler that was made for another number of batches, or for epochs.
    scheduler.steps_per_epoch = steps_per_epoch if "total_steps" not in given else None
    return scheduler


def get_loss(name="nll_loss", **options):
    """A loss of (scores, labels), the mean over a batch: "nll_loss", for log-probabilities, or "cross_entropy"."""
    kind = _named(options.pop("loss_name", name), "loss", [nn.functional.nll_loss, nn.functional.cross_entropy])
    return functools.partial(kind, **options)
