/**
 * Live quotes from a quotepush server, in one module without dependencies.
 *
 *     import { connect } from "./quotepush.js";
 *
 *     const quotes = connect("wss://quotes.example/ws");
 *     quotes.subscribe(["600519.SH", "AAPL"], row => console.log(row.code, row.last));
 *     quotes.on("state", ({ state, reason }) => console.log(state, reason));
 *
 * The connection looks after itself. It notices a link that is silently dead, comes back with growing, randomly spread
 * pauses, subscribes to everything again in one message per set of options, and asks for the rows that it has missed.
 * No row is delivered twice, and rows that could not be had are told: those that the server merged into newer ones
 * (`merged`) and those that are lost (`gap`). A row is always complete, so it never has to be merged with the one before.
 *
 * Where WebSockets are blocked and `EventSource` exists, rows come by a stream of Server-Sent Events instead: after two
 * sockets in a row that never said hello, while a plain GET of the same address is answered. The stream's address is
 * that of the WebSocket with `stream` in the place of its last part. It holds at most 300 codes (an `error` event with
 * `code_limit` names the others) and has one set of options: where those of the subscriptions differ, it is sent every row with
 * the usual fields. The WebSocket is tried again every three minutes, and when the network comes back.
 */

/** Connect to a server and stay connected until `close()`. */
export function connect(url: string | URL, options?: ConnectOptions): Quotes;

export interface ConnectOptions {
  /**
   * For a server that wants one: a token, or a function that returns one or the promise of one. A function is called
   * after each hello, and again after three quarters of a token's remaining life, for the same connection. When the
   * server has refused its token, it is called once more on another connection; a text is sent once. When the function fails, an
   * `error` event `no_token` says so, and it is called again after five seconds.
   */
  token?: string | (() => string | Promise<string>);

  /**
   * Most rows a second and code while nobody has looked at the page for five seconds; 1 by default, 0 or false: all of them.
   * The chain of rows goes on: what is merged meanwhile is counted as merged.
   */
  hiddenRate?: number | false;

  /** The socket, where the platform has none or another one; see `SocketLike`. */
  WebSocket?: new (url: string, protocols: string[]) => SocketLike;

  /** Asked for the reason when a socket could not open, and whether HTTP works. */
  fetch?: typeof fetch;

  /** Undefined: no streams. */
  EventSource?: typeof EventSource;

  setTimeout?: (fn: () => void, ms: number) => unknown;
  clearTimeout?: (id: any) => void;

  /** From 0 to below 1, for the length of pauses. */
  random?: () => number;

  /** Epoch milliseconds. */
  now?: () => number;
}

/**
 * What is used of a WebSocket: `onmessage` is called with `{ data }`, a text, and `onclose` with `{ code, reason }`. A socket
 * that could not open calls `onclose` or `onerror`.
 */
export interface SocketLike {
  onmessage: ((this: any, event: any) => any) | null;
  onclose: ((this: any, event: any) => any) | null;
  onerror: ((this: any, event: any) => any) | null;
  send(data: string): void;
  close(): void;
}

export interface Quotes {
  readonly state: State;

  /** The newest row of each subscribed code, by its canonical spelling. They stay while the connection is lost. */
  readonly rows: ReadonlyMap<string, Row>;

  /** How many rows the server merged into newer ones, because this client or a rate was slower. */
  readonly merged: number;

  /** The server's first message on the newest connection; null before the first. */
  readonly hello: Hello | null;

  /**
   * Subscribe, now and after every reconnect; `onRow` gets each row of these codes, also the one that is here already.
   *
   * Any spelling that the server understands will do; the `ack` event tells what was understood and what was refused.
   * A refused code is asked for again on the next connection, until it is unsubscribed. Subscribing again adds a
   * listener; options that are given replace those of before without a hole, and other fields are shown at once.
   */
  subscribe(codes: Codes, onRow?: (row: Row) => void): void;
  subscribe(codes: Codes, options: SubscribeOptions | null | undefined, onRow?: (row: Row) => void): void;

  /** Drop codes, by the spelling they were subscribed with, and all their listeners. */
  unsubscribe(codes: Codes): void;

  /** Call `fn` on each `event`; the returned function ends that. */
  on<Name extends keyof Events>(event: Name, fn: (payload: Events[Name]) => void): () => void;

  /** Measure the round trip; the answer is a `pong` event. Nothing happens while there is no open WebSocket. */
  ping(): void;

  /**
   * The network is back: do not wait any longer, and see whether an open connection is alive. Browsers' own `online`
   * events do that by themselves.
   */
  wake(): void;

  /** Somebody looks at the page, or nobody does. The `document` of a browser says so by itself. */
  setVisible(isVisible: boolean): void;

  /** Connect at once: instead of waiting, or after the connection was closed for good. */
  reconnect(): void;

  /** End the connection. */
  close(): void;
}

export type Codes = string | Iterable<string>;

export interface SubscribeOptions {
  /** The fields of a row, besides `code`, `seq`, `prev` and `ts`; all but `bids` and `asks` by default. */
  fields?: readonly string[];
  /** Most rows a second and code; the newest one always arrives. After a reconnect such a code resumes with its newest row. */
  max_rate?: number;
  /** False: no row until there is a new one. */
  snapshot?: boolean;
}

