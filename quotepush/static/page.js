/**
 * The ticker page: a list of codes, kept in the address and in the browser, live on quotepush.js.
 *
 * Rows only mark their line as changed; lines are painted once per frame, and only cells whose
 * text is new are touched. Whatever a vendor sends is shown as text, never as markup.
 */
import { connect } from "./quotepush.js";

const DEFAULT_LIST = [
  "600519.SH", "000001.SZ", "300750.SZ", "601318.SH", "002594.SZ", "600036.SH",
  "AAPL", "MSFT", "NVDA", "TSLA", "AMZN", "GOOGL",
];
const LIST_KEY = "quotepush.list";
const COLOURS_KEY = "quotepush.up";
const MOST_CODES = 500;
const TREND_S = 300;
const FLASH_EVERY_MS = 1000; // a code that ticks all the time should not glow all the time
const UNKNOWN = "–";

const REASONS = {
  connection_lost: "Connection lost",
  forbidden: "The server refuses this page",
  going_away: "The server is going away",
  kicked: "Closed by the server",
  overloaded: "The server is busy",
  rate_limited: "Too many requests",
  replaced: "A newer connection took over",
  restart: "The server is restarting",
  silent: "The server stopped answering",
  unreachable: "The server cannot be reached",
};

const $ = (id) => document.getElementById(id);
const root = document.documentElement;

// ---------------------------------------------------------------- numbers and times as text

const locale = root.lang;
const whole = new Intl.NumberFormat(locale, { maximumFractionDigits: 0 });
const compact = new Intl.NumberFormat(locale, {
  notation: "compact", minimumSignificantDigits: 3, maximumSignificantDigits: 3,
});
const clock = new Intl.DateTimeFormat(locale, {
  hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23",
});
const fullDate = new Intl.DateTimeFormat(locale, { dateStyle: "full", timeStyle: "long" });
const fixed = new Map(); // decimals → format

function price(value, decimals, signDisplay = "auto") {
  if (value == null) return UNKNOWN;
  const key = decimals + signDisplay;
  if (!fixed.has(key)) {
    fixed.set(key, new Intl.NumberFormat(locale, {
      minimumFractionDigits: decimals, maximumFractionDigits: decimals, signDisplay,
    }));
  }
  return fixed.get(key).format(value).replace("-", "−"); // as wide as a plus
}

function decimalsOf(value) {
  if (value == null) return 0;
  const text = String(value);
  if (text.includes("e-")) return 8;
  const point = text.indexOf(".");
  return point < 0 ? 0 : Math.min(8, text.length - point - 1);
}

function quantity(value) {
  if (value == null) return UNKNOWN;
  return value < 1000 ? whole.format(value) : compact.format(value);
}

function duration(ms) {
  const seconds = Math.max(0, ms) / 1000;
  if (seconds < 1) return "< 1 s";
  if (seconds < 120) return `${Math.round(seconds)} s`;
  return seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}

/** The time of day, or the date if it was another day. */
function moment(ms) {
  const date = new Date(ms);
  if (date.toDateString() === new Date().toDateString()) return clock.format(date);
  const [month, day] = [date.getMonth() + 1, date.getDate()].map((n) => String(n).padStart(2, "0"));
  return `${date.getFullYear()}-${month}-${day}`;
}

// ---------------------------------------------------------------- one line of the table

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

class Line {
  code = null; // as the server spells it, once it has said so
  row = null;
  refusal = null;
  isStale = false; // the server says that this code alone is stale
  isNear = true; // on the screen, or nearly

  #cells = {};
  #texts = {};
  #flashed = {}; // cell → value and time of its last flash
  #decimals = 2;
  #shown = null; // the row on the screen
  #trend;

