"""Calibration: how a posterior is best used, chosen on held-out rows and stored with the adapter.

Four numbers are chosen together: the factor τ of the variance, the share of weights that is pruned by signal to noise,
the temperature that logits are divided by, and the number of draws. The temperature costs no pass over the rows, as
it is a choice on logits that are there already; so each trial of τ and of the share is judged by the NLL at its own
best temperature, with few draws, the same noise for all. τ is doubled or halved while that helps. Where draws then do
no better than the mean, which costs one pass and gives no other answer tomorrow, the mean is used. At last weights are
pruned while that helps beyond a standard error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from varlora import metrics
from varlora.drawing import NOISES, PLAIN, Drawing, Noise
from varlora.errors import DamagedFileError, VarloraError
from varlora.files import MANIFEST, file_digest, read_json, write_json
from varlora.posterior import Posterior, Tempered
from varlora.posterior.base import MOST_DRAWS, check_draws
from varlora.run import origin
from varlora.temperature import fit_temperature

__all__ = ["MOST_CHOSEN", "Calibration", "Search", "Trial", "calibrate", "load_calibration", "save_calibration"]

FILE = "calibration.json"
MOST_CHOSEN = 16
"""Draws that are made to choose on, where nothing else is said: as many as can be chosen at the most."""
TAUS = (1 / 64, 16.0)
"""Between these τ is looked for."""
FEW = 20
"""Held-out rows, below which what is chosen on them is doubted."""
SHARES = (0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
"""Shares of weights that are tried, one after the other while it helps."""
SEARCH_DRAWS = 8
"""Draws of each trial."""
BEARABLE = 0.01
"""Relative rise of the NLL that fewer draws, or the mean in their place, may cost."""

Draw = Callable[[Posterior, int], tuple[Tensor, Tensor]]
"""`draw(posterior, n)`: class logits of n fixed draws for each held-out row, (S, N, C), or of the mean for n = 0, and
the labels, (N,)."""


@dataclass(frozen=True)
class Calibration:
    """How a posterior is to be used."""

    tau: float
    """Factor of the variance."""
    pruned: float
    """Share of all weights that is 0, those of lowest |m|/√v."""
    temperature: float
    """What the draws' logits are divided by."""
    temperature_mean: float
    """What the mean's logits are divided by."""
    samples: int
    """Draws that are averaged; 0: the mean, which does as well. Who wants draws has the other settings for them."""
    last_layers: int | None = None
    """Last adapted layers that are drawn, those below at the mean; None: all."""
    noise: Noise = "independent"
    """What the draws are to one another."""

    @property
    def how(self) -> Drawing:
        """How the draws are made."""
        return Drawing(noise=self.noise, last_layers=self.last_layers)

    def applied(self, posterior: Posterior) -> Tempered:
        """Return the posterior as it is to be drawn from."""
        return Tempered(_changed(posterior, self.tau, self.pruned), self.temperature, self.temperature_mean)


@dataclass(frozen=True)
class Trial:
    """What one setting gave on the held-out rows."""

    tau: float
    pruned: float
    samples: int
    temperature: float
    """The best for it."""
    nll: float
    """At that temperature."""


@dataclass(frozen=True)
class Search:
    """What was chosen, and among what."""

    chosen: Calibration
    trials: tuple[Trial, ...]
    """In the order in which they were tried."""
    rows: int
    """Held-out rows."""
    passes: int
    """Passes of a model over them."""
    told: tuple[str, ...] = ()
    """What was said of the temperature."""

    def doubts(self) -> list[str]:
        """Return in words what the held-out rows were too few to tell."""
        chosen, found = self.chosen, []
        if self.rows < FEW:
            found.append(
                f"Chosen on {self.rows} held-out rows, which tell little: what looks best on them may be chance."
            )
        if chosen.samples and chosen.tau in TAUS:
            found.append(f"tau is at the end of its range, {chosen.tau:g}: the held-out rows do not set it.")
        return [*(f"{words} Hold out more rows (`calibration_fraction`)." for words in found), *self.told]


