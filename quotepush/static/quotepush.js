/**
 * quotepush.js: live quotes from a quotepush server, in one module without dependencies.
 *
 *     import { connect } from "./quotepush.js";
 *
 *     const quotes = connect("wss://quotes.example/ws");
 *     quotes.subscribe(["600519.SH", "AAPL"], row => console.log(row.code, row.last));
 *     quotes.on("state", ({ state, reason }) => console.log(state, reason));
 *
 * The connection looks after itself: it notices a link that is silently dead, comes back with
 * growing, randomly spread pauses, and makes all subscriptions again in one message. A row is
 * always complete, so it never has to be merged with the one before.
 */

const SUBPROTOCOL = "quotes.v1.json";
const BACKOFF_MS = 500;
const BACKOFF_MAX_MS = 20_000;
const OPEN_TIMEOUT_MS = 10_000;
const ASK_TIMEOUT_MS = 5_000;
// auth_failed, kicked or forbidden, replaced by a newer connection of the same user.
const PERMANENT = new Set([4401, 4403, 4409]);
// A link is dead after this many checks without a message; four checks make one heartbeat.
const SILENT_CHECKS = 10;

/**
 * Connect to a server and keep connected until `close()`.
 *
 * `url` is `ws:`, `wss:`, `http:` or `https:`, or relative to the page. The options replace what
 * the platform offers: `WebSocket`, `fetch`, `setTimeout`, `clearTimeout`, `random`, `now`.
 *
 * Events, each with one argument:
 *
 * - `state`: `{state, reason, code, attempt, retryAt, message}`; `state` is `connecting`, `open`,
 *   `waiting` (the next attempt starts at `retryAt`, in epoch milliseconds) or `closed` (for good).
 * - `row`: every row of every subscribed code. `heartbeat`, `status`, `message`, `ack`, `pong`:
 *   the server's message. `pong` also has `rtt_ms`.
 * - `error`: the server's error message, with the `codes` of the request that it answers.
 */
export function connect(url, options = {}) {
  const quotes = new Quotes(absolute(url), { ...globalsOf(globalThis), ...options });
  quotes.reconnect();
  return quotes;
}

class Quotes {
  /** The newest row of each subscribed code. */
  rows = new Map();
  /** Rows that the server merged into newer ones because this client or a limit was slower. */
  merged = 0;
  /** The server's first message on this connection. */
  hello = null;

  #wanted = new Map(); // spelling → { code once acknowledged, listeners }
  #spellings = new Map(); // code → spellings it was subscribed by
  #asked = new Set(); // spellings that this connection has asked for
  #dropped = new Set(); // codes that this connection has yet to unsubscribe
  #requests = new Map(); // id → { action, codes, sentAt }
  #lastId = 0;
  #syncing = false;
  #pause = null;
  #events = new Map();
  #link;
  #env;
  #forget;