  /** `isNew`: the user has just asked for it, so a refusal is told at the input. */
  constructor(spelling, isNew) {
    this.spelling = spelling;
    this.isNew = isNew;
    this.element = $("line").content.firstElementChild.cloneNode(true);
    for (const name of ["code", "label", "tag", "last", "change", "pct", "bid", "ask", "volume", "time"]) {
      this.#cells[name] = this.element.querySelector(`.${name}`);
    }
    this.removeButton = this.element.querySelector("button");
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

  paint() {
    const row = this.row ?? {};
    const { last, prev_close: previousClose, bid, ask, change, change_pct: percent, ts } = row;
    this.#decimals = Math.max(this.#decimals, ...[last, previousClose, bid, ask].map(decimalsOf));
    this.#write("code", this.name);
    this.#write("label", row.name ?? (row.seq === 0 ? "no quote yet" : ""));
    this.#write("last", price(last, this.#decimals));
    this.#write("change", price(change, this.#decimals, "exceptZero"));
    this.#write("pct", percent == null ? UNKNOWN : `${price(percent, 2, "exceptZero")}%`);
    this.#write("bid", price(bid, this.#decimals));
    this.#write("ask", price(ask, this.#decimals));
    this.#write("volume", quantity(row.volume));
    this.#write("time", ts == null ? UNKNOWN : moment(ts));
    this.#tag();
    if (this.refusal) this.#refuse();
    this.#cells.time.title = ts == null ? "" : fullDate.format(ts);
    this.removeButton.setAttribute("aria-label", `Remove ${this.name}`);
    this.element.dataset.move = change > 0 ? "up" : change < 0 ? "down" : "flat";
    this.element.toggleAttribute("data-refused", this.refusal !== null);
    this.element.toggleAttribute("data-empty", !row.name);
    if (row === this.#shown || last == null) return;
    for (const name of ["last", "bid", "ask"]) this.#flash(name, row[name]);
    this.#trend.add(last, Date.now());
    this.#shown = row;
  }

  #tag() {
    const { status, phase } = this.row ?? {};
    let tag = "";
    if (this.row?.seq && (this.isStale || feedIsStale())) tag = "stale";
    else if (status && status !== "trading") tag = status.replaceAll("_", " ");
    else if (phase && phase !== "regular") tag = phase;
    this.#write("tag", tag);
    this.#cells.tag.hidden = !tag;
    this.element.toggleAttribute("data-stale", tag === "stale");
  }

  #refuse() {
    for (const name of ["last", "change", "pct", "bid", "ask", "volume", "time", "tag"]) this.#write(name, "");
    this.#cells.tag.hidden = true;
    this.#write("label", `Refused: ${this.refusal}`);
  }

  #write(name, text) {
    if (this.#texts[name] === text) return;
    this.#texts[name] = text;
    this.#cells[name].textContent = text;
  }

  /** Flash a cell in the direction in which it went since its last flash. */
  #flash(name, value) {
    const before = this.#flashed[name];
    const now = performance.now();
    if (value == null || value === before?.value) return;
    if (before && (!this.isNear || now - before.at < FLASH_EVERY_MS)) return;
    this.#flashed[name] = { value, at: before ? now : -Infinity };
    if (!before) return;
    // Two names for one animation: the other one starts it again without a forced layout.
    const cell = this.#cells[name];
    const side = value > before.value ? "up" : "down";
    cell.dataset.flash = cell.dataset.flash === `${side}-a` ? `${side}-b` : `${side}-a`;
  }
}

// ---------------------------------------------------------------- the list

const lines = new Map(); // spelling → Line, in the order on the page
const lineOf = new WeakMap(); // element → Line
const dirty = new Set(); // to be painted in the next frame
const far = new Set(); // out of sight: to be painted with the next second

const sight = new IntersectionObserver((entries) => {
  for (const { target, isIntersecting } of entries) {
    const line = lineOf.get(target);
    line.isNear = isIntersecting;
    if (far.delete(line)) touch(line);
  }
}, { rootMargin: "200px 0px" });

function touch(line) {
  if (!line.isNear) {
    far.add(line);
    return;
  }
  if (!dirty.size) requestAnimationFrame(paint);
  dirty.add(line);
}

function touchAll() {
  for (const line of lines.values()) touch(line);
}

function paint() {
  paintAll(dirty);
}

function paintAll(set) {
  const lines = [...set];
  set.clear();
  for (const line of lines) line.paint();
}

function add(spelling, isNew = false) {
  const line = new Line(spelling, isNew);
  lines.set(spelling, line);
  $("lines").append(line.element);
  lineOf.set(line.element, line);
  sight.observe(line.element);
  line.removeButton.addEventListener("click", () => {
    const next = line.element.nextElementSibling ?? line.element.previousElementSibling;
    remove(line);
    remember();
    (next?.querySelector("button") ?? $("code")).focus();
  });
  quotes.subscribe(spelling, (row) => {
    line.row = row;
    rowsSeen++;
    touch(line);
  });
}

function remove(line) {
  quotes.unsubscribe(line.spelling);
  lines.delete(line.spelling);
  dirty.delete(line);
  far.delete(line);
  sight.unobserve(line.element);
  line.element.remove();
}

function point(line) {
  line.element.scrollIntoView({ block: "nearest" });
  line.element.animate?.([{ backgroundColor: "var(--accent-soft)" }, {}], 1200);
}

