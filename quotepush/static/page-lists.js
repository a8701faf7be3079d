/**
 * The visitor's watchlists, and how a list is written in an address.
 *
 * Law: a list from an address is a guest. It becomes one of the visitor's own when it is changed or kept, beside the
 * others and never in their place. An address is `#A,B`, then `&name=…` for a list with a name and `&open=…` for the
 * code whose details are open.
 */
const KEY = "quotepush.lists";
const FORMER_KEY = "quotepush.list"; // of the one list that there was before there were several

export const MOST_CODES = 500;
const MOST_LISTS = 50;

export function addressOf({ codes, name, open }) {
  let hash = codes.map(encodeURIComponent).join(",");
  if (name) hash += `&name=${encodeURIComponent(name)}`;
  if (open) hash += `&open=${encodeURIComponent(open)}`;
  return hash ? `#${hash}` : "";
}

/** Returns `{ codes, name, open }`; what is no address of ours has no codes. */
export function readAddress(hash) {
  const found = { codes: [], name: null, open: null };
  try {
    const [codes, ...rest] = hash.replace(/^#/, "").split("&");
    found.codes = [...new Set(codes.split(/[,\s]+/).map(decodeURIComponent).filter(Boolean))].slice(0, MOST_CODES);
    for (const part of rest) {
      const [, key, value] = /^(name|open)=(.+)$/.exec(part) ?? [];
      if (key) found[key] = decodeURIComponent(value);
    }
  } catch {
    // Percent signs that encode nothing.
  }
  return found;
}

export class Lists {
  /** `{ codes, name }` of somebody else, until it is kept or deleted. */
  guest = null;

  #lists = []; // { codes, name: null for one that nobody has named }
  #current = 0;
  #isGuestShown = false;

  constructor(defaults) {
    this.#lists = this.#stored() ?? [{ codes: defaults, name: null }];
  }

  get all() {
    return this.#lists;
  }

  /** The place of the list that is shown; -1: it is a guest. */
  get place() {
    return this.#isGuestShown ? -1 : this.#current;
  }

  get current() {
    return this.#isGuestShown ? this.guest : this.#lists[this.#current];
  }

  /** Show what an address holds: a list of the visitor's own if it is the same, else a guest. */
  visit({ codes, name }) {
    const isSame = (list) => list.name === name && `${list.codes}` === `${codes}`;
    const place = isSame(this.#lists[this.#current]) ? this.#current : this.#lists.findIndex(isSame);
    if (place < 0) this.guest = { codes, name };
    this.select(place);
  }

  /** Show the list at `place`; -1: the guest. */
  select(place) {
    this.#isGuestShown = place < 0;
    if (place < 0) return;
    this.#current = place;
    this.#store();
  }

  /** The list that is shown has these codes now. */
  change(codes) {
    if (this.#isGuestShown) this.#adopt();
    this.current.codes = codes;
    this.#store();
  }

  create(list) {
    if (this.#lists.length === MOST_LISTS) this.#lists.pop();
    this.select(this.#lists.push(list) - 1);
  }

  rename(name) {
    if (this.#isGuestShown) this.#adopt();
    this.current.name = name;
    this.#store();
  }

  /** Take the list that is shown away; returns what brings it back. The last one is emptied instead. */
  delete() {
    const { guest } = this;
    if (this.#isGuestShown) {
      this.guest = null;
      this.select(this.#current);
      return () => this.visit(guest);
    }
    const [place, lists] = [this.#current, this.#lists];
    this.#lists = lists.toSpliced(place, 1);
    if (!this.#lists.length) this.#lists = [{ codes: [], name: null }];
    this.select(Math.min(place, this.#lists.length - 1));
    return () => {
      this.#lists = lists;
      this.select(place);
    };
  }

  /** Another tab has changed the lists; returns whether that was so. */
  reload({ key }) {
    if (key !== KEY) return false;
    const current = this.#current;
    this.#lists = this.#stored() ?? this.#lists;
    this.#current = Math.min(current, this.#lists.length - 1); // each tab shows what it likes
    return true;
  }

  #adopt() {
    const { guest } = this;
    this.guest = null;
    this.create(guest);
  }

  #stored() {
    try {
      const { lists, current } = JSON.parse(localStorage.getItem(KEY)) ?? {};
      const former = JSON.parse(localStorage.getItem(FORMER_KEY));
      if (!lists) return Array.isArray(former) ? [{ codes: former.map(String), name: null }] : null;
      const own = lists.map(({ codes, name }) => ({ codes: codes.map(String).slice(0, MOST_CODES), name: name ? `${name}` : null }));
      this.#current = own[current] ? current : 0;
      return own.length ? own : null;
    } catch {
      return null; // storage is blocked, or holds something else
    }
  }

  #store() {
    try {
      localStorage.setItem(KEY, JSON.stringify({ lists: this.#lists, current: this.#current }));
    } catch {
      // Storage is blocked or full: the address still holds the list.
    }
  }
}
