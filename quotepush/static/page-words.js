/**
 * Every word of the page, in each language it speaks.
 *
 * Law: no other file holds text for people. Elements name their words in `data-t` (their text) and in `data-t-to`
 * (`attribute=word …`), so changing the language changes all of the page at once. What a server says of a refusal is
 * shown as it is in English, and in the page's own words elsewhere, where it has some for it.
 */

const LANGUAGE_KEY = "quotepush.language";

const ENGLISH = {
  title: "quotepush: live quotes",
  settings: "Settings",
  language: "Language",

  connecting: "Connecting",
  connectingNow: "connecting…",
  live: "Live",
  connected: "Connected",
  feedStale: "Connected, but the feed is stale",
  feedDown: "Connected, but the feed is down",
  nextAttempt: "next attempt in {seconds} s",
  retry: "Try now",
  connect: "Connect",
  slow: "Slow connection: newest prices only",
  slowRows: "{count} rows merged",
  feedAge: "Feed age",
  latency: "Latency",
  updates: "Updates",
  perSecond: "{count}/s",

  add: "Add",
  addLabel: "Add a code to the list",
  addPlaceholder: "Add a code or search a name: 600519, AAPL",
  found: "Codes found",
  foundCount: "{count} found",
  foundNone: "No known code begins or is named like this",
  onList: "on the list",
  isOnList: "{code} is already on the list.",
  isTwin: "{as} is {code}, which is already on the list.",
  added: "{code} added.",
  addedAs: "{as} added as {code}.",
  removed: "{code} removed.",
  undo: "Undo",
  full: "A list has at most {most} codes.",
  moved: "{code} is now number {place} of {count}.",

  colours: "Colour of rising prices",
  redUp: "Red up",
  greenUp: "Green up",
  share: "Copy link",
  copied: "Copied",

  lists: "Watchlists",
  unnamed: "Watchlist",
  shared: "Shared list",
  newList: "New list",
  renameList: "Rename list",
  deleteList: "Delete list",
  listName: "Name of the list",
  save: "Save",
  cancel: "Cancel",
  listDeleted: "{name} deleted.",
  keep: "Keep it",
  isShared: "A list somebody shared; yours are as they were.",

  caption: "Live quotes, newest values",
  code: "Code",
  name: "Name",
  trend: "Trend",
  last: "Last",
  change: "Change",
  pct: "Change %",
  bid: "Bid",
  ask: "Ask",
  volume: "Volume",
  time: "Time",
  shortVolume: "Vol",
  remove: "Remove",
  removeCode: "Remove {code}",
  openCode: "Details of {code}. Alt with arrow up or down moves it.",
  noQuote: "no quote yet",
  refused: "Refused: {message}",
  empty: "No codes on this list.",
  defaults: "Show some well-known ones",
  codes: "{count} codes",
  oneCode: "1 code",
  merged: "{count} rows merged",
  foot: "Times are your local time. The address of this page holds the list.",
  now: "now",
  ago: "{age} ago",
  second: "{n} s",
  belowSecond: "< 1 s",
  minute: "{n} min",
  hour: "{n} h",

  stale: "stale",
  halted: "halted",
  limit_up: "limit up",
  limit_down: "limit down",
  trading: "trading",
  pre: "pre",
  auction: "auction",
  regular: "regular",
  break: "break",
  post: "post",
  closed: "closed",

  movers: "Biggest movers",
  moversUp: "Up",
  moversDown: "Down",
  moversNone: "no quotes yet",

  messages: "Messages",
  messageFrom_user: "To you",
  messageFrom_group: "To your group",
  messageFrom_all: "To everybody",
  messageFrom_conn: "To this page",
  messageSender: "from {name}",
  messageBytes: "{count} bytes of binary data",
  messageOpen: "Show the details",
  dismiss: "Dismiss",
  dismissAll: "Dismiss all {count}",

  detail: "Details of {code}",
  close: "Close",
  addThis: "Add to this list",
  open: "Open",
  high: "High",
  low: "Low",
  prevClose: "Prev close",
  amount: "Turnover",
  limitUp: "Limit up",
  limitDown: "Limit down",
  spread: "Spread",
  phase: "Phase",
  status: "Status",
  book: "Book",
  bookCaption: "Five best bids and asks",
  side: "Side",
  price: "Price",
  size: "Size",
  askLevel: "Ask {n}",
  bidLevel: "Bid {n}",
  noBook: "no book",

  chart: "Price today",
  chartWait: "Waiting for the first price",
  chartSince: "As seen by this page since {time}",
  chartSummary: "Price of {code} since {since}: {last} now, {high} at most, {low} at least, {change} since yesterday's close. Arrow keys go through time.",
  chartPoint: "{time}: {price}, volume {volume}",
  chartPrevClose: "prev {price}",

  connection_lost: "Connection lost",
  forbidden: "The server refuses this page",
  going_away: "The server is going away",
  kicked: "Closed by the server",
  overloaded: "The server is busy",
  rate_limited: "Too many requests",
  replaced: "A newer connection took over",
  restart: "The server is restarting",
  silent: "The server stopped answering",
  unreachable: "The server cannot be reached",
};

