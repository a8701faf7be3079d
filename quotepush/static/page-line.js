/**
 * One line of the table: what a code's newest row looks like.
 *
 * Law: painting touches only cells whose text is new, and no cell changes its size by it.
 */
import * as figures from "./page-figures.js";
import { has, t, translate } from "./page-words.js";

const TREND_S = 300;
const FLASH_EVERY_MS = 1000; // a code that ticks all the time should not glow all the time
const FRESH_MS = 2000;

/** The last price of each second, drawn over the full width from the first to the last. */
class Trend {
  #points = []; // [second, price]
  #area;
  #stroke;

  constructor(svg) {
    this.#area = svg.querySelector(".area");
    this.#stroke = svg.querySelector(".stroke");
  }

  add(value, nowMs) {
    const second = Math.floor(nowMs / 1000);
    const newest = this.#points.at(-1);
    if (newest?.[0] === second) {
      newest[1] = value;
      return;
    }
    this.#points.push([second, value]);
    while (this.#points[0][0] < second - TREND_S) this.#points.shift();
    this.#draw();
  }

  #draw() {
    const [[first]] = this.#points;
    const [last] = this.#points.at(-1);
    let low = Infinity;
    let high = -Infinity;
    for (const [, value] of this.#points) {
      low = Math.min(low, value);
      high = Math.max(high, value);
    }
    // A price that hardly moves should look like one.
    const range = Math.max(high - low, high * 0.0004) || 1;
    const base = (high + low - range) / 2;
    let path = "";
    for (const [second, value] of this.#points) {
      const x = ((second - first) / (last - first || 1)) * 100;
      const y = 22 - ((value - base) / range) * 20;
      path += `${path ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
    }
    if (first === last) path += "H100";
    this.#stroke.setAttribute("d", path);
    this.#area.setAttribute("d", `${path}V24H0Z`);
  }
}

/** What stands beside a name when a code is not simply trading. */
export function tagOf({ status, phase } = {}) {
  const word = status && status !== "trading" ? status : phase && phase !== "regular" ? phase : "";
  return has(word) ? t(word) : word.replaceAll("_", " ");
}

export class Line {
  code = null; // as the server spells it, once it has said so
  row = null;
  heardAt = null; // when the row came, or was made if it came as a snapshot
  refusal = null;
  isStale = false; // the server says that this code alone is stale
  isNear = true; // on the screen, or nearly
  paintedAt = -Infinity; // by the clock of frames

  #cells = {};
  #texts = {};
  #flashed = null; // value and time of the last flash
  #decimals = 2;
  #shown = null; // the row on the screen
  #trend;
  #isFeedStale;

  /** `isNew`: the user has just asked for it, so a refusal is told at the input. */
  constructor(template, spelling, { isNew, isFeedStale }) {
    this.spelling = spelling;
    this.isNew = isNew;
    this.#isFeedStale = isFeedStale;
    this.element = template.content.firstElementChild.cloneNode(true);
    translate(this.element);
    for (const name of ["open", "label", "tag", "last", "change", "pct", "bid", "ask", "volume", "time", "at", "age"]) {
      this.#cells[name] = this.element.querySelector(`.${name}`);
    }
    this.openButton = this.#cells.open;
    this.removeButton = this.element.querySelector(".remove button");
    this.#trend = new Trend(this.element.querySelector("svg"));
    this.paint();
  }

  get name() {
    return this.code ?? this.spelling;
  }

  is(spelling) {
    const wanted = spelling.toUpperCase();
    return this.spelling.toUpperCase() === wanted || this.code === wanted;
  }

  take(row, nowMs) {
    this.row = row;
    this.heardAt = row.prev == null ? Math.min(row.ts ?? nowMs, nowMs) : nowMs;
  }

  paint(now = performance.now()) {
    this.paintedAt = now;
    const row = this.row ?? {};
    const { last, prev_close: previousClose, bid, ask, change, change_pct: percent, ts } = row;
    this.#decimals = Math.max(this.#decimals, ...[last, previousClose, bid, ask].map(figures.decimalsOf));
    this.#write("open", this.name);
    this.#write("label", row.name ?? (row.seq === 0 ? t("noQuote") : ""));
    this.#write("last", figures.price(last, this.#decimals));
    this.#write("change", figures.price(change, this.#decimals, "exceptZero"));
    this.#write("pct", figures.percent(percent));
    this.#write("bid", figures.price(bid, this.#decimals));
    this.#write("ask", figures.price(ask, this.#decimals));
    this.#write("volume", figures.quantity(row.volume));
    this.#write("at", ts == null ? figures.UNKNOWN : figures.moment(ts));
    this.#paintTag();
    if (this.refusal) this.#paintRefusal();
    this.removeButton.ariaLabel = t("removeCode", { code: this.name });
    this.openButton.ariaDescription = t("openCode", { code: this.name });
    this.element.dataset.move = change > 0 ? "up" : change < 0 ? "down" : "flat";
    this.element.toggleAttribute("data-refused", this.refusal !== null);
    this.element.toggleAttribute("data-empty", !row.name);
    if (row === this.#shown || last == null) return;
    this.#flash(last, now);
    this.#trend.add(last, Date.now());
    this.#shown = row;
  }

  /** Say how long ago the newest row came. */
  paintAge(nowMs) {
    const { heardAt, row } = this;
    const age = nowMs - heardAt;
    const isKnown = heardAt !== null && row.seq > 0 && !this.refusal;
    this.#write("age", !isKnown ? "" : age < FRESH_MS ? t("now") : t("ago", { age: figures.duration(age) }));
    if (isKnown && row.ts != null) this.#cells.time.title = figures.fullDate(row.ts);
  }

  #paintTag() {
    const isOld = this.row?.seq && (this.isStale || this.#isFeedStale());
    const tag = isOld ? t("stale") : tagOf(this.row ?? {});
    this.#write("tag", tag);
    this.#cells.tag.hidden = !tag;
    this.element.toggleAttribute("data-stale", Boolean(isOld));
  }

  #paintRefusal() {
    for (const name of ["last", "change", "pct", "bid", "ask", "volume", "at", "tag"]) this.#write(name, "");
    this.#cells.tag.hidden = true;
    this.#write("label", t("refused", { message: this.refusal }));
  }

  #write(name, text) {
    if (this.#texts[name] === text) return;
    this.#texts[name] = text;
    this.#cells[name].textContent = text;
  }

  /** Flash the price in the direction in which it went since its last flash. */
  #flash(value, now) {
    const before = this.#flashed;
    if (value === before?.value) return;
    if (before && (!this.isNear || now - before.at < FLASH_EVERY_MS)) return;
    this.#flashed = { value, at: before ? now : -Infinity };
    if (!before) return;
    // Two names for one animation: the other one starts it again without a forced layout.
    const cell = this.#cells.last;
    const side = value > before.value ? "up" : "down";
    cell.dataset.flash = cell.dataset.flash === `${side}-a` ? `${side}-b` : `${side}-a`;
  }
}
