"""What an epoch of `train` or `test` counts, shows and refuses."""

import functools
import math
import operator
import time

import torch
import torch.nn.functional as F
from torch import nn

from devices import gather
from output import progress_bar


class Tally:
    """Running loss and accuracy of one epoch. They stay on the device: reading each would block on the GPU."""

    def __init__(self, what, loader):
        self.what, self.loader, self.start = what, loader, time.monotonic()
        self.losses, self.sizes, self.correct, self.last_shown = [], [], 0, self.start
        # The bar gets the length and not the loader, of which older versions of tqdm start a second epoch.
        self.bar = progress_bar(total=operator.length_hint(loader) or None, desc=what, unit="batch", leave=False)

    def add(self, loss, predictions, labels):
        """Count a batch, and twice a second show how far it is."""
        self.losses.append(loss.detach())
        self.sizes.append(len(labels))
        self.correct += (predictions == class_indices(labels)).sum()
        self.bar.update()
        if time.monotonic() - self.last_shown > 0.5:
            loss, correct, seen = self._sums()
            self.bar.set_postfix_str(f"loss {loss / seen:.4f}, accuracy {100 * correct / seen:.2f} %", refresh=False)
            self.last_shown = time.monotonic()

    def _sums(self):
        """(sum of the losses, number correct, number seen) of this process so far."""
        losses = torch.stack(self.losses).tolist() if self.losses else []
        for batch, loss in enumerate(losses, start=1):
            if not math.isfinite(loss):
                advice = "try a smaller learning rate, or look for values that are not finite in data and weights"
                raise FloatingPointError(f"{self.what}, batch {batch}: the loss is {loss}; {advice}")
        return sum(loss * size for loss, size in zip(losses, self.sizes)), int(self.correct), sum(self.sizes)

    def read(self, losses, accuracies, verbose):
        """Append the mean loss per sample and the accuracy in %, of all processes, and print them."""
        loss_sum, correct, seen = map(sum, zip(*gather(self._sums())))
        if not seen:
            raise ValueError(f"{self.what}: the loader is empty; it gave no batch")
        loss, accuracy, seconds = loss_sum / seen, 100 * correct / seen, time.monotonic() - self.start
        for values, value in ((losses, loss), (accuracies, accuracy)):
            if values is not None:
                values.append(value)
        if verbose:
            data = getattr(getattr(self.loader, "dataset", self.loader), "name", type(self.loader).__name__)
            line = f"{self.what:>14}  loss {loss:.4f}  accuracy {accuracy:5.2f} %  {seconds:6.1f} s  [{data}]"
            print(line, flush=True)


def class_indices(labels):
    """Class indices (N,) of labels that may be probabilities (N, classes), as of CutMix."""
    return labels.argmax(dim=1) if labels.ndim > 1 else labels


class MisclassifiedSamples(list):
    """What `test` returns: [(image float32 (3, H, W), true, predicted: 0-d int64)] on the CPU, and their transforms."""

    def __init__(self, samples=(), transforms=None):
        super().__init__(samples)
        self.transforms = transforms

    def __getitem__(self, index):
        part = super().__getitem__(index)
        return MisclassifiedSamples(part, self.transforms) if isinstance(index, slice) else part


def check_first_batch(model, criterion, scores, labels):
    """The labels are classes of the model, and the scores are what the criterion takes."""
    partial = isinstance(criterion, functools.partial)
    function, options = (criterion.func, criterion.keywords) if partial else (criterion, {})
    ignored = getattr(criterion, "ignore_index", -100)
    largest = max((label for label in class_indices(labels).tolist() if label != ignored), default=0)
    if largest >= scores.shape[1]:
        raise ValueError(f"the loader gave a label {largest} and the model has {scores.shape[1]} classes")
    if options.get("reduction", getattr(criterion, "reduction", "mean")) == "sum":
        raise ValueError("the criterion's reduction is 'sum'; it must be the 'mean' over a batch")
    takes_logs = function is F.nll_loss or isinstance(function, nn.NLLLoss)
    if takes_logs or function is F.cross_entropy or isinstance(function, nn.CrossEntropyLoss):
        if are_probabilities(scores):
            raise ValueError('the model ends in a softmax; remove it, and train with get_loss("cross_entropy")')
        if takes_logs and (scores.logsumexp(dim=1).abs() > 0.1).any():
            what = "the model returns scores, and the loss takes log-probabilities"
            raise ValueError(f'{what}; train with get_loss("cross_entropy"), or end the model in log_softmax')


def are_probabilities(scores):
    """Whether all scores (N, classes) come out of a softmax already; half precision leaves their sums 0.05 off."""
    return scores.shape[1] > 1 and bool((scores >= 0).all() & ((scores.sum(dim=1) - 1).abs() < 0.05).all())


def check_optimizer(model, optimizer, criterion, scheduler, loader):
    """The optimizer trains this model as it is now, and the scheduler is its own and counts the loader's batches."""
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    own = {*model.parameters(), *(criterion.parameters() if isinstance(criterion, nn.Module) else ())}
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p not in held]
    if missing and held - own:
        what = f"lacks {missing[0]} of this model and holds parameters of another, as before a layer was replaced"
        raise ValueError(f"the optimizer {what}; make it again, with get_optimizer(model, ...)")
    if getattr(scheduler, "optimizer", optimizer).param_groups is not optimizer.param_groups:
        raise ValueError("the scheduler is of another optimizer, whose learning rate it would set; make it again")
    batches = operator.length_hint(loader)  # 0 where the loader does not know
    for part in (scheduler, *getattr(scheduler, "_schedulers", ())):  # of a SequentialLR, say
        made_for = getattr(part, "steps_per_epoch", None)
        if made_for and batches and made_for != batches:
            what = f"the scheduler, {type(part).__name__}, was made for epochs of {made_for}, not {batches} batches"
            advice = "with steps_per_epoch=len(train_loader), or step it after each epoch and do not give it to train"
            raise ValueError(f"{what}; make it {advice}")
