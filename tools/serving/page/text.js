// Growing text, laid out so that existing text does not move: a forward text grows at its end; a
// backward one fills its lines from the right, and the page from below. Text of a right-to-left
// script does so from the left. In the document it is always in reading order.

const SEGMENTS = /\n|[^\S\n]+|\S+/gu;
const RIGHT_TO_LEFT = /[\u0590-\u08ff\ufb1d-\ufdff\ufe70-\ufeff]/u;
const LETTER = /\p{L}/u;

export function directionOf(text) {
  for (const character of text) {
    if (RIGHT_TO_LEFT.test(character)) return "rtl";
    if (LETTER.test(character)) return "ltr";
  }
  return "ltr";
}

export class IncrementalDetokenizer {
  constructor(box, isBackward, given) {
    this.box = box;
    this.isBackward = isBackward;
    this.given = given;
    this.parts = [];
    this.tokensOf = new WeakMap();
    this.isFinal = false;
    box.classList.add(isBackward ? "leftwards" : "forwards");
    this.layOut();
  }

  get text() {
    const written = this.parts.map((part) => part.text);
    return this.isBackward ? written.reverse().join("") + this.given : this.given + written.join("");
  }

  add(part) {
    this.parts.push(part);
    if (this.parts.length < 8 && !LETTER.test(this.given)) this.layOut();
    else this.place(part, true);
  }

  // Lay out everything again, as when the width has changed.
  layOut() {
    this.box.replaceChildren();
    this.box.dir = directionOf(this.given || this.text);
    this.line = null;
    this.place({ text: this.given, tokens: null }, false);
    for (const part of this.parts) this.place(part, false);
  }

  place(part, isFresh) {
    const segments = part.text.match(SEGMENTS) ?? [];
    if (this.isBackward) segments.reverse();
    for (const segment of segments) {
      const span = document.createElement("span");
      span.textContent = segment;
      if (part.tokens) {
        span.className = isFresh ? "written fresh" : "written";
        if (segment.trim()) span.dataset.level = levelOf(part.tokens);
        this.tokensOf.set(span, part.tokens);
      }
      if (!this.isBackward) this.box.append(span);
      else if (segment === "\n") this.newLine(span);
      else this.before(span);
    }
  }

  newLine(end) {
    this.line = document.createElement("div");
    this.line.className = "line";
    if (end) {
      end.classList.add("hang");
      this.line.append(end);
    }
    this.box.prepend(this.line);
  }

  before(span) {
    if (!this.line) this.newLine();
    const line = this.line;
    line.prepend(span);
    if (line.scrollWidth <= line.clientWidth + 1) return;
    const word = [];
    for (let one = line.firstChild; one && one.textContent.trim(); one = one.nextSibling) word.push(one);
    const space = word.length ? word.at(-1).nextSibling : span;
    if (!space && word.length < 2) return;
    const moved = space ? word : [span];
    this.newLine();
    this.line.append(...moved);
    if (space && !space.textContent.trim()) {
      space.classList.add("hang");
      this.line.append(space);
    }
  }
}

export function probabilityOf(tokens) {
  return Math.exp(tokens.reduce((sum, token) => sum + token.logProbability, 0));
}

function levelOf(tokens) {
  const probability = probabilityOf(tokens);
  return [0.03, 0.15, 0.4, 0.8].filter((bound) => probability >= bound).length;
}
