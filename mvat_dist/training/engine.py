"""A student in its DeepSpeed engine; the few places where ZeRO's stages differ are hidden here.

At every ZeRO stage: gradients of several `backward` calls add up until `step`; a step whose gradient is not
finite on any rank is skipped on every rank; weights and optimiser state can be read and written whole, by
parameter name.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, Literal

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
    set_z3_leaf_modules,
)
from torch import Tensor, nn

from mvat_dist.config.schema import EngineConfig, OptimConfig
from mvat_dist.distributed.collectives import all_reduce_mean_async, unflatten
from mvat_dist.models.attention import MultiViewBlock
from mvat_dist.models.layers import MaskGate, ResidualConformer

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's running means of the gradient and of its square, one tensor per parameter."""


class GuardedAdamW(torch.optim.AdamW):
    """AdamW that clips, and that skips a step whose gradient is not finite.

    Used at ZeRO stage 0, where DeepSpeed hands the step straight to the optimiser. Gradients are averaged
    before it, so one rank's NaN is every rank's and all skip alike. Norm, clipping and skipping stay on the
    device: the host learns of them when it asks, and nothing waits.
    """

    overflow = False
    """DeepSpeed reads this to count skipped steps, and does nothing else with it."""

    def __init__(self, parameters: Iterator[nn.Parameter], clip_norm: float, **options: Any) -> None:
        super().__init__(parameters, fused=True, **options)
        self.clip_norm = clip_norm
        self._global_grad_norm: Tensor | None = None
        # torch's fused optimisers look for these two, which its loss scaling uses.
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # a closure is never used
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        self._global_grad_norm = norm = nn.utils.get_total_norm(gradients)
        self.found_inf = 1.0 - torch.isfinite(norm).float()  # where it is 1, nothing changes
        if self.clip_norm > 0:
            self.grad_scale = (norm / self.clip_norm).clamp(min=1.0)  # gradients are divided by it
        super().step(closure)


def deepspeed_config(
    engine: EngineConfig,
    optim: OptimConfig,
    *,
    parameters: int,
    micro_batch: int,
    accumulation: int,
    precision: Literal["fp32", "bf16"],
) -> dict[str, Any]:
    """DeepSpeed's configuration, derived from ours so that nothing has to be given twice."""
    # DeepSpeed's default bucket of 5e8 elements costs 2 GB a student; these networks have 1 to 25 M.
    bucket = 2 * parameters
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        # step() ends the accumulation: with the managed kind, ZeRO 1 and 2 keep only the last of several
        # backward calls where the number of micro-batches is not the configured one.
        "managed_gradient_accumulation": False,
        # Always written: DeepSpeed's default clips at 1.0. At stage 0 GuardedAdamW clips.
        "gradient_clipping": optim.clip_norm if engine.zero_stage > 0 else 0.0,
        "zero_optimization": {
            "stage": engine.zero_stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "overlap_comm": False,
            "contiguous_gradients": engine.zero_stage > 1,
        },
        # Casts operations, not weights: DeepSpeed's bf16 mode casts weights and breaks BatchNorm.
        "torch_autocast": {"enabled": precision == "bf16", "dtype": "bfloat16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
        # On by default, and then every step of every student waits for the GPU twice.
        "timers": {"throughput": {"enabled": False}},
    }


