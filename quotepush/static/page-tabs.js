/**
 * The row of watchlists: which there are, which is shown, and the dialog that names one.
 *
 * Law: a list is shown by its tab and changed only by what is pressed here.
 */
import { t } from "./page-words.js";

export class Tabs {
  #nav;
  #dialog;
  #lists;
  #callbacks;
  #then = null; // what happens with the name

  /** `onSelect(place)`, `onCreate(name)`, `onRename(name)`, `onDelete()` are called for what the user does. */
  constructor({ nav, dialog, lists, buttons, ...callbacks }) {
    this.#nav = nav;
    this.#dialog = dialog;
    this.#lists = lists;
    this.#callbacks = callbacks;
    nav.addEventListener("click", ({ target }) => {
      const place = target.closest("button")?.dataset.place;
      if (place) callbacks.onSelect(Number(place));
    });
    buttons.create.addEventListener("click", () => this.#ask("newList", "", callbacks.onCreate));
    buttons.rename.addEventListener("click", () => this.#ask("renameList", lists.current.name ?? "", callbacks.onRename));
    buttons.delete.addEventListener("click", () => callbacks.onDelete());
    dialog.querySelector("form").addEventListener("submit", (event) => {
      event.preventDefault();
      const name = dialog.querySelector("input").value.trim();
      dialog.close();
      if (name) this.#then(name);
    });
    dialog.querySelector("[type=button]").addEventListener("click", () => dialog.close());
  }

  /** What the list at `place` is called; without a place, the one that is shown. */
  nameOf(place = this.#lists.place) {
    if (place < 0) return this.#lists.guest.name ?? t("shared");
    const { name } = this.#lists.all[place];
    if (name) return name;
    const before = this.#lists.all.slice(0, place).filter((list) => !list.name).length;
    return before ? `${t("unnamed")} ${before + 1}` : t("unnamed");
  }

  show() {
    const places = this.#lists.all.map((_, place) => place);
    if (this.#lists.guest) places.push(-1);
    const hadFocus = this.#nav.contains(document.activeElement);
    this.#nav.replaceChildren(...places.map((place) => {
      const button = document.createElement("button");
      button.type = "button";
      button.dataset.place = place;
      button.textContent = this.nameOf(place);
      if (place === this.#lists.place) button.setAttribute("aria-current", "true");
      return button;
    }));
    const current = this.#nav.querySelector("[aria-current]");
    current.scrollIntoView?.({ block: "nearest", inline: "nearest" });
    if (hadFocus) current.focus();
  }

  #ask(title, name, then) {
    this.#then = then;
    this.#dialog.querySelector("h2").textContent = t(title);
    const input = this.#dialog.querySelector("input");
    input.value = name;
    this.#dialog.showModal();
    input.select();
  }
}
