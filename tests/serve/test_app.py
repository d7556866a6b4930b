"""The service over loopback: its numbers are those of `answer_rows`, and each wrong request gets its reason."""

from __future__ import annotations

import dataclasses
import gc
import http.client
import json
import shutil
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from serve_helpers import Held, live, loaded, numbered, silent, task_rows, trained, until

from varlora.calibration import Calibration
from varlora.cli import main
from varlora.drawing import PLAIN, Drawing
from varlora.evaluation import answer_rows, evaluate
from varlora.predict import Predictor
from varlora.predictions import load_predictions, save_predictions
from varlora.serve import Limits, app, make_service
from varlora.serve.abstain import of_held_out
from varlora.serve.asking import Ask, Asker
from varlora.tasks import Example, get_task

ASK = {"question": "What is the tool of Narfan?", "answers": ["ladder", "basket", "candle", "mirror"]}


@pytest.fixture(scope="module")
def service():
    with live() as found:
        yield found


@pytest.fixture
def fresh():
    """A service of whose counts nothing is known yet."""
    with live(limits=Limits(queue=4)) as found:
        yield found


@pytest.fixture
def held(fresh):
    """A service that is busy with a question, until it is let go."""
    fresh.service.engine.draw = held = Held(numbered_by_length)
    first = ThreadPoolExecutor(1).submit(fresh.ask, **ASK)
    assert held.begun.wait(timeout=30)
    yield fresh, held, first
    held.go.set()


def numbered_by_length(rows, use):
    return numbered([dataclasses.replace(row, id=str(len(row.input_ids))) for row in rows], use)


def expected(rows, run=None, **settings):
    run = run or loaded()
    task = get_task(run.settings.task)
    examples = [task.example(row, i) for i, row in enumerate(rows)]
    return list(answer_rows(run, examples, say=silent, **settings))


def same_numbers(results, rows):
    for one, other in zip(results, rows, strict=True):
        for key in ("id", "answer"):
            assert one[key] == other[key]
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-5)
        assert one["uncertainty"] == pytest.approx(other["uncertainty"], abs=1e-5)


# --- numbers


def test_rows_are_answered_as_answer_rows_does(service):
    rows = task_rows()[:20]
    reply = service.ask(rows=rows)
    assert reply.status == 200
    assert (reply.json["samples"], reply.json["tau"], reply.json["calibrated"]) == (10, 1.0, False)
    same_numbers(reply.json["results"], expected(rows))


def test_a_question_is_answered_as_its_row(service):
    row = task_rows()[0]
    (own,) = expected([row])
    (one,) = service.ask(id="x", question=row["question"], answers=row["choices"]).json["results"]
    assert one["id"] == "x"
    assert list(one["probabilities"]) == row["choices"]
    assert list(one["probabilities"].values()) == pytest.approx(list(own["probabilities"].values()), abs=1e-5)
    assert one["answer"] == row["choices"]["ABCD".index(own["answer"])]


def test_the_spread_is_that_of_the_draws(service):
    (one,) = service.ask(**ASK, draws=True).json["results"]
    for answer, draws in one["draws"].items():
        values = torch.tensor(draws, dtype=torch.float64)
        assert len(values) == 10
        assert values.mean().item() == pytest.approx(one["probabilities"][answer])
        spread = one["spread"][answer]
        assert spread["std"] == pytest.approx(values.std(correction=0).item())
        ordered = values.sort().values
        assert spread["low"] == pytest.approx((ordered[0] + 0.45 * (ordered[1] - ordered[0])).item())
        assert spread["high"] == pytest.approx((ordered[9] - 0.45 * (ordered[9] - ordered[8])).item())
    assert "draws" not in service.ask(**ASK).json["results"][0]


@pytest.mark.parametrize("tau", [0.0, 0.3, 2.5])
def test_tau_is_that_of_answer_rows(service, tau):
    rows = task_rows()[:3]
    reply = service.ask(rows=rows, tau=tau).json
    assert reply["tau"] == tau
    same_numbers(reply["results"], expected(rows, tau=tau))


