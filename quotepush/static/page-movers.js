/**
 * The strip of the biggest movers among all codes that the server has seen.
 *
 * Law: it is asked for only while somebody can see it, one question at a time, and its places never change their size.
 */
import { percent } from "./page-figures.js";

const EVERY_MS = 5000;
const PLACES = 5; // each way

export class Movers {
  #url;
  #places = { up: [], down: [] };
  #answer = { up: [], down: [] };
  #isConnected = false;
  #isAsking = false;
  #timer = 0;

  /** `onOpen(code)` is called when one is pressed. */
  constructor({ strip, url, onOpen }) {
    this.#url = new URL(url);
    this.#url.search = new URLSearchParams({ movers: PLACES });
    for (const way of ["up", "down"]) {
      const list = strip.querySelector(`.${way}`);
      for (let n = 0; n < PLACES; n++) {
        const item = strip.querySelector("template").content.firstElementChild.cloneNode(true);
        list.append(item);
        const [button] = item.children;
        const [label, pct] = button.children;
        button.addEventListener("click", () => onOpen(button.dataset.code));
        this.#places[way].push({ button, label, pct });
      }
    }
    document.addEventListener("visibilitychange", () => this.#plan());
    this.paint();
  }

  setConnected(isConnected) {
    this.#isConnected = isConnected;
    this.#plan();
  }

  paint() {
    for (const [way, places] of Object.entries(this.#places)) {
      places.forEach(({ button, label, pct }, n) => {
        const { code = "", name, change_pct: changed } = this.#answer[way]?.[n] ?? {};
        button.dataset.move = changed > 0 ? "up" : changed < 0 ? "down" : "flat";
        button.disabled = !code;
        button.dataset.code = code;
        button.title = code && name ? `${code} ${name}` : code;
        write(label, code ? name || code : "–");
        write(pct, code ? percent(changed) : "");
      });
    }
  }

  #plan() {
    clearTimeout(this.#timer);
    if (this.#isConnected && !document.hidden && !this.#isAsking) this.#ask();
  }

  async #ask() {
    this.#isAsking = true;
    try {
      const answer = await fetch(this.#url, { cache: "no-store", signal: AbortSignal.timeout(EVERY_MS * 2) });
      if (answer.ok) this.#answer = await answer.json();
      this.paint();
    } catch {
      // The next one may be answered; the line about the connection says what is wrong.
    }
    this.#isAsking = false;
    this.#timer = setTimeout(() => this.#plan(), EVERY_MS);
  }
}

function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}