/** Put the list into the address and, when the visitor has changed it, into the browser's storage. */
function remember({ isEdit = true } = {}) {
  const codes = [...lines.values()].map((line) => line.name);
  const hash = codes.map(encodeURIComponent).join(",");
  history.replaceState(null, "", hash ? `#${hash}` : location.pathname + location.search);
  if (isEdit) store(LIST_KEY, JSON.stringify(codes));
  $("empty").hidden = codes.length > 0;
  showFigures();
}

function listFromAddress() {
  try {
    return location.hash.slice(1).split(/[,\s]+/).map(decodeURIComponent).filter(Boolean);
  } catch {
    return []; // not a list of ours
  }
}

function storedList() {
  try {
    return JSON.parse(localStorage.getItem(LIST_KEY)).map(String);
  } catch {
    return null; // nothing there, or storage is blocked
  }
}

function store(key, text) {
  try {
    localStorage.setItem(key, text);
  } catch {
    // Storage is blocked or full: the address still holds the list.
  }
}

function show(codes) {
  notify("");
  for (const line of [...lines.values()]) remove(line);
  for (const code of new Set(codes.slice(0, MOST_CODES))) add(code);
}

// ---------------------------------------------------------------- connection state and figures

let link = { state: "connecting" };
let trouble = ""; // why the connection was lost, until it is back
let feed = null; // ok, stale or down, as the last heartbeat said
let feedHeardAt = null;
let roundTrips = []; // of this connection, in ms
let rowsSeen = 0;
let figuresAt = performance.now();

function feedIsStale() {
  return link.state !== "open" || feed === "stale" || feed === "down";
}

function showState() {
  const { state, retryAt } = link;
  let text = trouble || "Connecting";
  let tone = trouble ? "bad" : "wait";
  let countdown = "";
  if (state === "open") {
    text = { ok: "Live", stale: "Connected, but the feed is stale", down: "Connected, but the feed is down" }[feed] ?? "Connected";
    tone = { stale: "wait", down: "bad" }[feed] ?? "good";
  } else if (state === "closed") {
    tone = "bad";
  } else if (state === "waiting") {
    countdown = `next attempt in ${Math.max(0, Math.ceil((retryAt - Date.now()) / 1000))} s`;
  } else if (trouble) {
    countdown = "connecting…";
  }
  // The live region is written only when it has something new to say; the countdown stands outside.
  if ($("state").textContent !== text) $("state").textContent = text;
  $("countdown").textContent = countdown;
  $("link").dataset.tone = tone;
  $("retry").hidden = state !== "closed" && !trouble;
  $("retry").textContent = state === "closed" ? "Connect" : "Try now";
}

function showFigures() {
  const now = performance.now();
  const rate = (rowsSeen * 1000) / Math.max(1, now - figuresAt);
  const isOpen = link.state === "open";
  if (now - figuresAt > 900) {
    $("rate").textContent = isOpen ? `${whole.format(rate)}/s` : UNKNOWN;
    rowsSeen = 0;
    figuresAt = now;
  }
  $("feed-age").textContent = feedHeardAt === null ? UNKNOWN : duration(Date.now() - feedHeardAt);
  if (!isOpen) $("latency").textContent = UNKNOWN;
  const facts = [`${lines.size} ${lines.size === 1 ? "code" : "codes"}`];
  if (quotes.merged) facts.push(`${whole.format(quotes.merged)} rows merged`);
  if (quotes.hello) facts.push(`quotepush ${quotes.hello.server}`);
  $("summary").textContent = facts.join(" · ");
}

function sentence(word) {
  return word.charAt(0).toUpperCase() + word.slice(1).replaceAll("_", " ");
}

function notify(text, isError = false) {
  $("notice").textContent = text;
  $("notice").toggleAttribute("data-error", isError);
  if (isError) $("code").setAttribute("aria-invalid", "true");
  else $("code").removeAttribute("aria-invalid");
}

// ---------------------------------------------------------------- wiring

const quotes = connect(new URL(document.body.dataset.ws, document.baseURI));

quotes.on("state", (event) => {
  link = event;
  if (event.state === "open") {
    trouble = "";
    feed = null;
    roundTrips = [];
    quotes.ping();
  } else if (event.reason) {
    trouble = event.message ?? REASONS[event.reason] ?? sentence(event.reason);
  }
  showState();
  touchAll();
});

