"""Adam and AdamW: clipping and update of all parameters in two passes over the gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.utils._python_dispatch import _disable_current_modes

from ..ops.adamw import Options
from . import hooks, torch_step
from .options import check_options, fold, on_device
from .tables import Tables, raise_if_nonfinite
from .update_stats import RawUpdateStats, UpdateStats, resolve, room_for_stats

_NO_EXTRAS = (None, "propagate", None)  # max_grad_norm, nonfinite, low_precision


class Adam(torch.optim.Adam):
    """Adam (Kingma & Ba, 2015, https://arxiv.org/abs/1412.6980), with coupled weight decay.

    Equivalent to: :class:`torch.optim.Adam`. Everything that :class:`AdamW` adds is here too.

    Example:
        >>> import torch, fastremedy
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = fastremedy.optim.Adam([weight], lr=0.1)
        >>> weight.sum().backward()
        >>> optimizer.step()
        >>> weight
        Parameter containing:
        tensor([0.9000, 0.9000, 0.9000], requires_grad=True)
    """

    # GradScaler hands over grad_scale and found_inf instead of touching the gradients.
    _step_supports_amp_scaling = True

    #: Whether steps also measure what they do, in the pass that they make anyway.
    collect_stats = False
    _raw_stats: list[RawUpdateStats] | None = None

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        max_grad_norm: float | None = None,
        norm_type: float = 2.0,
        nonfinite: str = "propagate",
        low_precision: str | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        """See :class:`AdamW` for the arguments."""
        check_options(max_grad_norm, norm_type, nonfinite, low_precision, state_dtype)
        extras = (max_grad_norm, nonfinite, low_precision)
        if differentiable and (extras != _NO_EXTRAS or state_dtype is not None):
            raise ValueError(
                "differentiable=True runs torch's own update and cannot be combined with "
                "max_grad_norm, nonfinite, low_precision or state_dtype"
            )
        self.max_grad_norm = max_grad_norm
        self.norm_type = float(norm_type)
        self.nonfinite = nonfinite
        self.low_precision = low_precision
        self.state_dtype = torch.float32 if low_precision == "master" else state_dtype
        self._tables = Tables()
        self._grad_norm: Tensor | None = None
        self._num_skipped: dict[torch.device, Tensor] = {}
        torch.optim.Adam.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=decoupled_weight_decay,
        )
        if low_precision == "stochastic":
            with _disable_current_modes():  # a FakeTensor has no value
                seed = int(torch.randint(2**63 - 1, (), device="cpu").item())
            self.defaults["noise_seed"] = seed
            for group in self.param_groups:
                group["noise_seed"] = seed

    # --- what the last steps did ---

    @property
    def grad_norm(self) -> Tensor | None:
        """Norm of the gradients before clipping at the last step: a scalar, read without waiting.

        None before the first step, and where neither ``max_grad_norm`` nor ``nonfinite`` needs it.
        """
        return self._grad_norm

    @property
    def last_stats(self) -> UpdateStats | None:
        """What the last step with ``collect_stats`` set did to the parameters; None before it.

        ``optimizer.collect_stats = True`` makes steps measure the norms of gradient, parameter and
        update, and count the elements that moved or did not though they had a gradient.
        """
        return None if self._raw_stats is None else resolve(self._raw_stats)

    @property
    def num_skipped(self) -> int:
        """Number of steps left out so far; reading it waits for the device.

        On several devices every step is counted once. Copies and pickles go on from it; the state
        dict, which is torch's, does not hold it. A schedule that must not advance with a step
        that was skipped asks for it::

            skipped = optimizer.num_skipped
            optimizer.step()
            if optimizer.num_skipped == skipped:
                schedule.step()
        """
        return max((int(count.item()) for count in self._num_skipped.values()), default=0)

    # --- life cycle ---

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a param group, as :meth:`torch.optim.Optimizer.add_param_group` does.

        Raises:
            ValueError: a parameter is in the group twice, where torch warns and updates it twice.
        """
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "optimizer contains a parameter group with duplicate")
            super().add_param_group(param_group)
        params = self.param_groups[-1]["params"]
        if len({id(param) for param in params}) < len(params):
            self.param_groups.pop()
            twice = next(i for i, p in enumerate(params) if any(p is q for q in params[:i]))
            raise ValueError(f"a parameter must be in a group once, got params[{twice}] again")

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep: options, counts and torch's part, no tables."""
        ours = ("norm_type", "nonfinite", "low_precision", "state_dtype", "collect_stats")
        names = ("max_grad_norm", *ours, "_num_skipped")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in names}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and build tables anew at the next step."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__dict__.setdefault("_grad_norm", None)
        counts = self.__dict__.get("_num_skipped", {}).values()  # torch.load may have moved them
        self._num_skipped = {count.device: count for count in counts}
        self._tables = Tables()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this class, or of any flavour of :class:`torch.optim.AdamW`.

        Differs in: state tensors keep the dtype they were saved in, where torch casts them to the
        parameter's; ``foreach``, ``fused``, ``capturable`` and ``differentiable`` stay as they are.
        """
        final = state_dict

        def remember(_: torch.optim.Optimizer, loaded: dict[str, Any]) -> None:
            nonlocal final
            final = loaded

        flags = ("foreach", "fused", "capturable", "differentiable")
        before = [{flag: group[flag] for flag in flags} for group in self.param_groups]
        # Around the user's hooks: after those that change the dict, before those that change us.
        hooks = (
            self.register_load_state_dict_pre_hook(remember),
            self.register_load_state_dict_post_hook(
                lambda _: self._restore(final, before), prepend=True
            ),
        )
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _restore(self, state_dict: dict[str, Any], flags: list[dict[str, Any]]) -> None:
        """Undo what torch's loading does to dtypes and flags."""
        for group, kept in zip(self.param_groups, flags, strict=True):
            group.update(kept)
            if self.low_precision == "stochastic":
                group.setdefault("noise_seed", self.defaults["noise_seed"])
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                loaded = self.state[param].get(name)
                both = isinstance(loaded, Tensor) and isinstance(value, Tensor)
                if both and loaded.dtype != value.dtype:
                    self.state[param][name] = value.to(param.device, copy=True)

    # --- the step ---

    # torch wraps the step of every class that is instantiated with it.
    profile_hook_step = staticmethod(hooks.wrap_step)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient.

        Args:
            closure: evaluates the model again and returns the loss.

        Returns:
            What the closure returned, None without one.

        Raises:
            RuntimeError: a gradient is sparse, or not finite with ``nonfinite="error"``.
            ValueError: a gradient or hyper-parameter does not fit; the message names it.
                Whatever is raised, nothing was changed.
        """
        if self.defaults["differentiable"]:
            return torch_step.step(self, closure)
        if not self._tables.are_built and torch_step.is_needed(self.param_groups):
            if (self.max_grad_norm, self.nonfinite, self.low_precision) != _NO_EXTRAS:
                raise RuntimeError(torch_step.REFUSAL)
            torch_step.warn()
            return torch_step.step(self, closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(False), self._tables.lock:  # half the time of no_grad
            self._update()
        return loss

    def _update(self) -> None:
        extras = (self.nonfinite, self.low_precision, self.state_dtype)
        check_options(self.max_grad_norm, self.norm_type, *extras)  # they may be set at any time
        rounding = self.low_precision or "nearest"
        tables = self._tables.gather(self.param_groups, self.state, rounding, self.state_dtype)
        options = Options(
            self.max_grad_norm,
            self.norm_type,
            self.nonfinite != "propagate",
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
            rounding,
            self.param_groups[0].get("noise_seed", 0),
        )
        raw_stats = []
        self._grad_norm = None
        grad_scale, has_found_inf = options.grad_scale, options.found_inf is not None
        if any(self._tables.everyone) or (len(tables) > 1 and options.needs_norm):
            options, self._grad_norm = fold(tables, self._tables.everyone, options)
        for rows, table in tables:
            packed = rows.packed()
            for memory, work in packed:
                work.copy_(memory)
            sums = room_for_stats(rows) if self.collect_stats else None
            num_skipped = self._count_on(rows.device)
            version = rows.version
            outcome = table.step(on_device(options, rows.device), num_skipped, sums)
            for memory, work in packed:
                memory.copy_(work)
            rows.note_update(version)
            rows.grads.clear()  # they would outlive zero_grad
            if outcome.total_norm is not None:
                self._grad_norm = outcome.total_norm
            if sums is not None:
                if grad_scale is not None:
                    sums[:, 0] /= grad_scale.to(rows.device, torch.float64).square()
                raw_stats.append(RawUpdateStats(rows, sums))
        if raw_stats:
            self._raw_stats = raw_stats
        if self.nonfinite == "error" and self._grad_norm is not None and not has_found_inf:
            raise_if_nonfinite(self._grad_norm, self.param_groups)

    def _count_on(self, device: torch.device) -> Tensor:
        if device not in self._num_skipped:
            self._num_skipped[device] = torch.zeros((), dtype=torch.int64, device=device)
        return self._num_skipped[device]


class AdamW(Adam, torch.optim.AdamW):
    """AdamW (Loshchilov & Hutter, 2019, https://arxiv.org/abs/1711.05101), clipping included.

    Equivalent to: :class:`torch.optim.AdamW`, and with ``max_grad_norm`` to
    :func:`torch.nn.utils.clip_grad_norm_` before it. The state dict is torch's, key for key, and
    loads both ways.

    Differs in:
        - The clip coefficient is applied inside the update; ``.grad`` is not rewritten. The same
          holds for the scale of :class:`torch.amp.GradScaler`.
        - Any strides of parameter and gradient give the right answer (torch's fused CPU update
          pairs the wrong elements, its CUDA one raises).
        - Weight decay is subtracted together with the update and rounded once.
        - A non-zero ``found_inf`` skips the step (torch tests for exactly 1).
        - A parameter that is twice in one group is an error (torch warns and updates it twice).
        - ``foreach`` and ``fused`` are accepted and have no effect; with ``differentiable`` torch's
          own update runs.
        - With DTensors ``grad_norm`` is a plain tensor with the norm of the whole model. All ranks
          step together, skip together and raise together. A gradient that is a partial sum
          (``Partial``) must be there on all of them: as in torch, ranks that have it wait for the
          others.
        - ``ZeroRedundancyOptimizer`` shows each rank some whole parameters: ``max_grad_norm`` and
          ``nonfinite`` would see no others. Clip with :func:`fastremedy.clip_` there.

    Args:
        params: parameters, named parameters or param groups.
        lr: learning rate; a float or a 1-element tensor.
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        amsgrad: divide by the largest second moment seen so far.
        maximize: ascend instead of descend.
        foreach: see above.
        capturable: accepted; CUDA steps can always be captured after a first one.
        differentiable: let autograd run through the step.
        fused: see above.
        max_grad_norm: clip the norm of all gradients of all groups to this, None for no clipping.
        norm_type: p of that norm, greater than 0, ``inf`` included.
        nonfinite: what to do if a gradient is NaN or infinite: ``"propagate"`` as torch does;
            ``"skip"`` leaves parameters, state and step as they are, without waiting for the
            device; ``"error"`` raises, naming the parameter.
        low_precision: how float16 and bfloat16 parameters keep updates smaller than their last
            bit: ``"stochastic"`` rounds at random without bias (the seed, drawn from torch's
            generator, is in the state dict; replicas stay equal if their ranks draw the same),
            ``"kahan"`` keeps the lost part in the parameter's dtype, ``"master"`` keeps a float32
            copy and float32 moments. None rounds to nearest, as torch does.
        state_dtype: dtype of the moments of real parameters; None for the parameter's own.

    Raises:
        ValueError: an argument is out of range; the message says which, expected and got.

    Example:
        >>> import torch, fastremedy
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = fastremedy.optim.AdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)
        >>> model(torch.ones(3, 4)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.grad_norm
        tensor(9.4868)
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        norm_type: float = 2.0,
        nonfinite: str = "propagate",
        low_precision: str | None = None,
        state_dtype: torch.dtype | None = None,
    ) -> None:
        """Check the arguments and set up param groups; nothing is allocated yet."""
        Adam.__init__(
            self,
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            decoupled_weight_decay=True,
            max_grad_norm=max_grad_norm,
            norm_type=norm_type,
            nonfinite=nonfinite,
            low_precision=low_precision,
            state_dtype=state_dtype,
        )
