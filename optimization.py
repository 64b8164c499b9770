"""Optimizers, schedulers and losses by name."""

import functools
import inspect
import weakref

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.nn.utils.rnn import pad_sequence


def _named(name, what, choices):
    """choices[name], whatever name's case, punctuation and final "loss", or an error that lists them."""

    def plain(name):
        return "".join(filter(str.isalnum, str(name).lower())).removesuffix("loss")

    found = {plain(choice): value for choice, value in choices.items()}
    if plain(name) not in found:
        raise ValueError(f"unknown {what} {name!r}; there is {', '.join(sorted(choices))}")
    return found[plain(name)]


def _classes(module, base):
    """The public classes of a torch module, by name: every optimizer, every scheduler."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, base) and value is not base and not name.startswith("_")
    }


def _also_named(**names):
    """Let a function take keywords of the original code, {its name: ours}, as well."""

    def decorate(function):
        @functools.wraps(function)
        def renamed(*args, **kwargs):
            return function(*args, **{names.get(key, key): value for key, value in kwargs.items()})

        return renamed

    return decorate


def _name_may_come_first(function):
    """Let get_scheduler be called by analogy with get_optimizer: (optimizer, "StepLR", ...)."""

    @functools.wraps(function)
    def reordered(optimizer, *args, **kwargs):
        if args and isinstance(args[0], str):
            args, kwargs = args[1:], kwargs | {"name": args[0]}
        return function(optimizer, *args, **kwargs)

    return reordered


# On a GPU these can update all parameters in one kernel, which also decides by itself whether float16 gradients have
# overflowed; otherwise GradScaler waits for the GPU in every step to find out.
FUSED = (optim.SGD, optim.Adam, optim.AdamW)


class MuonSGD(optim.Optimizer):
    """SGD with Nesterov momentum; for groups with a `kernel_scale`, Muon (Jordan et al., "Muon", 2024).

    Muon reads a kernel (out, in, k, k) as a matrix (out, in * k * k) and makes its step orthogonal: all directions
    change alike, not mostly those of large gradients. The step does not change the norm of the kernel: behind a
    normalisation only its direction matters.

    Args:
        params: float32 parameters or groups; those of groups with a `kernel_scale` have at least two dimensions.
        lr: one for all groups, so that a scheduler can set it; a step of Muon is kernel_scale * lr times as long as
            the kernel.
        weight_decay: for groups without a `kernel_scale`; give the others 0, as it would only turn their steps.

    Raises:
        ValueError: a negative argument.
    """

    def __init__(self, params, lr=0.01, momentum=0.9, weight_decay=0.0):
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "kernel_scale": 0.0}
        if negative := [f"{name}={value}" for name, value in defaults.items() if value < 0]:
            raise ValueError(f"{', '.join(negative)} given; MuonSGD takes no negative numbers")
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not parameters:
                continue
            for parameter in parameters:
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            # torch._foreach, as torch's own optimizers: on a GPU few kernels for all parameters, not some for each.
            gradients = torch._foreach_add([p.grad for p in parameters], parameters, alpha=group["weight_decay"])
            momenta = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
            torch._foreach_mul_(momenta, group["momentum"])
            torch._foreach_add_(momenta, gradients)
            torch._foreach_add_(gradients, momenta, alpha=group["momentum"])
            if not group["kernel_scale"]:
                torch._foreach_add_(parameters, gradients, alpha=-group["lr"])
                continue
            norms = torch._foreach_norm(parameters)
            steps = orthogonalized([gradient.flatten(1) for gradient in gradients])
            lengths = [norm / min(step.shape) ** 0.5 for norm, step in zip(norms, steps)]
            steps = [step.view_as(parameter) * length for step, parameter, length in zip(steps, parameters, lengths)]
            torch._foreach_add_(parameters, steps, alpha=-group["kernel_scale"] * group["lr"])
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
        x = pad_sequence([tall[index] for index in indices], batch_first=True)
        x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
        for _ in range(5):
            gram = x.mT @ x
            x = torch.baddbmm(x, x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), beta=a)
        for index, done in zip(indices, x):
            tall[index] = done[: len(tall[index])]
    return [done if done.shape == matrix.shape else done.T for done, matrix in zip(tall, matrices)]


def _muon_kernels(model):
    layers = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    # Not the last, the classifier: how large its scores are is for it to learn.
    convolutions = [layer for layer in layers[:-1] if isinstance(layer, nn.Conv2d) and layer.bias is None]
    dense = [conv.weight for conv in convolutions if conv.groups == 1 or conv.weight.shape[1] > 1]
    # A weight that layers share comes more than once, and that of a parametrized layer is computed.
    return [weight for weight in dict.fromkeys(dense) if isinstance(weight, nn.Parameter) and weight.any()]


@_also_named(optname="name", learningrate="lr", momentumval="momentum")
def get_optimizer(model, name="SGD", lr=0.01, momentum=0.9, weight_decay=None, decay="all", **options):
    """Any optimizer of `torch.optim`, or `MuonSGD`, by name, for all parameters of the model.

    Args:
        name: without regard to case.
        lr, momentum: the same defaults for every optimizer, whatever its own are; momentum goes to those that take one.
        weight_decay: by default the optimizer's own.
        decay: which parameters the weight decay applies to, "all", or "weights": those of convolutions and linear
            layers, but neither biases nor the scales and shifts of normalisation.
        options: go to the optimizer. MuonSGD also takes kernel_lr, the learning rate of Muon, by default lr / 15; the
            two keep their ratio when the learning rate changes. Muon trains the kernels of convolutions without bias,
            as before a normalisation, but neither depthwise nor all-zero ones, nor the layer that the network
            registers last, its classifier; SGD trains the rest. Weight decay does not apply to Muon's kernels, as
            their norm does not change.

    Raises:
        ValueError: unknown name, or another value of decay; MuonSGD for a network without such kernels, or kernel_lr
            and lr not both above zero.
    """
    if decay not in ("all", "weights"):
        raise ValueError(f"decay is {decay!r}; weight decay applies to 'all' parameters or to 'weights'")
    kind = _named(name, "optimizer", _classes(optim, optim.Optimizer) | {"MuonSGD": MuonSGD})
    if "momentum" in inspect.signature(kind).parameters:
        options["momentum"] = momentum
    if weight_decay is not None:
        options["weight_decay"] = weight_decay
    parameters = list(model.parameters())
    if kind in FUSED and all(p.is_cuda for p in parameters) and {"foreach", "differentiable"}.isdisjoint(options):
        options.setdefault("fused", True)
    kernels = []
    if kind is MuonSGD:
        kernel_scale = 1 / 15
        if (kernel_lr := options.pop("kernel_lr", None)) is not None:
            if lr <= 0 or kernel_lr <= 0:
                raise ValueError(f"kernel_lr={kernel_lr} is kept as a multiple of lr={lr}; give both above zero")
            kernel_scale = kernel_lr / lr
        if not (kernels := _muon_kernels(model)):
            raise ValueError("Muon trains convolutions without bias, and this network has none; take SGD instead")
    taken = set(kernels)
    rest = [parameter for parameter in parameters if parameter not in taken]
    groups = [{"params": rest}]
    if decay == "weights":
        groups = [
            {"params": [parameter for parameter in rest if parameter.dim() > 1]},
            {"params": [parameter for parameter in rest if parameter.dim() <= 1], "weight_decay": 0.0},
        ]
    if kernels:
        groups.append({"params": kernels, "weight_decay": 0.0, "kernel_scale": kernel_scale})
    optimizer = kind(groups, lr=lr, **options)
    fit_fused_state(optimizer)  # for loops other than `train`
    optimizer.made_for = weakref.ref(model)  # what it lacks of this model was added later: epoch.check_optimizer
    return optimizer


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


# What torch counts in steps.
IN_EPOCHS = {"step_size", "T_max", "T_0", "total_iters", "milestones", "step_size_up", "step_size_down"}


@_also_named(stepsize="step_size", gamma_val="gamma")
@_name_may_come_first
def get_scheduler(optimizer, step_size=None, gamma=None, name="StepLR", epochs=None, steps_per_epoch=1, **options):
    """A scheduler of `torch.optim.lr_scheduler` by name; what it counts is given in epochs.

    Args:
        step_size: epochs between two falls of the learning rate; for StepLR by default 10.
        gamma: factor of a fall; for StepLR by default 0.1.
        name: without regard to case; it may also come right after the optimizer. A bool in its place, the original's
            `verbose`, is passed over.
        epochs: length of the run, for the schedulers that need one.
        steps_per_epoch: 1 for a scheduler to be stepped after every epoch; the number of batches, `len(train_loader)`,
            for one to be stepped after every batch, as `train` does with the scheduler that it is given.
        options: go to the scheduler; T_max, T_0, total_iters, milestones, step_size_up and step_size_down count epochs,
            OneCycleLR's total_steps counts steps. max_lr is by default the learning rate of each of the optimizer's
            groups.

    Raises:
        ValueError: unknown name; step_size or gamma for a scheduler that takes none; a run too short for OneCycleLR, or
            an optimizer that has had one; a scheduler that has no length in epochs and so cannot be stepped after every
            batch.
    """
    options.pop("verbose", None)  # which torch has given up
    name = "StepLR" if isinstance(name, bool) else name
    kind = _named(name, "scheduler", _classes(optim.lr_scheduler, optim.lr_scheduler.LRScheduler))
    defaults = {key: parameter.default for key, parameter in inspect.signature(kind).parameters.items()}
    if steps_per_epoch > 1 and not (IN_EPOCHS | {"steps_per_epoch"}) & defaults.keys():
        raise ValueError(
            f"{kind.__name__} has no length in epochs; make torch.optim.lr_scheduler.{kind.__name__} yourself, with "
            "what it counts in batches"
        )
    if kind is optim.lr_scheduler.OneCycleLR and "max_lr" in optimizer.param_groups[0] and "max_lr" not in options:
        raise ValueError(
            f"the optimizer has had a OneCycleLR, which left a learning rate of {optimizer.param_groups[0]['lr']:.2g}; "
            "make the optimizer anew as well, or give max_lr"
        )
    falls = {key: value for key, value in {"step_size": step_size, "gamma": gamma}.items() if value is not None}
    for key in falls.keys() - defaults.keys():
        raise ValueError(f"{kind.__name__} takes no {key} (given: {falls[key]!r}); give its own arguments by name")
    if kind is optim.lr_scheduler.StepLR:
        falls = {"step_size": 10, "gamma": 0.1} | falls
    given = {"T_max": epochs, "epochs": epochs, "steps_per_epoch": steps_per_epoch}
    given["max_lr"] = [group["lr"] for group in optimizer.param_groups]
    # Others that have total_iters are for a part of the run, such as its warm-up.
    to_the_end = epochs if kind is optim.lr_scheduler.PolynomialLR else None
    given["total_iters"] = to_the_end or defaults.get("total_iters")
    given = {key: value for key, value in given.items() if key in defaults and value is not None} | falls | options
    for key in IN_EPOCHS & given.keys():
        if given[key] is not None:
            # Whole ones, as torch waits for a step that is equal.
            given[key] = np.rint(np.array(given[key]) * steps_per_epoch).astype(int).tolist()
    if kind is optim.lr_scheduler.OneCycleLR and epochs and epochs * steps_per_epoch * given.get("pct_start", 0.3) <= 1:
        raise ValueError(
            f"{epochs} epochs of {steps_per_epoch} batches are too few for OneCycleLR to rise and fall; train longer, "
            "or with a smaller batch size"
        )
    scheduler = kind(optimizer, **given)
    if "total_steps" not in options:
        scheduler.steps_per_epoch = steps_per_epoch  # `train` refuses the wrong pairing, see epoch.check_scheduler
    # By a weak reference, or a cycle would keep weights and gradients in memory.
    optimizer.batch_scheduler = weakref.ref(scheduler) if steps_per_epoch > 1 else lambda: None
    return scheduler


class NLLLoss(nn.NLLLoss):
    """`nn.NLLLoss` that can also be called as `F.nll_loss` is, which is what the original `get_loss` returned."""

    def forward(self, scores, labels, reduction=None):
        reduction = reduction or self.reduction
        return F.nll_loss(scores, labels, self.weight, ignore_index=self.ignore_index, reduction=reduction)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """`nn.CrossEntropyLoss` that can also be called as `F.cross_entropy` is."""

    def forward(self, scores, labels, reduction=None):
        options = {"ignore_index": self.ignore_index, "label_smoothing": self.label_smoothing}
        return F.cross_entropy(scores, labels, self.weight, reduction=reduction or self.reduction, **options)


LOSSES = {"nll_loss": NLLLoss, "cross_entropy": CrossEntropyLoss}


@_also_named(loss_name="name")
def get_loss(name="nll_loss", **options):
    """A loss, the mean over a batch: "nll_loss" for log-probabilities, which Model returns, or "cross_entropy".

    `get_loss()(scores, labels, reduction="sum")` gives another reduction for one call.

    Raises:
        ValueError: unknown name.
    """
    return _named(name, "loss", LOSSES)(**options)