quotes.on("heartbeat", (event) => {
  const before = feed;
  feed = event.feed;
  if (event.feed_age_ms != null) feedHeardAt = Date.now() - event.feed_age_ms;
  showState();
  if (feed !== before) touchAll();
  if (!document.hidden) quotes.ping();
});

quotes.on("row", (row) => {
  if (row.prev == null) return; // a snapshot can be old
  feedHeardAt = Date.now();
  if (feed === "ok" || feed === "down") return; // only the server knows that a dead feed is back
  feed = "ok";
  showState();
  touchAll();
});

quotes.on("pong", ({ rtt_ms }) => {
  // The least of the newest few: the others also measure what this browser was busy with.
  roundTrips = [...roundTrips.slice(-4), rtt_ms];
  const ms = Math.min(...roundTrips);
  $("latency").textContent = ms < 1 ? "< 1 ms" : `${Math.round(ms)} ms`;
});

quotes.on("status", ({ scope, state, codes }) => {
  if (scope !== "codes") return;
  for (const line of lines.values()) {
    if (!codes.includes(line.code)) continue;
    line.isStale = state === "stale";
    touch(line);
  }
});

quotes.on("ack", ({ accepted = [], rejected = [] }) => {
  for (const { as, code } of accepted) {
    const line = lines.get(as);
    if (!line) continue;
    const twin = [...lines.values()].find((other) => other !== line && other.code === code);
    if (twin) {
      remove(line);
      notify(`${as} is ${code}, which is already on the list.`);
      point(twin);
      continue;
    }
    line.code = code;
    line.refusal = null;
    if (line.isNew) {
      notify(as.toUpperCase() === code ? `${code} added.` : `${as} added as ${code}.`);
      point(line);
    }
    touch(line);
  }
  for (const { as, message, error } of rejected) refuse(as, message ?? error);
  const isEdit = [...lines.values()].some((line) => line.isNew && line.code);
  for (const line of lines.values()) if (line.code) line.isNew = false;
  remember({ isEdit });
});

quotes.on("error", ({ codes = [], message, error, retryable }) => {
  if (retryable) return; // asked again by itself
  for (const code of codes) refuse(code, message ?? error);
  remember({ isEdit: false });
  if (!codes.length) notify(message ?? error, true);
});

/** A code that was just typed goes away with a message; one that was on the list stays and says why. */
function refuse(spelling, message) {
  const line = lines.get(spelling);
  if (!line) return;
  if (line.isNew) {
    remove(line);
    notify(`${spelling}: ${message}`, true);
    if (!$("code").value) $("code").value = spelling;
    $("code").select();
  } else {
    line.refusal = message;
    touch(line);
  }
}

$("add").addEventListener("submit", (event) => {
  event.preventDefault();
  const spellings = $("code").value.split(/[\s,;，；、]+/).filter(Boolean);
  $("code").value = "";
  notify("");
  for (const spelling of spellings) {
    const present = [...lines.values()].find((line) => line.is(spelling));
    if (present) {
      notify(`${present.name} is already on the list.`);
      point(present);
    } else {
      add(spelling, true);
    }
  }
  if (spellings.length) remember({ isEdit: false });
});

$("code").addEventListener("input", () => notify(""));

$("retry").addEventListener("click", () => quotes.reconnect());

$("defaults").addEventListener("click", () => {
  show(DEFAULT_LIST);
  remember();
  $("code").focus();
});

$("colours").addEventListener("change", ({ target }) => {
  root.dataset.up = target.value;
  store(COLOURS_KEY, target.value);
});

if (navigator.clipboard) {
  $("share").addEventListener("click", async () => {
    await navigator.clipboard.writeText(location.href);
    $("share").textContent = "Copied";
    setTimeout(() => ($("share").textContent = "Copy link"), 1500);
  });
} else {
  $("share").hidden = true; // only pages from https or localhost may write to the clipboard
}

addEventListener("hashchange", () => {
  show(listFromAddress());
  remember({ isEdit: false });
});

addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.target.matches("input") || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  $("code").focus();
});

try {
  const up = localStorage.getItem(COLOURS_KEY);
  if (up) $("colours").querySelector(`[value="${CSS.escape(up)}"]`)?.click();
} catch {
  // Storage is blocked: red stays up.
}

const fromAddress = listFromAddress();
show(fromAddress.length ? fromAddress : storedList() ?? DEFAULT_LIST);
remember({ isEdit: false });
showState();
$("foot").hidden = false;
setInterval(() => {
  paintAll(far);
  showFigures();
  if (link.state === "waiting") showState();
}, 1000);
