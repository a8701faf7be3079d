/**
 * The ticker page: watchlists, kept in the address and in the browser, live on quotepush.js.
 *
 * Law: this is the wiring and the only place that knows the connection. What is on the page follows from the list, and
 * what is subscribed follows from the lines on the page and the code whose details are open. Whatever a vendor sends is
 * shown as text, never as markup.
 */
import { Days } from "./page-day.js";
import { Detail } from "./page-detail.js";
import { whole } from "./page-figures.js";
import { Lists, MOST_CODES, addressOf, readAddress } from "./page-lists.js";
import { Messages } from "./page-messages.js";
import { Movers } from "./page-movers.js";
import { Search } from "./page-search.js";
import { State } from "./page-state.js";
import { Table } from "./page-table.js";
import { Tabs } from "./page-tabs.js";
import { currentLanguage, locale, said, speak, t, translate } from "./page-words.js";
import { connect } from "./quotepush.js";

const DEFAULT_LIST = [
  "600519.SH", "000001.SZ", "300750.SZ", "601318.SH", "002594.SZ", "600036.SH",
  "AAPL", "MSFT", "NVDA", "TSLA", "AMZN", "GOOGL",
];
const COLOURS_KEY = "quotepush.up";
// A view replaces the one before: these are the fields of the table and the book.
const WIDE = {
  fields: [
    "name", "last", "prev_close", "open", "high", "low", "change", "change_pct", "volume", "amount", "bid", "ask",
    "bids", "asks", "limit_up", "limit_down", "phase", "status",
  ],
};
const USUAL = {};
const BOOK_EVERY_MS = 2000;
const SHEET = matchMedia("(max-width: 1000px)"); // the details lie over the list

const $ = (id) => document.getElementById(id);
const root = document.documentElement;
const url = (path) => new URL(path, document.baseURI);

root.lang = locale();
translate(document);
document.title = t("title");

const quotes = connect(url(document.body.dataset.ws));
const days = new Days(Date.now());
const lists = new Lists(DEFAULT_LIST);
const state = new State({
  state: $("state"), countdown: $("countdown"), link: $("link"), retry: $("retry"), slow: $("slow"), slowRows: $("slow-rows"),
  feedAge: $("feed-age"), latency: $("latency"), rate: $("rate"),
});
const table = new Table({
  table: $("quotes"),
  template: $("line"),
  isFeedStale: () => state.isFeedStale,
  onOpen: (line) => open(line.name),
  onRemove: dismiss,
  onMove: (line, place) => {
    remember({ isEdit: true });
    hear(t("moved", { code: line.name, place: place + 1, count: table.size }));
  },
});
const detail = new Detail({
  pane: $("detail"),
  dayOf: (code) => days.of(code),
  onClose: () => close({ isAsked: true }),
  onAdd: () => wish(detail.code),
});
const tabs = new Tabs({
  nav: $("lists"),
  dialog: $("naming"),
  lists,
  buttons: { create: $("new-list"), rename: $("rename-list"), delete: $("delete-list") },
  onSelect: (place) => {
    lists.select(place);
    show();
  },
  onCreate: (name) => {
    lists.create({ codes: [], name });
    show();
    $("code").focus();
  },
  onRename: (name) => {
    lists.rename(name);
    remember();
  },
  onDelete: () => {
    const name = tabs.nameOf();
    const undo = lists.delete();
    show();
    notify(t("listDeleted", { name }), { undo: () => (undo(), show()) });
  },
});
const movers = new Movers({ strip: $("movers"), url: url("codes"), onOpen: open });
const messages = new Messages({ pane: $("messages"), onOpen: open, onEmpty: () => $("code").focus() });
const search = new Search({
  input: $("code"),
  list: $("found"),
  count: $("found-count"),
  url: url("codes"),
  isListed: (code) => Boolean(table.find(code)),
  onChoose: (code) => {
    notify("");
    wish(code);
  },
});

// ---------------------------------------------------------------- the list

function add(spelling, options) {
  const line = table.add(spelling, options);
  quotes.subscribe(spelling, (row) => {
    line.take(row, Date.now());
    table.touch(line);
  });
  return line;
}

function drop(line) {
  quotes.unsubscribe(line.spelling);
  return table.remove(line);
}

/** What the user asks for: a new line, or a look at the one that is there. */
function wish(spelling) {
  const present = table.find(spelling);
  if (present) {
    notify(t("isOnList", { code: present.name }));
    table.point(present);
  } else if (table.size >= MOST_CODES) {
    notify(t("full", { most: MOST_CODES }), { isError: true });
  } else {
    add(spelling, { isNew: true });
    aim();
    remember();
  }
}

function dismiss(line) {
  const next = table.neighbour(line) ?? table.neighbour(line, -1);
  const place = drop(line);
  aim();
  remember({ isEdit: true });
  (next?.removeButton ?? $("code")).focus();
  const undo = () => {
    if (!table.find(line.name)) add(line.name, { place: Math.min(place, table.size) });
    aim();
    remember({ isEdit: true });
    table.find(line.name).openButton.focus();
  };
  notify(t("removed", { code: line.name }), { undo });
}