/** A quote. What is unknown is absent; percent means percent; times are epoch milliseconds. */
export interface Row {
  code: string;
  /** Rises by one with each tick of the code, within its epoch; 0: the server has seen none. */
  seq: number;
  /** The `seq` of the row before it, as the server sent it; absent in snapshots. */
  prev?: number;
  /** The epoch of a code that has one of its own; in snapshots. */
  epoch?: string;
  ts?: number;
  name?: string;
  last?: number;
  prev_close?: number;
  open?: number;
  high?: number;
  low?: number;
  change?: number;
  change_pct?: number;
  volume?: number;
  amount?: number;
  last_size?: number;
  bid?: number;
  bid_size?: number;
  ask?: number;
  ask_size?: number;
  /** `[price, size]`, best first; only where `fields` names it. */
  bids?: [number, number][];
  asks?: [number, number][];
  limit_up?: number;
  limit_down?: number;
  phase?: "pre" | "auction" | "regular" | "break" | "post" | "closed";
  status?: "trading" | "halted" | "limit_up" | "limit_down";
  [field: string]: any;
}

export type State = "connecting" | "open" | "waiting" | "closed";

/** Every event has one argument. */
export interface Events {
  /** The connection has another state. */
  state: StateEvent;

  /** A row of any subscribed code, after the listeners of that code. */
  row: Row;

  /**
   * Rows were merged into the one that comes next, because this client was slow, asked for a rate, or they showed
   * nothing new in its view. The newest row is there.
   */
  merged: { code: string; count: number };

  /** Rows between two that this client has are lost to it; that of `to` comes next. */
  gap: GapEvent;

  /** A server's first message on each connection. */
  hello: Hello;

  /** The answer to a request: what was understood of each code, or until when a token holds. */
  ack: Ack;

  /** Rows as they came, before anything was left out of them; most programs want `row`. */
  snapshot: RowsMessage;
  tick: RowsMessage;

  /** Every `hello.heartbeat_ms`: how the feed is. */
  heartbeat: { type: "heartbeat"; time: number; feed: "ok" | "stale" | "down"; feed_age_ms?: number };

  /** This connection is too slow for every row, has caught up, or is about to be closed; or codes are stale, or fresh again. */
  status: {
    type: "status";
    time: number;
    scope: "connection" | "codes";
    state: "conflating" | "realtime" | "closing" | "stale" | "fresh";
    codes?: string[];
    pending?: number;
    retry_after_ms?: number;
  };

  /** Something that a program behind the server has sent. */
  message: { type: "message"; time: number; from?: string; data?: any; [key: string]: any };

  /** A backend's bare frame (`raw`): text, or whatever the socket makes of bytes. */
  raw: { type: "raw"; data: any };

  /** A request was refused. What is `retryable` is asked again by itself. */
  error: ErrorEvent;

  /** The answer to `ping()`. */
  pong: { type: "pong"; time: number; rtt_ms: number };
}

export interface StateEvent {
  state: State;
  /**
   * Why it is `waiting` or `closed`: the server's word (`restart`, `overloaded`, `auth_failed`, …), `http_<status>`,
   * or `unreachable` (could not open), `silent` (said nothing for two and a half heartbeats), `connection_lost`,
   * `client` (`close()` was called).
   */
  reason?: string;
  /** The close code of the WebSocket or the status of HTTP. */
  code?: number | null;
  /** The server's sentence, for people. */
  message?: string;
  /** How many attempts have failed, while it is `waiting`. */
  attempt?: number;
  /** When the next attempt begins, in epoch milliseconds, while it is `waiting`. */
  retryAt?: number;
  /** It is open by a stream and not by a WebSocket. */
  stream?: true;
}

export interface GapEvent {
  code: string;
  /** The `seq` that this client had. */
  from: number;
  /** The `seq` of the row that comes next; in another epoch the two cannot be compared. */
  to: number;
  /**
   * `resume`: this client was away, and the server could not replay all it has missed (too long ago, or the code has a
   * rate). `server`: the server itself never got them. `epoch`: the code is numbered anew. `chain`: the row does not
   * follow on the one before, which is a bug, here or in the server.
   */
  reason: "resume" | "server" | "epoch" | "chain";
}

export interface Hello {
  type: "hello";
  version: string;
  server: string;
  conn: string;
  conn_key: string;
  epoch: string;
  time: number;
  auth: "none" | "required" | "optional" | "ok";
  heartbeat_ms: number;
  fields: string[];
  limits: {
    codes: number;
    codes_per_request: number;
    requests_per_s: number;
    message_bytes: number;
    max_rate: number | null;
  };
  /** When the token of a stream ends, in epoch milliseconds. */
  expires?: number;
}

export interface Ack {
  type: "ack";
  action: string;
  time: number;
  accepted?: { code: string; as: string; epoch?: string; resume?: "current" | "replay" | "snapshot" }[];
  rejected?: { as: string; error: string; message: string }[];
  removed?: string[];
  total?: number;
  limit?: number;
  /** When the token ends, in epoch milliseconds. */
  expires?: number;
}

export interface RowsMessage {
  type: "snapshot" | "tick";
  time: number;
  data: Row[];
  /** Rows of these codes were lost on their way to the server. */
  gap?: true;
  /** Missed while this client was away. */
  replay?: true;
}

export interface ErrorEvent {
  type: "error";
  /** For programs: the server's word, or `no_token` (the token function failed) or `code_limit` (too many for a stream). */
  error: string;
  /** For people. */
  message?: string;
  action?: string;
  /** The codes of the request that it answers, as they were spelled. */
  codes?: string[];
  retryable?: boolean;
  retry_after_ms?: number;
  time?: number;
}
