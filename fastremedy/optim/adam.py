"""Adam and AdamW: clipping and update of all parameters in two passes over the gradients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import backends
from ..ops import dispatch
from ..ops.adamw import Options
from ..ops.clip_grad_norm import clip_coefficient, norm_dtype, total_norm
from ..ops.table import Rows, Table, make_table
from .rows import aligned_grad, fits, init_state, make_rows, raise_misfit

_NONFINITE = ("propagate", "skip", "error")
_LOW_PRECISION = (None, "stochastic", "kahan", "master")
_STATE_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
        _check_options(max_grad_norm, norm_type, nonfinite, low_precision, state_dtype)
        if differentiable and (max_grad_norm, nonfinite, low_precision, state_dtype) != (
            None,
            "propagate",
            None,
            None,
        ):
            raise ValueError(
                "differentiable=True runs torch's own update and cannot be combined with "
                "max_grad_norm, nonfinite, low_precision or state_dtype"
            )
        self.max_grad_norm = max_grad_norm
        self.norm_type = float(norm_type)
        self.nonfinite = nonfinite
        self.low_precision = low_precision
        self.state_dtype = torch.float32 if low_precision == "master" else state_dtype
        self._reset_tables()
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
            seed = int(torch.randint(2**63 - 1, ()).item())
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
    def num_skipped(self) -> int:
        """Number of steps left out so far; reading it waits for the device.

        On several devices every step is counted once.
        """
        return max((int(count.item()) for count in self._num_skipped.values()), default=0)

    # --- life cycle ---

    def _reset_tables(self) -> None:
        self._tables: list[tuple[Rows, Table]] | None = None
        self._table_backend: object = None
        self._captured: list[Table] = []  # a CUDA graph uses their memory as long as it lives

    def __getstate__(self) -> dict[str, Any]:
        """Return what pickle and deepcopy keep: options and torch's part, no tables."""
        options = ("max_grad_norm", "norm_type", "nonfinite", "low_precision", "state_dtype")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in options}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore, and build tables anew at the next step."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__dict__.setdefault("_grad_norm", None)
        self.__dict__.setdefault("_num_skipped", {})
        self._reset_tables()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this class, or of any flavour of :class:`torch.optim.AdamW`.

        Differs in: state tensors keep the dtype they were saved in, where torch casts them to the
        parameter's; ``foreach``, ``fused``, ``capturable`` and ``differentiable`` stay as they are.
        """
        flags = ("foreach", "fused", "capturable", "differentiable")
        before = [{flag: group[flag] for flag in flags} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, kept in zip(self.param_groups, before, strict=True):
            group.update(kept)
            if self.low_precision == "stochastic":
                group.setdefault("noise_seed", self.defaults["noise_seed"])
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for index, param in zip(saved, params, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                loaded = self.state[param].get(name)
                if isinstance(loaded, Tensor) and loaded.dtype != value.dtype:
                    self.state[param][name] = value.to(param.device, copy=True)
        self._reset_tables()

    # --- the step ---

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
            return super().step(closure)
        if self._tables is None and self._wraps_tensors():
            return self._step_of_torch(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            self._update()
        return loss

    def _wraps_tensors(self) -> bool:
        return any(
            is_traceable_wrapper_subclass(param)
            for group in self.param_groups
            for param in group["params"]
        )

    def _step_of_torch(self, closure: Callable[[], Any] | None) -> Any:
        if (self.max_grad_norm, self.nonfinite, self.low_precision) != (None, "propagate", None):
            raise RuntimeError(
                "parameters that wrap other tensors (DTensor) run torch's own update, which has no "
                "max_grad_norm, nonfinite or low_precision"
            )
        if self._table_backend != "torch.optim":
            warnings.warn(
                "fastremedy: parameters that wrap other tensors (DTensor) run torch's own update",
                stacklevel=3,
            )
            self._table_backend = "torch.optim"
        return super().step(closure)

    def _update(self) -> None:
        tables = self._gathered_tables()
        options = Options(
            self.max_grad_norm,
            self.norm_type,
            self.nonfinite != "propagate",
            getattr(self, "grad_scale", None),
            getattr(self, "found_inf", None),
            self.low_precision or "nearest",
            self.param_groups[0].get("noise_seed", 0),
        )
        if len(tables) > 1 and options.needs_norm:
            options = self._options_over_devices(tables, options)
        for rows, table in tables:
            packed = _packed(rows)
            for owner, work in packed:
                work.copy_(owner)
            if rows.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                self._captured.append(table)
            outcome = table.step(_on_device(options, rows.device), self._num_skipped[rows.device])
            for owner, work in packed:
                owner.copy_(work)
            if outcome.total_norm is not None:
                self._grad_norm = outcome.total_norm
        if self.nonfinite == "error":
            self._raise_if_nonfinite(options.found_inf)

    def _gathered_tables(self) -> list[tuple[Rows, Table]]:
        """Return tables that have read this step's gradients."""
        for _ in range(2):
            if self._tables is None or self._table_backend != backends.choice():
                self._build_tables()
            assert self._tables is not None
            for rows, table in self._tables:
                unread = table.gather(self.param_groups, self.state)
                if unread is None:
                    self._tables = None
                    break
                for row in unread:
                    owner = rows.owners[row]
                    assert owner.grad is not None
                    if not fits(owner, owner.grad):
                        raise_misfit(owner, owner.grad, self._name(owner))
                    table.set_grad(row, aligned_grad(owner.grad, rows.columns.params[row]))
            else:
                return self._tables
        raise RuntimeError("param_groups or state changed while the step was reading them")

    def _build_tables(self) -> None:
        """Create missing state and one table for every device."""
        fresh: dict[torch.device, list[tuple[Tensor, bool]]] = {}
        devices: dict[torch.device, None] = {}
        for group in self.param_groups:
            for param in group["params"]:
                devices[param.device] = None
                if param.grad is None:
                    continue
                if not fits(param, param.grad):
                    raise_misfit(param, param.grad, self._name(param))
                if not self.state.get(param):
                    fresh.setdefault(param.device, []).append((param, group["amsgrad"]))
        if any(d.type == "cuda" for d in devices) and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the optimizer has new state to create, which a CUDA graph cannot capture: run "
                "at least one step with all gradients before the capture"
            )
        for params in fresh.values():
            init_state(params, self.state, self.state_dtype)
        rounding = self.low_precision or "nearest"
        self._tables = []
        for device in devices:
            rows = make_rows(self.param_groups, self.state, device, rounding)
            backend = backends.active("adamw", device)
            if device not in self._num_skipped:
                self._num_skipped[device] = torch.zeros((), dtype=torch.int64, device=device)
            self._tables.append((rows, make_table(backend, rows, self.param_groups, self.state)))
        self._table_backend = backends.choice()

    def _options_over_devices(self, tables: list[tuple[Rows, Table]], options: Options) -> Options:
        """Fold norm, clipping and checks over several devices into grad_scale and found_inf."""
        norms = []
        for rows, _ in tables:
            grads = [owner.grad for owner in rows.owners if owner.grad is not None]
            if grads:
                norms.append(
                    dispatch.clip_grad_norm_(grads, math.inf, options.norm_type, from_grad=False)
                )
        if not norms:
            return options
        norm = total_norm([norm.reshape(1) for norm in norms], options.norm_type)
        scale = torch.ones_like(norm)
        if options.grad_scale is not None:
            scale = options.grad_scale.to(norm.device, torch.float64).reshape(())
            norm = norm / scale
        if options.max_norm is not None:
            scale = scale / clip_coefficient(norm, options.max_norm)
        found_inf = options.found_inf
        if options.skip_nonfinite:
            nonfinite = (~norm.isfinite()).float()
            if found_inf is not None:
                nonfinite = nonfinite + found_inf.to(norm.device).reshape(())
            found_inf = nonfinite
        self._grad_norm = norm.to(norm_dtype(norms))
        return options._replace(
            max_norm=None, skip_nonfinite=False, grad_scale=scale, found_inf=found_inf
        )

    def _raise_if_nonfinite(self, found_inf: Tensor | None) -> None:
        norm = self._grad_norm
        if norm is None or bool(norm.isfinite()) or found_inf is not None:
            return
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and not bool(param.grad.isfinite().all()):
                    bad = int((~param.grad.isfinite()).sum())
                    raise RuntimeError(
                        f"gradient of {self._name(param)} must be finite, "
                        f"got {bad} NaN or infinite of {param.grad.numel()} elements; "
                        "nothing was changed"
                    )

    def _name(self, param: Tensor) -> str:
        for g, group in enumerate(self.param_groups):
            for i, other in enumerate(group["params"]):
                if other is param:
                    place = f"param_groups[{g}]['params'][{i}]"
                    names: Iterable[str] | None = group.get("param_names")
                    return f"{list(names)[i]} ({place})" if names else place
        return "an unknown parameter"


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
        - ``foreach`` and ``fused`` are accepted and have no effect; with ``differentiable`` torch's
          own update runs.

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
            bit: ``"stochastic"`` rounds at random without bias (the seed is in the state dict),
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


