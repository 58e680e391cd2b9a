"""Muon for the matrices, AdamW for everything else; every parameter in exactly one group (docs/method.md#optimizer)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lrt.config.run import OptimConfig
from lrt.model.lrt import LRT
from lrt.model.parameters import role
from lrt.utils.dtensor import by_matrix, fill, is_sharded, shard, whole

REFERENCE_WIDTH = 768
"""Width at which AdamW's rates are stated."""


def rate(step: int, steps: int, config: OptimConfig) -> float:
    """Share of the peak rate at `step` (0-based) of `steps`: linear warm-up, flat, linear decay to `config.final`."""
    warm, cool = round(config.warmup * steps), round(config.decay * steps)
    if step < warm:
        return (step + 1) / warm
    left = steps - step
    return 1.0 if left > cool else config.final + (1 - config.final) * left / cool


def memory_rate(step: int, steps: int, config: OptimConfig) -> float:
    """Share of the ordinary rate that the memory's parameters have: it rises linearly over `config.memory_warmup`."""
    return min(1.0, (step + 1) / max(1, round(config.memory_warmup * steps)))


def parameter_groups(model: LRT) -> dict[str, dict[str, nn.Parameter]]:
    """Every trainable parameter by name, in one of `matrix`, `embedding`, `head`, `scalar`, `vector`.

    A tied embedding is trained as a head; vectors are biases and weights of norms.
    """
    kinds = ("matrix", "embedding", "head", "scalar", "vector")
    groups: dict[str, dict[str, nn.Parameter]] = {kind: {} for kind in kinds}
    for name, p in model.named_parameters():
        use = role(name)
        if use == "head" or (use == "embedding" and model.head is None):
            groups["head"][name] = p
        elif use in ("embedding", "value embedding"):
            groups["embedding"][name] = p
        else:
            groups[("scalar", "vector", "matrix")[p.ndim]][name] = p
    return groups


class Peak(NamedTuple):
    """What decides a parameter's rate; those of one optimizer that share it are updated together."""

    lr: float
    warming: bool
    """Whether `memory_rate` scales it."""


def peak_rates(model: LRT, config: OptimConfig) -> dict[nn.Parameter, Peak]:
    """The peak rate of every parameter."""
    memory = {id(p) for p in model.memory_parameters()}
    scale = (model.config.d / REFERENCE_WIDTH) ** -0.5
    scaled = {"embedding": config.embedding_lr * scale, "head": config.head_lr * scale}
    scalars = {"alpha": config.alpha_lr, "beta": config.beta_lr, "gamma": config.gamma_lr}
    peaks = {}
    for kind, group in parameter_groups(model).items():
        for name, p in group.items():
            if kind == "scalar":
                lr, usual = scalars[name.rpartition(".")[2].removeprefix("shift_")], config.scalar_lr
            elif kind == "matrix":
                lr, usual = config.memory_lr if id(p) in memory else None, config.matrix_lr
            else:
                lr, usual = None, scaled["head" if kind == "vector" else kind]
            peaks[p] = Peak(usual if lr is None else lr, bool(config.memory_warmup) and id(p) in memory)
    return peaks


