// The page: requests, the text on the sheets, and undo.

import { NeedsToken, ask, stream, useToken } from "./api.js";
import { IncrementalDetokenizer, directionOf } from "./text.js";
import { attach, hide } from "./tip.js";

const at = (id) => document.getElementById(id);
const LABELS = {
  write: { backward: "Ending", forward: "Beginning" },
  both: { backward: "A text, for the middle" },
  infill: { backward: "Ending" },
  backchat: { backward: "Response", forward: "Instruction" },
};
const NUMBERS = ["temperature", "max_tokens", "top_k", "top_p", "min_p", "repetition_penalty"];
const LIKELIEST = 4;

let models = [];
let mode = "write";
let sheets = []; // { growing, element, model }
let chosen = 0;
let past = []; // { text, parts, mode } of each sheet, before each writing
let running = null;

const say = (text, isWrong = false) => {
  at("status").textContent = text;
  at("status").classList.toggle("wrong", isWrong);
};
const modelNamed = (name) => models.find((model) => model.id === name);
const isBackward = (model) => model.direction === "backward";

function settings() {
  const numbers = {};
  for (const name of NUMBERS) if (at(name).value !== "") numbers[name] = at(name).valueAsNumber;
  if (at("seed").value !== "") numbers.seed = at("seed").valueAsNumber;
  return numbers;
}

function refresh() {
  const isShown = sheets.length > 0;
  const isSheets = mode === "write" || mode === "both";
  at("sheets").hidden = !isShown || !isSheets;
  at("texts").hidden = isShown && isSheets;
  at("beginning-field").hidden = mode !== "infill";
  at("candidates").hidden = isSheets || !at("candidates").childElementCount;
  const model = modelNamed(at("model").value) ?? models[0];
  const direction = model ? model.direction : "backward";
  at("given-label").textContent = LABELS[mode][direction] ?? LABELS[mode].backward;
  at("given-field").classList.toggle("from-end", isSheets && direction === "backward");
  at("go").textContent = isShown && isSheets ? "Continue" : isSheets ? "Write" : mode === "infill" ? "Fill" : "Ask";
  at("go").disabled = running !== null || !models.length;
  at("stop").disabled = running === null;
  at("edit").disabled = running !== null || !isShown || !isSheets;
  at("undo").disabled = running !== null || !past.length || !isSheets;
  for (const button of document.querySelectorAll("[data-mode]")) {
    button.setAttribute("aria-pressed", String(button.dataset.mode === mode));
  }
  sheets.forEach(({ element }, index) => {
    if (sheets.length > 1 && mode === "write") element.setAttribute("aria-current", String(index === chosen));
  });
}

function newSheet(model, given, parts = []) {
  const element = document.createElement("section");
  element.className = isBackward(model) ? "sheet" : "sheet forward";
  element.tabIndex = 0;
  element.setAttribute("aria-label", `A text that ${model.id} writes ${model.direction}`);
  const box = document.createElement("div");
  box.className = "text";
  if (mode === "both") {
    const title = document.createElement("h2");
    title.textContent = isBackward(model) ? `← ${model.id}` : `${model.id} →`;
    element.append(title);
  }
  element.append(box);
  at("sheets").append(element);
  at("sheets").hidden = false;
  const growing = new IncrementalDetokenizer(box, isBackward(model), given);
  for (const part of parts) growing.add(part);
  const index = sheets.length;
  element.addEventListener("focus", () => {
    chosen = index;
    refresh();
  });
  attach(element, growing, say);
  const sheet = { growing, element, model };
  sheets.push(sheet);
  return sheet;
}

function clear() {
  sheets = [];
  chosen = 0;
  hide();
  at("sheets").replaceChildren();
}

function remember() {
  past.push({
    typed: at("given").value,
    sheets: sheets.map(({ growing, model }) => ({ model, given: growing.given, parts: [...growing.parts] })),
    chosen,
  });
}

function undo() {
  const before = past.pop();
  if (!before) return;
  clear();
  at("given").value = before.typed;
  at("texts").hidden = true;
  for (const { model, given, parts } of before.sheets) newSheet(model, given, parts);
  chosen = before.chosen;
  say("");
  refresh();
  (sheets[chosen]?.element ?? at("given")).focus();
}

function edit() {
  remember();
  at("given").value = sheets[chosen].growing.text;
  clear();
  refresh();
  at("given").focus();
}

function tokensOf({ logprobs }) {
  return (logprobs?.tokens ?? []).map((token, index) => ({
    token,
    logProbability: logprobs.token_logprobs[index],
    likeliest: logprobs.top_logprobs?.[index],
  }));
}

async function writeOn(targets, prompt, count, signal) {
  const body = { ...settings(), model: targets[0].model.id, prompt, n: count, logprobs: LIKELIEST, truncate: true };
  let tokens = 0;
  for await (const choice of stream(body, signal)) {
    const part = { text: choice.text, tokens: tokensOf(choice) };
    if (part.text) targets[choice.index].growing.add(part);
    tokens += part.tokens.length;
    say(`${tokens} tokens · seed ${choice.seed}`);
  }
}

