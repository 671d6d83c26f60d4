"""The operators as ``torch.ops.fastremedy.*``: visible to ``torch.compile`` and ``opcheck``.

:func:`fastremedy.clip_` and the optimizers take shorter ways to the same kernels.
"""

from . import activation_stats_library, batch_norm_relu_library, focal_loss_library, library

__all__ = ["activation_stats_library", "batch_norm_relu_library", "focal_loss_library", "library"]
