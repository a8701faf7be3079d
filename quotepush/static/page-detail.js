/**
 * The pane with one code's details: figures, chart, five levels of bids and asks.
 *
 * Law: it shows one code or is closed; it is painted at most four times a second, and everything in it has its place
 * before the first row is there.
 */
import { Chart } from "./page-chart.js";
import { UNKNOWN, decimalsOf, percent, price, quantity, whole } from "./page-figures.js";
import { tagOf } from "./page-line.js";
import { has, t } from "./page-words.js";

const LEVELS = 5;
const PAINT_EVERY_MS = 250;

export class Detail {
  /** The code or spelling that is open; null: none. */
  code = null;

  #pane;
  #parts = {};
  #levels = [];
  #texts = new Map(); // element → text
  #chart;
  #dayOf;
  #row = null;
  #book = null; // where it does not come with the rows
  #refusal = null;
  #decimals = 2;
  #timer = 0;
  #frame = 0;

  /** `dayOf(code)` has what was seen of a code; `onClose()` and `onAdd()` are called for what the user does. */
  constructor({ pane, dayOf, onClose, onAdd }) {
    this.#pane = pane;
    this.#dayOf = dayOf;
    for (const part of pane.querySelectorAll("[data-part]")) this.#parts[part.dataset.part] = part;
    this.#chart = new Chart({ canvas: pane.querySelector("canvas"), note: this.#parts.note });
    const body = pane.querySelector("tbody");
    for (const side of ["ask", "bid"]) {
      for (let n = 1; n <= LEVELS; n++) {
        const element = pane.querySelector("template").content.firstElementChild.cloneNode(true);
        element.className = side;
        body[side === "ask" ? "prepend" : "append"](element);
        const [name, value, size] = element.cells;
        this.#levels.push({ side, n, name, value, size: size.querySelector("span"), bar: size.querySelector("i") });
      }
    }
    this.#parts.close.addEventListener("click", onClose);
    this.#parts.add.addEventListener("click", onAdd);
    pane.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation();
      onClose();
    });
  }

  open(code, row) {
    this.code = code;
    this.#row = row ?? null;
    this.#book = null;
    this.#refusal = null;
    this.#decimals = 2;
    this.#pane.hidden = false;
    this.#pane.scrollTop = 0;
    this.#paint();
  }

  close() {
    this.code = null;
    this.#row = null;
    this.#pane.hidden = true;
    clearTimeout(this.#timer);
    cancelAnimationFrame(this.#frame);
    this.#timer = this.#frame = 0;
  }

  focus() {
    this.#parts.title.focus({ preventScroll: true });
  }

  /** The server spells the code in this way. */
  rename(code) {
    this.code = code;
    this.#soon();
  }

  take(row) {
    this.#row = row;
    this.#refusal = null;
    this.#soon();
  }

  takeBook(book) {
    this.#book = book;
    this.#soon();
  }

  refuse(message) {
    this.#refusal = message;
    this.#soon();
  }

  /** Whether the code is on the list that is shown, and whether its numbers are old. */
  setPlace({ isListed, isStale }) {
    this.#parts.add.hidden = isListed;
    this.#pane.toggleAttribute("data-stale", isStale);
  }

  /** Colours or words are others now. */
  restyle() {
    this.#chart.restyle();
    if (this.code) this.#paint();
  }

  #soon() {
    if (this.code) this.#timer ||= setTimeout(() => {
      this.#timer = 0;
      this.#frame ||= requestAnimationFrame(() => this.#paint());
    }, PAINT_EVERY_MS);
  }

  #paint() {
    this.#frame = 0;
    const row = this.#row ?? {};
    const { last, prev_close: prevClose, bid, ask, change } = row;
    this.#decimals = Math.max(this.#decimals, ...[last, prevClose, bid, ask].map(decimalsOf));
    const amount = (value) => price(value, this.#decimals);
    this.#pane.dataset.move = change > 0 ? "up" : change < 0 ? "down" : "flat";
    this.#pane.ariaLabel = t("detail", { code: this.code });
    const texts = {
      title: this.code,
      name: this.#refusal ? t("refused", { message: this.#refusal }) : row.name ?? (row.seq === 0 ? t("noQuote") : ""),
      tag: tagOf(row),
      last: amount(last),
      change: price(change, this.#decimals, "exceptZero"),
      pct: percent(row.change_pct),
      open: amount(row.open),
      high: amount(row.high),
      low: amount(row.low),
      prevClose: amount(prevClose),
      volume: quantity(row.volume),
      amount: quantity(row.amount),
      limitUp: amount(row.limit_up),
      limitDown: amount(row.limit_down),
      spread: bid > 0 && ask > 0 ? amount(ask - bid) : UNKNOWN,
      status: wordOf(row.status ?? row.phase),
      phase: wordOf(row.phase),
    };
    for (const [part, text] of Object.entries(texts)) this.#write(this.#parts[part], text);
    this.#parts.tag.hidden = !texts.tag;
    for (const [part, value] of [["open", row.open], ["high", row.high], ["low", row.low]]) {
      this.#parts[part].dataset.move = value > prevClose ? "up" : value < prevClose ? "down" : "flat";
    }
    this.#paintBook(row, prevClose);
    this.#chart.show(this.code, this.#dayOf(this.code), this.#decimals);
  }

  #paintBook(row, prevClose) {
    const { bids = [], asks = [] } = row.bids || row.asks ? row : this.#book ?? {};
    const sides = { bid: bids, ask: asks };
    const most = Math.max(1, ...[...bids, ...asks].slice(0, 2 * LEVELS).map(([, size]) => size));
    for (const { side, n, name, value, size, bar } of this.#levels) {
      const [at, shares] = sides[side][n - 1] ?? [];
      this.#write(name, t(`${side}Level`, { n }));
      this.#write(value, price(at, this.#decimals));
      value.dataset.move = at > prevClose ? "up" : at < prevClose ? "down" : "flat";
      this.#write(size, shares == null ? UNKNOWN : whole(shares));
      this.#scale(bar, (shares ?? 0) / most);
    }
  }

  #scale(bar, part) {
    const transform = `scaleX(${part.toFixed(3)})`;
    if (this.#texts.get(bar) === transform) return;
    this.#texts.set(bar, transform);
    bar.style.transform = transform;
  }

  #write(element, text) {
    if (this.#texts.get(element) === text) return;
    this.#texts.set(element, text);
    element.textContent = text;
  }
}

function wordOf(word) {
  if (!word) return UNKNOWN;
  return has(word) ? t(word) : word.replaceAll("_", " ");
}
