"""`varlora serve`: a finished run behind HTTP, with batches, limits, metrics and a page to ask on.

    request -> guard -> app: body within limits -> asking: encoded rows -> engine: queue, batches, draws -> JSON

The engine's thread alone touches the model. Draws are the same S models for every request, as those of `predict` are.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from varlora.data import collate
from varlora.drawing import PLAIN, Drawing
from varlora.errors import DamagedFileError, VarloraError
from varlora.evaluation import held_out_predictions
from varlora.loading import Loaded, load, longest_prompt, pad_of, trained_task
from varlora.posterior.base import check_draws, check_tau
from varlora.predict import Predictor
from varlora.prompt import Encoded
from varlora.serve.base import Limits, Use
from varlora.tasks import Task
from varlora.templating import environment

__all__ = ["Limits", "Service", "make_service", "serve"]

Say = Callable[[str], None]
NEEDED = ("fastapi", "uvicorn", "prometheus_client")
LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""What the own machine is called."""
KEPT = 4
"""Ways to draw whose draws are kept beside the service's own: the latest that requests asked for."""


@dataclass(frozen=True)
class Service:
    """A service that is put together, and not yet listening."""

    app: Any
    """The ASGI application, a `Guard`."""
    engine: Any
    """Works the queue off."""
    counters: Any
    """What was counted."""
    tokenizing: ThreadPoolExecutor
    """Makes rows ready."""

    def close(self) -> None:
        """Take nothing more, wait until what was taken is done, and end the threads."""
        self.engine.close()
        self.tokenizing.shutdown()


def serve(
    run_dir: str | Path,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    model: str | None = None,
    samples: int | None = None,
    tau: float | None = None,
    seed: int = 0,
    risk: float | None = None,
    how: Drawing = PLAIN,
    allowed_hosts: Sequence[str] = (),
    limits: Limits | None = None,
    say: Say = print,
) -> int:
    """Serve a run until a signal ends it; a second signal ends the process, with status 130.

    Args:
        run_dir: a trained run.
        host: where to listen; the default is reached from this machine alone.
        port: 0: any that is free.
        model: where the base lies now, if not where it was.
        samples: draws; 0: only the mean; left out: what `calibrate` chose, else 10.
        tau: factor of the variance of what was trained; left out: what `calibrate` chose, else 1.
        seed: seed of the draws.
        risk: share of the answers given that may be wrong, for requests that say none.
        how: how the draws are made and run.
        allowed_hosts: what the Host header may name; left out: the loopback's names if `host` is one, else any.
        limits: what is taken at most.
        say: told in words what a user should know.

    Returns:
        Requests for answers that were answered with 200.

    Raises:
        VarloraError: the extra `serve` is not installed, an argument is wrong, the address is taken, or see `load`.
    """
    _check_installed()
    from varlora.serve.process import Server, listen

    limits = limits or Limits()
    _check_use(samples, tau, risk)
    with listen(host, port) as sock:
        loaded = load(run_dir, model=model)
        hosts = tuple(allowed_hosts) or ((*LOOPBACK, host) if _is_loopback(host) else ())
        settings: dict[str, Any] = {"samples": samples, "tau": tau, "seed": seed, "risk": risk, "how": how}
        service = make_service(loaded, run_dir, limits=limits, hosts=hosts, say=say, **settings)
        engine = service.engine
        server = Server(service.app, stop=engine.stop, busy=lambda: engine.alive, connections=limits.connections)
        name = f"[{host}]" if ":" in host else host
        say(f"Serving {run_dir} at http://{name}:{sock.getsockname()[1]}/ (Ctrl+C ends it)")
        server.run(sockets=[sock])
    if server.signals > 1:
        say("Ended at once: what was taken is not answered.")
        sys.stdout.flush()
        os._exit(130)  # the engine's thread is within a pass, which would abort the interpreter's own end
    service.close()
    answered = service.counters.answered()
    say(f"Stopped: {answered} requests were answered.")
    return answered


