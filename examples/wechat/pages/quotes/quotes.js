/** A page that shows the quotes of a few codes. */
import { connect } from "../../quotepush.js";
import { WechatSocket } from "../../socket.js";

const SERVER = "wss://quotes.example/ws"; // has to be listed as a socket domain of the mini-program
const CODES = ["600519.SH", "00700.HK", "AAPL"];

Page({
  data: { state: "connecting", rows: {} },

  onLoad({ url = SERVER, codes = CODES } = {}) {
    const quotes = (this.quotes = connect(url, { WebSocket: WechatSocket }));
    quotes.on("state", ({ state }) => this.setData({ state }));
    quotes.subscribe(codes, { fields: ["name", "last", "change_pct"], max_rate: 2 }, (row) => {
      this.setData({ [`rows.${row.code.replace(".", "_")}`]: row });
    });
    wx.onNetworkStatusChange(this.onNetwork = ({ isConnected }) => isConnected && quotes.wake());
  },

  onShow() {
    this.quotes.setVisible(true);
  },

  onHide() {
    this.quotes.setVisible(false);
  },

  onUnload() {
    wx.offNetworkStatusChange(this.onNetwork);
    this.quotes.close();
  },
});