const CHINESE = {
  title: "quotepush：实时行情",
  settings: "设置",
  language: "语言",

  connecting: "正在连接",
  connectingNow: "正在连接…",
  live: "实时",
  connected: "已连接",
  feedStale: "已连接，但行情源没有更新",
  feedDown: "已连接，但行情源已中断",
  nextAttempt: "{seconds} 秒后重试",
  retry: "立即重试",
  connect: "连接",
  slow: "网络较慢：只显示最新价格",
  slowRows: "已合并 {count} 条",
  feedAge: "行情延迟",
  latency: "网络延迟",
  updates: "更新",
  perSecond: "{count}/秒",

  add: "添加",
  addLabel: "添加代码到列表",
  addPlaceholder: "输入代码或名称：600519、茅台",
  found: "找到的代码",
  foundCount: "找到 {count} 个",
  foundNone: "没有以此开头或名称包含它的代码",
  onList: "已在列表中",
  isOnList: "{code} 已在列表中。",
  isTwin: "{as} 就是 {code}，已在列表中。",
  added: "已添加 {code}。",
  addedAs: "已添加 {as}，即 {code}。",
  removed: "已移除 {code}。",
  undo: "撤销",
  full: "一个列表最多 {most} 个代码。",
  moved: "{code} 现在是第 {place} 个，共 {count} 个。",

  colours: "上涨的颜色",
  redUp: "红涨",
  greenUp: "绿涨",
  share: "复制链接",
  copied: "已复制",

  lists: "自选列表",
  unnamed: "自选",
  shared: "分享的列表",
  newList: "新建列表",
  renameList: "重命名列表",
  deleteList: "删除列表",
  listName: "列表名称",
  save: "保存",
  cancel: "取消",
  listDeleted: "已删除“{name}”。",
  keep: "保留",
  isShared: "这是别人分享的列表，你自己的列表没有变。",

  caption: "实时行情，最新数值",
  code: "代码",
  name: "名称",
  trend: "走势",
  last: "最新价",
  change: "涨跌额",
  pct: "涨跌幅",
  bid: "买价",
  ask: "卖价",
  volume: "成交量",
  time: "时间",
  shortVolume: "量",
  remove: "移除",
  removeCode: "移除 {code}",
  openCode: "{code} 的详情。按 Alt 和上下方向键可移动。",
  noQuote: "暂无行情",
  refused: "被拒绝：{message}",
  empty: "这个列表还没有代码。",
  defaults: "显示一些常见的代码",
  codes: "{count} 个代码",
  oneCode: "1 个代码",
  merged: "已合并 {count} 条",
  foot: "时间为本地时间。本页地址包含整个列表。",
  now: "刚刚",
  ago: "{age}前",
  second: "{n} 秒",
  belowSecond: "< 1 秒",
  minute: "{n} 分钟",
  hour: "{n} 小时",

  stale: "过时",
  halted: "停牌",
  limit_up: "涨停",
  limit_down: "跌停",
  trading: "交易中",
  pre: "盘前",
  auction: "集合竞价",
  regular: "连续竞价",
  break: "午间休市",
  post: "盘后",
  closed: "已收盘",

  movers: "涨跌幅榜",
  moversUp: "领涨",
  moversDown: "领跌",
  moversNone: "暂无行情",

  messages: "消息",
  messageFrom_user: "发给你",
  messageFrom_group: "发给你的群组",
  messageFrom_all: "发给所有人",
  messageFrom_conn: "发给本页面",
  messageSender: "来自 {name}",
  messageBytes: "{count} 字节的二进制数据",
  messageOpen: "查看详情",
  dismiss: "关闭",
  dismissAll: "全部关闭（{count}）",

  detail: "{code} 的详情",
  close: "关闭",
  addThis: "加入此列表",
  open: "今开",
  high: "最高",
  low: "最低",
  prevClose: "昨收",
  amount: "成交额",
  limitUp: "涨停价",
  limitDown: "跌停价",
  spread: "价差",
  phase: "阶段",
  status: "状态",
  book: "五档盘口",
  bookCaption: "买卖五档",
  side: "档位",
  price: "价格",
  size: "数量",
  askLevel: "卖{n}",
  bidLevel: "买{n}",
  noBook: "无盘口",

  chart: "分时",
  chartWait: "等待第一个价格",
  chartSince: "本页自 {time} 起所见",
  chartSummary: "{code} 自 {since} 起的价格：现价 {last}，最高 {high}，最低 {low}，较昨收 {change}。方向键可逐点查看。",
  chartPoint: "{time}：{price}，成交量 {volume}",
  chartPrevClose: "昨收 {price}",

  connection_lost: "连接已断开",
  forbidden: "服务器拒绝了本页",
  going_away: "服务器即将离开",
  kicked: "被服务器关闭",
  overloaded: "服务器繁忙",
  rate_limited: "请求过多",
  replaced: "已被新的连接取代",
  restart: "服务器正在重启",
  silent: "服务器没有响应",
  unreachable: "无法连接服务器",

  // What the server refuses; in English it says so itself.
  bad_code: "不是有效的代码",
  unknown_code: "没有这个代码",
  code_limit: "代码数量已达上限",
  not_entitled: "没有查看它的权限",
  not_authenticated: "需要先登录",
  auth_failed: "登录信息无效或已过期",
  auth_timeout: "登录超时",
  no_token: "无法取得登录信息",
  too_large: "请求过大",
  bad_request: "请求有误",
  internal: "服务器内部错误",
};