def calibrate(posterior: Posterior, draw: Draw, samples: int = MOST_CHOSEN, how: Drawing = PLAIN) -> Search:
    """Choose τ, the share that is pruned, the temperature and the number of draws on held-out rows.

    Args:
        posterior: what training ended with.
        draw: gives logits of the held-out rows, with the same noise for every posterior.
        samples: draws at the most; 0: only the mean and its temperature, and τ is 1.
        how: how `draw` makes the draws; its noise and its last layers are noted.

    Raises:
        MetricError: there are no rows, or a label is wrong.
        VarloraError: `samples` is negative.
    """
    check_draws(samples, what="samples")
    trials = _Trials(posterior, draw, samples)
    tau = _factor(trials)
    drawing = trials.made(0.0).nll > (1 + BEARABLE) * trials.made(tau, n=samples).nll
    pruned = _share(trials, tau if drawing else 0.0)
    mean, drawn = trials.made(0.0, pruned), trials.made(tau, pruned, samples)
    told = tuple(trials.told[drawn if drawing else mean])
    if drawing:
        drawn = _fewest(trials, drawn)
    noise, number = how.noise or "independent", drawn.samples if drawing else 0
    factor = tau if samples else 1.0  # of draws that were not looked at nothing is known
    chosen = Calibration(factor, pruned, drawn.temperature, mean.temperature, number, how.last_layers, noise)
    return Search(chosen, trials.trials, len(trials.labels), trials.passes, told)


class _Trials:
    """The trials of a search, each made once."""

    def __init__(self, posterior: Posterior, draw: Draw, samples: int) -> None:
        self.posterior, self.draw, self.samples = posterior, draw, samples
        self.by_setting: dict[tuple[float, float, int], Trial] = {}
        self.logits: dict[Trial, Tensor] = {}
        self.told: dict[Trial, list[str]] = {}
        self.labels = torch.empty(0)
        self.passes = 0

    @property
    def trials(self) -> tuple[Trial, ...]:
        """All of them, in the order in which they were made."""
        return tuple(self.logits)

    def made(self, tau: float, pruned: float = 0.0, n: int = SEARCH_DRAWS) -> Trial:
        """Return the trial of a setting, with n draws or as many as there may be; at τ = 0 it is of the mean."""
        n = min(n, self.samples) if tau else 0
        if (tau, pruned, n) not in self.by_setting:
            logits, self.labels = self.draw(_changed(self.posterior, tau, pruned), n)
            self.passes += min(len(logits), max(n, 1))
            told: list[str] = []
            temperature, losses = _fitted(logits, self.labels, told.append)
            drawn = n if len(logits) > 1 or n == 1 else 0  # more that are one: the mean
            trial = Trial(tau, pruned, drawn, temperature, losses.mean().item())
            self.by_setting[tau, pruned, n] = trial
            self.logits[trial], self.told[trial] = logits, told
        return self.by_setting[tau, pruned, n]

    def losses(self, trial: Trial) -> Tensor:
        """Return each row's NLL in a trial, (N,)."""
        return _fitted(self.logits[trial], self.labels)[1]


def _fitted(logits: Tensor, labels: Tensor, say: Callable[[str], None] | None = None) -> tuple[float, Tensor]:
    """Return the best temperature of some draws and each row's NLL at it, which is infinite where a draw overflows."""
    if not metrics.finite_rows(logits).all():
        return 1.0, torch.full((len(labels),), math.inf)
    temperature = fit_temperature(logits, labels, say)
    probs = metrics.average_probs(logits.double() / temperature)
    return temperature, -probs.gather(1, labels[:, None])[:, 0].log()


def _changed(posterior: Posterior, tau: float, pruned: float) -> Posterior:
    kept = posterior.prune(pruned) if pruned else posterior  # first: without variance there is no signal to noise
    return kept if tau == 1 else kept.scale(tau)


def _factor(trials: _Trials) -> float:
    """Return τ: 1, doubled or halved as long as that helps the draws; 0 where they are the mean, or overflow."""
    if not trials.samples or not trials.made(1.0).samples:
        return 0.0
    best = trials.made(1.0)
    for factor in (0.5, 2.0):
        while TAUS[0] <= best.tau * factor <= TAUS[1] and (
            trials.made(best.tau * factor).nll < best.nll or (factor < 1 and best.nll == math.inf)
        ):
            best = trials.made(best.tau * factor)
        if best.tau != 1:
            break
    return best.tau if math.isfinite(best.nll) else 0.0