  constructor(url, env) {
    this.#env = env;
    this.#link = new Link(url, env, (message) => this.#receive(message), (state) => this.#emit("state", state));
    this.#forget = onWake(() => {
      // A socket that slept may look open for minutes: make the server speak, or give it up.
      if (this.#link.wake()) this.ping();
    });
  }

  /** `connecting`, `open`, `waiting` or `closed`. */
  get state() {
    return this.#link.state;
  }

  /**
   * Subscribe to codes, now and after every reconnect; `onRow` gets each row of them.
   *
   * Any spelling that the server understands will do; the `ack` event tells what was understood
   * and what was refused. A refused code is asked for again on the next connection, until it is
   * unsubscribed.
   */
  subscribe(codes, onRow) {
    for (const spelling of listOf(codes)) {
      if (!this.#wanted.has(spelling)) this.#wanted.set(spelling, { code: null, listeners: new Set() });
      const { code, listeners } = this.#wanted.get(spelling);
      if (!onRow) continue;
      listeners.add(onRow);
      if (this.rows.has(code)) call(onRow, this.rows.get(code));
    }
    this.#sync();
  }

  /** Drop codes, by the spelling they were subscribed with, and all their listeners. */
  unsubscribe(codes) {
    for (const spelling of listOf(codes)) {
      const code = this.#wanted.get(spelling)?.code;
      this.#wanted.delete(spelling);
      // While the answer is on its way the spelling counts as asked; the ack then drops its code.
      if (!this.#isPending(spelling)) this.#asked.delete(spelling);
      const others = this.#spellings.get(code);
      others?.delete(spelling);
      if (others?.size === 0) {
        this.#spellings.delete(code);
        this.rows.delete(code);
        this.#dropped.add(code);
      }
    }
    this.#sync();
  }

  /** Call `fn` on each `event`; the returned function ends that. */
  on(event, fn) {
    if (!this.#events.has(event)) this.#events.set(event, new Set());
    this.#events.get(event).add(fn);
    return () => this.#events.get(event).delete(fn);
  }

  /** Measure the round trip; the answer is a `pong` event with `rtt_ms`. */
  ping() {
    if (this.state === "open") this.#request("ping");
  }

  /** Connect at once: instead of waiting, or after the connection was closed for good. */
  reconnect() {
    this.#link.open();
  }

  /** End the connection. */
  close() {
    this.#forget();
    this.#link.close();
  }

  #receive(message) {
    switch (message.type) {
      case "hello":
        this.hello = message;
        this.#asked.clear();
        this.#dropped.clear();
        this.#requests.clear();
        this.#hold(0);
        this.#link.opened(message.heartbeat_ms);
        this.#sync();
        break;
      case "snapshot":
      case "tick":
        for (const row of message.data) this.#take(row);
        break;
      case "ack":
        this.#acknowledge(message);
        this.#emit("ack", message);
        break;
      case "error":
        this.#emit("error", { ...message, codes: this.#refuse(message) });
        break;
      case "pong":
        this.#emit("pong", { ...message, rtt_ms: this.#env.now() - this.#answered(message)?.sentAt });
        break;
      case "heartbeat":
        this.#link.settled();
        this.#emit("heartbeat", message);
        break;
      case "status":
        if (message.state === "closing") this.#link.retryAfter(message.retry_after_ms);
        this.#emit("status", message);
        break;
      case "message":
        this.#emit("message", message);
    }
  }

  #take(row) {
    const spellings = this.#spellings.get(row.code);
    if (!spellings) return; // unsubscribed while it was on its way
    if (row.prev != null) this.merged += row.seq - row.prev - 1;
    this.rows.set(row.code, row);
    for (const spelling of spellings) {
      for (const onRow of this.#wanted.get(spelling)?.listeners ?? []) call(onRow, row);
    }
    this.#emit("row", row);
  }

  #acknowledge(message) {
    this.#answered(message);
    for (const { code, as } of message.accepted ?? []) {
      const entry = this.#wanted.get(as);
      if (entry) {
        entry.code = code;
        if (!this.#spellings.has(code)) this.#spellings.set(code, new Set());
        this.#spellings.get(code).add(as);
      } else {
        // Unsubscribed before the answer came.
        this.#asked.delete(as);
        this.#dropped.add(code);
      }
    }
    for (const { as } of message.rejected ?? []) {
      if (!this.#wanted.has(as)) this.#asked.delete(as);
    }
    if (this.#dropped.size) this.#sync();
  }

  /** The server did not do what was asked: ask again if it says when; return the codes concerned. */
  #refuse(message) {
    const { action, codes } = this.#answered(message) ?? {};
    if (codes && message.retryable) {
      for (const code of codes) {
        if (action === "subscribe") this.#asked.delete(code);
        else this.#dropped.add(code);
      }
      this.#hold(message.retry_after_ms ?? 1000);
    }
    return codes;
  }

  /** Bring the connection's subscriptions to what is wanted, after the caller has had its say. */
  #sync() {
    if (this.#syncing) return;
    this.#syncing = true;
    Promise.resolve().then(() => {
      this.#syncing = false;
      if (this.state !== "open" || this.#pause) return;
      const dropped = [...this.#dropped].filter((code) => !this.#spellings.has(code));
      const fresh = [...this.#wanted.keys()].filter((spelling) => !this.#asked.has(spelling));
      this.#dropped.clear();
      for (const spelling of fresh) this.#asked.add(spelling);
      this.#requestInParts("unsubscribe", dropped);
      this.#requestInParts("subscribe", fresh);
    });
  }

  #requestInParts(action, codes) {
    const most = this.hello.limits?.codes_per_request ?? 1000;
    for (let i = 0; i < codes.length; i += most) this.#request(action, { codes: codes.slice(i, i + most) });
  }

  #request(action, parameters) {
    const id = ++this.#lastId;
    this.#requests.set(id, { action, ...parameters, sentAt: this.#env.now() });
    this.#link.send({ action, id, ...parameters });
  }

  #isPending(spelling) {
    return [...this.#requests.values()].some(({ action, codes }) => action === "subscribe" && codes.includes(spelling));
  }

  #answered({ id }) {
    const request = this.#requests.get(id);
    this.#requests.delete(id);
    return request;
  }

  #hold(ms) {
    const { setTimeout, clearTimeout } = this.#env;
    clearTimeout(this.#pause);
    this.#pause = null;
    if (!ms) return;
    this.#pause = setTimeout(() => {
      this.#pause = null;
      this.#sync();
    }, ms);
  }

  #emit(event, payload) {
    for (const fn of this.#events.get(event) ?? []) call(fn, payload);
  }
}

/** A socket that comes back: backoff, watchdog, and the reason why it could not open. */
class Link {
  state = "closed";

  #url;
  #env;
  #onMessage;
  #onState;
  #socket = null;
  #retry = null;
  #watch = null;
  #silence = 0; // checks since the last message
  #failures = 0;
  #toldMs = 0; // how long the server asked us to stay away

  constructor(url, env, onMessage, onState) {
    this.#url = url;
    this.#env = env;
    this.#onMessage = onMessage;
    this.#onState = onState;
  }

