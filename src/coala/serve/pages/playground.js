// The playground: two streams beside each other, the head's score after every token, the best of N. Whatever a model
// wrote reaches the page as text (textContent), never as markup.
"use strict";

const SHADES = 9;
const $ = (id) => document.getElementById(id);
const { model, unguided } = document.body.dataset;
let running = null;

function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  if ($("key")) headers.Authorization = `Bearer ${$("key").value}`;
  return fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal }).then(async (answer) => {
    if (answer.ok) return answer;
    const said = await answer.json().catch(() => ({}));
    const after = answer.headers.get("Retry-After");
    throw new Error(said.error?.message ?? `The server answered ${answer.status}.${after ? ` Try again in ${after} s.` : ""}`);
  });
}

// Calls onEvent with each object of a stream of server-sent events.
async function events(answer, onEvent) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      onEvent(event);
    }
  }
}

function asked(more) {
  return {
    messages: [{ role: "user", content: $("prompt").value }],
    max_completion_tokens: Number($("tokens").value),
    temperature: Number($("temperature").value),
    seed: Number($("seed").value),
    ...more,
  };
}

async function stream(side, body, signal) {
  const card = $(side);
  const text = card.querySelector(".reply");
  card.setAttribute("aria-busy", "true");
  let reply = "";
  let score = null;
  try {
    await events(await post("/v1/chat/completions", { ...body, stream: true }, signal), (event) => {
      const choice = event.choices[0];
      if (!choice) return;
      reply += choice.delta.content ?? "";
      text.textContent = reply;
      if (choice.coala) score = choice.coala.score;
    });
  } finally {
    card.setAttribute("aria-busy", "false");
  }
  if (score !== null) {
    const shown = card.querySelector(".score");
    shown.textContent = `score ${score.toFixed(3)}`;
    shown.hidden = false;
  }
  return reply;
}

// The strips of both replies on one scale, so that a colour means the same in both.
async function heat(replies, signal) {
  const sides = Object.keys(replies).filter((side) => replies[side]);
  if (!sides.length) return;
  const body = { model, prompt: asked().messages, replies: sides.map((side) => replies[side]), positions: true };
  const { data } = await (await post("/v1/score", body, signal)).json();
  const all = data.flatMap((one) => one.positions.map((position) => position.score));
  const low = Math.min(...all);
  const high = Math.max(...all);
  sides.forEach((side, i) => {
    const card = $(side);
    const pieces = data[i].positions.map((position) => {
      const piece = document.createElement("span");
      const share = high > low ? (position.score - low) / (high - low) : 0.5;
      piece.className = `h${Math.min(SHADES - 1, Math.floor(share * SHADES))}`;
      piece.title = position.score.toFixed(3);
      piece.textContent = position.text;
      return piece;
    });
    card.querySelector(".strip").replaceChildren(...pieces);
    card.querySelector(".low").textContent = low.toFixed(3);
    card.querySelector(".high").textContent = high.toFixed(3);
    card.querySelector(".heat").hidden = false;
  });
}

async function compare(signal) {
  $("replies").hidden = false;
  for (const card of document.querySelectorAll(".side")) {
    card.querySelector(".reply").textContent = "";
    card.querySelector(".strip").replaceChildren();
    for (const part of card.querySelectorAll(".score, .heat")) part.hidden = true;
  }
  const strength = Number($("strength").value);
  const how = ranks() ? "" : `, strength ${strength}`;
  $("how").textContent = `Mode ${$("mode").value}${how}, seed ${$("seed").value}.`;
  const guidance = { mode: $("mode").value, strength };
  const wanted = { unguided: asked({ model: unguided }), guided: asked({ model, guidance }) };
  const names = Object.keys(wanted);
  const done = await Promise.allSettled(names.map((side) => stream(side, wanted[side], signal)));
  const failed = done.find((one) => one.status === "rejected");
  if (failed) throw failed.reason;
  await heat(Object.fromEntries(names.map((side, i) => [side, done[i].value])), signal);
}

async function best(signal) {
  const n = Number($("n").value);
  const answer = await post("/v1/chat/completions", asked({ model, guidance: "none", n, best_of: n }), signal);
  const choices = (await answer.json()).choices.sort((a, b) => (b.coala.score ?? -Infinity) - (a.coala.score ?? -Infinity));
  const rows = choices.map((choice, place) => {
    const row = document.createElement("tr");
    const amounts = [choice.coala.score, choice.coala.log_prob].map((value) => (value === null ? "" : value.toFixed(3)));
    [String(place + 1), ...amounts, choice.message.content].forEach((text, column) => {
      const cell = document.createElement("td");
      cell.className = ["amount", "amount", "amount", "text"][column];
      cell.textContent = text;
      if (column === 3) cell.dir = "auto";
      row.append(cell);
    });
    if (!place) row.className = "selected";
    return row;
  });
  $("table").querySelector("tbody").replaceChildren(...rows);
  $("table").hidden = false;
}

async function run(work) {
  if (running || !$("ask").reportValidity()) return;
  running = new AbortController();
  $("problem").hidden = true;
  for (const id of ["compare", "best"]) $(id).disabled = true;
  $("stop").disabled = false;
  try {
    await work(running.signal);
  } catch (error) {
    if (error.name !== "AbortError") {
      $("problem").textContent = error.message;
      $("problem").hidden = false;
    }
  } finally {
    running = null;
    for (const id of ["compare", "best"]) $(id).disabled = false;
    $("stop").disabled = true;
  }
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  run(compare);
});
$("best").addEventListener("click", () => run(best));
$("stop").addEventListener("click", () => running?.abort());
// Where the best of samples is kept whatever its lead there is no strength: moving it asks for a mode that has one.
const ranks = () => document.body.dataset.rule !== "calibrated" && ["block", "best_of"].includes($("mode").value);
const showStrength = () => {
  $("strength").classList.toggle("idle", ranks());
  $("strength-shown").value = ranks() ? "does nothing here" : $("strength").value;
};
$("strength").addEventListener("input", () => {
  if (ranks()) $("mode").value = "token";
  showStrength();
});
// The strength of the distilled policy is of another kind: 1 is the policy itself.
let strength = $("strength").value, mode = $("mode").value;
$("mode").addEventListener("change", () => {
  if ($("mode").value === "distilled") [strength, $("strength").value] = [$("strength").value, 1];
  else if (mode === "distilled") $("strength").value = strength;
  mode = $("mode").value;
  showStrength();
});
showStrength();
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});
