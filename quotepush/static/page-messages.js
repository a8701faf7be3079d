/**
 * What backends and other people send to this page: news, announcements, price alerts.
 *
 * Law: a message is shown as text, whatever is in it, stays until it is dismissed, and moves nothing else on the page;
 * how many are kept, and how long one is, is bounded.
 */
import { clock, fullDate, whole } from "./page-figures.js";
import { t } from "./page-words.js";

const MOST = 50; // the oldest go first
const LONGEST = 600; // characters of a text
const LONGEST_JSON = 300;
const CODE = /^[A-Za-z0-9._:=^-]{1,32}$/;

export class Messages {
  #list;
  #all;
  #template;
  #onOpen;
  #onEmpty;
  #shown = []; // newest first

  /** `onOpen(code)` is called when the code of a message is pressed, `onEmpty()` when the last one is dismissed by key. */
  constructor({ pane, onOpen, onEmpty }) {
    this.#list = pane.querySelector("ol");
    this.#all = pane.querySelector("[data-part=all]");
    this.#template = pane.querySelector("template");
    this.#onOpen = onOpen;
    this.#onEmpty = onEmpty;
    this.#all.addEventListener("click", (event) => {
      for (const { item } of this.#shown.splice(0)) item.remove();
      this.#count();
      if (isKey(event)) this.#onEmpty();
    });
  }

  /** Show a `message` of the server. */
  take(message) {
    const item = this.#template.content.firstElementChild.cloneNode(true);
    const part = (name) => item.querySelector(`[data-part=${name}]`);
    const shown = { item, message, part };
    part("dismiss").addEventListener("click", (event) => this.#dismiss(shown, isKey(event)));
    const { title, text, code, json } = read(message);
    write(part("title"), title);
    write(part("text"), text);
    write(part("json"), json);
    write(part("code"), code);
    part("code").addEventListener("click", () => this.#onOpen(code));
    this.#shown.unshift(shown);
    this.#paint(shown);
    this.#list.prepend(item);
    for (const old of this.#shown.splice(MOST)) old.item.remove();
    this.#count();
  }

  /** Say everything again, in another language. */
  paint() {
    for (const shown of this.#shown) this.#paint(shown);
    this.#count();
  }

  #paint({ message, part }) {
    const { from, sender, time, data, encoding } = message;
    part("from").textContent = t(`messageFrom_${from}`);
    write(part("sender"), sender ? t("messageSender", { name: cut(sender.user ?? sender.conn, 40) }) : "");
    part("time").textContent = clock(time);
    part("time").dateTime = new Date(time).toISOString();
    part("time").title = fullDate(time);
    part("dismiss").setAttribute("aria-label", t("dismiss"));
    part("code").title = t("messageOpen");
    if (encoding === "base64") write(part("text"), t("messageBytes", { count: whole(bytesOf(data)) }));
  }

  #dismiss(shown, byKey) {
    const place = this.#shown.indexOf(shown);
    this.#shown.splice(place, 1);
    shown.item.remove();
    this.#count();
    if (!byKey) return; // a tap must not bring up a keyboard
    const next = this.#shown[place] ?? this.#shown[place - 1];
    if (next) next.part("dismiss").focus();
    else this.#onEmpty();
  }

  #count() {
    this.#all.hidden = this.#shown.length < 2;
    this.#all.textContent = t("dismissAll", { count: this.#shown.length });
  }
}

/** What of a message is shown in which place; empty: nothing. */
function read({ data, encoding }) {
  const nothing = { title: "", text: "", code: "", json: "" };
  if (encoding === "base64") return nothing;
  if (typeof data === "string") return { ...nothing, text: cut(data, LONGEST) };
  if (data === null || typeof data !== "object" || Array.isArray(data)) return { ...nothing, json: short(data) };
  const { title, text, code, ...rest } = data;
  const told = { title: "", text: "", code: "" };
  if (typeof title === "string") told.title = cut(title, LONGEST);
  else if (title !== undefined) rest.title = title;
  if (typeof text === "string") told.text = cut(text, LONGEST);
  else if (text !== undefined) rest.text = text;
  if (typeof code === "string" && CODE.test(code)) told.code = code;
  else if (code !== undefined) rest.code = code;
  const isTold = told.title || told.text || told.code;
  return { ...told, json: isTold && !Object.keys(rest).length ? "" : short(rest) };
}

function bytesOf(base64) {
  return (base64.replace(/=+$/, "").length * 3) >> 2;
}

function short(value) {
  return cut(JSON.stringify(value), LONGEST_JSON);
}

function cut(text, most) {
  const characters = [...text.slice(0, 2 * most + 2)];
  return characters.length > most ? `${characters.slice(0, most - 1).join("")}…` : text;
}

function write(element, text) {
  element.textContent = text;
  element.hidden = !text;
}

function isKey(event) {
  return event.detail === 0;
}