def _by_rate(parameters: Iterable[nn.Parameter], peaks: dict[nn.Parameter, Peak]) -> list[dict[str, Any]]:
    groups: dict[Peak, list[nn.Parameter]] = {}
    for p in parameters:
        groups.setdefault(peaks[p], []).append(p)
    return [{"params": members, **peak._asdict()} for peak, members in groups.items()]


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz (Jordan et al. 2024): torch.optim.Muon with equal shapes in one batch.

    torch's takes one matrix at a time, in bfloat16 always; ours orthogonalises all matrices of a shape in one product,
    in the type it is given: where bfloat16 is emulated, float32 is far faster.
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)
    ROUNDS = 5

    def __init__(
        self,
        params: Iterable[nn.Parameter] | list[dict[str, Any]],
        lr: float,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype
        self.found_inf: Tensor | None = None
        """1.0 or 0.0 on the device: whether the next step must change nothing, as torch's fused optimizers have it."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every matrix that has a gradient; with `found_inf` 1, leave it and its momentum as they are."""
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            keep = 1.0 if self.found_inf is None else 1.0 - self.found_inf
            for shape, matrices in shapes.items():
                momenta, one = self._momentum(matrices, group["momentum"], keep), matrices[0]
                sharded = is_sharded(one)
                updates = by_matrix(momenta, one, self.orthogonalise) if sharded else self.orthogonalise(momenta)
                updates = updates * (group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5 * keep)
                for p, update in zip(matrices, updates, strict=True):
                    shard(p).mul_(1 - group["lr"] * group["weight_decay"] * keep).sub_(update)

    def _momentum(self, matrices: list[nn.Parameter], momentum: float, keep: float | Tensor) -> Tensor:
        """Advance the momentum buffers (where `keep` is 1); Nesterov's look-ahead of all of them, [n, A, B].

        Of a sharded matrix, this process's rows.
        """
        nesterov, share = [], torch.as_tensor((1 - momentum) * keep, dtype=matrices[0].dtype)
        for p in matrices:
            assert p.grad is not None
            grad = shard(p.grad)
            if self.found_inf is not None:
                grad = torch.where(self.found_inf > 0, 0.0, grad)
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            buffer = shard(self.state[p]["momentum_buffer"])
            nesterov.append(grad.lerp(buffer.lerp_(grad, share), momentum))
        return torch.stack(nesterov)

    def orthogonalise(self, updates: Tensor) -> Tensor:
        """The nearest semi-orthogonal matrices, roughly: singular values of [n, A, B] are pushed to about 1."""
        a, b, c = self.COEFFICIENTS
        tall = updates.shape[1] > updates.shape[2]
        x = (updates.mT if tall else updates).to(self.dtype)
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
        for _ in range(self.ROUNDS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        return (x.mT if tall else x).to(updates.dtype)


class Optimizer:
    """Muon and AdamW behind one step; its state is a flat dictionary of tensors, to be saved without pickle."""

    def __init__(self, model: LRT, config: OptimConfig, dtype: torch.dtype = torch.float32):
        """`dtype` is the type in which Muon orthogonalises: the training's own."""
        groups, peaks = parameter_groups(model), peak_rates(model, config)
        matrices = groups["matrix"].values()
        rest = [p for kind in ("embedding", "head", "scalar", "vector") for p in groups[kind].values()]
        adam, muon = _by_rate(rest, peaks), _by_rate(matrices, peaks)
        self.adam = torch.optim.AdamW(adam, betas=config.betas, eps=1e-10, weight_decay=0.0, fused=True)
        self.muon = Muon(muon, config.matrix_lr, config.momentum, config.weight_decay, dtype)
        self.names: dict[Tensor, str] = {p: name for group in groups.values() for name, p in group.items()}
        self.peaks = [(group, group["lr"]) for o in (self.adam, self.muon) for group in o.param_groups]

    def step(self, share: float, skip: Tensor | None = None, memory: float = 1.0) -> None:
        """Update every parameter at `share` of its peak rate, and clear the gradients.

        Where `skip`, a boolean on the device, is True, nothing is updated; the host need not wait to know.
        With a warm-up of the memory, its parameters have the share `memory` of that.
        """
        for group, peak in self.peaks:
            group["lr"] = peak * share * (memory if group["warming"] else 1.0)
        skipped = None if skip is None else skip.float()
        self.adam.found_inf = self.muon.found_inf = skipped  # pyright: ignore[reportAttributeAccessIssue]
        for optimizer in (self.adam, self.muon):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def state(self) -> dict[str, Tensor]:
        """`{parameter name/key: tensor}` of both optimizers; sharded where the parameters are."""
        states = ((p, state) for o in (self.adam, self.muon) for p, state in o.state.items())
        return {f"{self.names[p]}/{key}": value for p, state in states for key, value in state.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned: all of it, or nothing (from before the first step).

        An entry that is missing, foreign, or of another shape or number type raises ValueError naming it.
        """
        matrices = {p for group in self.muon.param_groups for p in group["params"]}
        entries = {
            f"{name}/{slot}": (p, self.muon if p in matrices else self.adam, slot)
            for p, name in self.names.items()
            for slot in (("momentum_buffer",) if p in matrices else ("step", "exp_avg", "exp_avg_sq"))
        }
        for key in sorted(entries.keys() ^ state.keys()) if state else ():
            verb = "lacks" if key in entries else "holds"
            raise ValueError(f"the optimizer state {verb} {key}, unlike this model's; resume with the run's own config")
        for key, value in state.items():
            p, optimizer, slot = entries[key]
            shape = torch.Size() if slot == "step" else p.shape
            if value.shape != shape or value.dtype != p.dtype:
                raise ValueError(
                    f"the optimizer state {key} is {tuple(value.shape)} {value.dtype}, not {tuple(shape)} {p.dtype}; "
                    "resume with the run's own config"
                )
            optimizer.state[p][slot] = torch.zeros_like(p if slot != "step" else value, device=p.device)
            fill(optimizer.state[p][slot], value)


def clip(parameters: Iterable[nn.Parameter], norm: float | None) -> Tensor:
    """Scale gradients down to `norm` if they exceed it; return their norm before, over all shards, on the device."""
    kinds: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for p in parameters:
        if p.grad is not None:
            kinds[is_sharded(p.grad)].append(p)
    norms = [whole(nn.utils.get_total_norm([p.grad for p in kind if p.grad is not None])) for kind in kinds if kind]
    total = norms[0] if len(norms) == 1 else torch.stack(norms).norm()
    if norm is not None:
        for kind in kinds:
            nn.utils.clip_grads_with_norm_(kind, norm, total)
    return total