def test_as_many_answers_as_the_limit_says_are_taken():
    run, most = loaded("true_or_false"), 300
    vocabulary = run.tokenizer.batch_decode([[id] for id in range(3, len(run.tokenizer))])
    words = [text for text in vocabulary if text.isprintable() and text == text.strip() and "\ufffd" not in text]
    other_scripts = [chr(first) for first in range(0xC0, 0x800, 0x40)]  # each begins with another byte
    answers = tuple([*other_scripts, *words][:most])
    asked = {"many": ("Which one is it? ", answers), "few": ("Is snow cold? Answer:", ("yes", "no"))}
    examples = [Example(id, question, "", "", given, None) for id, (question, given) in asked.items()]
    questions = [{"id": id, "question": question, "answers": given} for id, (question, given) in asked.items()]
    with live(trained("true_or_false"), run, limits=Limits(max_answers=most)) as service:
        reply = service.ask(questions=questions)
        assert reply.status == 200
        same_numbers(reply.json["results"], list(answer_rows(run, examples, say=silent)))
        reply = service.ask(question="Which? ", answers=[*answers, "one more"])
        assert (reply.status, reply.json["error"]["message"]) == (422, "Expected 2 to 300 answers, but got 301.")


def test_settings_of_the_service(service):
    rows = task_rows()[:3]
    with live(samples=3, tau=0.5, seed=7) as other:
        same_numbers(other.ask(rows=rows).json["results"], expected(rows, samples=3, tau=0.5, seed=7))
        assert other.ask(rows=rows, tau=2).json["samples"] == 3
    with live(samples=0) as mean:
        reply = mean.ask(rows=rows).json
        same_numbers(reply["results"], expected(rows, samples=0))
        assert all(spread["std"] == 0 for spread in reply["results"][0]["spread"].values())
        assert reply["samples"] == mean.get("/v1/run").json["samples"] == 0


def test_draws_are_made_and_run_as_the_service_is_told():
    rows, how = task_rows()[:3], Drawing(noise="antithetic", last_layers=1)
    wanted = expected(rows, how=how)
    with live(how=how) as service:
        same_numbers(service.ask(rows=rows).json["results"], wanted)
    assert wanted[0]["probabilities"] != pytest.approx(expected(rows)[0]["probabilities"], abs=1e-4)


def test_the_command_line_passes_on_how_draws_are_made(monkeypatch):
    told = {}
    monkeypatch.setattr("varlora.serve.serve", lambda run_dir, **settings: told.update(settings))
    assert main(["serve", "run", "--noise", "latin", "--last-layers", "2", "--tolerance", "0.01"]) == 0
    assert told["how"] == Drawing(noise="latin", last_layers=2, tolerance=0.01)


def test_export_takes_no_options_that_it_does_not_use(capsys):
    with pytest.raises(SystemExit):
        main(["export", "run", "--to", "served", "--noise", "latin"])
    assert "--noise" in capsys.readouterr().err


def test_the_services_own_draws_stay_whatever_others_ask_for(fresh, monkeypatch):
    made, own = [], Predictor.__init__

    def noted(self, *settings):
        made.append(settings[3])
        own(self, *settings)

    monkeypatch.setattr(Predictor, "__init__", noted)
    for tau in (0.1, 0.2, 0.3, 0.4, 0.5):
        assert fresh.ask(**ASK, tau=tau).status == 200
    assert fresh.ask(**ASK).status == fresh.ask(**ASK, tau=0.5).status == 200
    assert made == [0.1, 0.2, 0.3, 0.4, 0.5]


def test_a_calibrated_run_is_used_as_chosen_and_tau_is_of_what_was_trained():
    run, rows = loaded(), task_rows()[:4]
    chosen = dataclasses.replace(run, calibration=Calibration(0.5, 0.1, 1.7, 1.2, 4))
    with live(run=chosen) as service:
        reply = service.ask(rows=rows).json
        assert (reply["calibrated"], reply["tau"], reply["samples"]) == (True, 0.5, 4)
        assert service.get("/v1/run").json["tau"] == 0.5
        same_numbers(reply["results"], expected(rows, chosen))
        reply = service.ask(rows=rows, tau=1.0).json
        assert (reply["calibrated"], reply["samples"]) == (False, 10)
        same_numbers(reply["results"], expected(rows, run))


