// The browser client against a scripted server: no socket, no clock, no luck.
// Run by tests/unit/test_quotepush_js.py, or: node --test tests/browser/quotepush.test.mjs

import assert from "node:assert/strict";
import { readFile } from "node:fs/promises";
import { beforeEach, test } from "node:test";

// Read and not imported by path: without a package.json older versions of Node take a .js file for CommonJS.
const source = await readFile(new URL("../../quotepush/static/quotepush.js", import.meta.url), "utf8");
const { connect } = await import(`data:text/javascript,${encodeURIComponent(source)}`);

const HELLO = { type: "hello", server: "0.1.0", heartbeat_ms: 4000, limits: { codes_per_request: 1000 } };

/** Timers and time that stand still until they are told to advance. */
class Clock {
  now = 1_000_000;
  #timers = new Map();
  #lastId = 0;

  setTimeout = (fn, ms) => {
    this.#timers.set(++this.#lastId, { fn, at: this.now + ms });
    return this.#lastId;
  };

  clearTimeout = (id) => this.#timers.delete(id);

  get pending() {
    return this.#timers.size;
  }

  advance(ms) {
    const end = this.now + ms;
    for (;;) {
      const due = [...this.#timers].filter(([, { at }]) => at <= end).sort(([, a], [, b]) => a.at - b.at)[0];
      if (!due) break;
      const [id, { fn, at }] = due;
      this.#timers.delete(id);
      this.now = at;
      fn();
    }
    this.now = end;
  }
}

let clock, sockets, random, answer, wakers, states;

class FakeSocket {
  sent = [];
  isClosed = false;

  constructor(url, protocols) {
    Object.assign(this, { url, protocols });
    sockets.push(this);
  }

  send(text) {
    this.sent.push(JSON.parse(text));
  }

  close() {
    this.isClosed = true;
  }

  /** The server says something. */
  says(message) {
    this.onmessage({ data: JSON.stringify(message) });
  }

