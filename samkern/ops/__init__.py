"""The passes as functions over tensor lists: checked, sent to the right backend, usable under ``torch.compile``.

Optimizers do not need these (they run whole half-steps on a plan); they are for methods of your own. Lists have equal
lengths and shapes; tensors are dense float32, float64, bfloat16 or float16, in any mix, on one device. What is written
must have the memory layout of the first list's tensors; what is only read may have any. Scalars that come out of a
reduction are float64 tensors on the device of the lists, 0-d or with one entry per tensor: nothing is read back.

Under ``torch.compile`` a call is one node of the graph. Numbers (``lr``, ``eta``, ``seed``) become variables when they first
change, and compile nothing after that.

Common errors: ``ValueError`` for lengths, shapes, layouts or options that do not fit, ``TypeError`` for dtypes that are
not supported; each names the list and the index. Nothing has been written then.
"""

from .masks import drop_grow_mask, fisher_accumulate, grow_mask, random_mask, topk_mask
from .noise import gaussian_perturb
from .passes import (
    combine,
    decompose,
    difference_dot,
    norms,
    perturb,
    restore,
    update_adam,
    update_adamw,
    update_sgd,
)

__all__ = [
    "combine",
    "decompose",
    "difference_dot",
    "drop_grow_mask",
    "fisher_accumulate",
    "gaussian_perturb",
    "grow_mask",
    "norms",
    "perturb",
    "random_mask",
    "restore",
    "topk_mask",
    "update_adam",
    "update_adamw",
    "update_sgd",
]
