// What a token's probability was, and what else was likely: by pointer, or token by token with arrows.

import { probabilityOf } from "./text.js";

const tip = document.getElementById("tip");
const percent = new Intl.NumberFormat("en", { style: "percent", maximumSignificantDigits: 3 });

function row(name, logProbability) {
  const line = document.createElement("tr");
  for (const text of [name, percent.format(Math.exp(logProbability))]) {
    const cell = document.createElement("td");
    cell.textContent = text;
    line.append(cell);
  }
  return line;
}

function visible(token) {
  return token.replaceAll(" ", "␣").replaceAll("\n", "⏎");
}

export function show(span, tokens) {
  const table = document.createElement("table");
  for (const token of tokens) {
    table.append(row(visible(token.token), token.logProbability));
    const others = Object.entries(token.likeliest ?? {}).filter(([name]) => name !== token.token);
    for (const [name, value] of others.sort((a, b) => b[1] - a[1])) table.append(row(visible(name), value));
  }
  tip.replaceChildren(table);
  tip.hidden = false;
  const at = span.getBoundingClientRect();
  const left = Math.max(8, Math.min(at.left, innerWidth - tip.offsetWidth - 8));
  const above = at.top - tip.offsetHeight - 8;
  tip.style.left = `${left}px`;
  tip.style.top = `${above > 0 ? above : at.bottom + 8}px`;
  return `${visible(tokens.map((token) => token.token).join(" "))}: ${percent.format(probabilityOf(tokens))}`;
}

export function hide() {
  tip.hidden = true;
}

// Let a sheet show its tokens; `say` announces the token that the keyboard selects.
export function attach(sheet, growing, say) {
  sheet.addEventListener("pointerover", (event) => {
    const tokens = growing.tokensOf.get(event.target);
    if (tokens) show(event.target, tokens);
    else hide();
  });
  sheet.addEventListener("pointerleave", hide);
  sheet.addEventListener("blur", () => {
    sheet.querySelector(".current")?.classList.remove("current");
    hide();
  });
  sheet.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1 };
    if (event.target !== sheet || !(event.key in steps)) return;
    event.preventDefault();
    const spans = [...sheet.querySelectorAll(".written:not(.hang)")].filter((one) => one.textContent.trim());
    if (!spans.length) return;
    const old = sheet.querySelector(".current");
    old?.classList.remove("current");
    const isMirrored = growing.box.dir === "rtl" && /Left|Right/.test(event.key);
    const step = isMirrored ? -steps[event.key] : steps[event.key];
    const from = old ? spans.indexOf(old) : step > 0 ? -1 : spans.length;
    const span = spans[Math.max(0, Math.min(spans.length - 1, from + step))];
    span.classList.add("current");
    span.scrollIntoView({ block: "nearest" });
    say(show(span, growing.tokensOf.get(span)));
  });
}