  /** The server, or the network, ends it. */
  ends(code = 1006, reason = "") {
    this.onclose({ code, reason });
  }
}

const newest = () => sockets.at(-1);
const settle = () => new Promise((resolve) => setImmediate(resolve));
const ack = (id, accepted, rejected = []) => ({
  type: "ack", id, action: "subscribe", rejected, accepted: accepted.map(([code, as = code]) => ({ code, as })),
});

function open(options = {}) {
  const quotes = connect("ws://quotes.test/ws", {
    WebSocket: FakeSocket,
    fetch: (...request) => answer(...request),
    setTimeout: clock.setTimeout,
    clearTimeout: clock.clearTimeout,
    random: () => random,
    now: () => clock.now,
    ...options,
  });
  quotes.on("state", (event) => states.push(event));
  return quotes;
}

/** Connect, say hello, subscribe to codes that are all accepted; returns both ends. */
async function subscribed(codes, onRow) {
  const quotes = open();
  newest().says(HELLO);
  quotes.subscribe(codes, onRow);
  await settle();
  newest().says(ack(newest().sent.at(-1).id, codes.map((code) => [code])));
  return { quotes, server: newest() };
}

beforeEach(() => {
  clock = new Clock();
  sockets = [];
  states = [];
  random = 0.5;
  answer = async () => {
    throw new TypeError("nobody answers");
  };
  wakers = {};
  globalThis.addEventListener = (event, fn) => (wakers[event] = fn);
  globalThis.removeEventListener = (event) => delete wakers[event];
  globalThis.document = {
    visibilityState: "visible",
    addEventListener: (event, fn) => (wakers[event] = fn),
    removeEventListener: (event) => delete wakers[event],
  };
});

// ------------------------------------------------------------------ subscribing

test("codes that are subscribed before and after the hello go out in one message each", async () => {
  const quotes = open();
  quotes.subscribe(["A", "B"]);
  quotes.subscribe("C");
  await settle();
  assert.deepEqual(newest().sent, []);
  newest().says(HELLO);
  await settle();
  quotes.subscribe(["D", "A"]);
  await settle();
  assert.deepEqual(newest().sent.map(({ action, codes }) => [action, codes]), [
    ["subscribe", ["A", "B", "C"]],
    ["subscribe", ["D"]],
  ]);
  assert.deepEqual(newest().protocols, ["quotes.v1.json"]);
});

test("a long list is cut to what the server takes in one request", async () => {
  const quotes = open();
  quotes.subscribe(["A", "B", "C"]);
  newest().says({ ...HELLO, limits: { codes_per_request: 2 } });
  await settle();
  assert.deepEqual(newest().sent.map(({ codes }) => codes), [["A", "B"], ["C"]]);
});

test("rows reach the listeners of their code only, and the newest one is kept", async () => {
  const seen = [];
  const { quotes, server } = await subscribed(["A", "B"]);
  quotes.subscribe("A", (row) => seen.push(row.last));
  server.says({ type: "snapshot", data: [{ code: "A", seq: 4, last: 1 }, { code: "B", seq: 0 }] });
  server.says({ type: "tick", data: [{ prev: 4, code: "A", seq: 5, last: 2 }, { prev: 0, code: "B", seq: 1, last: 9 }] });
  assert.deepEqual(seen, [1, 2]);
  assert.equal(quotes.rows.get("A").last, 2);
  assert.equal(quotes.rows.get("B").last, 9);
});

test("a listener that comes later is given the row that is there", async () => {
  const seen = [];
  const { quotes, server } = await subscribed(["A"]);
  server.says({ type: "snapshot", data: [{ code: "A", seq: 4, last: 1 }] });
  quotes.subscribe("A", (row) => seen.push(row.last));
  await settle();
  assert.deepEqual(seen, [1]);
  assert.equal(server.sent.length, 1);
});

test("merged rows are counted from seq and prev", async () => {
  const { quotes, server } = await subscribed(["A"]);
  server.says({ type: "snapshot", data: [{ code: "A", seq: 10 }] });
  server.says({ type: "tick", data: [{ prev: 10, code: "A", seq: 11 }, { prev: 11, code: "A", seq: 15 }] });
  assert.equal(quotes.merged, 3);
});

test("a code is found under the spelling it was asked for, and unsubscribed when its last spelling goes", async () => {
  const seen = [];
  const quotes = open();
  newest().says(HELLO);
  quotes.subscribe("sh600519", (row) => seen.push(["sh600519", row.last]));
  quotes.subscribe("600519", (row) => seen.push(["600519", row.last]));
  await settle();
  const server = newest();
  server.says(ack(server.sent[0].id, [["600519.SH", "sh600519"], ["600519.SH", "600519"]]));
  server.says({ type: "tick", data: [{ code: "600519.SH", seq: 1, last: 7 }] });
  assert.deepEqual(seen, [["sh600519", 7], ["600519", 7]]);

  quotes.unsubscribe("600519");
  await settle();
  assert.equal(server.sent.length, 1);
  server.says({ type: "tick", data: [{ prev: 1, code: "600519.SH", seq: 2, last: 8 }] });
  assert.deepEqual(seen.slice(2), [["sh600519", 8]]);

  quotes.unsubscribe("sh600519");
  await settle();
  assert.deepEqual([server.sent[1].action, server.sent[1].codes], ["unsubscribe", ["600519.SH"]]);
  assert.equal(quotes.rows.size, 0);
});

test("a row that was on its way when its code was dropped is ignored", async () => {
  const { quotes, server } = await subscribed(["A"]);
  quotes.unsubscribe("A");
  server.says({ type: "tick", data: [{ code: "A", seq: 1 }] });
  assert.equal(quotes.rows.size, 0);
});

test("a code that is dropped before its ack came is unsubscribed when it comes", async () => {
  const quotes = open();
  newest().says(HELLO);
  quotes.subscribe("sh600519");
  await settle();
  quotes.unsubscribe("sh600519");
  await settle();
  newest().says(ack(newest().sent[0].id, [["600519.SH", "sh600519"]]));
  await settle();
  assert.deepEqual(newest().sent.map(({ action, codes }) => [action, codes]), [
    ["subscribe", ["sh600519"]],
    ["unsubscribe", ["600519.SH"]],
  ]);
});

test("dropping and wanting a code at once asks for it anew, in this order", async () => {
  const { quotes, server } = await subscribed(["A"]);
  quotes.unsubscribe("A");
  quotes.subscribe("A");
  await settle();
  assert.deepEqual(server.sent.map(({ action }) => action), ["subscribe", "unsubscribe", "subscribe"]);
});

test("a refused code is told in the ack, asked for again only on the next connection or after a new subscribe", async () => {
  const acks = [];
  const quotes = open();
  quotes.on("ack", (message) => acks.push(message));
  newest().says(HELLO);
  quotes.subscribe("no such");
  await settle();
  const refusal = { as: "no such", error: "bad_code", message: "…" };
  newest().says(ack(newest().sent[0].id, [], [refusal]));
  await settle();
  assert.deepEqual(acks[0].rejected, [refusal]);
  assert.equal(newest().sent.length, 1);

  quotes.unsubscribe("no such");
  quotes.subscribe("no such");
  await settle();
  assert.equal(newest().sent.length, 2);
  newest().says(ack(newest().sent[1].id, [], [refusal]));

  newest().ends();
  clock.advance(250);
  newest().says(HELLO);
  await settle();
  assert.deepEqual(newest().sent[0].codes, ["no such"]);
});

test("a subscribe that came too fast is made again when the server says", async () => {
  const errors = [];
  const quotes = open();
  quotes.on("error", (error) => errors.push(error));
  newest().says(HELLO);
  quotes.subscribe("A");
  await settle();
  const server = newest();
  server.says({ type: "error", id: server.sent[0].id, error: "rate_limited", retryable: true, retry_after_ms: 400 });
  assert.deepEqual(errors[0].codes, ["A"]);
  quotes.subscribe("B");
  await settle();
  assert.equal(server.sent.length, 1);
  clock.advance(400);
  await settle();
  assert.deepEqual(server.sent[1].codes, ["A", "B"]);
});

test("one listener's fault keeps no row from the others", async () => {
  const faults = [];
  const seen = [];
  const runners = process.listeners("unhandledRejection");
  process.removeAllListeners("unhandledRejection");
  process.once("unhandledRejection", (fault) => faults.push(fault.message));
  const { quotes, server } = await subscribed(["A"], () => {
    throw new Error("mine");
  });
  quotes.subscribe("A", (row) => seen.push(row.seq));
  server.says({ type: "tick", data: [{ code: "A", seq: 1 }] });
  await settle();
  for (const runner of runners) process.on("unhandledRejection", runner);
  assert.deepEqual([seen, faults], [[1], ["mine"]]);
});

test("messages of unknown type are ignored, known ones become events", async () => {
  const seen = [];
  const quotes = open();
  for (const event of ["heartbeat", "status", "message"]) quotes.on(event, ({ type }) => seen.push(type));
  newest().says(HELLO);
  for (const type of ["heartbeat", "news", "status", "message"]) newest().says({ type });
  assert.deepEqual(seen, ["heartbeat", "status", "message"]);
});

test("a ping is answered with its round trip", async () => {
  const trips = [];
  const quotes = open();
  quotes.on("pong", ({ rtt_ms: ms }) => trips.push(ms));
  quotes.ping(); // not open yet: nothing to measure
  newest().says(HELLO);
  quotes.ping();
  clock.advance(30);
  newest().says({ type: "pong", id: newest().sent[0].id });
  assert.deepEqual(trips, [30]);
});

// ------------------------------------------------------------------ coming back

test("pauses grow from half a second to twenty, and each is spread over its whole length", () => {
  open();
  random = 1;
  const pauses = [];
  for (let i = 0; i < 8; i++) {
    newest().ends();
    pauses.push(states.at(-1).retryAt - clock.now);
    clock.advance(pauses.at(-1));
  }
  assert.deepEqual(pauses, [500, 1000, 2000, 4000, 8000, 16_000, 20_000, 20_000]);
  assert.equal(sockets.length, 9);
  random = 0;
  newest().ends();
  assert.equal(states.at(-1).retryAt, clock.now);
  assert.deepEqual([states.at(-1).state, states.at(-1).reason, states.at(-1).attempt], ["waiting", "unreachable", 9]);
});

test("a connection that lasted to a heartbeat starts the pauses over; a hello alone does not", () => {
  random = 1;
  open();
  newest().ends();
  clock.advance(500);
  newest().says(HELLO);
  newest().ends(1012, "restart");
  assert.deepEqual([states.at(-1).retryAt - clock.now, states.at(-1).reason], [1000, "restart"]);
  clock.advance(1000);
  newest().says(HELLO);
  newest().says({ type: "heartbeat", feed: "ok" });
  newest().ends();
  assert.deepEqual([states.at(-1).retryAt - clock.now, states.at(-1).reason], [500, "connection_lost"]);
});

test("all subscriptions are made again in one message, and rows stay until they are replaced", async () => {
  const seen = [];
  const { quotes, server } = await subscribed(["A", "B"], (row) => seen.push(row.seq));
  server.says({ type: "snapshot", data: [{ code: "A", seq: 1 }, { code: "B", seq: 2 }] });
  quotes.unsubscribe("B");
  quotes.subscribe("C");
  server.ends();
  assert.equal(quotes.rows.get("A").seq, 1);
  clock.advance(250);
  newest().says(HELLO);
  await settle();
  assert.notEqual(newest(), server);
  assert.deepEqual(newest().sent.map(({ action, codes }) => [action, codes]), [["subscribe", ["A", "C"]]]);
  newest().says(ack(newest().sent[0].id, [["A"], ["C"]]));
  newest().says({ type: "snapshot", data: [{ code: "A", seq: 5 }] });
  assert.deepEqual(seen, [1, 2, 5]);
});

test("a link without any message for two and a half heartbeats is given up", () => {
  open();
  newest().says(HELLO); // heartbeat_ms 4000
  clock.advance(9_900);
  newest().says({ type: "tick", data: [] });
  clock.advance(9_900);
  assert.equal(states.at(-1).state, "open");
  clock.advance(300);
  assert.deepEqual([states.at(-1).state, states.at(-1).reason], ["waiting", "silent"]);
  assert.ok(sockets[0].isClosed);
  clock.advance(250);
  assert.equal(sockets.length, 2);
});

test("an opening that nobody answers is given up too", () => {
  open();
  clock.advance(11_000);
  assert.deepEqual([states.at(-1).state, states.at(-1).reason], ["waiting", "unreachable"]);
});

for (const [code, reason] of [[4401, "auth_failed"], [4403, "forbidden"], [4409, "replaced"]]) {
  test(`after close code ${code} nobody tries again, unless told to`, () => {
    const quotes = open();
    newest().says(HELLO);
    newest().ends(code, reason);
    assert.deepEqual(states.at(-1), { state: "closed", code, reason });
    wakers.online();
    assert.deepEqual([clock.pending, sockets.length], [0, 1]);
    quotes.reconnect();
    assert.equal(sockets.length, 2);
  });
}

test("a server that closes tells how long to stay away, and nothing shortens that", () => {
  open();
  newest().says(HELLO);
  newest().says({ type: "status", scope: "connection", state: "closing", retry_after_ms: 3000 });
  newest().ends(1012, "restart");
  assert.equal(states.at(-1).retryAt - clock.now, 3250);
  wakers.online();
  assert.equal(sockets.length, 1);
  clock.advance(3250);
  assert.equal(sockets.length, 2);
});

test("the network's return or the user's look ends the pause and starts the pauses over", () => {
  random = 1;
  open();
  for (const pause of [500, 1000]) {
    newest().ends();
    clock.advance(pause);
  }
  newest().ends();
  wakers.online();
  assert.equal(sockets.length, 4);
  newest().ends();
  assert.equal(states.at(-1).retryAt - clock.now, 500);
  document.visibilityState = "hidden";
  wakers.visibilitychange();
  assert.equal(sockets.length, 4);
  document.visibilityState = "visible";
  wakers.visibilitychange();
  assert.equal(sockets.length, 5);
});

test("an open socket must prove itself after a sleep", () => {
  open();
  newest().says(HELLO);
  wakers.online();
  assert.deepEqual(newest().sent.map(({ action }) => action), ["ping"]);
  clock.advance(3_100);
  assert.equal(states.at(-1).reason, "silent");
});

test("closing is for good", async () => {
  const quotes = open();
  newest().says(HELLO);
  quotes.close();
  await settle();
  assert.deepEqual([states.at(-1).state, quotes.state, newest().isClosed], ["closed", "closed", true]);
  assert.deepEqual([clock.pending, wakers], [0, {}]);
});

// ------------------------------------------------------------------ the reason of a failed open

const answers = (status, headers = {}, body = {}) => async (url) => {
  assert.equal(url, "http://quotes.test/ws");
  return { status, headers: { get: (name) => headers[name] ?? null }, json: async () => body };
};

test("a server that is full says so, and its Retry-After is kept", async () => {
  open();
  answer = answers(503, { "Retry-After": "7" }, { error: "overloaded", message: "this server holds all it can" });
  newest().ends();
  await settle();
  const { state, reason, message, attempt, retryAt } = states.at(-1);
  assert.deepEqual([state, reason, attempt], ["waiting", "overloaded", 1]);
  assert.equal(message, "this server holds all it can");
  assert.equal(retryAt - clock.now, 7250);
  assert.equal(clock.pending, 1);
  clock.advance(7250);
  assert.equal(sockets.length, 2);
});

test("a server that would welcome an upgrade is simply tried again", async () => {
  open();
  answer = answers(426);
  newest().ends();
  await settle();
  assert.equal(states.at(-1).reason, "unreachable");
  clock.advance(250);
  assert.equal(sockets.length, 2);
});

for (const status of [401, 403]) {
  test(`status ${status} is a refusal that no second attempt changes`, async () => {
    open();
    answer = answers(status, {}, { error: "forbidden_origin", message: "pages of this origin may not connect" });
    newest().ends();
    await settle();
    assert.deepEqual([states.at(-1).state, states.at(-1).reason, clock.pending], ["closed", "forbidden_origin", 0]);
  });
}

test("an answer that comes after the next attempt has begun changes nothing", async () => {
  let respond;
  open();
  answer = () => new Promise((resolve) => (respond = resolve));
  newest().ends();
  clock.advance(250);
  newest().says(HELLO);
  respond(await answers(403)("http://quotes.test/ws"));
  await settle();
  assert.equal(states.at(-1).state, "open");
});

test("a connection that was open is not asked about", () => {
  answer = () => assert.fail("asked");
  open();
  newest().says(HELLO);
  newest().ends();
  assert.equal(states.at(-1).reason, "connection_lost");
});