def _share(trials: _Trials, tau: float) -> float:
    """Return the share that is pruned: more of it as long as the NLL falls, if by more than a standard error."""
    try:
        trials.posterior.prune(0.0)
    except VarloraError:  # without variances there is no signal to noise
        return 0.0
    whole = best = trials.made(tau)
    for share in SHARES:
        trial = trials.made(tau, share)
        if trial.nll > best.nll:
            break
        if trial.nll < best.nll:  # of weights that are 0 already, pruning changes nothing
            best = trial
    gain = trials.losses(whole) - trials.losses(best)
    clear = len(gain) > 1 and gain.mean() > gain.std() / math.sqrt(len(gain))
    return best.pruned if clear else 0.0


def _fewest(trials: _Trials, whole: Trial) -> Trial:
    """Return the trial of the fewest draws, a power of two, that cost no more than a bearable rise of the NLL.

    What n draws give is judged by the average over the groups of n that there are, as one such group may be lucky on
    few rows, and then by the n draws that are made. (Some of many latin draws are like independent ones.)
    """
    logits = trials.logits[whole]
    if len(logits) >= 2 * trials.samples:  # more cost nothing
        return whole
    for n in (2**power for power in range(len(logits).bit_length()) if 2**power < len(logits)):
        groups = logits[: len(logits) // n * n].split(n)
        expected = sum(_fitted(group, trials.labels)[1].mean().item() for group in groups) / len(groups)
        if expected <= (1 + BEARABLE) * whole.nll:
            trial = trials.made(whole.tau, whole.pruned, n)
            if trial.nll <= (1 + BEARABLE) * whole.nll:
                return trial
    return whole


def save_calibration(search: Search, adapter: Path) -> None:
    """Write what was chosen, among what, and its origin beside an adapter."""
    write_json(
        adapter / FILE,
        asdict(search.chosen)
        | {"adapter": file_digest(adapter / MANIFEST), "rows": search.rows, "passes": search.passes}
        | {"trials": [{**asdict(trial), "nll": _finite(trial.nll)} for trial in search.trials]}
        | origin(),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None  # JSON has no infinity


def load_calibration(adapter: Path) -> Calibration | None:
    """Return how an adapter is to be used, if that was chosen.

    It may come from a stranger, so a number of draws that would take forever is refused.

    Raises:
        DamagedFileError: the file is damaged, or of another adapter.
    """
    path = adapter / FILE
    if not path.is_file():
        return None
    again = "Run `varlora calibrate` again, or delete it."
    try:
        stored: Any = read_json(path)
    except DamagedFileError as error:
        raise DamagedFileError(f"{error} {again}") from error
    if isinstance(stored, Mapping) and stored.get("adapter") != file_digest(adapter / MANIFEST):
        raise DamagedFileError(f"{path} is of another adapter than the one beside it. {again}")
    try:
        factors = [float(stored[name]) for name in ("tau", "pruned", "temperature", "temperature_mean")]
        layers = stored.get("last_layers")  # not in files of older versions
        layers = None if layers is None else int(layers)
        noise = stored.get("noise", "independent")
        chosen = Calibration(factors[0], factors[1], factors[2], factors[3], int(stored["samples"]), layers, noise)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DamagedFileError(f"Expected a calibration in {path}, but {error} is missing or wrong. {again}") from error
    within = (
        math.isfinite(chosen.tau) and chosen.tau >= 0,
        0 <= chosen.pruned <= 1,
        0 < chosen.temperature < math.inf and 0 < chosen.temperature_mean < math.inf,
        0 <= chosen.samples <= MOST_DRAWS,
        layers is None or layers >= 1,
        noise in NOISES,
    )
    if not all(within):
        raise DamagedFileError(f"Expected a calibration in {path}, but its numbers make no sense: {chosen}. {again}")
    return chosen
