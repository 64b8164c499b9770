"""What an epoch of `train` or `test` counts, shows and refuses."""

import functools
import math
import operator
import time
import warnings
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import lr_scheduler

from output import progress_bar
from parallel import rank, sum_over_processes, unwrap

# ---- what it counts ------------------------------------------------------------------------------------------------


class Tally:
    """Running loss and accuracy of one epoch. They stay on the device, because to read them is to wait for it."""

    def __init__(self, what, bar, device):
        self.what, self.bar, self.device = what, bar, device
        self.losses, self.sizes, self.correct = [], [], 0
        self.last_shown = time.monotonic()

    def add(self, loss, predictions, labels):
        """Count a batch; returns whether the device was waited for, to show how far it is."""
        self.losses.append(loss.detach())
        self.sizes.append(len(labels))
        self.bar.update()
        self.correct += (predictions == labels).sum()
        if time.monotonic() - self.last_shown <= 0.5:
            return False
        loss_sum, correct, seen = self.sums()
        self.bar.set_postfix_str(f"loss {loss_sum / seen:.4f}, accuracy {100 * correct / seen:.2f} %", refresh=False)
        self.last_shown = time.monotonic()
        return True

    def sums(self):
        """(sum of the losses, number correct, number seen) of this process so far."""
        losses = torch.stack(self.losses).tolist() if self.losses else []
        for batch, loss in enumerate(losses, start=1):
            if not math.isfinite(loss):
                advice = "; if training itself got there, go on from the last checkpoint with a smaller learning rate"
                raise FloatingPointError(
                    f"{self.what}, batch {batch}: the loss is {loss}. Look for non-finite values in data and weights"
                    f"{'' if self.what == 'test' else advice}"
                )
        return sum(loss * size for loss, size in zip(losses, self.sizes)), int(self.correct), sum(self.sizes)

    def read(self):
        """(mean loss per sample, accuracy in %) of all processes."""
        loss_sum, correct, seen = sum_over_processes(list(self.sums()), self.device)
        if not seen:
            raise ValueError(f"{self.what}: the loader is empty; it gave no batch")
        return loss_sum / seen, 100 * correct / seen


class Misclassified(NamedTuple):
    """A sample that the model got wrong: normalised image float32 (3, H, W) and two class indices, 0-d int64 tensors.

    All on the CPU, and each with memory of its own.
    """

    image: torch.Tensor
    true: torch.Tensor
    predicted: torch.Tensor


class MisclassifiedSamples(list):
    """What `test` returns: a list of `Misclassified`.

    `tested` is how many samples of each class there were, as long as the list has the `found` samples of that test.
    """

    def __init__(self):
        super().__init__()
        self.tested, self.found = np.zeros(0, dtype=int), 0

    def read(self, unread):
        """Take over what is wrong in a list of batches (images, labels, predictions), which it empties."""
        for images, labels, predictions in unread:
            images, labels, predictions = images.cpu(), labels.cpu(), predictions.cpu()
            counts = np.bincount(labels, minlength=len(self.tested))
            counts[: len(self.tested)] += self.tested
            self.tested = counts
            for index in torch.nonzero(predictions != labels).flatten().tolist():
                sample = images[index], labels[index], predictions[index]
                self.append(Misclassified(*(part.clone() for part in sample)))
        self.found = len(self)
        unread.clear()


# ---- what it shows -------------------------------------------------------------------------------------------------


def batch_bar(loader, description):
    """A bar of the batches of a loader."""
    # It gets the length and not the loader, of which older versions of tqdm start a second epoch.
    total = operator.length_hint(loader) or None
    return progress_bar(hidden=rank() > 0, total=total, desc=description, unit="batch", leave=False)


def report(what, split, loss, accuracy, seconds, loader):
    """The line that `train` and `test` print, in the first of several processes."""
    if rank():
        return
    data = getattr(getattr(loader, "dataset", loader), "name", type(loader).__name__)
    print(f"{what:>8}  {split:5}  loss {loss:.4f}  accuracy {accuracy:5.2f} %  {seconds:6.1f} s  [{data}]", flush=True)


# ---- what it refuses: what would be silently wrong -----------------------------------------------------------------


def check_lists(losses, accuracies):
    """Losses and accuracies in % are not in each other's lists, as far as the last values tell."""
    if any(values is other for values in losses for other in accuracies):
        raise ValueError("losses and accuracies are one list; make two, as `losses = accuracies = []` does not")
    if any(values and values[-1] > 10 for values in losses) and any(values and values[-1] < 5 for values in accuracies):
        raise ValueError(
            f"the lists of losses end in {[values[-1] for values in losses if values]} and those of accuracies in "
            f"{[values[-1] for values in accuracies if values]} %; they seem to be in each other's place, or training "
            "has diverged. The order is train_losses, train_acc; for post_accuracyplots train_losses, test_losses, "
            "train_acc, test_acc"
        )