const WORDS = { en: ENGLISH, zh: CHINESE };
const LOCALES = { en: "en", zh: "zh-CN" };

let language = firstLanguage();

/** The language as a tag for `Intl` and for `lang`. */
export function locale() {
  return LOCALES[language];
}

export function currentLanguage() {
  return language;
}

/** Return the words for `key`, with `{facts}` put in. */
export function t(key, facts = {}) {
  const words = WORDS[language][key] ?? ENGLISH[key] ?? key;
  return words.replace(/\{(\w+)\}/g, (_, name) => facts[name]);
}

export function has(key) {
  return key in ENGLISH;
}

/** Return what a server said, in the language of the page where that has words for it. */
export function said(word, message) {
  const own = WORDS[language][word];
  if (language === "en") return message ?? own ?? spelledOut(word);
  return own ?? message ?? spelledOut(word);
}

/** Take `wanted` as the language from now on; the browser remembers it. */
export function speak(wanted) {
  language = wanted in WORDS ? wanted : "en";
  try {
    localStorage.setItem(LANGUAGE_KEY, language);
  } catch {
    // Storage is blocked: the next visit speaks the browser's language again.
  }
}

/** Write the words that `scope` and everything in it ask for. */
export function translate(scope) {
  const elements = [...scope.querySelectorAll("[data-t], [data-t-to]")];
  if (scope instanceof Element) elements.push(scope);
  for (const element of elements) {
    const { t: word, tTo: attributes } = element.dataset;
    if (word) element.textContent = t(word);
    for (const pair of attributes?.split(" ") ?? []) {
      const [attribute, key] = pair.split("=");
      element.setAttribute(attribute, t(key));
    }
  }
}

function firstLanguage() {
  let wanted = null;
  try {
    wanted = localStorage.getItem(LANGUAGE_KEY);
  } catch {
    // Storage is blocked.
  }
  if (wanted in WORDS) return wanted;
  return navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en";
}

function spelledOut(word) {
  return word.charAt(0).toUpperCase() + word.slice(1).replaceAll("_", " ");
}