def test_many_at_once_get_their_own_answers(service):
    rows = task_rows()[:16]
    taus = [None, 0.5]
    own = {tau: expected(rows, tau=tau) for tau in taus}

    def ask(i):
        more = {} if taus[i % 2] is None else {"tau": taus[i % 2]}
        return service.ask(rows=[rows[i // 2], rows[-1 - i // 2]], **more)

    with ThreadPoolExecutor(16) as pool:
        for i, reply in enumerate(pool.map(ask, range(16))):
            wanted = own[taus[i % 2]]
            same_numbers(reply.json["results"], [wanted[i // 2], wanted[-1 - i // 2]])


# --- abstaining


def test_without_a_risk_nothing_is_advised(service):
    reply = service.ask(**ASK).json
    assert "risk" not in reply
    assert reply["results"][0]["abstain"] is None


def test_a_risk_is_compared_with_the_expected_error(service):
    confidence = max(service.ask(**ASK).json["results"][0]["probabilities"].values())
    for risk, abstain in ((1 - confidence + 1e-6, False), (1 - confidence - 1e-6, True)):
        reply = service.ask(**ASK, risk=risk).json
        assert reply["risk"] == {"target": risk, "confidence": pytest.approx(1 - risk), "held_out": 0}
        assert reply["results"][0]["abstain"] is abstain


def test_with_held_out_rows_the_risk_is_kept_on_them(tmp_path):
    run_dir = shutil.copytree(trained(), tmp_path / "run")
    evaluate(run_dir, split="calibration", say=silent)
    held_out = load_predictions(run_dir / "predictions-calibration.safetensors")
    with live(run_dir, risk=0.5) as service:
        assert service.get("/v1/run").json["held_out"] == len(held_out.labels)
        wanted = of_held_out(held_out.probs, held_out.labels, 0.5)
        reply = service.ask(**ASK).json
        assert reply["risk"] == {"target": 0.5, "confidence": wanted.confidence, "held_out": wanted.rows}
        confidence = max(reply["results"][0]["probabilities"].values())
        assert reply["results"][0]["abstain"] is wanted.abstains(confidence)
        assert service.ask(**ASK, risk=1.0).json["results"][0]["abstain"] is False
        assert service.ask(**ASK, tau=2.0).json["risk"]["held_out"] == 0  # they were not drawn like this
    with live(run_dir, risk=0.5, tau=1) as service:
        assert service.ask(**ASK).json["risk"]["held_out"] == len(held_out.labels)
    with live(run_dir, risk=0.5, samples=3) as service:
        assert service.ask(**ASK).json["risk"]["held_out"] == 0
    with live(run_dir, risk=0.5, how=Drawing(noise="latin")) as service:
        assert service.ask(**ASK).json["risk"]["held_out"] == 0
    evaluate(run_dir, split="calibration", how=Drawing(noise="latin"), say=silent)
    for how, count in ((PLAIN, 0), (Drawing(noise="latin"), len(held_out.labels))):
        with live(run_dir, risk=0.5, how=how) as service:
            assert service.ask(**ASK).json["risk"]["held_out"] == count
    (run_dir / "predictions-calibration.safetensors").write_bytes(b"")
    with live(run_dir, risk=0.5) as service:
        assert service.ask(**ASK).json["risk"]["held_out"] == 0
        assert "cannot be read" in service.said[0]


# --- rows that fail alone


def test_of_several_rows_the_wrong_ones_fail_alone(service):
    rows = task_rows()
    reply = service.ask(rows=[rows[0], {"question": "?"}, rows[1]])
    assert reply.status == 200
    first, wrong, last = reply.json["results"]
    assert wrong["id"] == "1"
    assert wrong["error"]["code"] == "wrong_row"
    same_numbers([first, last], expected(rows[:2]))


def test_a_row_beyond_the_context_fails_alone(service):
    rows = task_rows()
    reply = service.ask(rows=[rows[0], {**rows[1], "question": "word " * 600}, rows[2]])
    assert reply.status == 200
    first, long, last = reply.json["results"]
    assert (long["id"], long["error"]["code"]) == (rows[1]["id"], "too_long")
    same_numbers([first, last], expected([rows[0], rows[2]]))


BAD = "\ud800"  # a lone surrogate, which JSON can say and UTF-8 cannot


@pytest.mark.parametrize(
    ("more", "name"),
    [
        ({"id": BAD}, "\\ud800"),
        ({"id": "a", "question": BAD}, "a"),
        ({"id": "a", "choices": [BAD, "b"]}, "a"),
        ({"id": "a", "question": None, BAD: "x"}, "a"),
        ({"id": "x" * 201}, "0"),
        ({"id": "a", "choices": None}, "a"),
    ],
)
def test_a_row_that_cannot_be_read_fails_alone_and_by_its_own_name(service, more, name):
    row, other = task_rows()[:2]
    reply = service.ask(rows=[{**row, **more}, other])
    assert reply.status == 200
    wrong, right = reply.json["results"]
    assert (wrong["id"], wrong["error"]["code"]) == (name, "wrong_row")
    same_numbers([right], expected([other]))


@pytest.mark.parametrize("body", [{"question": "q", "answers": ["a", "b"], BAD: 1}, {**ASK, "id": BAD}])
def test_a_request_that_is_no_unicode_is_refused(service, body):
    assert service.ask(**body).status == 422


def test_if_all_rows_are_wrong_so_is_the_request(service):
    reply = service.ask(questions=[{"id": "a", "question": "?", "answers": []}, {"question": "?", "answers": ["x"]}])
    assert reply.status == 422
    assert [one["id"] for one in reply.json["results"]] == ["a", "1"]
    assert {one["error"]["code"] for one in reply.json["results"]} == {"answers"}


def test_a_row_that_overflows_fails_alone(fresh):
    def draw(rows, use):
        logits = numbered_by_length(rows, use)
        longest = max(range(len(rows)), key=lambda i: len(rows[i].input_ids))
        logits[0, longest, 0] = torch.inf
        return logits

    fresh.service.engine.draw = draw
    questions = [{"question": text, "answers": ["x", "y"]} for text in ("a?", "a long, long question?", "c?")]
    reply = fresh.ask(questions=questions)
    assert reply.status == 200
    assert [one.get("error", {}).get("code") for one in reply.json["results"]] == [None, "not_finite", None]
    assert (fresh.metric("rows_total", outcome="failed"), fresh.metric("rows_total", outcome="answered")) == (1, 2)


def test_draws_that_overflow_in_float16_are_an_error_and_the_mean_is_served():
    run = loaded()
    half = dataclasses.replace(run, posterior=run.posterior.scale(1e12))
    with live(run=half, limits=Limits(max_tau=4)) as service:
        run.model.half()
        try:
            reply = service.ask(**ASK)
            assert (reply.status, reply.code) == (500, "not_finite")
            assert service.ask(**ASK, tau=0).status == 200
        finally:
            run.model.float()


# --- refusals


def test_a_full_queue_is_503_with_the_time_to_wait(held):
    service, held, first = held
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(service.ask, rows=task_rows()[:2]) for _ in range(2)]
        until(lambda: service.service.engine.waiting == 4)
        reply = service.ask(**ASK)
        assert (reply.status, reply.code) == (503, "busy")
        assert int(reply.headers["retry-after"]) >= 1
        assert service.get("/readyz").status == 200
        assert service.metric("queue_rows") == 4
        held.go.set()
        assert first.result().status == 200
        assert [one.result().status for one in waiting] == [200, 200]
    assert service.ask(**ASK).status == 200


def test_more_rows_than_the_queue_holds_are_never_taken(fresh):
    reply = fresh.ask(rows=task_rows()[:5])
    assert (reply.status, reply.code) == (422, "too_many_rows")


def test_a_stopping_service_refuses_and_finishes(held):
    service, held, first = held
    service.service.engine.stop()
    reply = service.ask(**ASK)
    assert (reply.status, reply.code) == (503, "stopping")
    assert reply.headers["connection"] == "close"
    assert reply.headers["retry-after"]
    assert service.get("/readyz").status == 503
    assert service.get("/healthz").status == 200
    held.go.set()
    assert first.result().status == 200


def asking(service):
    """Return a connection on which a question was asked."""
    body = json.dumps(ASK).encode()
    head = (
        f"POST /v1/answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    client = socket.create_connection(("127.0.0.1", service.port), timeout=30)
    client.sendall(head.encode() + b"\r\n\r\n" + body)
    return client


def test_a_client_that_has_gone_is_not_worked_for(held, caplog):
    service, held, first = held
    with asking(service):
        until(lambda: service.service.engine.waiting == 1)
    until(lambda: service.service.engine.waiting == 0)
    held.go.set()
    assert first.result().status == 200
    assert len(held.batches) == 1
    until(lambda: service.metric("rows_total", outcome="dropped") == 1)
    until(lambda: service.metric("requests_total", path="/v1/answer", status="499") == 1)
    gc.collect()
    assert "never retrieved" not in caplog.text


def test_a_client_that_has_gone_before_its_tokens_are_made_keeps_no_place(fresh, monkeypatch, caplog):
    ready, made, go = Asker.ready, [], threading.Event()

    def held_up(self, ask):
        made.append(ask)
        assert go.wait(timeout=60)
        return ready(self, ask)

    monkeypatch.setattr(Asker, "ready", held_up)
    engine, stays = fresh.service.engine, ThreadPoolExecutor(1)
    with asking(fresh):  # is begun
        until(lambda: made)
        with asking(fresh):  # waits for its turn
            until(lambda: engine.waiting == 2)
            answer = stays.submit(fresh.ask, **ASK)
            until(lambda: engine.waiting == 3)
        until(lambda: engine.waiting == 2)
    until(lambda: engine.waiting == 1)
    go.set()
    assert answer.result().status == 200
    assert len(made) == 2
    assert fresh.metric("rows_total", outcome="answered") == 1
    until(lambda: fresh.metric("rows_total", outcome="dropped") == 2)
    until(lambda: fresh.metric("requests_total", path="/v1/answer", status="499") == 2)
    gc.collect()
    assert "never retrieved" not in caplog.text


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_beyond_the_limit_is_413(service, chunked):
    body = json.dumps({**ASK, "question": "x" * 300_000}).encode()
    more = {"transfer_encoding": "chunked"} if chunked else {}
    reply = service.post(iter([body[:1000], body[1000:]]) if chunked else body, **more)
    assert (reply.status, reply.code) == (413, "too_large")
    assert "at most 262144 bytes" in reply.json["error"]["message"]
    assert reply.headers["connection"] == "close"


def test_a_body_in_chunks_within_the_limit_is_taken(service):
    body = json.dumps(ASK).encode()
    assert service.post(iter([body[:20], body[20:]]), transfer_encoding="chunked").status == 200


def test_a_length_beyond_the_limit_is_refused_before_it_is_sent(service):
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as client:
        head = "POST /v1/answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: 99999999\r\nExpect: 100-continue\r\n\r\n".encode())
        assert client.recv(1000).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_come_is_408_and_frees_its_place():
    with live(limits=Limits(body_seconds=0.3, max_reading=1)) as service:
        with socket.create_connection(("127.0.0.1", service.port), timeout=30) as slow:
            head = "POST /v1/answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            slow.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            found = []
            while not found or found[-1] == 503:  # until the slow one is read
                found.append(service.ask(**ASK).status)
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")
        assert service.ask(**ASK).status == 200


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({}, 422, "wrong_shape"),
        ({"question": "q"}, 422, "answers"),
        ({"question": "q", "answers": ["a", "a"]}, 422, "answers"),
        ({"question": "q", "answers": [str(i) for i in range(300)]}, 422, "answers"),
        ({**ASK, "tau": 5}, 422, "tau"),
        ({**ASK, "risk": 2}, 422, "wrong_shape"),
        ({**ASK, "question": "word " * 600}, 422, "too_long"),
    ],
)
def test_a_wrong_request_has_its_reason(service, body, status, code):
    reply = service.ask(**body)
    assert (reply.status, reply.code) == (status, code)
    assert reply.json["error"]["message"].startswith("Expected")


def test_a_long_prompt_is_cut_where_that_is_allowed(service):
    (one,) = service.ask(**{**ASK, "question": "word " * 600}, cut=True).json["results"]
    assert one["cut"] is True


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_only_json_is_taken_so_that_no_page_elsewhere_can_ask_without_asking_for_leave(service, kind):
    assert service.post(json.dumps(ASK), content_type=kind).status == 415
    reply = service.send("OPTIONS", "/v1/answer", Origin="http://evil.example", Access_Control_Request_Method="POST")
    assert reply.status == 405
    assert not [name for name in reply.headers if name.startswith("access-control")]


def test_paths_and_methods_that_are_not_there(service):
    assert service.get("/docs").status == service.get("/../etc/passwd").status == 404
    assert service.get("/v1/answer").status == 405
    assert service.get("/docs").code == "not_found"


@pytest.mark.parametrize("path", [path for path in app.PATHS if path != "/v1/answer"])
def test_head_is_answered_as_get_is_without_a_body(service, path):
    reply, got = service.send("HEAD", path), service.get(path)
    assert reply.status == 200
    assert reply.headers["content-type"] == got.headers["content-type"]
    assert int(reply.headers["content-length"]) > 0
    with socket.create_connection(("127.0.0.1", service.port), timeout=30) as client:
        client.sendall(f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        assert b"".join(iter(lambda: client.recv(1 << 16), b"")).endswith(b"\r\n\r\n")


def test_head_is_no_way_around_the_guard():
    with live(hosts=["localhost"]) as service:
        for path, host, status in (("/healthz", "evil.example", 400), ("/v1/answer", "localhost", 405)):
            assert service.send("HEAD", path, Host=host).status == status
        service.service.engine.close()
        assert service.send("HEAD", "/readyz", Host="localhost").status == 503


# --- what strangers are shown


def test_every_response_has_the_security_headers(service):
    replies = [service.get(path) for path in ("/", "/page.js", "/page.css", "/v1/run", "/metrics", "/none")]
    for reply in [*replies, service.ask(**ASK), service.ask()]:
        assert "default-src 'none'" in reply.headers["content-security-policy"]
        assert "unsafe" not in reply.headers["content-security-policy"]
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["x-frame-options"] == "DENY"
        assert reply.headers["cache-control"] == "no-store"
        assert not {"server", "access-control-allow-origin"} & set(reply.headers)


@pytest.mark.parametrize("host", ["localhost:8000", "[::1]:8000", "::1", "ask.example.org:443"])
def test_a_host_that_is_allowed_may_be_written_with_a_port(host):
    with live(hosts=[host]) as service:
        bare = host.rpartition(":")[0] if host != "::1" else "[::1]"
        for given in (bare, f"{bare}:1234"):
            assert service.get("/healthz", Host=given).status == 200
        assert service.get("/healthz", Host="evil.example").status == 400


def test_the_host_must_be_one_of_those_allowed():
    with live(hosts=("localhost", "127.0.0.1", "::1")) as service:
        for host in ("localhost:80", "LOCALHOST", "127.0.0.1", "[::1]:8000"):
            assert service.get("/healthz", Host=host).status == 200
        for host in ("evil.example", "localhost.evil.example", ""):
            reply = service.get("/healthz", Host=host)
            assert (reply.status, reply.code) == (400, "host")


def test_a_mistake_of_ours_shows_no_traceback_and_nobodys_text(fresh, capfd, monkeypatch):
    def mistaken(self, ask):
        raise LookupError(f"the secret {ask.question}")

    monkeypatch.setattr(Asker, "ready", mistaken)
    reply = fresh.ask(**ASK)
    assert (reply.status, reply.code) == (500, "internal")
    assert "secret" not in reply.body.decode()
    assert "Traceback" not in reply.body.decode()
    until(lambda: fresh.said)
    (said,) = fresh.said
    assert said.startswith("A request failed: LookupError in test_app.py, line ")
    shown = capfd.readouterr()
    assert "secret" not in said + shown.out + shown.err
    assert "Narfan" not in said + shown.out + shown.err
    assert fresh.service.engine.waiting == 0


def test_what_is_served_is_said_without_paths_of_the_machine(service):
    about = service.get("/v1/run")
    assert about.json["task"] == "four_choices"
    assert about.json["limits"]["queue"] == 256
    assert str(trained().parent) not in about.body.decode()
    assert "/" not in about.json["model"]


def test_the_schema_describes_the_request(service):
    schema = service.get("/openapi.json").json
    body = schema["paths"]["/v1/answer"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"question", "answers", "questions", "rows", "tau", "risk", "cut", "draws"} <= set(body["properties"])


# --- metrics


def test_metrics_count_right(held):
    service, held, first = held
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(service.ask, rows=task_rows()[:4])
        until(lambda: service.service.engine.waiting == 4)
        assert service.ask(**ASK, risk=0.0).status == 503
        held.go.set()
        assert waiting.result().status == first.result().status == 200
    assert service.ask(**ASK, risk=0.0).status == 200  # nothing is that sure
    assert service.ask().status == 422
    for path in ("/none", "/nowhere"):
        service.get(path)
    text = service.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain")
    lines = dict(line.rsplit(" ", 1) for line in text.body.decode().splitlines() if not line.startswith("#"))
    numbers = {name.removeprefix("varlora_serve_"): float(value) for name, value in lines.items()}
    for status, count in {"200": 3, "503": 1, "422": 1}.items():
        assert numbers[f'requests_total{{path="/v1/answer",status="{status}"}}'] == count
    assert numbers['requests_total{path="other",status="404"}'] == 2
    assert numbers['request_seconds_count{path="/v1/answer"}'] == 5
    assert numbers['rows_total{outcome="answered"}'] == 6
    assert numbers['rows_total{outcome="failed"}'] == numbers['rows_total{outcome="dropped"}'] == 0
    assert numbers["abstained_rows_total"] == 1
    assert numbers["queue_rows"] == 0
    assert (numbers["batch_rows_count"], numbers["batch_rows_sum"]) == (3, 6)
    assert numbers['batch_rows_bucket{le="1.0"}'] == 2
    assert numbers["batch_seconds_count"] == 3
    assert numbers["queue_seconds_count"] == 6


def test_what_waits_keeps_its_tokens_and_not_its_texts(held):
    service, held, _ = held
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(service.ask, rows=[*task_rows()[:3], {"id": "wrong"}])
        until(lambda: service.service.engine.waiting == 3)
        until(lambda: not [one for one in gc.get_objects() if type(one) is Ask], seconds=10)
        held.go.set()
        assert waiting.result().json["results"][3]["id"] == "wrong"


def test_large_responses_are_made_beside_the_event_loop(service, monkeypatch):
    threads = []
    own = app._answered

    def noted(*given):
        threads.append(threading.current_thread())
        return own(*given)

    monkeypatch.setattr(app, "_answered", noted)
    reply = service.ask(rows=task_rows()[:64])
    assert len(reply.json["results"]) == 64
    assert service.ask(**ASK).status == 200
    assert threads[0] is not threads[1]


def test_a_service_that_is_closed_leaves_no_thread():
    def own():
        return {thread for thread in threading.enumerate() if thread.name.startswith("varlora-")}

    before = own()
    with live() as service:
        assert service.ask(**ASK).status == 200
        assert {thread.name for thread in own() - before} == {"varlora-engine", "varlora-tokenizer_0"}
    assert own() == before


def test_services_do_not_share_their_counts():
    services = [make_service(loaded(), trained(), say=silent) for _ in range(2)]
    services[0].counters.rows("answered", 5)
    found = [
        one.counters.registry.get_sample_value("varlora_serve_rows_total", {"outcome": "answered"}) for one in services
    ]
    assert found == [5, 0]
    for one in services:
        one.close()


def test_connections_are_kept(service):
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=30)
    statuses = Counter()
    for _ in range(5):
        connection.request("POST", "/v1/answer", json.dumps(ASK), {"Content-Type": "application/json"})
        sock = connection.sock
        response = connection.getresponse()
        response.read()
        statuses[response.status] += 1
        assert connection.sock is sock
    assert statuses == {200: 5}
    connection.close()


def test_if_all_rows_fail_the_worst_is_the_status(fresh):
    fresh.service.engine.draw = lambda rows, use: numbered_by_length(rows, use) + torch.inf
    reply = fresh.ask(questions=[{"question": "?", "answers": []}, ASK])
    assert [one["error"]["code"] for one in reply.json["results"]] == ["answers", "not_finite"]
    assert reply.status == 500


def test_more_bodies_at_a_time_than_are_read_are_503():
    with live(limits=Limits(body_seconds=60, max_reading=1)) as service:
        with socket.create_connection(("127.0.0.1", service.port), timeout=30) as slow:
            head = "POST /v1/answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            slow.sendall(f"{head}Content-Length: 2\r\n\r\n{{".encode())
            until(lambda: service.ask(**ASK).status == 503, seconds=20)
            reply = service.ask(**ASK)
            assert (reply.status, reply.code) == (503, "busy")
            assert reply.headers["retry-after"] == "1"
            slow.sendall(b"}")
            assert slow.recv(1000).startswith(b"HTTP/1.1 422")
        assert service.ask(**ASK).status == 200


def test_a_body_without_an_end_is_not_read_for_long():
    with live(limits=Limits(body_seconds=60, max_body=1000)) as service:
        with socket.create_connection(("127.0.0.1", service.port), timeout=20) as client:
            head = "POST /v1/answer HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
            for _ in range(9):
                client.sendall(b"3e8\r\n" + b"x" * 1000 + b"\r\n")  # and none that ends it
            assert client.recv(1000).startswith(b"HTTP/1.1 413")


@pytest.fixture(scope="module")
def held_out_run(tmp_path_factory):
    """A run with predictions of its held-out rows."""
    run_dir = shutil.copytree(trained(), tmp_path_factory.mktemp("held-out") / "run")
    evaluate(run_dir, split="calibration", say=silent)
    return run_dir


def test_a_calibrated_run_keeps_no_risk_on_rows_that_were_drawn_without_what_was_chosen(held_out_run):
    """Also where as many draws were chosen."""
    chosen = dataclasses.replace(loaded(), calibration=Calibration(0.5, 0.1, 1.7, 1.2, 10))
    with live(held_out_run, chosen, risk=0.5) as service:
        reply = service.ask(**ASK).json
        assert reply["calibrated"] is True
        assert reply["risk"] == {"target": 0.5, "confidence": 0.5, "held_out": 0}
        assert service.get("/v1/run").json["held_out"] == 0


def test_a_calibrated_run_is_drawn_as_was_chosen():
    run, rows = loaded(), task_rows()[:4]
    chosen = dataclasses.replace(run, calibration=Calibration(1.0, 0.0, 1.0, 1.0, 4, 1, "latin"))
    with live(run=chosen) as service:
        same_numbers(service.ask(rows=rows).json["results"], expected(rows, chosen))
    plain = dataclasses.replace(run, calibration=Calibration(1.0, 0.0, 1.0, 1.0, 4))
    assert expected(rows, plain)[0]["probabilities"] != pytest.approx(
        expected(rows, chosen)[0]["probabilities"], abs=1e-4
    )


def test_held_out_rows_without_labels_keep_no_risk(held_out_run, tmp_path):
    run_dir = shutil.copytree(held_out_run, tmp_path / "run")
    path = run_dir / "predictions-calibration.safetensors"
    found = load_predictions(path)
    labels = found.labels.clone()
    labels[0] = -1
    save_predictions(dataclasses.replace(found, labels=labels), path)
    with live(run_dir, risk=0.5) as service:
        assert service.ask(**ASK).json["risk"] == {"target": 0.5, "confidence": 0.5, "held_out": 0}


@pytest.mark.parametrize("hosts", ["", "Host: localhost\r\nHost: evil.example\r\n"])
def test_a_request_names_one_host(hosts):
    with live(hosts=["localhost"]) as service:
        with socket.create_connection(("127.0.0.1", service.port), timeout=30) as client:
            client.sendall(f"GET /healthz HTTP/1.0\r\n{hosts}\r\n".encode())
            assert client.recv(1000).startswith(b"HTTP/1.1 400")
