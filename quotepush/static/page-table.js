/**
 * The lines of a list, in their order on the page.
 *
 * Law: rows only mark their line as changed. A line is painted in the next frame, but at most eight times a second, once a
 * second when it is out of sight, and never with many others: lines that tick all the time share the frames. Sorting
 * never changes the list's own order, and nothing moves under a pointer or the focus unless it was asked to.
 */
import { Line } from "./page-line.js";

const PAINT_EVERY_MS = 125; // more often nobody reads
const PAINT_FAR_EVERY_MS = 1000;
const MOST_A_FRAME = 8;
const SORT_EVERY_MS = 3000;

// What a column is sorted by, and how it begins when its header is pressed for the first time.
const SORTS = {
  code: { of: (line) => line.name, direction: "ascending" },
  name: { of: (line) => line.row?.name, direction: "ascending" },
  last: { of: (line) => line.row?.last, direction: "descending" },
  change: { of: (line) => line.row?.change, direction: "descending" },
  pct: { of: (line) => line.row?.change_pct, direction: "descending" },
  volume: { of: (line) => line.row?.volume, direction: "descending" },
};
const OTHER = { ascending: "descending", descending: "ascending" };

export class Table {
  #body;
  #head;
  #template;
  #callbacks;
  #lines = []; // in the list's own order
  #bySpelling = new Map();
  #ofElement = new WeakMap();
  #dirty = new Set(); // to be painted as soon as it is their turn
  #frame = 0;
  #sight;
  #sort = null; // { column, direction }
  #sortedAt = 0;
  #dragged = null;