/** Put the lines of the list that is current on the page, in the place of those that are there. */
function show() {
  notify("");
  for (const line of table.lines) drop(line);
  for (const code of lists.current.codes) add(code);
  aim();
  remember();
}

/** Put the list into the address and, when the visitor has changed it, into the browser's storage. */
function remember({ isEdit = false } = {}) {
  if (isEdit) lists.change(table.names);
  const address = addressOf({ codes: table.names, name: lists.current.name, open: detail.code });
  history.replaceState(null, "", address || location.pathname + location.search);
  $("empty").hidden = table.size > 0;
  $("shared").hidden = lists.place >= 0;
  tabs.show();
  summarize();
}

function summarize() {
  const facts = [table.size === 1 ? t("oneCode") : t("codes", { count: whole(table.size) })];
  if (quotes.merged) facts.push(t("merged", { count: whole(quotes.merged) }));
  if (quotes.hello) facts.push(`quotepush ${quotes.hello.server}`);
  $("summary").textContent = facts.join(" · ");
}

function notify(text, { isError = false, undo = null } = {}) {
  $("notice").textContent = text;
  $("notice").toggleAttribute("data-error", isError);
  $("undo").hidden = !undo;
  $("undo").onclick = () => {
    notify("");
    undo();
  };
  if (isError) $("code").setAttribute("aria-invalid", "true");
  else $("code").removeAttribute("aria-invalid");
}

/** Say something that those who see the page see. */
function hear(text) {
  $("heard").textContent = text;
}

/** A code that was just typed goes away with a message; one that was on the list stays and says why. */
function refuse(spelling, message) {
  if (spelling === aimedAt) detail.refuse(message);
  const line = table.get(spelling);
  if (line?.isNew) {
    drop(line);
    notify(`${spelling}: ${message}`, { isError: true });
    if (!$("code").value) $("code").value = spelling;
    $("code").select();
  } else if (line) {
    line.refusal = message;
    table.touch(line);
  }
}

// ---------------------------------------------------------------- the details

let aimedAt = null; // the spelling whose subscription has the wide view
let opener = null; // gets the focus back

function open(code) {
  if (detail.code === null) opener = document.activeElement;
  const line = table.find(code);
  detail.open(line?.name ?? code, quotes.rows.get(line?.code ?? code));
  lay(true);
  aim();
  remember();
  detail.focus();
}

function close({ isAsked }) {
  detail.close();
  lay(false);
  aim();
  remember();
  if (isAsked) (opener?.isConnected ? opener : $("code")).focus();
}

/** Make room for the details; where they lie over everything else, nothing else can be reached. */
function lay(isOpen) {
  root.toggleAttribute("data-detail", isOpen);
  for (const part of document.querySelectorAll("[data-under]")) part.inert = isOpen && SHEET.matches;
}

/** Bring the wide view to the code that is open, by the spelling its line has, and take it from the one before. */
function aim() {
  const line = detail.code && table.find(detail.code);
  const wanted = line?.spelling ?? detail.code;
  if (aimedAt !== null && aimedAt !== wanted) {
    if (table.get(aimedAt)) quotes.subscribe(aimedAt, USUAL);
    else quotes.unsubscribe(aimedAt);
  }
  if (wanted !== null) quotes.subscribe(wanted, WIDE);
  aimedAt = wanted;
  table.mark(line);
  place();
}

function place() {
  if (detail.code === null) return;
  const line = table.find(detail.code);
  detail.setPlace({ isListed: Boolean(line), isStale: state.isFeedStale || line?.isStale === true });
}

/** A stream has one view for all its codes, so the book is asked for. */
async function askForBook() {
  const { code } = detail;
  if (code === null || !state.isStream || document.hidden) return;
  const where = url("quotes");
  where.search = new URLSearchParams({ codes: code, fields: "bids,asks" });
  try {
    const answer = await fetch(where, { cache: "no-store", signal: AbortSignal.timeout(BOOK_EVERY_MS) });
    const { quotes: [book] } = await answer.json();
    if (code === detail.code) detail.takeBook(book);
  } catch {
    // Asked again soon.
  }
}

// ---------------------------------------------------------------- what the server says

quotes.on("state", (event) => {
  state.takeLink(event);
  movers.setConnected(state.isOpen);
  if (state.isOpen) quotes.ping();
  table.touchAll();
  place();
});

quotes.on("heartbeat", (event) => {
  if (state.takeHeartbeat(event)) {
    table.touchAll();
    place();
  }
  if (!document.hidden) quotes.ping();
});

quotes.on("row", (row) => {
  if (state.takeRow(row)) {
    table.touchAll();
    place();
  }
  days.take(row, Date.now());
  if (row.code === detail.code) detail.take(row);
});

