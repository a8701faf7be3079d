/** Live quotes from a quotepush server; quotepush.d.ts says how to use it. License: MIT. */

const BACKOFF_MS = 500;
const BACKOFF_MAX_MS = 20_000;
const OPEN_TIMEOUT_MS = 10_000;
const MOMENT_MS = 5000; // to answer a GET, to be hidden, to get another token
const PROBE_MS = 180_000;
const PERMANENT = [4401, 4403, 4409];
// A silent link is dead after so many checks, four to a heartbeat.
const SILENT_CHECKS = 10;
const STREAM_CODES = 300; // at most
const STREAM_EVENTS = ["hello", "ack", "snapshot", "tick", "heartbeat", "status", "message", "error"];

// Mini-programs know no globalThis.
const home = typeof globalThis === "undefined" ? {} : globalThis;

export function connect(url, options) {
  const { WebSocket, EventSource, fetch } = home;
  const quotes = new Quotes(absolute(url), {
    WebSocket,
    EventSource,
    fetch,
    setTimeout,
    clearTimeout,
    random: Math.random,
    now: Date.now,
    hiddenRate: 1,
    ...options,
  });
  quotes.reconnect();
  return quotes;
}

class Quotes {
  rows = new Map();
  merged = 0;
  hello = null;

  #wishes = new Map(); // spelling → { code, options, isNewView, listeners }
  #lines = new Map(); // code → { spellings, epoch, seq, awaits: why a snapshot comes }
  #asked = new Map(); // spelling → options, on this connection
  #dropped = new Set(); // codes to unsubscribe
  #requests = new Map();
  #lastId = 0;
  #events = {};
  #streamed;
  #isSyncing;
  #isHeld; // no requests now
  #isRefused; // the newest token was
  #isHidden;
  #env;
  #link;
  #pause;
  #hiding;
  #renewal;
  #forget;

