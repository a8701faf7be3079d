// The browser client against a scripted server: no socket, no clock, no luck.
// Run by tests/unit/test_quotepush_js.py, or: node --test tests/browser/quotepush.test.mjs

import assert from "node:assert/strict";
import { beforeEach, test } from "node:test";

import { connect } from "../../quotepush/static/quotepush.js";

const HELLO = { type: "hello", server: "0.1.0", epoch: "e1", heartbeat_ms: 4000, limits: { codes_per_request: 1000 } };

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

let clock, sockets, streams, random, answer, wakers, states;

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

class FakeStream extends EventTarget {
  readyState = 1;

  constructor(url) {
    super();
    this.query = Object.fromEntries(new URL(url).searchParams);
    this.path = url.split("?")[0];
    streams.push(this);
  }

  close() {
    this.readyState = 2;
  }

  says(message, lastEventId = "") {
    this.dispatchEvent(Object.assign(new Event(message.type), { data: JSON.stringify(message), lastEventId }));
  }

  /** The connection is lost; it comes back by itself unless it was refused. */
  ends(isRefused = false) {
    this.readyState = isRefused ? 2 : 0;
    this.dispatchEvent(new Event("error"));
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
  streams = [];
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

test("a backend's bare frame is told as it is, and harms nobody", async () => {
  const seen = [];
  const quotes = open();
  for (const event of ["raw", "message"]) quotes.on(event, (message) => seen.push(message));
  const server = newest();
  server.says(HELLO);
  const bytes = new Uint8Array([1, 2]).buffer;
  for (const data of ["Good morning", "", "null", "5", "[]", '{"alert":1}', bytes]) server.onmessage({ data });
  server.says({ type: "message", data: 1 });
  assert.deepEqual(seen.map(({ type, data }) => [type, data]), [
    ...["Good morning", "", "null", "5", "[]", '{"alert":1}', bytes].map((data) => ["raw", data]), ["message", 1],
  ]);
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

/** A number that looks like chance, and is the same each time (mulberry32). */
function chance(seed) {
  return () => {
    let t = (seed += 0x6d2b79f5);
    t = Math.imul(t ^ (t >>> 15), t | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

for (const told of [0, 1000]) {
  test(`a thousand clients that lose one server together come back spread evenly, told to wait ${told} ms or not`, () => {
    const next = chance(1);
    for (let n = 0; n < 1000; n++) {
      open({ random: next });
      newest().says(HELLO);
      if (told) newest().says({ type: "status", scope: "connection", state: "closing", retry_after_ms: told });
      newest().ends(told ? 1012 : 1006);
    }
    const tenths = Array(20).fill(0);
    for (let tenth = 0; tenth < 20; tenth++) {
      const before = sockets.length;
      clock.advance(100);
      tenths[tenth] = sockets.length - before;
    }
    const first = told / 100;
    assert.deepEqual(tenths.filter((count, tenth) => count && (tenth < first || tenth >= first + 5)), []);
    assert.ok(tenths.slice(first, first + 5).every((count) => count > 160 && count < 240), `${tenths}`);
  });
}

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

test("a socket that could not open is not waited for, whether it says so by an error, a close, or both", () => {
  open();
  newest().onerror({});
  assert.deepEqual([states.at(-1).state, states.at(-1).reason, newest().onclose], ["waiting", "unreachable", null]);
  clock.advance(250);
  newest().says(HELLO);
  newest().onerror({}); // its close says more
  assert.equal(states.at(-1).state, "open");
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

// ------------------------------------------------------------------ options

test("codes of the same options share a message, and those of others have their own", async () => {
  const quotes = open();
  newest().says(HELLO);
  quotes.subscribe(["A", "B"], { fields: ["last"], max_rate: 2 });
  quotes.subscribe("C", { snapshot: false });
  quotes.subscribe("D", { fields: ["last"], max_rate: 2 });
  quotes.subscribe("E");
  await settle();
  assert.deepEqual(newest().sent.map(({ codes, fields, max_rate, snapshot }) => [codes, fields, max_rate, snapshot]), [
    [["A", "B", "D"], ["last"], 2, undefined],
    [["C"], undefined, undefined, false],
    [["E"], undefined, undefined, undefined],
  ]);
});

test("a request is cut to the bytes that the server takes", async () => {
  const quotes = open();
  const codes = Array.from({ length: 40 }, (_, n) => `CODE-${n}`);
  quotes.subscribe(codes);
  newest().says({ ...HELLO, limits: { codes_per_request: 1000, message_bytes: 300 } });
  await settle();
  assert.ok(newest().sent.every((request) => JSON.stringify(request).length <= 300));
  assert.deepEqual(newest().sent.flatMap(({ codes }) => codes), codes);
});

test("another rate is asked for without a snapshot, other fields with one that is shown although its seq is known", async () => {
  const seen = [];
  const { quotes, server } = await subscribed(["A"], (row) => seen.push(row));
  server.says({ type: "snapshot", data: [{ code: "A", seq: 4, last: 1 }] });
  quotes.subscribe("A", { max_rate: 5 });
  await settle();
  quotes.subscribe("A", { fields: ["bid"], max_rate: 5 });
  await settle();
  assert.deepEqual(server.sent.slice(1).map(({ snapshot, since }) => [snapshot, since]), [[false, undefined], [undefined, undefined]]);
  server.says(ack(server.sent[1].id, [["A"]]));
  server.says({ type: "tick", data: [{ prev: 4, code: "A", seq: 5, last: 2 }] }); // was on its way
  server.says(ack(server.sent[2].id, [["A"]]));
  server.says({ type: "snapshot", data: [{ code: "A", seq: 5, bid: 3 }] });
  server.says({ type: "snapshot", data: [{ code: "A", seq: 5, bid: 3 }] });
  assert.deepEqual(seen.map(({ seq, bid }) => [seq, bid]), [[4, undefined], [5, undefined], [5, 3]]);
});

test("a listener without options leaves those of the code as they are", async () => {
  const quotes = open();
  newest().says(HELLO);
  quotes.subscribe("A", { max_rate: 5 });
  await settle();
  quotes.subscribe("A", () => {});
  await settle();
  assert.equal(newest().sent.length, 1);
});

test("a second spelling of a code is given the row that is there, and the first one gets none twice", async () => {
  const seen = [];
  const { quotes, server } = await subscribed(["A"], (row) => seen.push(["A", row.seq]));
  server.says({ type: "snapshot", data: [{ code: "A", seq: 4 }] });
  quotes.subscribe("a", (row) => seen.push(["a", row.seq]));
  await settle();
  server.says(ack(server.sent[1].id, [["A", "a"]]));
  server.says({ type: "snapshot", data: [{ code: "A", seq: 4 }] });
  assert.deepEqual(seen, [["A", 4], ["a", 4]]);
});

// ------------------------------------------------------------------ what is missing between two rows

/** Subscribe to A and be at its row 4; returns both ends and what was told. */
async function atRowFour() {
  const told = [];
  const ends = await subscribed(["A"], ({ seq }) => told.push(seq));
  for (const event of ["merged", "gap"]) ends.quotes.on(event, (payload) => told.push({ event, ...payload }));
  ends.server.says({ type: "snapshot", data: [{ code: "A", seq: 4 }] });
  told.length = 0;
  return { ...ends, told };
}

/** Lose the connection and have another, whose answer to `since` is `resume`. */
async function back(resume, hello = HELLO) {
  newest().ends();
  clock.advance(states.at(-1).retryAt - clock.now);
  newest().says(hello);
  await settle();
  const accepted = [{ code: "A", as: "A", resume }];
  newest().says({ type: "ack", id: newest().sent[0].id, action: "subscribe", accepted, rejected: [] });
  return newest();
}

test("rows that were merged are told before the row that stands for them", async () => {
  const { quotes, server, told } = await atRowFour();
  server.says({ type: "tick", data: [{ prev: 4, code: "A", seq: 5 }, { prev: 5, code: "A", seq: 9 }] });
  assert.deepEqual(told, [5, { event: "merged", code: "A", count: 3 }, 9]);
  assert.equal(quotes.merged, 3);
});

test("a row that does not follow on the one before is told as a gap, and an old one is dropped", async () => {
  const { server, told } = await atRowFour();
  server.says({ type: "tick", data: [{ prev: 6, code: "A", seq: 7 }, { prev: 4, code: "A", seq: 5 }, { prev: 6, code: "A", seq: 7 }] });
  assert.deepEqual(told, [{ event: "gap", code: "A", from: 4, to: 7, reason: "chain" }, 7]);
});

test("rows that the server never got are told as a gap", async () => {
  const { server, told } = await atRowFour();
  server.says({ type: "snapshot", gap: true, data: [{ code: "A", seq: 9, epoch: "e1" }] });
  server.says({ type: "tick", data: [{ prev: 9, code: "A", seq: 10 }] });
  assert.deepEqual(told, [{ event: "gap", code: "A", from: 4, to: 9, reason: "server" }, 9, 10]);
});

test("a code that is numbered anew is told as a gap, and its lower seq is taken", async () => {
  const { server, told } = await atRowFour();
  server.says({ type: "snapshot", data: [{ code: "A", seq: 1, epoch: "e2" }] });
  server.says({ type: "tick", data: [{ prev: 1, code: "A", seq: 2 }] });
  assert.deepEqual(told, [{ event: "gap", code: "A", from: 4, to: 1, reason: "epoch" }, 1, 2]);
});

test("who comes back asks for what was missed, and what is replayed follows without a gap", async () => {
  const { told } = await atRowFour();
  const server = await back("replay");
  assert.deepEqual([server.sent[0].epoch, server.sent[0].since], ["e1", { A: 4 }]);
  server.says({ type: "tick", replay: true, data: [{ prev: 4, code: "A", seq: 5 }, { prev: 5, code: "A", seq: 6 }] });
  server.says({ type: "tick", data: [{ prev: 6, code: "A", seq: 7 }] });
  assert.deepEqual(told, [5, 6, 7]);
});

test("a snapshot instead of what was missed is a gap, but not when it is the next row or the known one", async () => {
  const { told } = await atRowFour();
  for (const seq of [4, 5, 8]) (await back("snapshot")).says({ type: "snapshot", data: [{ code: "A", seq }] });
  assert.deepEqual(told, [5, { event: "gap", code: "A", from: 5, to: 8, reason: "resume" }, 8]);
});

test("each code resumes in the epoch of its own row", async () => {
  const { quotes, server } = await subscribed(["A", "B"]);
  server.says({ type: "snapshot", data: [{ code: "A", seq: 4 }, { code: "B", seq: 5, epoch: "b1" }] });
  server.ends();
  quotes.subscribe("C");
  clock.advance(250);
  newest().says(HELLO);
  await settle();
  assert.deepEqual(newest().sent[0].since, { A: 4, B: { epoch: "b1", seq: 5 } });
  newest().ends();
  clock.advance(500);
  newest().says({ ...HELLO, epoch: "e2" });
  await settle();
  assert.deepEqual(newest().sent[0].since, { A: { epoch: "e1", seq: 4 }, B: { epoch: "b1", seq: 5 } });
});

test("a code that was dropped and is wanted again begins anew", async () => {
  const { quotes, server, told } = await atRowFour();
  quotes.unsubscribe("A");
  quotes.subscribe("A", ({ seq }) => told.push(seq));
  await settle();
  server.says({ type: "tick", data: [{ prev: 4, code: "A", seq: 5 }] });
  server.says(ack(server.sent.at(-1).id, [["A"]]));
  server.says({ type: "snapshot", data: [{ code: "A", seq: 7 }] });
  assert.deepEqual(told, [7]);
});

// ------------------------------------------------------------------ a tab that nobody looks at

const rates = () => newest().sent.filter(({ action }) => action === "subscribe").map(({ max_rate, snapshot }) => [max_rate, snapshot]);

function look(visibilityState) {
  document.visibilityState = visibilityState;
  wakers.visibilitychange();
  clock.advance(0);
}

test("after five seconds out of sight a code is asked for once a second, and as before when it is seen again", async () => {
  await subscribed(["A"]);
  look("hidden");
  clock.advance(5000);
  await settle();
  assert.deepEqual(rates().slice(1), [[1, false]]);
  look("visible");
  await settle();
  assert.deepEqual(rates().slice(2), [[undefined, false]]);
});

test("a short look away changes nothing", async () => {
  await subscribed(["A"]);
  look("hidden");
  clock.advance(4900);
  await settle();
  look("visible");
  clock.advance(1000);
  await settle();
  assert.equal(rates().length, 1);
});

test("a rate below the hidden one is left alone, and 0 leaves all of them alone", async () => {
  for (const [hiddenRate, asked] of [[3, [3, 2]], [0, [4, 2]]]) {
    const quotes = open({ hiddenRate });
    newest().says(HELLO);
    quotes.subscribe("A", { max_rate: 4 });
    quotes.subscribe("B", { max_rate: 2 });
    look("hidden");
    clock.advance(5000);
    await settle();
    assert.deepEqual(newest().sent.map(({ max_rate }) => max_rate), asked);
    quotes.close();
    document.visibilityState = "visible";
  }
});

test("a page that opens out of sight is slow from its fifth second on", async () => {
  document.visibilityState = "hidden";
  const quotes = open();
  newest().says(HELLO);
  quotes.subscribe("A");
  await settle();
  clock.advance(5000);
  await settle();
  assert.deepEqual(rates(), [[undefined, undefined], [1, false]]);
});

test("a connection that is lost out of sight comes back at the hidden rate", async () => {
  const { server } = await atRowFour();
  look("hidden");
  clock.advance(5000);
  server.ends();
  clock.advance(250);
  newest().says(HELLO);
  await settle();
  assert.deepEqual(newest().sent.map(({ max_rate, since }) => [max_rate, since]), [[1, { A: 4 }]]);
});

// ------------------------------------------------------------------ tokens

const GUARDED = { ...HELLO, auth: "required" };

test("a token goes out before anything else, once it is there", async () => {
  let bring;
  const quotes = open({ token: () => new Promise((resolve) => (bring = resolve)) });
  quotes.subscribe("A");
  newest().says(GUARDED);
  await settle();
  assert.deepEqual(newest().sent, []);
  bring("t1");
  await settle();
  assert.deepEqual(newest().sent.map(({ action, token, codes }) => [action, token ?? codes]), [["auth", "t1"], ["subscribe", ["A"]]]);
});

test("a token goes out also where it is not required", async () => {
  for (const token of [() => "t1", undefined]) {
    open({ token }).subscribe("A");
    newest().says({ ...HELLO, auth: "optional" });
    await settle();
    assert.deepEqual(newest().sent.map(({ action }) => action), token ? ["auth", "subscribe"] : ["subscribe"]);
  }
});

test("a server that wants no token is sent none", async () => {
  const quotes = open({ token: () => assert.fail("asked") });
  quotes.subscribe("A");
  newest().says({ ...HELLO, auth: "none" });
  await settle();
  assert.deepEqual(newest().sent.map(({ action }) => action), ["subscribe"]);
});

test("a newer token is sent on the same connection after three quarters of its life", async () => {
  let count = 0;
  open({ token: () => `t${++count}` });
  newest().says(GUARDED);
  await settle();
  newest().says({ type: "ack", id: newest().sent[0].id, action: "auth", time: 50_000, expires: 70_000 });
  for (let i = 0; i < 14; i++) {
    clock.advance(1000);
    newest().says({ type: "heartbeat" });
  }
  assert.equal(count, 1);
  clock.advance(1000);
  await settle();
  assert.deepEqual(newest().sent.map(({ token }) => token), ["t1", "t2"]);
});

test("a token that lives for a year is not asked for at once", async () => {
  let count = 0;
  open({ token: () => `t${++count}`, setTimeout: (fn, ms) => (assert.ok(ms < 2 ** 31), clock.setTimeout(fn, ms)) });
  newest().says(GUARDED);
  await settle();
  newest().says({ type: "ack", id: newest().sent[0].id, action: "auth", time: 0, expires: 365 * 86_400_000 });
  clock.advance(5000);
  await settle();
  assert.equal(count, 1);
});

test("a token that comes when its connection has gone is not sent on the next one", async () => {
  const bring = [];
  open({ token: () => new Promise((resolve) => bring.push(resolve)) });
  newest().says(GUARDED);
  await settle();
  newest().ends();
  clock.advance(250);
  newest().says({ ...GUARDED });
  await settle();
  bring[0]("old");
  await settle();
  assert.deepEqual(newest().sent, []);
  bring[1]("new");
  await settle();
  assert.deepEqual(newest().sent.map(({ token }) => token), ["new"]);
});

test("closing ends the tries for a token too", async () => {
  let count = 0;
  const quotes = open({ token: () => Promise.reject(new Error(`${++count}`)) });
  newest().says(GUARDED);
  quotes.close();
  await settle();
  clock.advance(60_000);
  await settle();
  assert.deepEqual([count, clock.pending], [1, 0]);
});

// ------------------------------------------------------------------ the reason of a failed open

const answers = (status, headers = {}, body = {}) => async (url) => {
  assert.equal(url.split("?")[0], "http://quotes.test/ws");
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

// ------------------------------------------------------------------ where WebSockets are blocked

/** Watch codes by a stream; returns the client. */
async function streaming(codes = ["A"], options = {}) {
  answer = answers(426);
  const quotes = open({ EventSource: FakeStream, ...options });
  quotes.subscribe(codes);
  await blocked();
  await blocked();
  return quotes;
}

/** One more socket cannot open. */
async function blocked() {
  if (states.at(-1)?.state === "waiting") clock.advance(states.at(-1).retryAt - clock.now);
  newest().ends();
  await settle();
}

const stream = () => streams.at(-1);

test("a server that comes back just as it is asked why is not taken for one whose WebSockets are blocked", async () => {
  open({ EventSource: FakeStream }).subscribe("A");
  await blocked();
  await blocked(); // nobody answered these two
  answer = answers(426);
  await blocked();
  assert.equal(streams.length, 0);
});

test("a position is kept until a row brings another, so a stream that is lost before goes on from it", async () => {
  await streaming(["A"]);
  stream().says(HELLO, "");
  stream().says({ type: "snapshot", data: [] }, "7");
  for (let lost = 0; lost < 2; lost++) {
    stream().ends(true);
    await blocked();
    assert.equal(stream().query.last_event_id, "7");
    stream().says(HELLO, "");
  }
});

test("rows that come again behind an old position are no gap, and are not counted as merged twice", async () => {
  const { server, told } = await atRowFour();
  server.says({ type: "tick", data: [{ prev: 4, code: "A", seq: 7 }] });
  server.says({ type: "tick", data: [{ prev: 4, code: "A", seq: 6 }, { prev: 6, code: "A", seq: 9 }] });
  assert.deepEqual(told, [
    { event: "merged", code: "A", count: 2 }, 7, { event: "merged", code: "A", count: 1 }, 9,
  ]);
});

for (const [kind, tokens] of [["text", "t"], ["function", null]]) {
  test(`a stream that is refused learns why, and is not tried for ever with a bad token: a ${kind}`, async () => {
    const asked = [];
    let count = 0;
    await streaming(["A"], { token: tokens ?? (() => `t${++count}`) });
    const refusal = answers(401, {}, { error: "auth_failed", message: "it has expired" });
    answer = (url, ...more) => {
      asked.push(url);
      return (url.includes("token=") ? refusal : answers(426))(url, ...more);
    };
    stream().ends(true);
    await settle();
    if (!tokens) {
      assert.equal(states.at(-1).state, "waiting");
      await blocked();
      assert.equal(stream().query.token, "t2");
      stream().ends(true);
      await settle();
    }
    assert.deepEqual(states.at(-1), { state: "closed", code: 401, reason: "auth_failed", message: "it has expired" });
    assert.equal(new URL(asked.at(-1)).searchParams.get("token"), tokens ?? "t2");
    assert.equal(clock.pending, 0);
  });
}

test("a stream that a full server refuses keeps the pause that this asks for", async () => {
  await streaming();
  answer = answers(503, { "Retry-After": "7" }, { error: "overloaded" });
  stream().ends(true);
  await settle();
  assert.equal(states.at(-1).reason, "overloaded");
  assert.ok(states.at(-1).retryAt - clock.now >= 7000);
});

test("a token that was taken by a stream makes the next refusal a first one", async () => {
  let count = 0;
  await streaming(["A"], { token: () => `t${++count}` });
  for (let ends = 0; ends < 3; ends++) {
    stream().says({ ...HELLO, auth: "ok" });
    stream().says({ type: "error", error: "auth_failed" });
    assert.equal(states.at(-1).state, "waiting");
    await blocked();
  }
});

test("two sockets that never said hello are followed by a stream beside the WebSocket's path", async () => {
  const quotes = await streaming(["A", "B"]);
  assert.deepEqual([stream().path, stream().query], ["http://quotes.test/stream", { codes: "A,B" }]);
  stream().says({ ...HELLO, auth: "none" });
  stream().says({ type: "ack", action: "subscribe", accepted: [{ code: "A", as: "A" }], rejected: [] });
  stream().says({ type: "snapshot", data: [{ code: "A", seq: 4 }] });
  assert.deepEqual(states.at(-1), { state: "open", stream: true });
  assert.equal(quotes.rows.get("A").seq, 4);
  quotes.ping(); // a stream takes no requests
});

test("a socket that has said hello meanwhile makes the next failure a first one", async () => {
  answer = answers(426);
  open({ EventSource: FakeStream }).subscribe("A");
  await blocked();
  clock.advance(states.at(-1).retryAt - clock.now);
  newest().says(HELLO);
  newest().ends();
  await blocked();
  assert.equal(streams.length, 0);
  await blocked();
  assert.equal(streams.length, 1);
});

test("a server that is full, or away, is not asked for a stream", async () => {
  open({ EventSource: FakeStream }).subscribe("A");
  await blocked();
  await blocked();
  answer = answers(503);
  await blocked();
  assert.equal(streams.length, 0);
});

test("a change of what is wanted opens another stream behind the last event of the one before", async () => {
  const quotes = await streaming(["A"]);
  stream().says(HELLO, "7");
  quotes.subscribe("B", { max_rate: 2 });
  await settle();
  assert.deepEqual([streams.length, streams[0].readyState, stream().query], [2, 2, { codes: "A,B", last_event_id: "7" }]);
  stream().says(HELLO, "8");
  quotes.subscribe("A", { max_rate: 2 });
  await settle();
  assert.deepEqual(stream().query, { codes: "A,B", max_rate: "2", last_event_id: "8" });
  stream().says(HELLO, "9");
  await settle();
  assert.equal(streams.length, 3);
});

test("what is wanted while a token for the stream is awaited is on the stream in the end", async () => {
  const bring = [];
  const quotes = await streaming(["A"], { token: () => new Promise((resolve) => bring.push(resolve)) });
  bring.shift()("t1");
  await settle();
  stream().says(HELLO);
  quotes.subscribe("B");
  await settle();
  quotes.subscribe("C");
  await settle();
  bring.shift()("t2");
  await settle();
  quotes.subscribe("D");
  bring.shift()("t3");
  await settle();
  stream().says(HELLO);
  await settle();
  while (bring.length) bring.shift()("t4");
  await settle();
  assert.equal(stream().query.codes, "A,B,C,D");
});

test("a stream that was lost is shown as such until it says hello again, and one that was refused is asked anew", async () => {
  await streaming();
  stream().says(HELLO);
  stream().ends();
  assert.equal(states.at(-1).state, "connecting");
  stream().says(HELLO);
  assert.equal(states.at(-1).state, "open");
  stream().ends(true);
  assert.equal(states.at(-1).state, "waiting");
  await blocked();
  assert.equal(streams.length, 2);
});

test("a stream without any message for two and a half heartbeats is given up", async () => {
  await streaming();
  stream().says(HELLO);
  clock.advance(11_000);
  assert.deepEqual([states.at(-1).state, states.at(-1).reason, stream().readyState], ["waiting", "silent", 2]);
});

test("a stream is opened again with a newer token before the old one ends", async () => {
  let count = 0;
  await streaming(["A"], { token: () => `t${++count}` });
  stream().says({ ...HELLO, auth: "ok", time: 0, expires: 12_000 }, "3");
  clock.advance(9_000);
  await settle();
  assert.deepEqual(stream().query, { codes: "A", token: "t2", last_event_id: "3" });
});

test("a token that falls due while a lost stream waits does not shorten the wait", async () => {
  let count = 0;
  await streaming(["A"], { token: () => `t${++count}` });
  stream().says({ ...HELLO, auth: "ok", time: 0, expires: 12_000 });
  clock.advance(8_900);
  stream().says({ type: "status", scope: "connection", state: "closing", retry_after_ms: 5000 });
  stream().ends(true);
  await settle();
  clock.advance(1_000);
  await settle();
  assert.deepEqual([states.at(-1).state, streams.length], ["waiting", 1]);
  await blocked();
  assert.equal(streams.length, 2);
});

test("a stream that has no token to begin with says so, and is tried again", async () => {
  const tokens = [null, "t"];
  const told = [];
  answer = answers(426);
  const quotes = open({
    EventSource: FakeStream,
    token: () => tokens.shift() ?? Promise.reject(new Error("nobody there")),
  });
  quotes.on("error", (error) => told.push(error));
  quotes.subscribe("A");
  await blocked();
  await blocked();
  assert.deepEqual(told, [{ type: "error", error: "no_token", message: "Error: nobody there" }]);
  assert.deepEqual([states.at(-1).state, streams.length], ["waiting", 0]);
  await blocked();
  assert.equal(stream().query.token, "t");
});

test("a token that a stream refuses is followed by one more try, and then by none", async () => {
  let count = 0;
  await streaming(["A"], { token: () => `t${++count}` });
  stream().says({ type: "error", error: "auth_failed" });
  assert.deepEqual([states.at(-1).state, states.at(-1).reason], ["waiting", "auth_failed"]);
  await blocked();
  assert.equal(stream().query.token, "t2");
  stream().says({ type: "error", error: "auth_failed" });
  assert.deepEqual(states.at(-1), { state: "closed", code: 4401, reason: "auth_failed" });
});

test("the WebSocket is tried every three minutes, and taken as soon as one says hello", async () => {
  const quotes = await streaming();
  stream().says({ ...HELLO, heartbeat_ms: 1_000_000 });
  const before = sockets.length;
  clock.advance(180_000);
  assert.equal(sockets.length, before + 1);
  clock.advance(180_000);
  assert.equal(sockets.length, before + 2);
  assert.ok(sockets[before].isClosed);
  newest().says(HELLO);
  assert.deepEqual([stream().readyState, sockets.length], [2, before + 3]);
  newest().says(HELLO);
  await settle();
  assert.deepEqual([states.at(-1), newest().sent[0].codes], [{ state: "open" }, ["A"]]);
  quotes.close();
  assert.equal(clock.pending, 0);
});

test("of the sockets that look for a way past a stream one is open at most, and none when the stream is closed", async () => {
  const quotes = await streaming();
  stream().says(HELLO);
  const before = sockets.length;
  for (let looks = 0; looks < 3; looks++) quotes.wake();
  assert.deepEqual(sockets.slice(before).map(({ isClosed }) => isClosed), [true, true, false]);
  quotes.close();
  assert.ok(newest().isClosed);
});
