/**
 * The chart of a day on a canvas: price, volume, the previous close, and a crosshair.
 *
 * Law: it is drawn when it is asked to and in the colours of the style sheet; where nothing was seen no line is drawn.
 * For those who do not see it, it is a slider over the points of the day.
 */
import { clock, decimalsOf, minute, percent, price, quantity } from "./page-figures.js";
import { t } from "./page-words.js";

const PAD = { top: 10, right: 62, bottom: 20, left: 8 };
const VOLUME_PART = 0.2;
const TOLD_EVERY_MS = 15_000;
const LEAST_SPAN_MS = 60_000;
const STEPS_MS = [15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400].map((s) => s * 1000);
const LABEL_PX = 64;

export class Chart {
  #canvas;
  #note;
  #code = "";
  #day = null;
  #decimals = 2;
  #point = null; // the time under the crosshair
  #frame = 0;
  #toldAt = 0;
  #colours = null;
  #size = { width: 0, height: 0 };

  /** `note` gets the words of the crosshair, or since when the page has seen the code. */
  constructor({ canvas, note }) {
    this.#canvas = canvas;
    this.#note = note;
    new ResizeObserver(([{ contentRect: { width, height } }]) => {
      this.#size = { width, height };
      this.#draw(); // now, or a stretched picture is seen
    }).observe(canvas);
    canvas.addEventListener("pointermove", (event) => this.#aim(event.offsetX));
    canvas.addEventListener("pointerdown", (event) => this.#aim(event.offsetX));
    canvas.addEventListener("pointerleave", () => this.#mark(null));
    canvas.addEventListener("blur", () => this.#mark(null));
    canvas.addEventListener("keydown", (event) => this.#key(event));
  }

  /** Show this day from now on; undefined: nothing is known yet. */
  show(code, day, decimals) {
    if (code !== this.#code) {
      this.#code = code;
      this.#point = null;
      this.#toldAt = 0;
    }
    this.#day = day;
    this.#decimals = decimals;
    this.#frame ||= requestAnimationFrame(() => this.#draw());
  }

  /** The style sheet or the words are others now. */
  restyle() {
    this.#colours = null;
    this.#toldAt = 0;
    this.#frame ||= requestAnimationFrame(() => this.#draw());
  }

  #draw() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    const { width, height } = this.#size;
    const points = this.#day?.points ?? [];
    this.#tell(points);
    if (!width) return;
    const scale = devicePixelRatio;
    const canvas = this.#canvas;
    const [pixelsX, pixelsY] = [Math.round(width * scale), Math.round(height * scale)];
    if (canvas.width !== pixelsX || canvas.height !== pixelsY) Object.assign(canvas, { width: pixelsX, height: pixelsY });
    const pen = canvas.getContext("2d");
    pen.setTransform(scale, 0, 0, scale, 0, 0);
    pen.clearRect(0, 0, width, height);
    this.#colours ??= coloursOf(canvas);
    pen.font = this.#colours.font;
    pen.textBaseline = "middle";
    if (!points.length) return;
    const frame = this.#frameOf(points);
    this.#drawTimes(pen, frame);
    this.#drawPrices(pen, frame);
    this.#drawVolumes(pen, frame, points);
    this.#drawLine(pen, frame, points);
    this.#drawPrevClose(pen, frame);
    this.#drawCrosshair(pen, frame, points);
  }

  /** Where times and prices stand. */
  #frameOf(points) {
    const { width, height } = this.#size;
    const { prevClose } = this.#day;
    let [low, high] = [Infinity, -Infinity];
    for (const { last } of points) {
      low = Math.min(low, last);
      high = Math.max(high, last);
    }
    const seen = Math.max(high - low, high * 0.0005);
    // Yesterday's close belongs into the picture unless the day would become a flat line by it.
    const isPrevNear = prevClose != null && prevClose > low - 4 * seen && prevClose < high + 4 * seen;
    if (isPrevNear) [low, high] = [Math.min(low, prevClose), Math.max(high, prevClose)];
    const room = Math.max(high - low, high * 0.0005) * 0.08;
    [low, high] = [low - room, high + room];
    const from = points[0].at;
    const until = Math.max(points.at(-1).at, from + LEAST_SPAN_MS);
    const right = width - PAD.right;
    const floor = height - PAD.bottom;
    const bottom = floor - (floor - PAD.top) * VOLUME_PART;
    return {
      low, high, from, until, right, floor, bottom, isPrevNear, prevClose,
      x: (at) => PAD.left + ((at - from) / (until - from)) * (right - PAD.left),
      y: (value) => bottom - ((value - low) / (high - low)) * (bottom - PAD.top),
    };
  }

  #drawTimes(pen, { from, until, x, right, floor }) {
    const { rule, muted } = this.#colours;
    const most = Math.max(1, Math.floor((right - PAD.left) / LABEL_PX));
    const step = STEPS_MS.find((ms) => (until - from) / ms <= most) ?? STEPS_MS.at(-1);
    const shift = new Date(from).getTimezoneOffset() * 60_000; // full hours are those of this place
    const name = step < 60_000 ? clock : minute;
    pen.textAlign = "center";
    for (let at = Math.ceil((from - shift) / step) * step + shift; at <= until; at += step) {
      const at_x = x(at);
      if (at_x < PAD.left + 16 || at_x > right - 16) continue;
      pen.fillStyle = rule;
      pen.fillRect(Math.round(at_x), PAD.top, 1, floor - PAD.top);
      pen.fillStyle = muted;
      pen.fillText(name(at), at_x, floor + 11);
    }
  }

  #drawPrices(pen, { low, high, y, right, bottom, prevClose }) {
    const { rule, muted, up, down } = this.#colours;
    const step = niceStep((high - low) / 5);
    pen.textAlign = "left";
    for (let value = Math.ceil(low / step) * step; value <= high; value += step) {
      const at_y = y(value);
      if (at_y > bottom - 2 || at_y < PAD.top + 2) continue;
      pen.fillStyle = rule;
      pen.fillRect(PAD.left, Math.round(at_y), right - PAD.left, 1);
      pen.fillStyle = prevClose == null ? muted : value > prevClose ? up : value < prevClose ? down : muted;
      pen.fillText(price(value, Math.max(this.#decimals, Math.min(8, decimalsFor(step)))), right + 6, at_y);
    }
  }

  #drawVolumes(pen, { x, right, floor, bottom }, points) {
    const { up, down, muted } = this.#colours;
    const most = Math.max(...points.map((point) => point.volume));
    if (!most) return;
    const width = Math.max(1, Math.min(8, ((right - PAD.left) / points.length) * 0.7));
    pen.globalAlpha = 0.45;
    for (let n = 0; n < points.length; n++) {
      const { at, last, volume } = points[n];
      if (!volume) continue;
      const before = points[n - 1]?.last ?? last;
      const height = Math.max(1, (volume / most) * (floor - bottom - 8));
      pen.fillStyle = last > before ? up : last < before ? down : muted;
      pen.fillRect(x(at) - width / 2, floor - height, width, height);
    }
    pen.globalAlpha = 1;
  }

  #drawLine(pen, { x, y, bottom, prevClose }, points) {
    const { up, down, accent } = this.#colours;
    const { last } = points.at(-1);
    const colour = prevClose == null || last === prevClose ? accent : last > prevClose ? up : down;
    pen.strokeStyle = pen.fillStyle = colour;
    pen.lineWidth = 1.6;
    pen.lineJoin = "round";
    for (const part of partsOf(points, this.#day.holeMs)) {
      pen.beginPath();
      for (const point of part) pen.lineTo(x(point.at), y(point.last));
      pen.stroke();
      pen.lineTo(x(part.at(-1).at), bottom);
      pen.lineTo(x(part[0].at), bottom);
      pen.globalAlpha = 0.09;
      pen.fill();
      pen.globalAlpha = 1;
    }
    pen.beginPath();
    pen.arc(x(points.at(-1).at), y(last), 3, 0, 2 * Math.PI);
    pen.fill();
  }

  #drawPrevClose(pen, { low, y, right, bottom, isPrevNear, prevClose }) {
    if (prevClose == null) return;
    const { muted, card } = this.#colours;
    const at_y = isPrevNear ? y(prevClose) : prevClose < low ? bottom - 7 : PAD.top + 7;
    if (isPrevNear) {
      pen.strokeStyle = muted;
      pen.lineWidth = 1;
      pen.setLineDash([4, 4]);
      pen.beginPath();
      pen.moveTo(PAD.left, Math.round(at_y) + 0.5);
      pen.lineTo(right, Math.round(at_y) + 0.5);
      pen.stroke();
      pen.setLineDash([]);
    }
    const text = t("chartPrevClose", { price: price(prevClose, this.#decimals) });
    const edge = isPrevNear ? "" : prevClose < low ? "↓ " : "↑ ";
    pen.textAlign = "left";
    const width = pen.measureText(edge + text).width + 8;
    const label_y = isPrevNear ? Math.max(PAD.top + 8, at_y - 9) : at_y;
    pen.fillStyle = card;
    pen.globalAlpha = 0.8;
    pen.fillRect(PAD.left, label_y - 7, width, 14);
    pen.globalAlpha = 1;
    pen.fillStyle = muted;
    pen.fillText(edge + text, PAD.left + 4, label_y);
  }

  #drawCrosshair(pen, { x, y, right, floor }, points) {
    if (this.#point === null) return;
    const { at, last } = points[nearest(points, this.#point)];
    const { text, card } = this.#colours;
    const [at_x, at_y] = [Math.round(x(at)) + 0.5, Math.round(y(last)) + 0.5];
    pen.strokeStyle = text;
    pen.globalAlpha = 0.55;
    pen.lineWidth = 1;
    pen.beginPath();
    pen.moveTo(at_x, PAD.top);
    pen.lineTo(at_x, floor);
    pen.moveTo(PAD.left, at_y);
    pen.lineTo(right, at_y);
    pen.stroke();
    pen.globalAlpha = 1;
    pen.fillStyle = text;
    pen.beginPath();
    pen.arc(at_x, at_y, 3.5, 0, 2 * Math.PI);
    pen.fill();
    pen.fillRect(right + 2, at_y - 9, PAD.right - 2, 18);
    pen.fillStyle = card;
    pen.textAlign = "left";
    pen.fillText(price(last, this.#decimals), right + 6, at_y);
  }

  #aim(at_x) {
    const points = this.#day?.points;
    if (!points?.length) return;
    const { from, until, right } = this.#frameOf(points);
    const at = from + ((at_x - PAD.left) / (right - PAD.left)) * (until - from);
    this.#mark(points[nearest(points, at)].at);
  }

  #key(event) {
    const points = this.#day?.points;
    if (!points?.length) return;
    const most = points.length - 1;
    const here = this.#point === null ? most : nearest(points, this.#point);
    const page = Math.max(1, Math.round(most / 10));
    const wanted = {
      ArrowLeft: here - 1, ArrowDown: here - 1, ArrowRight: here + 1, ArrowUp: here + 1,
      PageDown: here - page, PageUp: here + page, Home: 0, End: most,
    }[event.key];
    if (wanted === undefined) return;
    event.preventDefault();
    this.#mark(points[Math.max(0, Math.min(most, wanted))].at);
  }

  #mark(at) {
    if (this.#point === at) return;
    this.#point = at;
    this.#frame ||= requestAnimationFrame(() => this.#draw());
  }

  /** Say in words what the picture shows; the summary not with every price. */
  #tell(points) {
    const canvas = this.#canvas;
    if (!points.length) {
      this.#note.textContent = t("chartWait");
      canvas.ariaLabel = `${t("chart")}: ${t("chartWait")}`;
      canvas.ariaValueText = t("chartWait");
      return;
    }
    const n = this.#point === null ? points.length - 1 : nearest(points, this.#point);
    const { at, last, volume } = points[n];
    const words = t("chartPoint", { time: clock(at), price: price(last, this.#decimals), volume: quantity(volume) });
    const since = t("chartSince", { time: clock(points[0].at) });
    const note = this.#point === null ? since : words;
    if (this.#note.textContent !== note) this.#note.textContent = note;
    // The value is told when it is asked for, by the keyboard, and not whenever a price comes.
    const now = performance.now();
    const isDue = !this.#toldAt || now - this.#toldAt > TOLD_EVERY_MS;
    if (this.#point !== null || isDue) {
      canvas.ariaValueMax = points.length - 1;
      canvas.ariaValueNow = n;
      canvas.ariaValueText = words;
    }
    if (!isDue) return;
    this.#toldAt = now;
    const prices = points.map((point) => point.last);
    const newest = points.at(-1).last;
    const { prevClose } = this.#day;
    canvas.ariaLabel = t("chartSummary", {
      code: this.#code,
      since: clock(points[0].at),
      last: price(newest, this.#decimals),
      high: price(Math.max(...prices), this.#decimals),
      low: price(Math.min(...prices), this.#decimals),
      change: percent(prevClose ? (newest / prevClose - 1) * 100 : null),
    });
  }
}

/** The points without the holes between them. */
function partsOf(points, holeMs) {
  const parts = [];
  for (const point of points) {
    const part = parts.at(-1);
    if (part && point.at - part.at(-1).at <= holeMs) part.push(point);
    else parts.push([point]);
  }
  return parts;
}

function nearest(points, at) {
  let [low, high] = [0, points.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle].at < at) low = middle + 1;
    else high = middle;
  }
  return low > 0 && at - points[low - 1].at < points[low].at - at ? low - 1 : low;
}

function niceStep(least) {
  const power = 10 ** Math.floor(Math.log10(least));
  return power * [1, 2, 2.5, 5, 10].find((n) => n * power >= least * 0.9999);
}

/** Decimals that a multiple of `step` has, without what floating point adds. */
function decimalsFor(step) {
  return decimalsOf(Number(step.toPrecision(3)));
}

function coloursOf(canvas) {
  const style = getComputedStyle(canvas);
  const colours = { font: `11px ${style.fontFamily}` };
  for (const name of ["up", "down", "muted", "rule", "text", "card", "accent"]) {
    colours[name] = style.getPropertyValue(`--${name}`).trim();
  }
  return colours;
}
