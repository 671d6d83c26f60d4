"""Loss scaling that leaves the gradients alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.amp.grad_scaler import OptState

from .optim import Adam


class GradScaler(torch.amp.GradScaler):
    """Scales losses, so that small gradients do not vanish in float16.

    Equivalent to: :class:`torch.amp.GradScaler`, with the same state dict, for any optimizer.

    Differs in:
        - With :class:`fastremedy.optim.AdamW` and ``Adam`` the gradients are neither checked nor
          divided in passes of their own: the optimizer does both in those that it makes for
          ``max_grad_norm``. torch's scaler reads and writes all gradients before a fused step.
          Without ``max_grad_norm`` one pass that reads them remains. Gradients keep the scale.
        - Steps that are skipped count in ``optimizer.num_skipped``.

    After :meth:`unscale_`, as for :func:`fastremedy.clip_`, all is as in torch.

    Args:
        device: type of the devices, such as ``"cuda"``.
        init_scale: factor of the losses at first.
        growth_factor: by which the scale grows after ``growth_interval`` steps without infinity.
        backoff_factor: by which it shrinks after a step with infinite or NaN gradients.
        growth_interval: steps without infinity after which the scale grows.
        enabled: do nothing if False.

    Example:
        >>> import torch, fastremedy
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = fastremedy.optim.AdamW([weight], lr=0.1, max_grad_norm=1.0)
        >>> scaler = fastremedy.amp.GradScaler("cpu", init_scale=1024.0)
        >>> scaler.scale(weight.sum()).backward()
        >>> scaler.step(optimizer)
        >>> scaler.update()
        >>> optimizer.grad_norm, weight.grad
        (tensor(1.7321), tensor([1024., 1024., 1024.]))
    """

    @_disable_dynamo
    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """Step ``optimizer``, unless gradients are NaN or infinite.

        Args:
            optimizer: applies the gradients.
            args: for its ``step``.
            kwargs: for its ``step``; no ``closure``.

        Returns:
            What its ``step`` returns.

        Raises:
            RuntimeError: there is a closure, or ``step`` was called since the last ``update``.
        """
        if (
            not self._enabled
            or self._per_optimizer_states[id(optimizer)]["stage"] is not OptState.READY
            or not isinstance(optimizer, Adam)
            or optimizer.defaults["differentiable"]
            or args
            or kwargs
        ):
            return super().step(optimizer, *args, **kwargs)
        self._check_scale_growth_tracker("step")
        scale = self._get_scale_async()
        assert scale is not None
        state = self._per_optimizer_states[id(optimizer)]
        state["found_inf_per_device"] = _step_unless_nonfinite(optimizer, scale)
        state["stage"] = OptState.STEPPED
        return None


def _step_unless_nonfinite(optimizer: Adam, scale: Tensor) -> dict[torch.device, Tensor]:
    """Step, and tell by device whether the step was skipped: a float32 scalar, not 0 if it was."""
    before = {device: count.clone() for device, count in optimizer._num_skipped.items()}
    nonfinite, outer_scale = optimizer.nonfinite, getattr(optimizer, "grad_scale", None)
    optimizer.nonfinite = "skip"
    optimizer.grad_scale = scale if outer_scale is None else scale * outer_scale  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        optimizer.nonfinite = nonfinite
        del optimizer.grad_scale  # type: ignore[attr-defined]
    counts = optimizer._num_skipped.items()
    return {device: (count - before.get(device, 0)).float() for device, count in counts}