  open() {
    const { WebSocket } = this.#env;
    this.#drop();
    this.#toldMs = 0;
    const socket = (this.#socket = new WebSocket(this.#url, [SUBPROTOCOL]));
    socket.onmessage = ({ data }) => {
      this.#silence = 0;
      this.#onMessage(JSON.parse(data));
    };
    socket.onclose = ({ code, reason }) => this.#lost(code, reason);
    this.#guard(OPEN_TIMEOUT_MS / SILENT_CHECKS);
    this.#report("connecting");
  }

  close() {
    this.#drop();
    this.#report("closed", { reason: "client" });
  }

  send(request) {
    this.#socket.send(JSON.stringify(request));
  }

  /** The server said hello. */
  opened(heartbeatMs) {
    this.#guard(heartbeatMs / 4);
    this.#report("open");
  }

  /** The connection has lasted, so the next loss is a new story. */
  settled() {
    this.#failures = 0;
  }

  retryAfter(ms) {
    this.#toldMs = ms ?? 0;
  }

  /** The network or the user came back: do not wait any longer. True: check the open socket. */
  wake() {
    // A pause that the server itself asked for is kept.
    if (this.state === "waiting" && !this.#toldMs) {
      this.#failures = 0;
      this.open();
    }
    if (this.state !== "open") return false;
    this.#silence = Math.max(this.#silence, SILENT_CHECKS - 2);
    return true;
  }

  #lost(code, reason) {
    const wasOpen = this.state === "open";
    this.#drop();
    if (PERMANENT.has(code)) return this.#report("closed", { code, reason });
    this.#wait(reason || (wasOpen ? "connection_lost" : "unreachable"), { code });
    if (!wasOpen) this.#ask(this.#failures);
  }

  #wait(reason, details) {
    const { setTimeout, clearTimeout, random, now } = this.#env;
    // Full jitter: clients that lost one server together must not come back together.
    const delayMs = this.#toldMs + random() * Math.min(BACKOFF_MAX_MS, BACKOFF_MS * 2 ** this.#failures++);
    clearTimeout(this.#retry);
    this.#retry = setTimeout(() => this.open(), delayMs);
    this.#report("waiting", { ...details, reason, attempt: this.#failures, retryAt: now() + delayMs });
  }

  /** A browser does not show why a handshake failed; the same path answers a plain GET with it. */
  async #ask(attempt) {
    const { fetch } = this.#env;
    try {
      const answer = await fetch(this.#url.replace(/^ws/, "http"), {
        cache: "no-store",
        signal: globalThis.AbortSignal?.timeout?.(ASK_TIMEOUT_MS),
      });
      const { status } = answer;
      const { error, message } = status === 426 ? {} : await answer.json().catch(() => ({}));
      if (this.state !== "waiting" || this.#failures !== attempt) return; // answered too late
      const reason = error ?? `http_${status}`;
      if (status === 401 || status === 403) {
        this.#drop();
        this.#report("closed", { code: status, reason, message });
      } else if (status === 429 || status === 503) {
        this.#failures--; // the same attempt, with a better reason
        this.#toldMs = Number(answer.headers.get("Retry-After")) * 1000 || 0;
        this.#wait(reason, { code: status, message });
      }
    } catch {
      // Nobody answers there either: go on waiting.
    }
  }

  /** Give the socket up after too many checks without a message. */
  #guard(checkMs) {
    // Checks are counted and not the time: a timer that a sleeping tab held back proves nothing.
    const { setTimeout, clearTimeout } = this.#env;
    const check = () => {
      if (++this.#silence > SILENT_CHECKS) this.#lost(null, this.state === "open" ? "silent" : "unreachable");
      else this.#watch = setTimeout(check, checkMs);
    };
    clearTimeout(this.#watch);
    this.#silence = 0;
    this.#watch = setTimeout(check, checkMs);
  }

  #drop() {
    const { clearTimeout } = this.#env;
    clearTimeout(this.#retry);
    clearTimeout(this.#watch);
    if (!this.#socket) return;
    // Its own close event can come minutes later on a dead link.
    this.#socket.onmessage = this.#socket.onclose = null;
    this.#socket.close();
    this.#socket = null;
  }

  #report(state, details) {
    this.state = state;
    this.#onState({ state, ...details });
  }
}

function globalsOf({ WebSocket, fetch, setTimeout, clearTimeout }) {
  return { WebSocket, fetch, setTimeout, clearTimeout, random: Math.random, now: Date.now };
}

function absolute(url) {
  return /^wss?:/.test(url) ? String(url) : new URL(url, globalThis.location?.href).href.replace(/^http/, "ws");
}

function listOf(codes) {
  return typeof codes === "string" ? [codes] : codes;
}

/** Call `fn` when the network comes back or the page is looked at again; returns how to stop. */
function onWake(fn) {
  const { document } = globalThis;
  const onVisible = () => document.visibilityState === "visible" && fn();
  globalThis.addEventListener?.("online", fn);
  document?.addEventListener?.("visibilitychange", onVisible);
  return () => {
    globalThis.removeEventListener?.("online", fn);
    document?.removeEventListener?.("visibilitychange", onVisible);
  };
}

/** One listener's fault must not keep a row from the others. */
function call(fn, argument) {
  try {
    fn(argument);
  } catch (error) {
    Promise.reject(error); // shown as an unhandled rejection, like any other bug
  }
}
