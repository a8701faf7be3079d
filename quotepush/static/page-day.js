/**
 * What this page has seen of a code's day: its price and what was traded, over time.
 *
 * Law: a day has at most `MOST_POINTS` points, whatever its length, and all of them fit into the tab's storage. Only
 * what was seen is here: volume between two rows that do not follow each other belongs to no point.
 */
export const MOST_POINTS = 480;

const MOST_DAYS = 600; // codes
const MOST_LETTERS = 1_500_000; // of what is stored, for all codes
const LETTERS_A_POINT = 24;
const HOLE_MS = 300_000;
const RESTS = ["break", "closed"]; // no price is made in these phases
const OLD_MS = 18 * 3_600_000;
const KEY = "quotepush.days";

export class Day {
  prevClose = null;
  slotMs = 1000; // doubles when there are too many points

  #total = null; // the newest day total of the volume
  #points = []; // { at, last, volume }: of a slot the newest price, when it came, and what was traded

  static revived({ prevClose, slotMs, total, points }) {
    const day = new Day();
    Object.assign(day, { prevClose, slotMs });
    day.#total = total;
    day.#points = points.map(([at, last, volume]) => ({ at, last, volume }));
    return day;
  }

  get points() {
    return this.#points;
  }

  /** A pause of this length is drawn as one: the market rested, or nobody looked. */
  get holeMs() {
    return Math.max(HOLE_MS, 4 * this.slotMs);
  }

  take({ last, ts, prev, volume, phase, prev_close: prevClose }, nowMs) {
    if (last == null || (RESTS.includes(phase) && this.#points.length)) return;
    const isOther = prevClose != null && this.prevClose != null && prevClose !== this.prevClose;
    if (isOther || volume < this.#total / 2) {
      this.#points = []; // another day
      this.#total = null;
      this.slotMs = 1000;
    }
    this.prevClose = prevClose ?? this.prevClose;
    const traded = prev == null || this.#total === null ? 0 : Math.max(0, (volume ?? 0) - this.#total);
    this.#total = volume ?? this.#total;
    const newest = this.#points.at(-1);
    const at = Math.max(Math.min(ts ?? nowMs, nowMs), newest?.at ?? 0);
    if (newest && this.#slot(newest.at) === this.#slot(at)) {
      newest.at = at;
      newest.last = last;
      newest.volume += traded;
      return;
    }
    this.#points.push({ at, last, volume: traded });
    this.thin(MOST_POINTS);
  }

  /** Have at most so many points: neighbours become one. */
  thin(most) {
    while (this.#points.length > most) {
      this.slotMs *= 2;
      const points = [];
      for (const point of this.#points) {
        const before = points.at(-1);
        if (before && this.#slot(before.at) === this.#slot(point.at)) {
          points[points.length - 1] = { ...point, volume: before.volume + point.volume };
        } else {
          points.push(point);
        }
      }
      this.#points = points;
    }
  }

  toJSON() {
    const points = this.#points.map(({ at, last, volume }) => [at, last, volume]);
    return { prevClose: this.prevClose, slotMs: this.slotMs, total: this.#total, points };
  }

  #slot(at) {
    return Math.floor(at / this.slotMs);
  }
}

/** The days of all codes, kept over a reload of the tab. */
export class Days {
  #days = new Map(); // the one that was made last comes last

  constructor(nowMs) {
    try {
      for (const [code, kept] of JSON.parse(sessionStorage.getItem(KEY)) ?? []) {
        if (kept.points.at(-1)?.[0] > nowMs - OLD_MS) this.#days.set(code, Day.revived(kept));
      }
    } catch {
      // Storage is blocked, or holds something else.
    }
  }

  /** What is known of a code; undefined before its first row. */
  of(code) {
    return this.#days.get(code);
  }

  take(row, nowMs) {
    let day = this.#days.get(row.code);
    if (!day) {
      day = new Day();
      this.#days.set(row.code, day);
      if (this.#days.size > MOST_DAYS) this.#days.delete(this.#days.keys().next().value);
    }
    day.take(row, nowMs);
  }

  keep() {
    const most = Math.floor(MOST_LETTERS / LETTERS_A_POINT / Math.max(1, this.#days.size));
    const kept = [...this.#days].map(([code, day]) => {
      const copy = Day.revived(day.toJSON());
      copy.thin(most);
      return [code, copy];
    });
    try {
      sessionStorage.setItem(KEY, JSON.stringify(kept));
    } catch {
      // Storage is blocked or full: the chart begins anew.
    }
  }
}