def _check_options(
    max_grad_norm: float | None,
    norm_type: float,
    nonfinite: str,
    low_precision: str | None,
    state_dtype: torch.dtype | None,
) -> None:
    if max_grad_norm is not None and not max_grad_norm >= 0:
        raise ValueError(f"max_grad_norm must be None or a number >= 0, got {max_grad_norm}")
    if not norm_type > 0:
        raise ValueError(f"norm_type must be a number > 0 or inf, got {norm_type}")
    if nonfinite not in _NONFINITE:
        raise ValueError(f"nonfinite must be one of {_NONFINITE}, got {nonfinite!r}")
    if low_precision not in _LOW_PRECISION:
        raise ValueError(f"low_precision must be one of {_LOW_PRECISION}, got {low_precision!r}")
    if state_dtype not in _STATE_DTYPES:
        raise ValueError(f"state_dtype must be one of {_STATE_DTYPES}, got {state_dtype!r}")


def _packed(rows: Rows) -> list[tuple[Tensor, Tensor]]:
    """Return the parameters with gaps in memory and the dense copies that kernels update."""
    if not rows.has_indirect:
        return []
    works = zip(rows.owners, rows.columns.params, rows.indirect, strict=True)
    return [
        (owner, torch.view_as_complex(work) if owner.is_complex() else work)
        for owner, work, indirect in works
        if indirect and work.data_ptr() != owner.data_ptr() and owner.grad is not None
    ]


def _on_device(options: Options, device: torch.device) -> Options:
    """Return the options with AMP's scalars as float32 on a device."""
    if options.grad_scale is None and options.found_inf is None:
        return options
    return options._replace(
        grad_scale=_scalar_on(options.grad_scale, device),
        found_inf=_scalar_on(options.found_inf, device),
    )


def _scalar_on(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else value.to(device, torch.float32).reshape(())
