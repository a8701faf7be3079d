/**
 * The line that says how the connection is, and the figures beside it.
 *
 * Law: the live region is written only when it has something new to say; what counts or runs stands outside it.
 */
import { UNKNOWN, duration, whole } from "./page-figures.js";
import { said, t } from "./page-words.js";

const SLOW_SHOWN_MS = 4000; // or a short one could not be read
const WORDS = { ok: "live", stale: "feedStale", down: "feedDown" };
const TONES = { stale: "wait", down: "bad" };

export class State {
  #parts;
  #link = { state: "connecting" };
  #trouble = null; // { reason, message } of the lost connection, until it is back
  #feed = null; // ok, stale or down, as the last heartbeat said
  #feedHeardAt = null;
  #roundTrips = []; // of this connection, in ms
  #rows = 0;
  #figuresAt = performance.now();
  #slowSince = null;
  #slowUntil = 0;
  #slowMerged = 0;

  /** `parts`: elements by name. */
  constructor(parts) {
    this.#parts = parts;
  }

  get isOpen() {
    return this.#link.state === "open";
  }

  get isStream() {
    return this.isOpen && this.#link.stream === true;
  }

  /** Whether no row can be trusted to be new. */
  get isFeedStale() {
    return !this.isOpen || this.#feed === "stale" || this.#feed === "down";
  }

  /** Take a `state` event. */
  takeLink(event) {
    this.#link = event;
    if (event.state === "open") {
      this.#trouble = null;
      this.#feed = null;
      this.#roundTrips = [];
    } else {
      this.#slowSince = null;
      this.#slowUntil = 0;
      if (event.reason) this.#trouble = event;
    }
    this.paint();
  }

  /** Take a `heartbeat` event; returns whether the feed is another one. */
  takeHeartbeat({ feed, feed_age_ms: age }) {
    const before = this.#feed;
    this.#feed = feed;
    if (age != null) this.#feedHeardAt = Date.now() - age;
    this.paint();
    return feed !== before;
  }

  /** Take a row; returns whether the feed is another one by it. */
  takeRow(row) {
    this.#rows++;
    if (row.prev == null) return false; // a snapshot can be old
    this.#feedHeardAt = Date.now();
    if (this.#feed === "ok" || this.#feed === "down") return false; // only the server knows that a dead feed is back
    this.#feed = "ok";
    this.paint();
    return true;
  }

  takePong({ rtt_ms: ms }) {
    // The least of the newest few: the others also measure what this browser was busy with.
    this.#roundTrips = [...this.#roundTrips.slice(-4), ms];
    const least = Math.min(...this.#roundTrips);
    this.#parts.latency.textContent = least < 1 ? "< 1 ms" : `${Math.round(least)} ms`;
  }

  /** Take a `status` event about this connection. */
  takeStatus({ state }) {
    if (state === "conflating") {
      this.#slowSince ??= Date.now();
      this.#slowUntil = Infinity;
      this.#slowMerged = 0;
    } else if (state === "realtime" && this.#slowSince !== null) {
      this.#slowUntil = Math.max(Date.now(), this.#slowSince + SLOW_SHOWN_MS);
    }
    this.paint();
  }

  takeMerged({ count }) {
    if (this.#slowUntil === Infinity) this.#slowMerged += count;
  }

  paint() {
    const { state, retryAt } = this.#link;
    const trouble = this.#trouble && said(this.#trouble.reason, this.#trouble.message);
    let text = trouble ?? t("connecting");
    let tone = trouble ? "bad" : "wait";
    let countdown = "";
    if (state === "open") {
      text = t(WORDS[this.#feed] ?? "connected");
      tone = TONES[this.#feed] ?? "good";
    } else if (state === "closed") {
      tone = "bad";
    } else if (state === "waiting") {
      countdown = t("nextAttempt", { seconds: Math.max(0, Math.ceil((retryAt - Date.now()) / 1000)) });
    } else if (trouble) {
      countdown = t("connectingNow");
    }
    const { state: sentence, countdown: counting, link, retry } = this.#parts;
    if (sentence.textContent !== text) sentence.textContent = text;
    counting.textContent = countdown;
    link.dataset.tone = tone;
    retry.hidden = state !== "closed" && !trouble;
    retry.textContent = t(state === "closed" ? "connect" : "retry");
    this.#paintSlow();
  }

  /** What is due once a second. */
  tick() {
    const now = performance.now();
    const rate = (this.#rows * 1000) / Math.max(1, now - this.#figuresAt);
    this.#parts.rate.textContent = this.isOpen ? t("perSecond", { count: whole(rate) }) : UNKNOWN;
    this.#rows = 0;
    this.#figuresAt = now;
    this.#parts.feedAge.textContent = this.#feedHeardAt === null ? UNKNOWN : duration(Date.now() - this.#feedHeardAt);
    if (!this.isOpen) this.#parts.latency.textContent = UNKNOWN;
    if (this.#link.state === "waiting") this.paint();
    else this.#paintSlow();
  }

  #paintSlow() {
    const { slow, slowRows } = this.#parts;
    if (this.#slowSince !== null && Date.now() >= this.#slowUntil) this.#slowSince = null;
    const text = this.#slowSince === null ? "" : t("slow");
    if (slow.textContent !== text) slow.textContent = text;
    slowRows.textContent = text && this.#slowMerged ? t("slowRows", { count: whole(this.#slowMerged) }) : "";
  }
}
