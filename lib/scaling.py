"""How the loss falls with training FLOPs: a power law for each arm, and where two arms cross.

    loss = a x FLOPs ** -alpha

Fitted by least squares in log-log space, as in Kaplan et al. (2001.08361, section 3). Over the one
or two decades of a sweep the irreducible part of the loss cannot be told from the exponent, so it
is not fitted: the laws hold between the smallest and the largest budget, and not far beyond.
"""

import math

import numpy as np

N_DRAW = 1000  # of the losses, for the intervals
NOISE = 0.015  # standard deviation of a loss over seeds, nats, where no arm has several seeds


def noise_of(runs):
    """Standard deviation over seeds, pooled over {arm: [(flops, loss), ...]}. -> nats."""
    squares = n_free = 0
    for points in runs.values():
        for budget in {flops for flops, _ in points}:
            losses = np.array([loss for flops, loss in points if flops == budget])
            squares += ((losses - losses.mean()) ** 2).sum()
            n_free += len(losses) - 1
    return math.sqrt(squares / n_free) if n_free else NOISE


def fit(flops, losses):
    """Points (n,) and losses (...,n) -> log a (...), alpha (...)."""
    x = np.log(flops)
    y = np.log(losses)
    centred = x - x.mean()
    alpha = -(y * centred).sum(-1) / (centred**2).sum()
    return y.mean(-1) + alpha * x.mean(), alpha


def law(runs, fit_to=math.inf):
    """{arm: [(FLOPs, loss), ...]} with two budgets of at most fit_to FLOPs or more each -> what to
    say about them. Larger budgets, where a law no longer holds, are left out of the fits.

    {"noise", "arms": {arm: {"a", "alpha", "alpha_90", "residual"}}, "crossings": [...]}; a crossing
    is {"arms": [better before, better after], "flops", "flops_90"}, only where the laws of two arms
    meet within the budgets that both have. alpha_90 and flops_90: the middle 90 % when every loss
    is drawn again with the noise of the seeds. ValueError where an arm has fewer than two budgets.
    """
    noise, random = noise_of(runs), np.random.default_rng(0)
    arms, drawn = {}, {}
    for name, points in runs.items():
        within = sorted(point for point in points if point[0] <= fit_to)
        n_budget = len({flops for flops, _ in within})
        if n_budget < 2:
            raise ValueError(f"arm {name}: a law needs two budgets of at most {fit_to:g} FLOPs, "
                             f"found {n_budget}")
        flops, losses = np.array(within).T
        log_a, alpha = fit(flops, losses)
        again = fit(flops, losses + noise * random.standard_normal((N_DRAW, len(losses))))
        residual = losses - np.exp(log_a - alpha * np.log(flops))
        arms[name] = dict(a=math.exp(log_a), alpha=float(alpha),
                          alpha_90=np.quantile(again[1], [0.05, 0.95]).tolist(),
                          residual=float(abs(residual).max()))
        drawn[name] = (log_a, alpha), again, (flops.min(), flops.max())
    crossings = []
    names = list(runs)
    for i, first in enumerate(names):
        for second in names[i + 1:]:
            found = crossing(drawn[first], drawn[second])
            if found:
                order = [first, second] if arms[first]["alpha"] < arms[second]["alpha"] else [
                    second, first]
                crossings.append(dict(arms=order) | found)
    return dict(noise=noise, arms=arms, crossings=crossings)


def crossing(first, second):
    """-> {"flops", "flops_90"}, None where two laws do not meet within the budgets of both."""
    (a, alpha), again_a, (low_a, high_a) = first
    (b, beta), again_b, (low_b, high_b) = second

    def meet(a, alpha, b, beta):
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            return np.exp((a - b) / (alpha - beta))
    flops = float(meet(a, alpha, b, beta))
    if not max(low_a, low_b) <= flops <= min(high_a, high_b):  # also where it is nan
        return None
    draws = np.nan_to_num(meet(*again_a, *again_b), nan=math.inf)
    return dict(flops=flops, flops_90=np.quantile(draws, [0.05, 0.95]).tolist())


def draw(runs, path, fit_to=math.inf):
    """Losses and laws of all arms, and how far each is from the law of the last one.

    The laws are fitted to budgets of at most fit_to FLOPs and drawn up to there; losses of larger
    ones are drawn as dots.
    """
    from matplotlib.figure import Figure

    found = law(runs, fit_to)["arms"]
    reference = found[list(runs)[-1]]
    figure = Figure(figsize=(11, 4.4), dpi=130)
    left, right = figure.subplots(1, 2)
    for number, (name, points) in enumerate(runs.items()):
        flops, losses = np.array(sorted(points)).T
        line = np.geomspace(flops.min(), flops[flops <= fit_to].max(), 50)
        style = dict(color=f"C{number % 10}", lw=1.2)

        def loss_at(x, of):
            return of["a"] * x ** -of["alpha"]
        label = f"{name}  {found[name]['alpha']:.3f}".replace("$", r"\$")
        left.plot(line, loss_at(line, found[name]), label=label, **style)
        right.plot(line, loss_at(line, found[name]) - loss_at(line, reference), **style)
        for axes, y in ((left, losses), (right, losses - loss_at(flops, reference))):
            axes.plot(flops, y, ".", color=style["color"])
    left.set(xscale="log", yscale="log", xlabel="training FLOPs",
             ylabel="validation loss, nats a predicted token")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    right.set(xscale="log", xlabel="training FLOPs",
              ylabel=f"nats above the law of {list(runs)[-1]}")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=7, title="arm, exponent", title_fontsize=7)
    figure.tight_layout()
    figure.savefig(path)