class StudentEngine:
    """A student network in its DeepSpeed engine."""

    def __init__(
        self, module: nn.Module, config: dict[str, Any], optim: OptimConfig, device: torch.device
    ) -> None:
        self.device = device
        options: dict[str, Any] = {
            "lr": optim.lr,
            "betas": optim.betas,
            "eps": optim.eps,
            "weight_decay": optim.weight_decay,
        }
        self.zero_stage: int = config["zero_optimization"]["stage"]
        parameters = module.parameters()
        optimizer: torch.optim.AdamW
        if self.zero_stage == 0:
            optimizer = GuardedAdamW(parameters, optim.clip_norm, **options)
        else:
            optimizer = torch.optim.AdamW(parameters, fused=True, **options)
        if self.zero_stage == 3:
            # These compute several layers at once, so ZeRO must gather the weights of all of them before.
            set_z3_leaf_modules(module, [MultiViewBlock, ResidualConformer, MaskGate], False)
        self._engine, *_ = deepspeed.initialize(model=module.to(device), optimizer=optimizer, config=config)
        if self.zero_stage == 0:
            self._engine.enable_backward_allreduce = False  # `backward` starts its own, which does not wait
        self.module: nn.Module = self._engine.module
        self._buffers = dict(self.module.named_buffers())
        self._buffers_by_type: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
        for buffer in self._buffers.values():
            self._buffers_by_type[buffer.dtype].append(buffer)
        self._all_reduce: Callable[[], None] | None = None

    def __call__(self, noisy: Tensor, *, return_views: bool = True) -> Any:
        """Forward pass in train mode: (B, T) -> enhanced (B, T) and, unless switched off, view features."""
        return self._engine(noisy, return_views=return_views)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add the gradient of one micro-batch's `loss`, divided by the number of micro-batches of a step.

        The `last` backward of a step starts to average the gradients over the ranks. That overlaps whatever
        is computed before `wait_for_gradients`. ZeRO's stages 1 to 3 reduce in their own time.
        """
        self._engine.backward(loss)
        if last:
            gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
            self._all_reduce = all_reduce_mean_async(gradients if self.zero_stage == 0 else [])

    def wait_for_gradients(self) -> None:
        """Wait for the averaged gradients, after the step's last `backward`."""
        assert self._all_reduce, "a step without its last backward: ranks would drift apart"
        self._all_reduce()
        self._all_reduce = None

    def step(self, lr: float, beta1: float) -> Tensor:
        """Clip and update, after `wait_for_gradients`.

        Returns:
            Whether the step was applied or, as its gradient was not finite, skipped: (), on the device.
        """
        assert self._all_reduce is None, "the gradients are still being averaged"
        for group in self._engine.optimizer.param_groups:
            group["lr"], group["betas"] = lr, (beta1, group["betas"][1])
        self._engine.step()
        if self.zero_stage == 0:
            not_finite: Tensor = self._engine.optimizer.found_inf
            return not_finite == 0
        return torch.tensor(self._engine.was_step_applied(), device=self.device)

    @property
    def gradient_norm(self) -> float:
        """2-norm of the last step's gradient before clipping; not finite where the step was skipped."""
        norm = self._engine.get_global_grad_norm()
        return 0.0 if norm is None else float(norm)

    def snapshot_batchnorm(self) -> dict[torch.dtype, Tensor]:
        """A copy of the BatchNorm statistics, concatenated by type: a network has hundreds of them."""
        return {
            dtype: torch.cat([buffer.reshape(-1) for buffer in buffers])
            for dtype, buffers in self._buffers_by_type.items()
        }

    @torch.no_grad()
    def restore_batchnorm(self, snapshot: dict[torch.dtype, Tensor]) -> None:
        """Put back the statistics of `snapshot_batchnorm`."""
        for dtype, buffers in self._buffers_by_type.items():
            unflatten(snapshot[dtype], buffers)

    def weights(self) -> dict[str, Tensor]:
        """Whole fp32 weights and buffers by name, on the CPU. Every rank must call it."""
        weights = {}
        for name, parameter in self.module.named_parameters():
            value = safe_get_full_fp32_param(parameter) if self.zero_stage == 3 else parameter
            weights[name] = value.detach().float().cpu().clone()
        weights |= {name: buffer.detach().cpu().clone() for name, buffer in self._buffers.items()}
        return weights

    @torch.no_grad()
    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Continue from `weights` of any ZeRO stage and number of ranks. Every rank must call it."""
        for name, parameter in self.module.named_parameters():
            value = weights[name].to(self.device)
            if self.zero_stage == 3:
                length = safe_get_local_fp32_param(parameter).numel()
                safe_set_local_fp32_param(parameter, _partition(value, length))
                continue
            parameter.copy_(value)
            if self.zero_stage > 0:  # the optimiser has its own copy, which the next step would put back
                safe_set_full_fp32_param(parameter, value)
        for name, buffer in self._buffers.items():
            buffer.copy_(weights[name])

    def optimizer_state(self) -> dict[str, Tensor]:
        """Whole moments as ``exp_avg.NAME`` and the update count ``step``. Every rank must call it."""
        states = self._engine.basic_optimizer.state
        if not states:  # before the first update
            return {}
        moments = {"step": torch.as_tensor(next(iter(states.values()))["step"]).cpu().clone()}
        for name, parameter in self.module.named_parameters():
            for key in MOMENTS:
                value = (
                    states[parameter][key]
                    if self.zero_stage == 0
                    else safe_get_full_optimizer_state(parameter, key)
                )
                moments[f"{key}.{name}"] = value.detach().cpu().clone()
        return moments

    def load_optimizer_state(self, moments: dict[str, Tensor]) -> None:
        """Continue from `optimizer_state` of any ZeRO stage and number of ranks."""
        states = self._engine.basic_optimizer.state
        if not moments:  # from before the first update, when there are no moments or all are zero
            for state in states.values():
                for value in state.values():
                    value.zero_()
            return
        if self.zero_stage == 0:
            for name, parameter in self.module.named_parameters():
                own = {key: moments[f"{key}.{name}"].to(self.device, copy=True) for key in MOMENTS}
                states[parameter] = {"step": moments["step"].to(self.device, copy=True), **own}
            return
        self._create_zero_states()
        for name, parameter in self.module.named_parameters():
            for key in MOMENTS:
                self._set_moment(parameter, key, moments[f"{key}.{name}"].to(self.device))
        for state in states.values():
            state["step"].copy_(moments["step"])

    def _set_moment(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        if self.zero_stage < 3:
            safe_set_full_optimizer_state(parameter, value, key)
            return
        length = safe_get_local_optimizer_state(parameter, key).numel()
        safe_set_local_optimizer_state(parameter, _partition(value, length), key)

    def _create_zero_states(self) -> None:
        """Make ZeRO allocate its partitions of the moments, which it does at the first update.

        An update with a learning rate of 0 and a zero gradient changes no weight; the BatchNorm statistics
        that its forward pass moves are put back.
        """
        snapshot = self.snapshot_batchnorm()
        silence = torch.zeros(2, 2048, device=self.device)
        self.backward(0.0 * self(silence, return_views=False).sum(), last=True)
        self.wait_for_gradients()
        self.step(lr=0.0, beta1=0.9)
        self.restore_batchnorm(snapshot)


def _partition(value: Tensor, length: int) -> Tensor:
    """This rank's `length` elements of `value` as ZeRO stage 3 cuts it, the last rank's padded with zeros.

    DeepSpeed 0.19.8 leaves out the padding when it cuts a value itself, and fails wherever the ranks do not
    divide the size.
    """
    ranks = torch.distributed.get_world_size()
    padded = nn.functional.pad(value.flatten(), (0, length * ranks - value.numel()))
    return padded[torch.distributed.get_rank() * length :][:length]