quotes.on("merged", (event) => state.takeMerged(event));

quotes.on("pong", (event) => state.takePong(event));

quotes.on("message", (event) => messages.take(event));

quotes.on("status", (event) => {
  if (event.scope === "connection") state.takeStatus(event);
  if (event.scope !== "codes") return;
  for (const line of table.lines) {
    if (!event.codes.includes(line.code)) continue;
    line.isStale = event.state === "stale";
    table.touch(line);
  }
  place();
});

quotes.on("ack", ({ action, accepted = [], rejected = [] }) => {
  if (action !== "subscribe") return;
  let isEdit = false;
  for (const { as, code } of accepted) {
    if (as === aimedAt && detail.code !== code) detail.rename(code);
    const line = table.get(as);
    if (!line) continue;
    const twin = table.lines.find((other) => other !== line && other.code === code);
    if (twin) {
      drop(line);
      notify(t("isTwin", { as, code }));
      table.point(twin);
      continue;
    }
    line.code = code;
    line.refusal = null;
    if (line.isNew) {
      notify(as.toUpperCase() === code ? t("added", { code }) : t("addedAs", { as, code }));
      table.point(line);
      isEdit = true;
    }
    line.isNew = false;
    table.touch(line);
  }
  for (const { as, message, error } of rejected) refuse(as, said(error, message));
  aimAgain();
  remember({ isEdit });
});

quotes.on("error", ({ codes = [], message, error, retryable }) => {
  if (retryable) return; // asked again by itself
  for (const code of codes) refuse(code, said(error, message));
  remember();
  if (!codes.length) notify(said(error, message), { isError: true });
});

/** Lines may be spelled otherwise, or be gone. */
function aimAgain() {
  const line = detail.code && table.find(detail.code);
  if ((line?.spelling ?? detail.code) !== aimedAt) aim();
}

// ---------------------------------------------------------------- what the user does

$("add").addEventListener("submit", (event) => {
  event.preventDefault();
  const spellings = $("code").value.split(/[\s,;，；、]+/).filter(Boolean);
  $("code").value = "";
  search.close();
  notify("");
  for (const spelling of spellings) wish(spelling);
});

$("code").addEventListener("input", () => notify(""));

$("retry").addEventListener("click", () => quotes.reconnect());

$("keep").addEventListener("click", () => {
  lists.change(table.names);
  remember();
  $("lists").querySelector("[aria-current]").focus();
});

$("defaults").addEventListener("click", () => {
  lists.change(DEFAULT_LIST);
  show();
  $("code").focus();
});

$("colours").addEventListener("change", ({ target }) => {
  root.dataset.up = target.value;
  detail.restyle();
  try {
    localStorage.setItem(COLOURS_KEY, target.value);
  } catch {
    // Storage is blocked: the next visit has red up again.
  }
});

$("language").addEventListener("change", ({ target }) => {
  speak(target.value);
  root.lang = locale();
  document.title = t("title");
  translate(document);
  notify("");
  for (const line of table.lines) line.paint();
  table.tick();
  state.paint();
  state.tick();
  movers.paint();
  messages.paint();
  detail.restyle();
  remember();
});

if (navigator.clipboard) {
  $("share").addEventListener("click", async () => {
    await navigator.clipboard.writeText(location.href);
    $("share").textContent = t("copied");
    setTimeout(() => ($("share").textContent = t("share")), 1500);
  });
} else {
  $("share").hidden = true; // only pages from https or localhost may write to the clipboard
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape" && detail.code !== null && !event.defaultPrevented) close({ isAsked: true });
  if (event.key !== "/" || event.target.matches("input")) return;
  event.preventDefault();
  $("code").focus();
});

addEventListener("hashchange", () => visit());

addEventListener("storage", (event) => {
  if (!lists.reload(event)) return;
  if (lists.place < 0 || `${lists.current.codes}` === `${table.names}`) tabs.show();
  else show();
});

addEventListener("pagehide", () => days.keep());

document.addEventListener("visibilitychange", () => {
  if (document.hidden) days.keep();
});

SHEET.addEventListener("change", () => lay(detail.code !== null));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => detail.restyle());

// ---------------------------------------------------------------- start

/** Show what the address says; without a list in it, the visitor's own. */
function visit() {
  const address = readAddress(location.hash);
  if (address.codes.length) lists.visit(address);
  show();
  if (address.open) open(address.open);
  else if (detail.code !== null) close({ isAsked: false });
}

try {
  const up = localStorage.getItem(COLOURS_KEY);
  if (up) $("colours").querySelector(`[value="${CSS.escape(up)}"]`)?.click();
} catch {
  // Storage is blocked: red stays up.
}
$("language").value = currentLanguage();
visit();
state.paint();
document.body.removeAttribute("data-wait");
setInterval(() => {
  table.tick();
  state.tick();
  summarize();
}, 1000);
setInterval(askForBook, BOOK_EVERY_MS);