async function write(signal) {
  const model = modelNamed(at("model").value);
  const writers = mode === "both" ? [models.find(isBackward), models.find((one) => !isBackward(one))] : [model];
  const isBegun = sheets.length > 0;
  const givenOf = (writer) =>
    isBegun ? (mode === "both" ? sheets.find((one) => one.model === writer) : sheets[chosen]).growing.text : at("given").value;
  const given = writers.map(givenOf);
  const count = at("n").valueAsNumber || 1;
  remember();
  clear();
  at("texts").hidden = true;
  const jobs = writers.map((writer, index) => {
    const targets = Array.from({ length: count }, () => newSheet(writer, given[index]));
    return writeOn(targets, given[index], count, signal);
  });
  refresh();
  await Promise.all(jobs);
}

function list(candidates, textsOf) {
  at("candidates").replaceChildren(
    ...candidates.map((one) => {
      const item = document.createElement("li");
      const text = document.createElement("p");
      text.dir = directionOf(one.text);
      text.append(...textsOf(one));
      const small = document.createElement("small");
      small.textContent = one.says;
      item.append(text, small);
      return item;
    }),
  );
}

async function askBack(signal) {
  const model = modelNamed(at("model").value);
  const key = isBackward(model) ? "response" : "instruction";
  const n = Math.max(at("n").valueAsNumber || 1, 4);
  const body = { ...settings(), model: model.id, [key]: at("given").value, n };
  const found = await ask("v1/backchat", body, signal);
  const saying = (one) =>
    `${one.log_probability.toFixed(1)} nats · ${one.tokens} tokens` + (one.is_complete ? "" : " · cut");
  const candidates = found.candidates.map((one) => ({ text: one.text, says: saying(one) }));
  list(candidates, (one) => [one.text || "(nothing)"]);
  say(`${found.candidates.length} different of ${n} · seed ${found.seed}`);
}

async function fill(signal) {
  const { temperature, max_tokens: tokens, top_k: topK, seed } = settings();
  const beginning = at("beginning").value;
  const ending = at("given").value;
  const n = Math.max(at("n").valueAsNumber || 1, 3);
  const body = { beginning, ending, n, temperature, top_k: topK, max_tokens: Math.min(tokens, 64), seed };
  const found = await ask("v1/infill", body, signal);
  const candidates = found.infills.map((one) => ({ text: one.middle, says: `${one.score.toFixed(2)} nats per token` }));
  list(candidates, (one) => {
    const middle = document.createElement("b");
    middle.textContent = one.text;
    return [beginning, middle, ending];
  });
  say(candidates.length ? `the best first · seed ${found.seed}` : "nothing fits between");
}

async function go() {
  if (running || !models.length) return;
  running = new AbortController();
  const { signal } = running;
  say("…");
  refresh();
  try {
    await (mode === "backchat" ? askBack : mode === "infill" ? fill : write)(signal);
  } catch (error) {
    if (error.name === "AbortError") say("stopped");
    else if (error instanceof NeedsToken) enter();
    else say(error.message, true);
  } finally {
    running = null;
    refresh();
  }
}

function stop() {
  running?.abort();
}

function enter() {
  at("entrance").hidden = false;
  at("token").focus();
}

async function start() {
  try {
    models = (await ask("v1/models")).data;
  } catch (error) {
    if (error instanceof NeedsToken) enter();
    else say(error.message, true);
    return;
  }
  at("entrance").hidden = true;
  at("model").replaceChildren(...models.map((model) => new Option(`${model.id} (${model.direction})`, model.id)));
  const hasBoth = models.some(isBackward) && models.some((model) => !isBackward(model));
  document.querySelector("[data-mode=both]").hidden = !hasBoth;
  document.querySelector("[data-mode=infill]").hidden = !hasBoth || !models.some((model) => model.can_infill);
  refresh();
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  at("theme").textContent = theme;
  localStorage.setItem("theme", theme);
}

at("asking").addEventListener("submit", (event) => {
  event.preventDefault();
  go();
});
at("stop").addEventListener("click", stop);
at("edit").addEventListener("click", edit);
at("undo").addEventListener("click", undo);
at("model").addEventListener("change", refresh);
at("certainty").addEventListener("change", () => {
  at("sheets").classList.toggle("certainty", at("certainty").checked);
});
at("theme").addEventListener("click", () => {
  const themes = ["auto", "light", "dark"];
  setTheme(themes[(themes.indexOf(document.documentElement.dataset.theme) + 1) % 3]);
});
at("entrance").addEventListener("submit", (event) => {
  event.preventDefault();
  useToken(at("token").value);
  start();
});
for (const button of document.querySelectorAll("[data-mode]")) {
  button.addEventListener("click", () => {
    stop();
    mode = button.dataset.mode;
    past = [];
    if (sheets.length) at("given").value = sheets[chosen].growing.given;
    clear();
    at("candidates").replaceChildren();
    at("n").value = mode === "write" || mode === "both" ? 1 : 4;
    say("");
    refresh();
  });
}
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) go();
  else if (event.key === "Escape") stop();
  else if (event.altKey && event.key.toLowerCase() === "z" && !at("undo").disabled) undo();
  else if (event.altKey && event.key.toLowerCase() === "e" && !at("edit").disabled) edit();
  else return;
  event.preventDefault();
});
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === width) return;
  width = innerWidth;
  for (const { growing } of sheets) growing.layOut();
});

setTheme(localStorage.getItem("theme") ?? "auto");
start();
