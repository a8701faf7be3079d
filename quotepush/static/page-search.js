/**
 * The search below the input: a combobox as WAI-ARIA describes it, over the codes that the server has seen.
 *
 * Law: what is shown answers what stands in the input now; an older question is given up. Without a choice the input
 * stays what it is, a place for free text.
 */
import { percent } from "./page-figures.js";
import { t } from "./page-words.js";

const CALM_MS = 150;
const MOST_FOUND = 8;

export class Search {
  #input;
  #list;
  #count;
  #url;
  #callbacks;
  #asking = null; // AbortController
  #timer = 0;
  #found = [];
  #active = -1;

  /** `isListed(code)` says what is on the list; `onChoose(code)` is called with what was chosen. */
  constructor({ input, list, count, url, ...callbacks }) {
    this.#input = input;
    this.#list = list;
    this.#count = count;
    this.#url = url;
    this.#callbacks = callbacks;
    input.addEventListener("input", () => this.#wait());
    input.addEventListener("keydown", (event) => this.#key(event));
    input.addEventListener("blur", () => this.close());
    list.addEventListener("mousedown", (event) => event.preventDefault()); // the focus stays in the input
    list.addEventListener("click", ({ target }) => this.#choose(target.closest("[role=option]")));
  }

  /** Forget what was asked and found. */
  close() {
    clearTimeout(this.#timer);
    this.#asking?.abort();
    this.#count.textContent = "";
    this.#show([]);
  }

  #wait() {
    clearTimeout(this.#timer);
    this.#asking?.abort();
    const text = this.#input.value.trim();
    if (!text || text.length > 64 || /[,;，；、]/.test(text)) this.close();
    else this.#timer = setTimeout(() => this.#ask(text), CALM_MS);
  }

  async #ask(text) {
    const asking = (this.#asking = new AbortController());
    const url = new URL(this.#url);
    url.search = new URLSearchParams({ q: text, limit: MOST_FOUND });
    try {
      const answer = await fetch(url, { signal: asking.signal, cache: "no-store" });
      const found = answer.ok ? await answer.json() : [];
      if (asking.signal.aborted) return;
      this.#show(found);
      this.#count.textContent = found.length ? t("foundCount", { count: found.length }) : t("foundNone");
    } catch {
      // Given up, or nobody answers: the line about the connection says so.
      if (!asking.signal.aborted) this.close();
    }
  }

  #show(found) {
    this.#found = found;
    this.#list.replaceChildren(...found.map((one, n) => this.#option(one, n)));
    this.#list.hidden = !found.length;
    this.#input.setAttribute("aria-expanded", String(found.length > 0));
    this.#activate(-1);
  }

  #option({ code, name, change, change_pct: changed }, n) {
    const option = document.createElement("li");
    option.id = `found-${n}`;
    option.role = "option";
    option.ariaSelected = "false";
    option.dataset.move = change > 0 ? "up" : change < 0 ? "down" : "flat";
    const isListed = this.#callbacks.isListed(code);
    const parts = { symbol: code, label: name ?? "", note: isListed ? t("onList") : "", pct: changed == null ? "" : percent(changed) };
    for (const [part, text] of Object.entries(parts)) {
      const span = document.createElement("span");
      span.className = part;
      span.textContent = text;
      option.append(span);
    }
    return option;
  }

  #activate(n) {
    this.#list.children[this.#active]?.setAttribute("aria-selected", "false");
    this.#active = n;
    const option = this.#list.children[n];
    if (option) {
      option.setAttribute("aria-selected", "true");
      option.scrollIntoView({ block: "nearest" });
      this.#input.setAttribute("aria-activedescendant", option.id);
    } else {
      this.#input.removeAttribute("aria-activedescendant");
    }
  }

  #key(event) {
    const count = this.#found.length;
    if (!count || event.isComposing) return;
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (step) {
      // One place more than there are options: back to the free text.
      this.#activate(((this.#active + 1 + step + count + 1) % (count + 1)) - 1);
    } else if (event.key === "Enter" && this.#active >= 0) {
      this.#choose(this.#list.children[this.#active]);
    } else if (event.key === "Escape") {
      this.close();
    } else {
      return;
    }
    event.preventDefault();
  }

  #choose(option) {
    if (!option) return;
    const { code } = this.#found[[...this.#list.children].indexOf(option)];
    this.#input.value = "";
    this.close();
    this.#callbacks.onChoose(code);
  }
}
