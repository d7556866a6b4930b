"""Ask every draw of an exported posterior on a server, and average the probabilities. Standard library only.

`varlora export` puts a copy of this file beside `manifest.json`; it needs neither varlora nor torch:

    python client.py --prompt "Is water wet? Answer:" --answers False True
    python client.py --input questions.jsonl --url http://localhost:8000/v1

Each question goes to each draw's adapter for one token. The logarithms of the probabilities of the answers' first
tokens are read from the reply, divided by the temperature and made probabilities of the answers by a softmax: those of
the draws are averaged, never their logarithms. Each line of output has answer, probabilities and uncertainty in nats,
or the error of a question that has no answer; the exit status is 1 then.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

__all__ = ["Failure", "Server", "ask", "combine", "main"]

NEUTRAL = {
    "temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
}  # fmt: skip
"""A server may have other defaults from the base's generation_config.json, and some read probabilities after these."""
LEAST = -9999.0
"""What vLLM sends for every logarithm below it, -inf too: the answer's probability is 0, or all answers overflow."""
INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""
URLS = {"openai": "http://localhost:8000/v1", "sglang": "http://localhost:30000"}


class Failure(Exception):
    """What went wrong, for the user to mend."""


class _Direct(urllib.request.HTTPRedirectHandler):
    """No redirects: what is asked, and the key with it, goes to the server that the user named and to no other."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        raise Failure(f"{req.full_url} answered {code}: go to {newurl}. If that is the server, give it as --url.")


class Server:
    """Where the adapters are served.

    Args:
        url: of vLLM or another OpenAI-compatible server, with `/v1`; of SGLang without.
        api: `openai`: the completions API (chat completions for an adapter that was trained with a chat template);
            `sglang`: SGLang's own `/generate`, which tells tokens by their numbers.
        logprobs: how many of the likeliest tokens to ask for, where a server cannot be asked for tokens by number.
        prefix: what the server puts before an adapter's name (`BASE:` in SGLang's OpenAI-compatible API).
        timeout: seconds to wait for a reply.
        key: sent as the bearer's; None: none.
    """

    def __init__(
        self,
        url: str,
        api: str = "openai",
        logprobs: int = 20,
        prefix: str = "",
        timeout: float = 120.0,
        key: str | None = None,
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise Failure(f"Expected a URL that begins with http:// or https://, but got {url!r}.")
        self.url, self.api, self.logprobs, self.prefix, self.timeout = url.rstrip("/"), api, logprobs, prefix, timeout
        self.headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self.opener = urllib.request.build_opener(_Direct)

    def logprobs_of(self, adapter: str, prompt: str, tokens: Sequence[Mapping[str, Any]], chat: bool) -> list[float]:
        """Return the logarithm of the probability of each answer's token as the next one.

        It is -inf where the server says that it is too small to tell.

        Args:
            adapter: its name on the server.
            prompt: what to ask.
            tokens: of the manifest: `answer`, `id`, `text` and `shared`, whether another token has the same text.
            chat: put the prompt through the chat template.
        """
        ids = [token["id"] for token in tokens]
        if self.api == "sglang":
            if chat:
                raise Failure(
                    "SGLang's /generate knows no chat template, and this adapter was trained with one. "
                    "Use --api openai --url http://localhost:30000/v1 --prefix BASE: in its place."
                )
            sampling = {**NEUTRAL, "max_new_tokens": 1}
            body = {"text": prompt, "sampling_params": sampling, "lora_path": adapter, "return_logprob": True}
            reply = self._post("/generate", {**body, "token_ids_logprob": ids, "logprob_start_len": -1})
            try:
                found = {
                    f"token_id:{entry[1]}": entry[0] for entry in reply["meta_info"]["output_token_ids_logprobs"][0]
                }
            except (KeyError, IndexError, TypeError) as error:
                raise Failure(f"{self.url} sent no probabilities of the tokens asked for: {_short(reply)}") from error
        else:
            found = self._openai(adapter, prompt, ids, chat)
        return self._of_answers(found, tokens, adapter)

    def _openai(self, adapter: str, prompt: str, ids: Sequence[int], chat: bool) -> dict[str, float]:
        """Ask by the completions API; what a server does not know of the request it ignores."""
        body: dict[str, Any] = {**NEUTRAL, "model": self.prefix + adapter, "max_tokens": 1, "allowed_token_ids": ids}
        body |= {"logprob_token_ids": ids, "return_tokens_as_token_ids": True}
        try:
            if chat:
                body |= {"messages": [{"role": "user", "content": prompt}], "logprobs": True}
                reply = self._post("/chat/completions", {**body, "top_logprobs": self.logprobs})
                entry = reply["choices"][0]["logprobs"]["content"][0]
                return {each["token"]: each["logprob"] for each in [entry, *entry["top_logprobs"]]}
            reply = self._post("/completions", {**body, "prompt": prompt, "logprobs": self.logprobs})
            return dict(reply["choices"][0]["logprobs"]["top_logprobs"][0])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise Failure(f"{self.url} sent a reply without `top_logprobs`: {_short(reply)}") from error

    def _of_answers(self, found: Mapping[str, float], tokens: Sequence[Mapping[str, Any]], adapter: str) -> list[float]:
        by_number = any(name.startswith("token_id:") for name in found)
        values, missing = [], []
        for token in tokens:
            name = f"token_id:{token['id']}" if by_number else token["text"]
            if not by_number and token["shared"]:
                raise Failure(
                    f"The server tells tokens by their text, and {token['text']!r} is the text of several of them. "
                    "Ask a server that tells them by number: vLLM, or SGLang with --api sglang."
                )
            if name in found:
                values.append(found[name])
            else:
                missing.append(token["answer"])
        if missing:
            raise Failure(
                f"The reply of {adapter} lacks {', '.join(map(repr, missing))}: it has {len(found)} likeliest tokens. "
                f"Raise --logprobs (it is {self.logprobs}), and the server's limit with it (`vllm serve "
                "--max-logprobs N`). Newer versions of vLLM are asked for the answers alone (`logprob_token_ids`) and "
                "leave none out; older ones do so after `vllm serve --logprobs-mode processed_logprobs` "
                "(`allowed_token_ids`); SGLang does with --api sglang."
            )
        numbers = all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)
        if not (numbers and max(values) > LEAST):
            raise Failure(
                f"Expected logarithms of probabilities from {adapter}, but got {_short(values)}: its logits overflow, "
                "probably. Serve it with --dtype bfloat16 or float32."
            )
        return [value if value > LEAST else -math.inf for value in values]

    def _post(self, path: str, body: Mapping[str, Any]) -> Any:
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), self.headers)
        try:
            with self.opener.open(request, timeout=self.timeout) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            text = error.read(2000).decode(errors="replace")
            raise Failure(f"{self.url}{path} answered {error.code}: {_short(text)}") from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise Failure(f"{self.url}{path} cannot be asked: {error}. Is the server running?") from error


def _short(value: Any) -> str:
    return " ".join(str(value).split())[:300]


def ask(
    manifest: Mapping[str, Any], server: Server, prompt: str, answers: Sequence[str] | None = None
) -> dict[str, Any]:
    """Return the most probable answer, all probabilities and the uncertainty in nats.

    Args:
        manifest: what `manifest.json` holds.
        server: where the adapters are served.
        prompt: what to ask, as in training.
        answers: those of this question; left out: those of all questions, if these are the same.
    """
    tokens = _tokens(manifest, prompt, answers)
    draws = manifest["draws"]
    pool = ThreadPoolExecutor(max_workers=min(16, len(draws)))
    try:
        asked = [pool.submit(server.logprobs_of, draw["name"], prompt, tokens, manifest["chat"]) for draw in draws]
        logprobs = [_result(each) for each in asked]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # after a failure no reply is waited for
    temperatures, weights = ([draw[name] for draw in draws] for name in ("temperature", "weight"))
    averaged, uncertainty = combine(logprobs, temperatures, weights)
    probabilities = {token["answer"]: p for token, p in zip(tokens, averaged)}
    best = max(probabilities, key=lambda answer: probabilities[answer])
    return {"answer": best, "probabilities": probabilities, "uncertainty": uncertainty}


def _result(future: Future[list[float]]) -> list[float]:
    """Wait in short spells: a Ctrl-C in the moment before a wait begins is heard only when that ends."""
    while not future.done():
        wait([future], timeout=0.5)
    return future.result()


def _tokens(manifest: Mapping[str, Any], prompt: str, answers: Sequence[str] | None) -> Sequence[Mapping[str, Any]]:
    """Return the tokens that begin the answers after a prompt, which may end in white space, or in a chat template."""
    after_space = not manifest["chat"] and prompt[-1:].isspace()
    known = [one for one in manifest["answers"] if one[0]["after_space"] == after_space]
    fitting = [one for one in known if answers is None or [token["answer"] for token in one] == list(answers)]
    if len(fitting) == 1:
        return fitting[0]
    listed = "; ".join(", ".join(token["answer"] for token in one) for one in known) or "none"
    given = "none" if answers is None else list(answers)
    raise Failure(
        f"Expected `answers` that the export knows the tokens of, but got {given}. "
        f"Known: {listed}. Export again with `--answers` for others."
    )


def combine(
    logprobs: Sequence[Sequence[float]], temperatures: Sequence[float], weights: Sequence[float]
) -> tuple[list[float], dict[str, float]]:
    """Return the weighted average of the draws' probabilities, and its uncertainty in nats.

    Args:
        logprobs: (S, C): of each answer, up to a constant of the draw.
        temperatures: (S,): what each draw's are divided by.
        weights: (S,): share of each draw; they need not sum to 1.

    Example:
        >>> agreed, parts = combine([[0.0, 0.0], [0.0, -99.0]], [1.0, 1.0], [1, 1])
        >>> agreed, round(parts["epistemic"], 2)
        ([0.75, 0.25], 0.22)
    """
    draws = [_softmax([value / temperature for value in row]) for row, temperature in zip(logprobs, temperatures)]
    shares = [weight / math.fsum(weights) for weight in weights]
    average = [math.fsum(share * draw[c] for share, draw in zip(shares, draws)) for c in range(len(draws[0]))]
    total = _entropy(average)
    aleatoric = math.fsum(share * _entropy(draw) for share, draw in zip(shares, draws))
    return average, {"total": total, "aleatoric": aleatoric, "epistemic": max(0.0, total - aleatoric)}


def _softmax(values: Sequence[float]) -> list[float]:
    powers = [math.exp(value - max(values)) for value in values]
    return [power / math.fsum(powers) for power in powers]


def _entropy(probabilities: Sequence[float]) -> float:
    return -math.fsum(p * math.log(p) for p in probabilities if p > 0)


def _lines(arguments: argparse.Namespace) -> list[str]:
    """Return the questions, a JSON object a line."""
    if arguments.prompt is not None:
        return [json.dumps({"id": "0", "prompt": arguments.prompt})]
    try:
        if arguments.input == "-":
            return sys.stdin.readlines()
        return Path(arguments.input).read_text("utf-8").split("\n")  # JSON's texts may hold the other line ends
    except (OSError, UnicodeDecodeError) as error:
        raise Failure(f"{arguments.input} cannot be read: {error}") from error


def _question(line: str) -> tuple[str, list[str] | None]:
    """Return prompt and answers of a line."""
    try:
        row = json.loads(line)
        prompt, answers = row["prompt"], row.get("answers")
        texts = [prompt, *(answers or ())]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        texts = [None]
    if not all(isinstance(text, str) for text in texts) or not isinstance(answers, (list, type(None))):
        raise Failure(f'Expected {{"prompt": ..., "answers": [...]}}, all of it text, but got {line.strip()[:80]!r}.')
    return prompt, answers


def _id(line: str, number: int) -> str:
    """Return what a question is called in the output: its id, or else its place."""
    try:
        return str(json.loads(line).get("id", number))
    except (ValueError, AttributeError, RecursionError):
        return str(number)


def _key(name: str | None) -> str | None:
    """Return the key that the environment holds by a name."""
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise Failure(f"Expected a key in the environment by the name {name}, but there is none, or no plain text.")
    return key


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(description="Ask every draw of an exported posterior and average.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", help="a question, as in training")
    what.add_argument("--input", help='JSON lines of {"prompt": ..., "answers": [...]}; - is standard input')
    parser.add_argument("--answers", nargs="+", help="the answers, where the questions do not give them")
    parser.add_argument("--api", choices=("openai", "sglang"), default="openai", help="default: openai, as vLLM's")
    parser.add_argument("--url", help=f"default: {URLS['openai']}, or {URLS['sglang']} for sglang")
    parser.add_argument("--prefix", default="", help="what the server puts before an adapter's name")
    parser.add_argument("--logprobs", type=int, default=20, help="likeliest tokens to ask for (default: 20)")
    parser.add_argument("--api-key-env", metavar="NAME", help="variable with a key for the server (default: no key)")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds (default: 120)")
    parser.add_argument("--manifest", type=Path, default=Path(__file__).with_name("manifest.json"))
    arguments = parser.parse_args(argv)
    url = arguments.url or URLS[arguments.api]
    failed = False
    try:
        try:
            manifest = json.loads(arguments.manifest.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise Failure(f"{arguments.manifest} cannot be read: {error}") from error
        key = _key(arguments.api_key_env)
        server = Server(url, arguments.api, arguments.logprobs, arguments.prefix, arguments.timeout, key)
        for number, line in enumerate(_lines(arguments)):
            if not line.strip():
                continue
            try:
                prompt, answers = _question(line)
                found = ask(manifest, server, prompt, arguments.answers if answers is None else answers)
            except Failure as failure:
                found, failed = {"error": str(failure)}, True
                print(f"error: line {number + 1}: {failure}", file=sys.stderr)
            print(json.dumps({"id": _id(line, number), **found}), flush=True)
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of our output has left
        return 1
    return int(failed)


if __name__ == "__main__":
    status = main()
    if status == INTERRUPTED:
        os._exit(status)  # an ordinary exit would wait for the replies that are still to come
    sys.exit(status)
