"""What `train` and `test` show and count while an epoch runs, without waiting for the device more than needed."""

import math
import operator
import os
import time

import torch
from tqdm.auto import tqdm


class Tally:
    """Running loss and accuracy of one epoch. They stay on the device, because to read them is to wait for it."""

    def __init__(self, what, bar):
        self.what, self.bar = what, bar
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
        self.bar.set_postfix_str("loss {:.4f}, accuracy {:.2f} %".format(*self.read()), refresh=False)
        self.last_shown = time.monotonic()
        return True

    def read(self):
        """(mean loss per sample, accuracy in %) so far."""
        if not self.losses:
            raise ValueError(f"{self.what}: the loader is empty; it gave no batch")
        losses = torch.stack(self.losses).tolist()
        for batch, loss in enumerate(losses, start=1):
            if not math.isfinite(loss):
                advice = "; if training itself got there, go on from the last checkpoint with a smaller learning rate"
                raise FloatingPointError(
                    f"{self.what}, batch {batch}: the loss is {loss}. Look for non-finite values in data and weights"
                    f"{'' if self.what == 'test' else advice}"
                )
        seen = sum(self.sizes)
        mean_loss = sum(loss * size for loss, size in zip(losses, self.sizes)) / seen
        return mean_loss, 100 * int(self.correct) / seen


def progress_bar(loader, description):
    """A bar in a notebook or a terminal; none in a log file, or where tqdm's own switch TQDM_DISABLE is set."""
    off = True if os.environ.get("TQDM_DISABLE") else None  # None leaves it to whether there is a terminal
    # It gets the length and not the loader, of which older versions of tqdm start a second epoch.
    total = operator.length_hint(loader) or None
    return tqdm(total=total, desc=description, unit="batch", leave=False, disable=off)


def report(epoch, split, loss, accuracy, seconds, loader):
    data = getattr(getattr(loader, "dataset", loader), "name", type(loader).__name__)
    print(f"{epoch:>8}  {split:5}  loss {loss:.4f}  accuracy {accuracy:5.2f} %  {seconds:6.1f} s  [{data}]", flush=True)
