/**
 * Numbers and times as text, in the language of the page.
 *
 * Law: what is unknown is a dash and never a zero; a minus is as wide as a plus.
 */
import { locale, t } from "./page-words.js";

export const UNKNOWN = "–";

const MOST_DECIMALS = 8;

let formats = new Map(); // of one locale
let formatsOf = "";

function format(key, make) {
  if (formatsOf !== locale()) {
    formats = new Map();
    formatsOf = locale();
  }
  if (!formats.has(key)) formats.set(key, make(formatsOf));
  return formats.get(key);
}

export function price(value, decimals, signDisplay = "auto") {
  if (value == null) return UNKNOWN;
  const numbers = format(decimals + signDisplay, (tag) => new Intl.NumberFormat(tag, {
    minimumFractionDigits: decimals, maximumFractionDigits: decimals, signDisplay,
  }));
  return numbers.format(value).replace("-", "−");
}

export function percent(value) {
  return value == null ? UNKNOWN : `${price(value, 2, "exceptZero")}%`;
}

/** How many decimals a price was given with. */
export function decimalsOf(value) {
  if (value == null) return 0;
  const text = String(value);
  if (text.includes("e-")) return MOST_DECIMALS;
  const point = text.indexOf(".");
  return point < 0 ? 0 : Math.min(MOST_DECIMALS, text.length - point - 1);
}

export function whole(value) {
  return format("whole", (tag) => new Intl.NumberFormat(tag, { maximumFractionDigits: 0 })).format(value);
}

/** Shares or money, short. */
export function quantity(value) {
  if (value == null) return UNKNOWN;
  if (value < 1000) return whole(value);
  return format("compact", (tag) => new Intl.NumberFormat(tag, {
    notation: "compact", minimumSignificantDigits: 3, maximumSignificantDigits: 3,
  })).format(value);
}

export function duration(ms) {
  const seconds = Math.max(0, ms) / 1000;
  if (seconds < 1) return t("belowSecond");
  if (seconds < 120) return t("second", { n: Math.round(seconds) });
  return seconds < 7200 ? t("minute", { n: Math.round(seconds / 60) }) : t("hour", { n: Math.round(seconds / 3600) });
}

export function clock(ms) {
  return format("clock", (tag) => new Intl.DateTimeFormat(tag, {
    hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23",
  })).format(ms);
}

/** Hour and minute. */
export function minute(ms) {
  return format("minute", (tag) => new Intl.DateTimeFormat(tag, {
    hour: "2-digit", minute: "2-digit", hourCycle: "h23",
  })).format(ms);
}

/** The time of day, or the date if it was another day. */
export function moment(ms) {
  const date = new Date(ms);
  if (date.toDateString() === new Date().toDateString()) return clock(ms);
  const [month, day] = [date.getMonth() + 1, date.getDate()].map((n) => String(n).padStart(2, "0"));
  return `${date.getFullYear()}-${month}-${day}`;
}

export function fullDate(ms) {
  return format("full", (tag) => new Intl.DateTimeFormat(tag, { dateStyle: "full", timeStyle: "long" })).format(ms);
}
