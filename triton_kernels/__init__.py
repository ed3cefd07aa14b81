"""The passes in Triton, installed as ``samkern.triton_kernels``: for GPUs where the CUDA extension is not built.

``plan`` runs the half-steps: ``tables`` holds what they read, ``launch`` starts kernels. ``perturb``, ``noise``, ``update``
and ``restore`` are the kernels, over what ``common`` gives all of them: ``reduce`` sums, ``philox`` draws, ``decompose`` keeps
the cache, ``base`` steps, ``average`` averages. ``ops`` runs list ops on ``lists``, and ``masks`` those over masks on
``select``, with what ``arguments`` makes of lists.

With ``TRITON_INTERPRET=1`` in the environment before Triton is imported, the same kernels run on CPU tensors in Triton's
interpreter, to be tested without a GPU. Importing this package imports Triton; samkern does so when this backend is used.
"""

from .plan import TritonPlan

__all__ = ["TritonPlan"]
