// A pair, a verdict, the next pair. What a model or a rater wrote reaches the page as text, never as markup. A click is
// kept in this browser until the server says that it is on its disk; sent twice, it counts once.
"use strict";

const $ = (id) => document.getElementById(id);
const here = `/r/${document.body.dataset.token}`;
const kept = `coala-live ${here}`;
const OFTEN = 1000;
const SELDOM = 5000;
let shown = null; // the id of the question on the page
let last = null; // what an undo takes back
let busy = false;
let side = ""; // the reply that is being edited
let next = 0;

const newId = () => Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");

class Refused extends Error {}

async function ask(path, body) {
  const how = body ? { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) } : {};
  const answer = await fetch(here + path, how);
  const said = await answer.json().catch(() => ({}));
  if (answer.ok) return said;
  throw new Refused(said.error?.message ?? `The server answered ${answer.status}.`);
}

function tell(problem) {
  $("problem").textContent = problem;
  $("problem").hidden = !problem;
}

function fill(list, rows) {
  list.replaceChildren(
    ...rows.map(({ name, value, how }) => {
      const [both, term, told, note] = ["div", "dt", "dd", "small"].map((tag) => document.createElement(tag));
      term.textContent = name;
      told.textContent = value;
      note.textContent = how;
      told.append(note);
      both.append(term, told);
      return both;
    }),
  );
}

const STATES = { running: ["At work:", "open"], done: ["Done.", "yes"], failed: ["Failed.", "no"], interrupted: ["Interrupted.", "open"] };

// Only what is new is written: a status is read aloud whenever it changes.
function put(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function showJob(line, { state, said, since, commands }) {
  const [word, kind] = STATES[state];
  const told = line.querySelector(".told");
  told.hidden = false;
  told.querySelector(".verdict").className = `verdict ${kind}`;
  for (const [part, text] of [["verdict", word], ["said", said], ["since", since]]) put(told.querySelector(`.${part}`), text);
  const list = line.querySelector(".commands");
  if (list.dataset.shown === JSON.stringify(commands)) return;
  list.dataset.shown = JSON.stringify(commands);
  list.replaceChildren(
    ...commands.flatMap(([typed, why]) => {
      const [term, block, code, note] = ["dt", "pre", "code", "dd"].map((tag) => document.createElement(tag));
      code.textContent = typed;
      block.className = "command";
      block.append(code);
      term.append(block);
      note.textContent = why;
      return [term, note];
    }),
  );
}

function show(state) {
  const question = state.question;
  last = state.last;
  $("undo").disabled = !last;
  $("answered").value = state.answered;
  fill($("figures"), state.figures);
  $("asked").hidden = !question;
  $("waiting").hidden = Boolean(question);
  if ($("why").textContent !== state.waiting) $("why").textContent = state.waiting;
  if (question && question.id !== shown) {
    shown = question.id;
    closeEdit();
    $("prompt").replaceChildren(
      ...question.prompt.map(({ role, text }) => {
        const said = document.createElement("p");
        said.textContent = text;
        said.dir = "auto";
        said.className = question.prompt.length > 1 ? "said" : "prompt";
        if (question.prompt.length === 1) return said;
        const [turn, name] = ["div", "p"].map((tag) => document.createElement(tag));
        turn.className = role === "assistant" ? "turn reply-turn" : "turn";
        name.className = "side-name";
        name.textContent = role;
        turn.append(name, said);
        return turn;
      }),
    );
    for (const one of ["first", "second"]) $(one).textContent = question[one] || "(empty reply)";
    $("status").textContent = `A new pair. ${state.answered} answered by you.`;
    if (!document.activeElement || document.activeElement === document.body || $("asked").contains(document.activeElement)) {
      $("asked-title").focus({ preventScroll: false });
    }
  }
  if (!question) {
    shown = null;
    $("status").textContent = state.waiting;
  }
  for (const button of document.querySelectorAll("[data-job]")) button.disabled = Boolean(state.running);
  for (const [name, job] of Object.entries(state.jobs)) showJob($(`job-${name}`), job);
  clearTimeout(next);
  next = setTimeout(refresh, question && !state.running ? SELDOM : OFTEN);
}

async function refresh() {
  clearTimeout(next);
  next = setTimeout(refresh, SELDOM);
  if (busy) return;
  try {
    const state = await ask("/state");
    if (!busy) show(state);
    if ($("problem").dataset.kind === "away") tell("");
  } catch (error) {
    $("problem").dataset.kind = "away";
    tell(error instanceof Refused ? error.message : "The server does not answer; this page keeps asking.");
  }
}

// Sends until the server has answered: a click that may or may not have arrived is sent again under the same id.
async function send(path, body) {
  if (busy) return false;
  busy = true;
  sessionStorage.setItem(kept, JSON.stringify([path, body]));
  try {
    for (;;) {
      try {
        const state = await ask(path, body);
        $("problem").dataset.kind = "";
        tell("");
        show(state);
        return true;
      } catch (error) {
        if (error instanceof Refused) {
          $("problem").dataset.kind = "";
          tell(error.message);
          return false;
        }
        $("problem").dataset.kind = "away";
        tell("Not saved yet: the server does not answer. The click is sent again until it does; leave this page open.");
        await new Promise((resolve) => setTimeout(resolve, OFTEN));
      }
    }
  } finally {
    sessionStorage.removeItem(kept);
    busy = false;
  }
}

const tags = () => $("tags").value.split(",").map((tag) => tag.trim().slice(0, 40)).filter(Boolean).slice(0, 10);

async function click(verdict, more = {}) {
  if (!shown || busy) return;
  const kind = await send("/answer", { question: shown, click: newId(), verdict, tags: tags(), ...more });
  if (kind) $("tags").value = "";
  else await refresh();
}

function closeEdit() {
  side = "";
  $("edit").hidden = true;
}

for (const button of document.querySelectorAll("[data-verdict]")) {
  button.addEventListener("click", () => click(button.dataset.verdict));
}
for (const button of document.querySelectorAll("[data-side]")) {
  button.addEventListener("click", () => {
    side = button.dataset.side;
    $("edited").value = $(side).textContent;
    $("edit").hidden = false;
    $("edited").focus();
  });
}
$("edit").addEventListener("submit", (event) => {
  event.preventDefault();
  if ($("edited").value.trim()) click("edited", { side, text: $("edited").value });
});
$("leave").addEventListener("click", () => {
  closeEdit();
  $("asked-title").focus();
});
const undo = () => last && send("/undo", { question: last.question, click: last.click }).then((done) => done || refresh());
$("undo").addEventListener("click", undo);
$("typed")?.addEventListener("submit", async (event) => {
  event.preventDefault();
  if (await send("/prompt", { text: $("text").value })) $("text").value = "";
});
for (const button of document.querySelectorAll("[data-job]")) {
  button.addEventListener("click", () => send("/job", { name: button.dataset.job }));
}
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || event.repeat) return;
  if (event.target.closest("input, textarea")) return;
  if (event.key === "u") return void undo();
  const verdict = { 1: "first", 2: "second", "=": "same", s: "skip" }[event.key];
  if (verdict && $("edit").hidden) click(verdict);
});

const unsent = sessionStorage.getItem(kept);
if (unsent) send(...JSON.parse(unsent)).then((done) => done || refresh());
else refresh();
