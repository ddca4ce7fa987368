"""StableAdamW: AdamW that clips the update of each tensor, in place of clipping the gradient.

Where gradients grow suddenly, the second moment is too old for a while and AdamW's updates are far
larger than the learning rate. StableAdamW (2304.13013, algorithm 2) measures by how much, as the
root mean square of gradient / sqrt(second moment), and divides the learning rate by that where it
is above 1. ModernBERT and Ettin train with it and without gradient clipping.
"""

import torch


class StableAdamW(torch.optim.Optimizer):
    """Arguments as torch.optim.AdamW. Weight decay is decoupled and scaled by the learning rate."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group)
        return loss

    def update(self, p, group):
        state, g, (beta1, beta2), eps = self.state[p], p.grad, group["betas"], group["eps"]
        if not state:
            state["step"] = torch.zeros((), device=p.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
        state["step"] += 1
        # Means over the updates so far: with these betas there is no bias to correct.
        first = 1 - (1 - beta1) / (1 - beta1 ** state["step"])
        second = 1 - (1 - beta2) / (1 - beta2 ** state["step"])
        state["exp_avg"].lerp_(g, 1 - first)
        state["exp_avg_sq"].lerp_(g.square(), 1 - second)
        rms = (g.square() / state["exp_avg_sq"].clamp(min=eps**2)).mean().sqrt()
        lr = group["lr"] / rms.clamp(min=1)
        p.mul_(1 - lr * group["weight_decay"])
        p.sub_(lr * state["exp_avg"] / (state["exp_avg_sq"].sqrt() + eps))