  /**
   * `onOpen(line)`, `onRemove(line)` and `onMove(line)` are called for what the user does; `isFeedStale()` says whether
   * no row can be trusted to be new.
   */
  constructor({ table, template, ...callbacks }) {
    this.#head = table.tHead;
    [this.#body] = table.tBodies;
    this.#template = template;
    this.#callbacks = callbacks;
    this.#sight = new IntersectionObserver((entries) => this.#see(entries), { rootMargin: "200px 0px" });
    this.#head.addEventListener("click", ({ target }) => this.#press(target.closest("button")?.dataset.sort));
    this.#body.addEventListener("click", (event) => this.#click(event));
    this.#body.addEventListener("keydown", (event) => this.#key(event));
    this.#body.addEventListener("dragstart", (event) => this.#drag(event));
    this.#body.addEventListener("dragover", (event) => this.#dragOver(event));
    this.#body.addEventListener("dragend", () => this.#drop());
  }

  get size() {
    return this.#lines.length;
  }

  get lines() {
    return [...this.#lines];
  }

  /** The codes in the list's own order. */
  get names() {
    return this.#lines.map((line) => line.name);
  }

  get(spelling) {
    return this.#bySpelling.get(spelling);
  }

  find(spelling) {
    return this.#lines.find((line) => line.is(spelling));
  }

  /** Add a line at `place`, or at the end. */
  add(spelling, { isNew = false, place = this.size } = {}) {
    const line = new Line(this.#template, spelling, { isNew, isFeedStale: this.#callbacks.isFeedStale });
    this.#body.insertBefore(line.element, this.#sort ? null : this.#lines[place]?.element ?? null);
    this.#lines.splice(place, 0, line);
    this.#bySpelling.set(spelling, line);
    this.#ofElement.set(line.element, line);
    this.#sight.observe(line.element);
    return line;
  }

  /** Take a line away; returns the place it had. */
  remove(line) {
    const place = this.#lines.indexOf(line);
    this.#lines.splice(place, 1);
    this.#bySpelling.delete(line.spelling);
    this.#dirty.delete(line);
    this.#sight.unobserve(line.element);
    line.element.remove();
    return place;
  }

  touch(line) {
    this.#frame ||= requestAnimationFrame((now) => this.#paintDue(now));
    this.#dirty.add(line);
  }

  touchAll() {
    for (const line of this.#lines) this.touch(line);
  }

  /** What is due once a second: ages, the order of a sorted table. */
  tick() {
    const now = Date.now();
    for (const line of this.#lines) if (line.isNear) line.paintAge(now);
    const isBusy = this.#body.matches(":hover") || this.#body.contains(document.activeElement);
    if (this.#sort && !isBusy && now - this.#sortedAt >= SORT_EVERY_MS) this.#arrange();
  }

  /** Show where a line is. */
  point(line) {
    line.element.scrollIntoView({ block: "nearest" });
    line.element.animate?.([{ backgroundColor: "var(--accent-soft)" }, {}], 1200);
  }

  /** Mark the line whose details are open. */
  mark(line) {
    for (const other of this.#lines) {
      other.element.toggleAttribute("data-open", other === line);
      if (other === line) other.openButton.setAttribute("aria-current", "true");
      else other.openButton.removeAttribute("aria-current");
    }
  }

  /** The line above or below, as it is shown. */
  neighbour(line, step = 1) {
    const { element } = line;
    return this.#ofElement.get(step > 0 ? element.nextElementSibling : element.previousElementSibling);
  }

  #paintDue(now) {
    this.#frame = 0;
    let painted = 0;
    for (const line of this.#dirty) {
      if (now - line.paintedAt < (line.isNear ? PAINT_EVERY_MS : PAINT_FAR_EVERY_MS)) continue;
      this.#dirty.delete(line); // who waits longest stands first
      line.paint(now);
      if (++painted === MOST_A_FRAME) break;
    }
    if (this.#dirty.size) this.#frame = requestAnimationFrame((then) => this.#paintDue(then));
  }

  #see(entries) {
    const now = Date.now();
    for (const { target, isIntersecting } of entries) {
      const line = this.#ofElement.get(target);
      line.isNear = isIntersecting;
      if (isIntersecting) line.paintAge(now);
    }
  }

  #click({ target }) {
    const line = this.#ofElement.get(target.closest("tr"));
    if (!line) return;
    if (target.closest(".remove")) {
      if (target.closest("button")) this.#callbacks.onRemove(line);
    } else if (!getSelection().toString()) {
      this.#callbacks.onOpen(line);
    }
  }

  #key(event) {
    const step = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    const line = this.#ofElement.get(event.target.closest("tr"));
    if (!step || !line || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    if (event.altKey) {
      if (!this.#sort) this.#move(line, this.#lines.indexOf(line) + step);
      event.target.focus();
      return;
    }
    const kind = event.target.closest(".remove") ? "removeButton" : "openButton";
    this.neighbour(line, step)?.[kind].focus();
  }

  #move(line, place) {
    if (place < 0 || place >= this.size) return;
    this.#lines.splice(this.#lines.indexOf(line), 1);
    this.#lines.splice(place, 0, line);
    this.#body.insertBefore(line.element, this.#lines[place + 1]?.element ?? null);
    this.#callbacks.onMove(line, place);
  }

  #drag(event) {
    const line = this.#ofElement.get(event.target.closest?.("tr"));
    if (!line || this.#sort) {
      event.preventDefault();
      return;
    }
    this.#dragged = line;
    event.dataTransfer.effectAllowed = "move";
    event.dataTransfer.setData("text/plain", line.name);
    line.element.toggleAttribute("data-dragged", true);
  }

  #dragOver(event) {
    const over = this.#ofElement.get(event.target.closest?.("tr"));
    if (!this.#dragged) return;
    event.preventDefault();
    if (!over || over === this.#dragged) return;
    this.#move(this.#dragged, this.#lines.indexOf(over));
  }

  #drop() {
    this.#dragged?.element.removeAttribute("data-dragged");
    this.#dragged = null;
  }

  /** A header was pressed: its first direction, the other one, then the list's own order again. */
  #press(column) {
    if (!column) return;
    const { direction } = SORTS[column];
    if (this.#sort?.column !== column) this.#sort = { column, direction };
    else if (this.#sort.direction === direction) this.#sort = { column, direction: OTHER[direction] };
    else this.#sort = null;
    for (const button of this.#head.querySelectorAll("[data-sort]")) {
      const isIt = button.dataset.sort === this.#sort?.column;
      button.closest("th").ariaSort = isIt ? this.#sort.direction : null;
    }
    this.#body.toggleAttribute("data-sorted", this.#sort !== null);
    this.#arrange();
  }

  #arrange() {
    this.#sortedAt = Date.now();
    const lines = this.lines;
    if (this.#sort) lines.sort(orderOf(SORTS[this.#sort.column].of, this.#sort.direction === "ascending" ? 1 : -1));
    let place = this.#body.firstElementChild;
    for (const { element } of lines) {
      if (element === place) place = place.nextElementSibling;
      else this.#body.insertBefore(element, place);
    }
  }
}

/** Words by the language's rules, numbers by size; what is unknown comes last, either way. */
function orderOf(keyOf, sign) {
  return (a, b) => {
    const [one, other] = [keyOf(a), keyOf(b)];
    if (one == null || other == null) return (one == null) - (other == null);
    return sign * (typeof one === "string" ? one.localeCompare(other) : one - other);
  };
}