def make_service(
    loaded: Loaded,
    run_dir: str | Path,
    *,
    limits: Limits | None = None,
    samples: int | None = None,
    tau: float | None = None,
    seed: int = 0,
    risk: float | None = None,
    how: Drawing = PLAIN,
    hosts: Sequence[str] = (),
    say: Say = print,
) -> Service:
    """Put a service together; see `serve` for the arguments. The caller has to close it."""
    _check_installed()
    from varlora.serve.abstain import of_expected_error, of_held_out
    from varlora.serve.app import PATHS, Parts, make_app
    from varlora.serve.asking import Ask, Asker, parse
    from varlora.serve.counters import Counters
    from varlora.serve.engine import Engine
    from varlora.serve.guard import Guard

    limits = limits or Limits()
    _check_use(samples, tau, risk)
    task = trained_task(Path(run_dir), loaded.settings)
    counters = Counters()
    default = _default_use(loaded, samples, tau)
    draw, own = _draw(loaded, default, seed, how)
    meta = {**own.meta, "task": task.name, "task_version": task.version}
    held_out = None if default.calibrated else _held_out(Path(run_dir), meta, say)

    def threshold(risk: float, use: Use) -> Any:
        if held_out is None or use != default:
            return of_expected_error(risk)
        return of_held_out(*held_out, risk)

    engine = Engine(draw, queue=limits.queue, batch_tokens=limits.batch_tokens, watch=counters, say=say)
    counters.queue(lambda: engine.waiting)
    longest = longest_prompt(loaded.model, loaded.settings, say)
    asker = Asker(task, loaded.tokenizer, limits, longest, loaded.settings.chat)
    rows = 0 if held_out is None else len(held_out[1])
    about = _about(loaded, task, default, limits, risk, rows, asker.own_choices)
    tokenizing = ThreadPoolExecutor(1, thread_name_prefix="varlora-tokenizer")
    by_hand = 10 if samples is None else samples
    parts = Parts(
        engine=engine,
        asker=asker,
        tokenizing=tokenizing,
        parse=parse,
        schema=Ask.model_json_schema(ref_template="#/components/schemas/{model}"),
        threshold=threshold,
        counters=counters,
        limits=limits,
        default=default,
        by_hand=lambda tau: default if not default.calibrated and tau == default.tau else Use(False, tau, by_hand),
        risk=risk,
        about=about,
        files=_page(about, task, asker.own_choices),
    )
    guard = Guard(make_app(parts), paths=PATHS, hosts=hosts, count=counters.request, say=say)
    return Service(guard, engine, counters, tokenizing)


def _check_installed() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise VarloraError(
            f"`varlora serve` needs {', '.join(missing).replace('_', '-')}, which are not installed. "
            'Install them: pip install "varlora[serve]"'
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _check_use(samples: int | None, tau: float | None, risk: float | None) -> None:
    from varlora.serve.abstain import check_risk

    if samples is not None:
        check_draws(samples, what="samples")
    if tau is not None:
        check_tau(tau)
    if risk is not None:
        check_risk(risk)


def _default_use(loaded: Loaded, samples: int | None, tau: float | None) -> Use:
    """How `answer_rows` draws: as calibrated, unless a factor of the variance is given."""
    _, samples, tau_used, _ = loaded.used(samples, tau)
    return Use(tau is None and loaded.calibration is not None, float(tau_used), samples)


def _draw(
    loaded: Loaded, default: Use, seed: int, how: Drawing
) -> tuple[Callable[[Sequence[Encoded], Use], Tensor], Predictor]:
    """Return what draws rows, and the service's own draws, which no other ones displace."""
    pad = pad_of(loaded.tokenizer)

    def made(use: Use) -> Predictor:
        chosen = loaded.calibration if use.calibrated else None
        posterior, tau = (chosen.applied(loaded.posterior), 1.0) if chosen else (loaded.posterior, use.tau)
        drawn = how.over(chosen.how) if chosen else how
        return Predictor(loaded.model, posterior, use.samples, tau, seed, drawn)

    own, other = made(default), lru_cache(maxsize=KEPT)(made)

    def draw(rows: Sequence[Encoded], use: Use) -> Tensor:
        return (own if use == default else other(use)).logits(collate(rows, pad))

    return draw, own


def _held_out(run_dir: Path, meta: Mapping[str, str], say: Say) -> tuple[Tensor, Tensor] | None:
    """Return probabilities and labels of the run's held-out rows, if they were drawn as the service draws."""
    try:
        found = held_out_predictions(run_dir, meta)
    except DamagedFileError as error:
        say(f"Thresholds of confidence come from the expected error, as the held-out rows cannot be read: {error}")
        return None
    if found is None or (found.labels < 0).any():
        return None
    return found.probs, found.labels


def _about(
    loaded: Loaded,
    task: Task,
    use: Use,
    limits: Limits,
    risk: float | None,
    held_out: int,
    own_choices: bool,
) -> dict[str, Any]:
    return {
        "task": task.name,
        "method": loaded.settings.method,
        "model": Path(loaded.settings.model).name,
        "fields": list(task.fields),
        "wording": "task" if own_choices else "verbatim",
        "calibrated": use.calibrated,
        "tau": use.tau,
        "samples": use.samples,
        "risk": risk,
        "held_out": held_out,
        "limits": {name: getattr(limits, name) for name in ("queue", "max_body", "max_rows", "max_answers", "max_tau")},
    }


def _page(about: dict[str, Any], task: Task, own_choices: bool) -> dict[str, tuple[str, str]]:
    templates = environment(autoescape=True)
    question, answers = ("", ()) if own_choices else _blank(task)
    html = templates.get_template("serve.html.jinja").render(about=about, question=question, answers="\n".join(answers))
    script, style = (templates.get_template(f"serve.{kind}").render() for kind in ("js", "css"))
    return {
        "/": ("text/html", html),
        "/page.js": ("text/javascript", script),
        "/page.css": ("text/css", style),
    }


def _blank(task: Task) -> tuple[str, tuple[str, ...]]:
    """The task's prompt with its fields in braces, to be filled in by hand, and its answers."""
    try:
        example = task.example({**{name: f"{{{name}}}" for name in task.fields}, task.label: None}, 0)
    except VarloraError:
        return "", ()
    return example.prompt, example.answers
