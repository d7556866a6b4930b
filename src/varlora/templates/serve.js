"use strict";

const $ = (id) => document.getElementById(id);
const form = $("ask");
const calibrated = $("calibrated");
const percent = (p, digits = 1) => `${(100 * p).toFixed(digits)} %`;
let tau = null; // chosen here; null: the service's own, which the slider may be too short for
let asking = null; // the latest question: earlier ones are aborted

function shown() {
  $("tau").disabled = Boolean(calibrated && calibrated.checked);
  const value = tau ?? Number(form.dataset.tau);
  const text = Number(value.toFixed(2)) === value ? value.toFixed(2) : String(value);
  $("tau-shown").textContent = calibrated && tau === null ? "as calibrated" : text;
}

function request() {
  const found = {
    question: $("question").value,
    answers: $("answers").value.split("\n").map((line) => line.trim()).filter(Boolean),
    draws: true,
  };
  if (tau !== null) found.tau = tau;
  if ($("risk").value !== "") found.risk = Number($("risk").value) / 100;
  return found;
}

async function ask() {
  if (asking) asking.abort(); // so that nobody works for an answer that is not shown
  const mine = asking = new AbortController();
  $("status").textContent = "The draws are asked …";
  form.setAttribute("aria-busy", "true");
  try {
    const reply = await fetch("v1/answer", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(request()),
      signal: mine.signal,
    });
    const found = await reply.json();
    if (mine !== asking) return;
    if (!reply.ok) throw new Error(found.error.message);
    $("problem").hidden = true;
    show(found);
    $("status").textContent = "";
  } catch (error) {
    if (mine !== asking) return;
    $("problem").textContent = error instanceof TypeError ? "The service does not answer." : error.message;
    $("problem").hidden = false;
    $("result").hidden = true;
    $("status").textContent = "";
  } finally {
    if (mine === asking) form.removeAttribute("aria-busy");
  }
}

function show(found) {
  const [one] = found.results;
  const p = one.probabilities[one.answer];
  $("answer").textContent = `${one.answer}: ${percent(p)}`;
  const advice = $("advice");
  advice.className = one.abstain ? "abstain" : "";
  advice.textContent = advised(one, found.risk, p);
  const count = found.samples;
  $("caption").textContent = count > 1
    ? `Bar and blue line: the average of ${count} draws. Circles: each draw. Line: the middle 90 % of them.`
    : "One model answers: nothing was drawn.";
  const rows = Object.keys(one.probabilities).map((answer) => row(answer, one, count > 1));
  $("bars").tBodies[0].replaceChildren(...rows);
  for (const name of ["total", "aleatoric", "epistemic"]) {
    $(name).textContent = `${one.uncertainty[name].toFixed(3)} nats`;
  }
  $("result").hidden = false;
}

function advised(one, risk, p) {
  if (!risk) return "";
  const source = risk.held_out ? `${risk.held_out} held-out rows` : "the expected error";
  const target = `a risk of ${percent(risk.target)}`;
  if (risk.confidence === null) return `Better abstain: no confidence is enough for ${target}, by ${source}.`;
  const needs = `${target} needs ${percent(risk.confidence)}, by ${source}`;
  return one.abstain ? `Better abstain: ${needs}; this answer has ${percent(p)}.` : `Sure enough: ${needs}.`;
}

function row(answer, one, drawn) {
  const p = one.probabilities[answer];
  const { low, high } = one.spread[answer];
  const bar = document.createElement("div");
  bar.className = "bar";
  bar.setAttribute("aria-hidden", "true"); // the numbers beside say the same
  bar.append(mark("fill", 0, p), ...(drawn ? [mark("range", low, high)] : []));
  if (drawn) bar.append(...one.draws[answer].slice(0, 256).map((q) => mark("dot", q)));
  bar.append(mark("mean", p));
  const made = document.createElement("tr");
  if (answer === one.answer) made.className = "best";
  const name = document.createElement("th");
  name.scope = "row";
  name.textContent = answer;
  made.append(name, cell("track", bar), cell("n", percent(p)));
  made.append(cell("n", drawn ? `${(100 * low).toFixed(1)}–${percent(high)}` : "–"));
  return made;
}

function mark(kind, from, to) {
  const made = document.createElement("i");
  made.className = kind;
  made.style.left = `${100 * from}%`;
  if (to !== undefined) made.style.width = `${100 * (to - from)}%`;
  return made;
}

function cell(kind, content) {
  const made = document.createElement("td");
  made.className = kind;
  made.append(content);
  return made;
}

$("tau").value = form.dataset.tau;
if (form.dataset.risk !== "") $("risk").value = 100 * Number(form.dataset.risk);
const query = new URLSearchParams(location.search);
if (query.has("question")) $("question").value = query.get("question");
if (query.has("answers")) $("answers").value = query.getAll("answers").join("\n");
if (query.has("risk")) $("risk").value = 100 * Number(query.get("risk"));
if (query.has("tau")) {
  tau = Number(query.get("tau"));
  $("tau").value = tau;
  if (calibrated) calibrated.checked = false;
}
shown();
form.addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
let later;
form.addEventListener("input", (event) => {
  if (event.target === $("tau")) tau = Math.round(100 * $("tau").value) / 100;
  if (event.target === calibrated) tau = calibrated.checked ? null : Number($("tau").value);
  shown();
  const changes = event.target === $("tau") || event.target === calibrated || event.target === $("risk");
  if (!changes || $("result").hidden) return;
  clearTimeout(later);
  later = setTimeout(ask, 150);
});
const from = document.referrer; // a link elsewhere fills the form in, and leaves it to the visitor to ask
if (query.has("run") && (!from || new URL(from).origin === location.origin)) form.requestSubmit();