def check_criterion(criterion):
    """The criterion gives the mean over a batch, as the means of an epoch take for granted."""
    options = criterion.keywords if isinstance(criterion, functools.partial) else {}
    if options.get("reduction", getattr(criterion, "reduction", "mean")) == "sum":
        raise ValueError("the criterion's reduction is 'sum'; it must be the 'mean' over a batch")


def check_optimizer(model, optimizer, criterion):
    """The optimizer trains this model as it is now, and not layers that it once had."""
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    missing = {name: p for name, p in model.named_parameters() if p.requires_grad and p not in held}
    if not missing:
        return
    criterions = set(criterion.parameters()) if isinstance(criterion, nn.Module) else set()
    foreign = held - set(model.parameters()) - criterions
    names = ", ".join(list(missing)[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    made_for = getattr(optimizer, "made_for", lambda: None)()
    if foreign or (made_for is not None and unwrap(made_for) is unwrap(model)):
        raise ValueError(
            f"the optimizer does not have the parameters {names} of this model, so they would never be trained; it was "
            "made for another model, or before a layer was replaced. Make it again, with get_optimizer(model, ...)"
        )
    warnings.warn(f"the optimizer does not have {names}, which will not be trained", stacklevel=3)


def steps_taken(scheduler):
    """How many times a scheduler was stepped; None of one that does not count."""
    if isinstance(scheduler, lr_scheduler.ChainedScheduler):  # which leaves counting to its parts
        scheduler = scheduler._schedulers[0]
    return getattr(scheduler, "last_epoch", None)


def _counts_epochs(scheduler, batches):
    """Whether a scheduler counts epochs: get_scheduler says so, or counting batches it would be through within one."""
    if hasattr(scheduler, "steps_per_epoch"):
        return scheduler.steps_per_epoch == 1 and batches != 1
    if isinstance(scheduler, lr_scheduler.SequentialLR):
        starts = [0, *scheduler._milestones, batches]
        return any(
            _counts_epochs(part, min(end, batches) - start)
            for part, start, end in zip(scheduler._schedulers, starts, starts[1:])
        )
    if isinstance(scheduler, lr_scheduler.ChainedScheduler):
        return any(_counts_epochs(part, batches) for part in scheduler._schedulers)
    for name in ("T_max", "T_0", "total_iters"):  # of CosineAnnealingLR, CosineAnnealingWarmRestarts, PolynomialLR
        if hasattr(scheduler, name) and not isinstance(
            scheduler, (lr_scheduler.ConstantLR, lr_scheduler.LinearLR)
        ):  # for a warm-up
            return getattr(scheduler, name) < batches
    if isinstance(scheduler, lr_scheduler.MultiStepLR):
        return max(scheduler.milestones, default=batches) < batches
    if isinstance(scheduler, (lr_scheduler.StepLR, lr_scheduler.ExponentialLR)):
        return scheduler.gamma ** (batches // getattr(scheduler, "step_size", 1)) < 0.01
    if isinstance(scheduler, lr_scheduler.LambdaLR):
        return all(factor(batches // 2) < 0.01 * factor(0) for factor in scheduler.lr_lambdas)
    return isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)


def check_scheduler(scheduler, optimizer, loader):
    """The scheduler, if there is one, counts the batches of this optimizer, and nobody else steps it."""
    batches = operator.length_hint(loader)  # 0 where the loader does not know
    if scheduler is None:
        forgotten = getattr(optimizer, "batch_scheduler", lambda: None)()
        if forgotten is not None and batches > 1 and not hasattr(forgotten, "stepped_to"):
            raise ValueError(
                f"the optimizer's {type(forgotten).__name__} counts batches, and train was not given it: "
                "train(..., scheduler=scheduler). One to be stepped after each epoch is made without steps_per_epoch"
            )
        return
    if getattr(scheduler, "optimizer", optimizer).param_groups is not optimizer.param_groups:
        raise ValueError("the scheduler is of another optimizer, whose learning rate it would set; make it again")
    if _counts_epochs(scheduler, batches):
        raise ValueError(
            f"train steps its scheduler after every batch, and this {type(scheduler).__name__} counts epochs. Call "
            "train without it and step it after each epoch, or make it with "
            "get_scheduler(..., steps_per_epoch=len(train_loader))"
        )
    parts = [scheduler, *getattr(scheduler, "_schedulers", [])]  # of a SequentialLR, say
    made_for = {part.steps_per_epoch for part in parts if hasattr(part, "steps_per_epoch")}
    if batches and made_for - {batches}:
        raise ValueError(
            f"the scheduler was made for {max(made_for)} batches per epoch and the loader has {batches}; make it with "
            "get_scheduler(..., steps_per_epoch=len(train_loader))"
        )
    steps = steps_taken(scheduler)
    left = scheduler.total_steps - steps if hasattr(scheduler, "total_steps") else math.inf
    if left < batches:
        raise ValueError(
            f"the scheduler has {left} steps left and the epoch takes {batches}; it was made for fewer epochs, or for "
            "epochs instead of batches: get_scheduler(..., epochs=EPOCHS, steps_per_epoch=len(train_loader))"
        )
    if steps is not None and steps > getattr(scheduler, "stepped_to", steps):
        raise ValueError(
            "train steps this scheduler after every batch, and it was stepped once more since the last epoch; take "
            "scheduler.step() out of the loop, or do not give the scheduler to train"
        )


def checked_batch(batch):
    """(images, labels), if a network can take them; torch's own errors are less clear, on a GPU some are missing."""
    parts = [batch] if isinstance(batch, (torch.Tensor, dict)) else [*batch]
    if len(parts) != 2 or not all(isinstance(part, torch.Tensor) for part in parts):
        kinds = " and ".join(f"a {type(part).__name__}" for part in parts[:5])
        raise TypeError(
            f"the loader gave {kinds}; a batch is a pair of tensors (images, labels), such as "
            "torch.utils.data.DataLoader makes"
        )
    images, labels = parts
    matching = len(images) > 0 and labels.shape == images.shape[:1]
    if not images.is_floating_point() or labels.dtype != torch.int64 or not matching:
        raise ValueError(
            f"the loader gave {images.dtype} images {tuple(images.shape)} and {labels.dtype} labels "
            f"{tuple(labels.shape)}; a batch is normalised floating-point images (N, ...) and int64 labels (N,), N > 0"
        )
    return images, labels


def check_labels(labels, scores):
    """The scores are (N, classes), with a class for each label; a GPU would only say that an assertion failed."""
    if getattr(scores, "ndim", 0) != 2:
        found = f"{tuple(scores.shape)}" if hasattr(scores, "shape") else f"a {type(scores).__name__}"
        raise ValueError(f"the model returned {found}; it must return scores (N, classes)")
    # Labels that are on a GPU already would have to be waited for.
    if labels.device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) < scores.shape[1]:
        raise ValueError(
            f"the loader gave labels from {int(labels.min())} to {int(labels.max())}; the model has {scores.shape[1]} "
            f"classes, so labels go from 0 to {scores.shape[1] - 1}"
        )


def check_scores(scores, labels, criterion, loss):
    """The loss is one number, and the scores are what the criterion takes: else it still falls and means nothing.

    A criterion is known by its kind, or by the value of its loss.
    """
    if loss.ndim:
        raise ValueError(
            f"the criterion gave a loss of shape {tuple(loss.shape)}; it must be one number, the batch's mean"
        )
    called = criterion.func if isinstance(criterion, functools.partial) else criterion
    twice = _softmax_under_log_softmax(scores.grad_fn)
    scores, loss = scores.detach(), loss.item()
    known = []
    for function, kind in ((F.nll_loss, nn.NLLLoss), (F.cross_entropy, nn.CrossEntropyLoss)):
        mean = function(scores, labels).item()
        known.append(called is function or isinstance(called, kind) or math.isclose(loss, mean, rel_tol=1e-4))
        if not any(known) and math.isclose(loss, len(labels) * mean, rel_tol=1e-4):
            raise ValueError("the criterion gave the sum over the batch; it must be the mean")
    takes_logs, takes_scores = known
    if not (takes_logs or takes_scores):
        return
    probabilities = are_probabilities(scores)
    if probabilities or twice:
        wrong = "takes the softmax twice" if twice and not probabilities else "returns probabilities"
        raise ValueError(
            f"the model {wrong}, and both losses take the logarithm of a softmax. Let it return scores instead, "
            'without any softmax, and train with get_loss("cross_entropy")'
        )
    if takes_logs and (scores.logsumexp(dim=1).abs() > 0.1).any():
        raise ValueError(
            "the model returns scores that are not log-probabilities, and the loss is the negative log-likelihood; "
            'train with get_loss("cross_entropy"), or end the model in log_softmax'
        )


def are_probabilities(scores, off=0.05):
    """Whether scores (N, classes) come out of a softmax already: half precision leaves their sums 0.05 off."""
    return scores.shape[1] > 1 and bool((scores >= 0).all() & ((scores.sum(dim=1) - 1).abs() < off).all())


def _softmax_under_log_softmax(node):
    """Whether the scores are a softmax, or the log_softmax of one, behind steps that only change shape or type."""
    passed = "LogSoftmax", "ToCopy", "View", "UnsafeView", "ReshapeAlias", "Squeeze", "Clone"
    while node is not None and node.name().startswith(passed):
        node = node.next_functions[0][0]
    return node is not None and node.name() == "SoftmaxBackward0"