  constructor(url, env) {
    const { document } = home;
    const onVisible = () => this.setVisible(document.visibilityState !== "hidden");
    this.#env = env;
    this.#pause = timer(env);
    this.#hiding = timer(env);
    this.#renewal = timer(env);
    this.#link = new Link(url, env, {
      onMessage: (message) => this.#receive(message),
      onState: (state) => this.#emit("state", state),
      query: () => this.#query(),
      stream: () => this.#authenticate(true),
      mayRetry: () => typeof env.token === "function" && !this.#isRefused && (this.#isRefused = true),
    });
    this.#forget = [listen(home, "online", () => this.wake()), listen(document, "visibilitychange", onVisible)];
    if (document?.visibilityState === "hidden") onVisible();
  }

  get state() {
    return this.#link.state;
  }

  subscribe(codes, options, onRow) {
    if (typeof options === "function") return this.subscribe(codes, null, options);
    for (const spelling of listOf(codes)) {
      if (!this.#wishes.has(spelling)) this.#wishes.set(spelling, { options: {}, listeners: new Set() });
      const wish = this.#wishes.get(spelling);
      if (options) {
        wish.isNewView ||= `${options.fields}` !== `${wish.options.fields}`;
        wish.options = options;
      }
      if (!onRow) continue;
      wish.listeners.add(onRow);
      if (this.rows.has(wish.code)) tell([onRow], this.rows.get(wish.code));
    }
    this.#sync();
  }

  unsubscribe(codes) {
    for (const spelling of listOf(codes)) {
      const code = this.#wishes.get(spelling)?.code;
      const line = this.#lines.get(code);
      this.#wishes.delete(spelling);
      this.#asked.delete(spelling);
      line?.spellings.delete(spelling);
      if (line?.spellings.size === 0) {
        this.#lines.delete(code);
        this.rows.delete(code);
        this.#dropped.add(code);
      }
    }
    this.#sync();
  }

  on(event, fn) {
    (this.#events[event] ??= new Set()).add(fn);
    return () => this.#events[event].delete(fn);
  }

  ping() {
    if (this.state === "open" && !this.#link.isStream) this.#request("ping");
  }

  wake() {
    // A socket that slept may look open: make the server speak.
    if (this.#link.wake()) this.ping();
  }

  setVisible(isVisible) {
    const change = () => {
      this.#isHidden = !isVisible;
      this.#sync();
    };
    this.#hiding(change, isVisible ? 0 : MOMENT_MS);
    if (isVisible) this.wake();
  }

  reconnect() {
    this.#link.open();
  }

  close() {
    for (const forget of this.#forget) forget();
    this.#pause();
    this.#hiding();
    this.#renewal();
    this.#link.close();
  }

  #receive(message) {
    const { type, id } = message;
    const request = this.#requests.get(id);
    this.#requests.delete(id);
    if (type === "hello") this.#greet(message);
    else if (type === "snapshot" || type === "tick") for (const row of message.data) this.#take(row, message);
    else if (type === "ack") this.#acknowledge(message, request);
    else if (type === "error") this.#refuse(message, request);
    else if (type === "pong") message.rtt_ms = this.#env.now() - request?.sentAt;
    else if (type === "heartbeat") this.#link.settled();
    else if (message.state === "closing") this.#link.retryAfter(message.retry_after_ms);
    this.#emit(type, message);
  }

  #greet(hello) {
    this.hello = hello;
    this.#asked.clear();
    this.#dropped.clear();
    this.#requests.clear();
    this.#pause();
    this.#renewal();
    for (const line of this.#lines.values()) line.awaits = "resume";
    if (hello.auth === "ok") this.#isRefused = false;
    this.#isHeld = /req|opt/.test(hello.auth) && this.#env.token;
    this.#link.opened(hello.heartbeat_ms);
    this.#renew(hello);
    if (this.#isHeld) this.#authenticate();
    this.#sync();
  }

  async #authenticate(isStream = this.#link.isStream) {
    const { hello } = this;
    try {
      if (isStream) return await this.#link.stream(); // with its token
      const token = await this.#token();
      if (hello !== this.hello || this.state !== "open") return;
      this.#request("auth", { token });
      this.#isHeld = false;
      this.#sync();
    } catch (error) {
      this.#emit("error", { type: "error", error: "no_token", message: `${error}` });
      if (this.state === "open") this.#renewal(() => this.#authenticate(), MOMENT_MS);
    }
  }

  async #token() {
    const { token } = this.#env;
    return typeof token === "function" ? token() : token;
  }

  #renew({ expires, time }) {
    // In good time, for hidden tabs have late timers; and none may be longer than 31 bits.
    const ms = Math.min(Math.max(1000, (expires - time) * 0.75), 2 ** 31 - 1);
    if (expires) this.#renewal(() => this.#authenticate(), ms);
  }

  #take(row, { type, gap }) {
    const { code, seq } = row;
    const line = this.#lines.get(code);
    if (!line) return; // unsubscribed while it was on its way
    const { epoch, seq: from, awaits } = line;
    const { prev = from } = row; // some streams do not know
    let merged = seq - Math.max(prev, from) - 1;
    let reason = prev > from && "chain"; // why rows before it are lost
    if (type === "snapshot") {
      merged = 0;
      line.epoch = row.epoch ?? this.hello.epoch;
      line.awaits = null;
      if (line.epoch !== epoch) reason = gap ? "server" : from && "epoch";
      else if (seq < from || (seq === from && awaits !== "view")) return;
      else if (gap) reason = "server";
      else if (awaits === "resume") reason = seq > from + 1 && awaits;
      else if (awaits) [merged, reason] = [seq - from - 1];
      else reason = "epoch"; // it was in another one meanwhile
    } else if (seq <= from) return;
    line.seq = seq;
    this.rows.set(code, row);
    if (reason && from != null) this.#emit("gap", { code, from, to: seq, reason });
    if (merged > 0) {
      this.merged += merged;
      this.#emit("merged", { code, count: merged });
    }
    for (const spelling of line.spellings) tell(this.#wishes.get(spelling)?.listeners, row);
    this.#emit("row", row);
  }

  #acknowledge(message, request) {
    if (message.action === "auth") this.#isRefused = false;
    this.#renew(message);
    for (const { code, as, epoch } of message.accepted ?? []) {
      const wish = this.#wishes.get(as);
      if (!wish) {
        this.#dropped.add(code); // unsubscribed before the answer came
        continue;
      }
      wish.code = code;
      if (!this.#lines.has(code)) this.#lines.set(code, { spellings: new Set() });
      const line = this.#lines.get(code);
      if (line.seq == null) line.epoch = epoch ?? this.hello.epoch;
      if (request?.snapshot !== false) line.awaits ??= "ack";
      if (line.spellings.has(as)) continue;
      line.spellings.add(as);
      // Known by another spelling, so its snapshot may be no news.
      if (this.rows.has(code)) tell(wish.listeners, this.rows.get(code));
    }
    if (this.#dropped.size) this.#sync();
  }

  #refuse(message, { action, codes } = {}) {
    message.codes = codes;
    if (codes && message.retryable) {
      for (const code of codes) {
        if (action === "subscribe") this.#asked.delete(code);
        else this.#dropped.add(code);
      }
      this.#isHeld = true;
      this.#pause(() => {
        this.#isHeld = false;
        this.#sync();
      }, message.retry_after_ms ?? 1000);
    }
    if (this.#link.isStream && message.error === "auth_failed") this.#link.lost(4401, message.error);
  }

  /** Bring the connection's subscriptions to what is wanted, after the caller has had its say. */
  #sync() {
    if (this.#isSyncing) return;
    this.#isSyncing = true;
    Promise.resolve().then(() => {
      this.#isSyncing = false;
      if (this.state !== "open" || this.#isHeld) return;
      if (this.#link.isStream) {
        if (this.#streamed !== JSON.stringify(this.#streamOptions())) this.#authenticate();
        return;
      }
      const dropped = [...this.#dropped].filter((code) => !this.#lines.has(code));
      this.#dropped.clear();
      this.#requestInParts("unsubscribe", dropped);
      for (const [options, spellings] of this.#due()) this.#requestInParts("subscribe", spellings, JSON.parse(options));
    });
  }

  #due() {
    const groups = {};
    for (const [spelling, wish] of this.#wishes) {
      const options = this.#optionsOf(wish);
      const text = JSON.stringify(options);
      const isNew = !this.#asked.has(spelling);
      const line = this.#lines.get(wish.code);
      if (text === this.#asked.get(spelling)) continue;
      this.#asked.set(spelling, text);
      if (isNew) options.since = true;
      // Without a snapshot the chain goes on; only other fields need the row once more.
      else if (!wish.isNewView) options.snapshot = false;
      else if (line) line.awaits = "view";
      wish.isNewView = false;
      (groups[JSON.stringify(options)] ??= []).push(spelling);
    }
    return Object.entries(groups);
  }

  #optionsOf({ options: { fields, max_rate, snapshot } }) {
    const { hiddenRate } = this.#env;
    if (this.#isHidden && hiddenRate) max_rate = Math.min(max_rate ?? hiddenRate, hiddenRate);
    return { fields, max_rate, snapshot };
  }

  #requestInParts(action, codes, options = {}) {
    const { epoch, limits } = this.hello;
    const request = { ...options, codes };
    if (options.since) {
      request.epoch = epoch;
      request.since = {};
      for (const spelling of codes) {
        const { code } = this.#wishes.get(spelling);
        const { epoch: of, seq } = this.#lines.get(code) ?? {};
        if (seq != null) request.since[code] = of === epoch ? seq : { epoch: of, seq };
      }
    }
    const half = Math.ceil(codes.length / 2);
    if (codes.length > limits.codes_per_request || (half > 1 && JSON.stringify(request).length + 99 > limits.message_bytes)) {
      this.#requestInParts(action, codes.slice(0, half), options);
      this.#requestInParts(action, codes.slice(half), options);
    } else if (half) this.#request(action, request);
  }

  #streamOptions() {
    // A stream has one set of options; where they differ: everything.
    const sets = new Set([...this.#wishes.values()].map((wish) => JSON.stringify(this.#optionsOf(wish))));
    return { ...(sets.size === 1 && JSON.parse(...sets)), codes: [...this.#wishes.keys()] };
  }

  async #query() {
    const token = await this.#token();
    const options = this.#streamOptions();
    this.#streamed = JSON.stringify(options);
    const codes = options.codes.splice(STREAM_CODES);
    if (codes.length) this.#emit("error", { type: "error", error: "code_limit", codes });
    return options.codes.length && { ...options, token };
  }

  #request(action, parameters) {
    const id = ++this.#lastId;
    this.#requests.set(id, { action, ...parameters, sentAt: this.#env.now() });
    this.#link.send({ action, id, ...parameters });
  }

  #emit(event, payload) {
    tell(this.#events[event], payload);
  }
}

class Link {
  state = "closed";
  isStream;

  #url;
  #env;
  #owner;
  #socket;
  #probing;
  #retry;
  #watch;
  #silence = 0; // checks since the last message
  #failures = 0;
  #mute = 0; // sockets in a row that never said hello
  #why; // tells why not
  #position; // in the stream
  #toldMs = 0; // how long the server asked us to stay away

  constructor(url, env, owner) {
    this.#url = url;
    this.#env = env;
    this.#owner = owner;
    this.#retry = timer(env);
    this.#watch = timer(env);
  }

  open() {
    this.#drop();
    this.#toldMs = 0;
    this.isStream = false;
    this.#why = this.#url.replace(/^ws/, "http");
    const socket = this.#dial();
    socket.onmessage = ({ data }) => this.#hear(data);
    socket.onclose = ({ code, reason }) => this.lost(code, reason);
    socket.onerror = () => this.state === "connecting" && this.lost(); // in Node no close follows
    this.#begin(socket);
  }

  async stream() {
    const query = await this.#owner.query();
    // A lost stream keeps its pause.
    if (!query || this.state === "closed" || !this.#socket === this.isStream) return;
    const url = new URL(this.#url.replace(/^ws/, "http"));
    query.last_event_id = this.#position;
    for (const name in query) if (query[name]) url.searchParams.set(name, query[name]);
    this.#why = url.href;
    url.pathname = url.pathname.replace(/[^/]*$/, "stream");
    this.#drop();
    this.isStream = true;
    const stream = new this.#env.EventSource(url.href);
    for (const type of STREAM_EVENTS) {
      stream.addEventListener(type, ({ data, lastEventId }) => {
        if (data) {
          this.#position = lastEventId || this.#position; // known rows may come again
          this.#hear(data);
        } else if (stream.readyState === 2) this.lost(); // its own event, also named error
        else this.#report("connecting"); // it comes back by itself
      });
    }
    this.#begin(stream);
    this.#retry(() => this.#probe(), PROBE_MS);
  }

  close() {
    this.#drop();
    this.#report("closed", { reason: "client" });
  }

  send(request) {
    this.#socket.send(JSON.stringify(request));
  }

  opened(heartbeatMs) {
    if (!this.isStream) this.#mute = this.#position = null;
    this.#guard(heartbeatMs / 4);
    this.#report("open", this.isStream && { stream: true });
  }

  settled() {
    this.#failures = 0;
  }

  retryAfter(ms) {
    this.#toldMs = ms ?? 0;
  }

  /** Do not wait any longer; true: check the open socket. */
  wake() {
    // A pause that the server itself asked for is kept.
    if (this.state === "waiting" && !this.#toldMs) {
      this.#failures = 0;
      this.open();
    }
    if (this.state !== "open") return false;
    if (this.isStream) this.#probe();
    else this.#silence = Math.max(this.#silence, SILENT_CHECKS - 2);
    return !this.isStream;
  }

  lost(code, reason) {
    const wasOpen = this.state === "open";
    this.#drop();
    if (PERMANENT.includes(code) && !(code === 4401 && this.#owner.mayRetry())) {
      this.#report("closed", { code, reason });
      return;
    }
    this.#wait(reason || (wasOpen ? "connection_lost" : "unreachable"), { code });
    if (!wasOpen) this.#ask(this.#failures);
  }

  #wait(reason, details) {
    const { random, now } = this.#env;
    // Full jitter: who lost one server together comes back spread.
    const delayMs = this.#toldMs + random() * Math.min(BACKOFF_MAX_MS, BACKOFF_MS * 2 ** this.#failures++);
    this.#retry(() => this.open(), delayMs);
    this.#report("waiting", { ...details, reason, attempt: this.#failures, retryAt: now() + delayMs });
  }

  /** A GET shows why a handshake failed. */
  async #ask(attempt) {
    const { fetch, EventSource } = this.#env;
    try {
      const answer = await fetch(this.#why, { cache: "no-store", signal: home.AbortSignal?.timeout?.(MOMENT_MS) });
      const { status } = answer;
      const { error: reason = `http_${status}`, message } = await answer.json().catch(() => ({}));
      if (this.state !== "waiting" || this.#failures !== attempt) return; // answered too late
      if ((status === 401 && !(this.isStream && this.#owner.mayRetry())) || status === 403) {
        this.#drop();
        this.#report("closed", { code: status, reason, message });
      } else if (status === 429 || status === 503) {
        this.#failures--; // the same attempt, with a better reason
        this.#toldMs = Number(answer.headers.get("Retry-After")) * 1000 || 0;
        this.#wait(reason, { code: status, message });
      } else if (status === 426 && EventSource && !this.isStream && ++this.#mute > 1) this.#owner.stream();
    } catch {} // nobody answers there either
  }

  /** Is the WebSocket still blocked? */
  #probe() {
    this.#probing?.close();
    this.#probing = this.#dial();
    this.#probing.onmessage = () => this.open();
    this.#retry(() => this.#probe(), PROBE_MS);
  }

  #dial() {
    return new this.#env.WebSocket(this.#url, ["quotes.v1.json"]);
  }

  #begin(socket) {
    this.#socket = socket;
    this.#guard(OPEN_TIMEOUT_MS / SILENT_CHECKS);
    this.#report("connecting");
  }

  #hear(data) {
    this.#silence = 0;
    let message;
    try {
      message = JSON.parse(data);
    } catch {} // a backend's bare frame
    this.#owner.onMessage(message?.type ? message : { type: "raw", data });
  }

  #guard(checkMs) {
    // Checks are counted, no time: a timer that a sleeping tab held back proves nothing.
    const check = () => {
      if (++this.#silence > SILENT_CHECKS) this.lost(null, this.state === "open" && "silent");
      else this.#watch(check, checkMs);
    };
    this.#silence = 0;
    this.#watch(check, checkMs);
  }

  #drop() {
    this.#retry();
    this.#watch();
    if (!this.#socket) return;
    // Its own close can come minutes later.
    this.#socket.onmessage = this.#socket.onclose = this.#socket.onerror = null;
    this.#socket.close();
    this.#socket = null;
    this.#probing?.close();
  }

  #report(state, details) {
    this.state = state;
    this.#owner.onState({ state, ...details });
  }
}

function absolute(url) {
  return /^wss?:/.test(url) ? `${url}` : new URL(url, home.location?.href).href.replace(/^http/, "ws");
}

function listOf(codes) {
  return typeof codes === "string" ? [codes] : codes;
}

/** Returns what sets the timer anew, or, called without arguments, stops it. */
function timer({ setTimeout, clearTimeout }) {
  let id;
  return (fn, ms) => {
    clearTimeout(id);
    if (fn) id = setTimeout(fn, ms);
  };
}

function listen(target, event, fn) {
  target?.addEventListener?.(event, fn);
  return () => target?.removeEventListener?.(event, fn);
}

/** One's fault must not keep a row from the others. */
function tell(listeners, payload) {
  for (const fn of listeners ?? []) {
    try {
      fn(payload);
    } catch (error) {
      Promise.reject(error); // shown like any other bug
    }
  }
}
